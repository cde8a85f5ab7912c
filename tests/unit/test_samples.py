import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from cache_store.contract import FieldSpec
from diffsynth_pipe.config import RunConfig
from diffsynth_pipe.contracts import EncodeUnit
from diffsynth_pipe.data.samples import list_samples, needed_columns
from diffsynth_pipe.errors import ConfigError, DataError

DEMO = Path(__file__).parents[2] / "deploy" / "demo"


def unit(name, inputs, *outputs):
    fields = tuple(FieldSpec(name=output, dtype="float32", dims=("x",)) for output in outputs)
    return EncodeUnit(name=name, inputs=inputs, outputs=fields, component=None, encode=dict)


FAMILY = SimpleNamespace(
    units=(
        unit("text", ("prompt",), "emb"),
        unit("latents", ("image",), "latents"),
        unit("mix", ("latents",), "mixed"),
    ),
    size_multiple=16,
)
COLOURS = {"red.png": "#f00", "green.png": "#0f0", "blue.png": "#00f"}


@pytest.fixture
def folder(tmp_path):
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 48), colour).save(tmp_path / name)
    return tmp_path


def config(folder, rows, **parameters):
    (folder / "metadata.json").write_text(
        json.dumps([dict(zip(("image", "prompt"), row, strict=True)) for row in rows])
    )
    return RunConfig(dataset_base_path=str(folder), dataset_metadata_path=str(folder / "metadata.json"), **parameters)


def listed(folder, rows, **parameters):
    return list_samples(config(folder, rows, **parameters), FAMILY.units, FAMILY.size_multiple)


def ids(folder, rows, **parameters):
    return [sample.sample_id for sample in listed(folder, rows, **parameters)]


def test_columns_are_inputs_that_no_earlier_unit_yields():
    assert needed_columns(FAMILY.units) == ["prompt", "image"]
    late = (unit("a", ("x",), "y"), unit("b", ("z", "y"), "z"), unit("c", ("z", "x"), "w"))
    assert needed_columns(late) == ["x", "z"]


def test_a_row_becomes_a_sample(folder):
    first, second = listed(folder, [("red.png", "a red field"), ("blue.png", "")])
    assert first.source == "metadata.json row 1 (red.png)"
    assert first.bucket == "48x64"
    assert first.inputs["prompt"].load() == "a red field"
    assert first.inputs["image"].load().tobytes() == bytes([255, 0, 0]) * (64 * 48)
    assert second.source == "metadata.json row 2 (blue.png)"
    assert second.inputs["prompt"].load() == ""
    assert len(first.sample_id) == 32
    assert set(first.inputs) == {"image", "prompt"}


def test_sizes_come_from_the_config(folder):
    rows = [("red.png", "x")]
    assert listed(folder, rows, max_pixels=1024)[0].bucket == "16x32"  # scale 1.732: 27.7 x 36.9
    sample = listed(folder, rows, height=32, width=96)[0]
    assert (sample.bucket, sample.inputs["image"].load().size) == ("32x96", (96, 32))


def test_an_id_tells_content_and_not_name_order_or_size(folder):
    rows = [("red.png", "x"), ("green.png", "x"), ("red.png", "y")]
    original = ids(folder, rows)
    assert len(set(original)) == 3
    assert ids(folder, rows[::-1]) == original[::-1]
    assert ids(folder, rows, height=32, width=32) == original
    shutil.move(folder / "red.png", folder / "renamed.png")
    assert ids(folder, [(name.replace("red", "renamed"), text) for name, text in rows]) == original
    Image.new("RGB", (64, 48), "#100").save(folder / "renamed.png")
    changed = ids(folder, [("renamed.png", "x"), *rows[1:2], ("renamed.png", "y")])
    assert changed[1] == original[1]
    assert not {changed[0], changed[2]} & set(original)


def test_identical_rows_have_ids_of_their_own(folder):
    shutil.copy(folder / "red.png", folder / "copy.png")
    repeated = ids(folder, [("red.png", "x"), ("copy.png", "x"), ("green.png", "x"), ("red.png", "x")])
    assert len(set(repeated)) == 4
    assert repeated[0] == ids(folder, [("red.png", "x")])[0]


def test_a_unit_sees_equal_content_as_equal(folder):
    shutil.copy(folder / "red.png", folder / "copy.png")
    samples = listed(folder, [("red.png", "x"), ("copy.png", "x"), ("green.png", "x")])
    assert len({sample.inputs["image"].digest for sample in samples}) == 2
    assert len({sample.inputs["prompt"].digest for sample in samples}) == 1


def test_exif_decides_the_bucket(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(folder / "turned.jpg", exif=exif)
    assert listed(folder, [("turned.jpg", "x")])[0].bucket == "64x48"
    assert listed(folder, [("turned.jpg", "x")], apply_exif_orientation=False)[0].bucket == "48x64"


def test_threads_and_chunks_change_nothing(folder, monkeypatch):
    rows = [(name, text) for text in "abc" for name in COLOURS]
    monkeypatch.setattr("diffsynth_pipe.data.samples.FILES_PER_CHUNK", 2)
    chunked = listed(folder, rows, dataset_num_workers=3)
    monkeypatch.undo()
    assert chunked == listed(folder, rows)


def test_two_file_columns_share_a_bucket_only_if_both_sizes_agree(folder):
    Image.new("RGB", (32, 32)).save(folder / "small.png")
    family = SimpleNamespace(units=(*FAMILY.units, unit("edit", ("edit_image",), "edit")), size_multiple=16)
    settings = config(folder, [], data_file_keys="image, edit_image")
    rows = [{"image": "red.png", "prompt": "x", "edit_image": name} for name in ("green.png", "small.png")]
    (folder / "metadata.json").write_text(json.dumps(rows))
    assert [s.bucket for s in list_samples(settings, family.units, family.size_multiple)] == [
        "48x64+48x64",
        "48x64+32x32",
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("red.png", "x"), ("no.png", "x"), ("no2.png", "x"), ("no.png", "y")],
            r"row 2 \(no.png\): .*No such file .*\(2 more rows like this\)$",
        ),
        ([("red.png", "x"), ("text.png", "x")], r"row 2 \(text.png\): .*is not an image that can be decoded"),
        ([("thin.png", "x")], r"row 1 \(thin.png\): 900x9 px leave a side below 16 px"),
        ([("", "x"), (" ", "x")], r"row 1: 'image' is empty, expected a file name \(1 more rows like this\)$"),
        ([(["red.png"], "x")], r"'image' is \['red.png'\], expected a file name"),
        ([("red.png", None)], r"row 1 \(red.png\): 'prompt' is None, expected a text"),
        ([("red.png", "half a \ud83d pair")], r"row 1 \(red.png\): 'prompt' is .* not valid Unicode"),
    ],
)
def test_all_rows_are_checked_and_the_first_bad_one_is_named(folder, rows, message):
    (folder / "text.png").write_text("text")
    Image.new("RGB", (900, 9)).save(folder / "thin.png")
    with pytest.raises(DataError, match=message) as caught:
        listed(folder, rows)
    assert "\n" not in str(caught.value)


def test_missing_columns(folder):
    settings = config(folder, [])
    (folder / "metadata.json").write_text('[{"image": "red.png", "text": "x"}]')
    with pytest.raises(DataError, match=r"metadata.json: no column 'prompt', found image, text; add it"):
        list_samples(settings, FAMILY.units, FAMILY.size_multiple)
    (folder / "metadata.json").write_text('[{"image": "red.png", "prompt": "x"}, {"image": "red.png"}]')
    with pytest.raises(DataError, match=r"metadata.json row 2 \(red.png\): no 'prompt', found image; add it"):
        list_samples(settings, FAMILY.units, FAMILY.size_multiple)


def test_settings_that_lead_nowhere(folder):
    with pytest.raises(ConfigError, match="dataset_metadata_path: not set"):
        list_samples(RunConfig(dataset_base_path=str(folder)), FAMILY.units, FAMILY.size_multiple)
    with pytest.raises(ConfigError, match="data_file_keys: 'photo' names none of the columns prompt, image"):
        listed(folder, [("red.png", "x")], data_file_keys="photo")
    with pytest.raises(ConfigError, match="width: 100 is not a multiple of 16"):
        listed(folder, [("red.png", "x")], height=32, width=100)


def test_the_demo_dataset_can_be_used():
    demo = RunConfig(dataset_base_path=str(DEMO), dataset_metadata_path=str(DEMO / "metadata.csv"))
    samples = list_samples(demo, FAMILY.units, FAMILY.size_multiple)
    assert len(samples) == len(list((DEMO / "images").iterdir())) == 18
    assert len({sample.inputs["prompt"].digest for sample in samples}) == 17
    assert len({sample.bucket for sample in samples}) >= 4
    for sample in samples:
        height, width = map(int, sample.bucket.split("x"))
        assert sample.inputs["image"].load().size == (width, height)
        assert Path(sample.inputs["image"].path).name in (DEMO / "LICENSES.md").read_text()


# lists of images

EDITS = (
    replace(unit("edit", ("edit_image",), "edit"), media={"edit_image": "images"}),
    unit("latents", ("image",), "latents"),
)


def edits(folder, cells, suffix=".json", **parameters):
    path = folder / f"metadata{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps([{"image": "red.png", "edit_image": cell} for cell in cells]))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("image", "edit_image"), *(("red.png", json.dumps(cell)) for cell in cells)])
    settings = {"extra_inputs": "edit_image", "data_file_keys": "image,edit_image", "max_pixels": 4096, **parameters}
    config = RunConfig(dataset_base_path=str(folder), dataset_metadata_path=str(path), **settings)
    return list_samples(config, EDITS, 16)


def test_a_cell_may_hold_several_images_whose_sizes_make_up_the_bucket(folder):
    Image.new("RGB", (32, 32), "#ff0").save(folder / "small.png")
    both, one, alone = edits(folder, [["green.png", "small.png"], ["green.png"], "green.png"])
    assert (both.bucket, one.bucket, alone.bucket) == ("48x64+32x32+48x64", "48x64+48x64", "48x64+48x64")
    assert [image.size for image in both.inputs["edit_image"].load()] == [(64, 48), (32, 32)]
    assert isinstance(one.inputs["edit_image"].load(), list)
    assert alone.inputs["edit_image"].load().size == (64, 48)
    assert both.source == "metadata.json row 1 (green.png, small.png, red.png)"
    assert len({sample.sample_id for sample in (both, one, alone)}) == 3
    assert one.inputs["edit_image"].digest != alone.inputs["edit_image"].digest


def test_a_csv_holds_lists_as_json(folder):
    cells = [["green.png", "blue.png"], ["blue.png"]]
    assert [sample.sample_id for sample in edits(folder, cells, ".csv")] == [
        sample.sample_id for sample in edits(folder, cells)
    ]


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ([], r"'edit_image' is \[\], expected a list of file names"),
        (["green.png", 3], r"'edit_image' is \['green.png', 3\], expected a list of file names"),
        (["green.png", "gone.png"], r"gone\.png: cannot be read"),
    ],
)
def test_a_list_that_names_no_images_is_refused(folder, cell, problem):
    with pytest.raises(DataError, match=rf"^metadata\.json row 2 \(.*\): .*{problem}"):
        edits(folder, ["green.png", cell])


def test_a_column_of_images_must_be_a_file_column(folder):
    with pytest.raises(ConfigError, match=r"^data_file_keys: 'image,video' must also name edit_image"):
        edits(folder, ["green.png"], data_file_keys="image,video")
