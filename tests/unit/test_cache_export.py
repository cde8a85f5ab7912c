"""Exports: the same records and samples in a new cache of any format, also after a kill, and nothing spoiled."""

import itertools
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
import zarr

from cache_store.backends import backend_names
from cache_store.contract import CacheCorrupt, CacheError, CacheNotFound, FieldSpec
from cache_store.export import export
from cache_store.manifest import read_recipe
from cache_store.reader import BatchReader
from cache_store.store import Cache, SealedSample
from cache_store.verify import verify
from diffsynth_pipe.cli import main

LATENTS = FieldSpec(name="latents", dtype="bfloat16", dims=("channel", "height", "width"))
TEXT = FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel"), ragged=True)
SPECS = {"latents": LATENTS, "text": TEXT}
RECIPES = [{"unit": unit, "version": 1} for unit in SPECS]
NUM_SAMPLES = 8


def key_of(number):
    return f"{number:032x}"


def value_of(unit, number):
    rng = np.random.default_rng([number, len(unit)])
    shape = (2, 4, 4 + 4 * (number % 2)) if unit == "latents" else (1 + number, 64)
    return rng.integers(1, 0x7F80, shape, np.uint16)


def text_number(number):
    """The first two samples share a caption."""
    return max(number, 1)


def samples_of(numbers):
    return [
        SealedSample(
            key_of(100 + n),
            str(n % 2),
            f"metadata.csv row {n}",
            {"latents": key_of(n), "text": key_of(text_number(n))},
        )
        for n in numbers
    ]


def build(root, backend="zarr", numbers=range(NUM_SAMPLES), commit_every=3):
    """Write and seal a cache; its order is not that of writing, and a record is in no snapshot."""
    cache = Cache.open_or_new(root, backend)
    with cache.writer() as writer:
        for number in (99, *numbers):
            for unit, spec in SPECS.items():
                writer.add(unit, key_of(number), {spec.name: value_of(unit, number)}, [spec])
            if number % commit_every == 0:
                writer.commit()
    units = {recipe["unit"]: cache.put_recipe(recipe) for recipe in RECIPES}
    cache.seal(samples_of(reversed(numbers)), {"family": "tiny", "units": units})
    return cache


def num_records(numbers):
    return len(numbers) + len({text_number(n) for n in numbers})


def assert_same_samples(snapshot, source):
    assert snapshot.digest == source.digest
    assert list(snapshot.samples()) == list(source.samples())
    for name in ("family", "units"):
        assert snapshot.header[name] == source.header[name]
    for recipe, name in zip(RECIPES, snapshot.header["units"].values(), strict=True):
        assert read_recipe(snapshot.root, name) == recipe
    with BatchReader(snapshot, [spec.name for spec in SPECS.values()]) as reader:
        for position in range(len(snapshot)):
            batch = reader.read([position])
            number = int(batch.sample_ids[0], 16) - 100
            np.testing.assert_array_equal(batch.fields["latents"][0], value_of("latents", number))
            np.testing.assert_array_equal(batch.fields["prompt_emb"][0], value_of("text", text_number(number)))


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def cache(tmp_path):
    return build(tmp_path / "cache")


def test_a_round_trip_keeps_every_bit_and_other_libraries_read_it(cache, tmp_path):
    before = contents(cache.root)
    tars = export(cache.root, tmp_path / "tars", "webdataset").snapshot
    arrays = export(tars.root, tmp_path / "arrays", "zarr").snapshot
    assert contents(cache.root) == before
    for snapshot in (tars, arrays):
        assert_same_samples(snapshot, cache.latest())
        assert verify(snapshot.root, full=True) == []
    expected = {("latents", n): value_of("latents", n) for n in range(NUM_SAMPLES)}
    expected |= {("text", n): value_of("text", n) for n in range(1, NUM_SAMPLES)}

    found = {}
    for path in (tars.root / "segments").rglob("*.tar"):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode():
            unit = sample["json"]["unit"]
            tensor = safetensors.torch.load(sample["safetensors"])[SPECS[unit].name]
            found[unit, int(sample["__key__"], 16)] = tensor.view(torch.uint16).numpy()
    assert found.keys() == expected.keys()
    for record, item in expected.items():
        np.testing.assert_array_equal(found[record], item)

    found_items = Counter()
    for folder in (arrays.root / "segments").iterdir():
        for path, node in zarr.open_group(folder, mode="r").members(max_depth=None):
            if isinstance(node, zarr.Array):
                rows = node[:]
                assert node.attrs["torch_dtype"] == "bfloat16"
                # a ragged item's last chunk is filled with zeros, which no row of ours is
                found_items.update((path.partition("/")[0], row.tobytes()) for row in rows if row.any())
    expected_items = Counter()
    for (unit, _), item in expected.items():
        rows = item if SPECS[unit].ragged else [item]
        expected_items.update((SPECS[unit].name, row.tobytes()) for row in rows)
    assert found_items == expected_items


@pytest.mark.parametrize(("backend", "other"), list(itertools.product(backend_names(), repeat=2)))
def test_a_complete_export_says_so_and_is_left_alone(backend, other, tmp_path, capsys):
    cache = build(tmp_path / "cache", backend)
    command = ["cache", "export", str(cache.root), str(tmp_path / "target"), "--backend", other]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'target'}: 8 samples, 15 of 15 records copied\n"
    assert "export: 100%|" in printed.err
    assert Cache.open(tmp_path / "target").backend == other
    before = contents(tmp_path / "target")
    assert main(command) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'target'}: complete already, 8 samples, 15 records\n", "")
    assert contents(tmp_path / "target") == before


def start_export(source, target, backend):
    program = (
        "import sys; from pathlib import Path; from cache_store.export import export;"
        "export(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], segment_bytes=1)"
    )
    command = [sys.executable, "-c", program, str(source), str(target), backend]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def num_committed(root):
    try:
        return sum(map(len, Cache.open(root).committed_keys().values()))
    except CacheNotFound:
        return 0


@pytest.mark.parametrize("backend", backend_names())
def test_a_killed_export_goes_on_where_it_was(backend, tmp_path):
    numbers = range(200)
    cache, target = build(tmp_path / "cache", numbers=numbers, commit_every=100), tmp_path / "target"
    exporter = start_export(cache.root, target, backend)
    while exporter.poll() is None and num_committed(target) == 0:
        pass
    exporter.send_signal(signal.SIGKILL)
    assert exporter.wait() == -signal.SIGKILL
    there = num_committed(target)
    assert 0 < there < num_records(numbers)
    assert Cache.open(target).latest() is None

    done = export(cache.root, target, backend)
    assert (done.was_complete, done.num_copied) == (False, num_records(numbers) - there)
    assert_same_samples(done.snapshot, cache.latest())


def test_a_damaged_record_is_named_and_what_came_before_it_is_kept(cache, tmp_path):
    snapshot = cache.latest()
    array, _, _, _ = snapshot.placements("prompt_emb", np.array([0]))[0]
    path = snapshot.array_path(array)
    data = path.read_bytes()
    item = data.index(value_of("text", NUM_SAMPLES - 1).tobytes()[:512])
    path.write_bytes(data[:item] + bytes([data[item] ^ 1]) + data[item + 1 :])
    with pytest.raises(CacheCorrupt) as caught:
        export(cache.root, tmp_path / "target", "webdataset")
    assert str(caught.value) == (
        f"{path}: prompt_emb of text record {key_of(NUM_SAMPLES - 1)} is damaged;"
        f" run `diffsynth-pipe cache repair {cache.root}`"
    )
    there = num_committed(tmp_path / "target")
    assert there > 0
    assert Cache.open(tmp_path / "target").latest() is None

    path.write_bytes(data)
    done = export(cache.root, tmp_path / "target", "webdataset")
    assert done.num_copied == num_records(range(NUM_SAMPLES)) - there
    assert_same_samples(done.snapshot, snapshot)


def test_a_damaged_recipe_is_named_before_anything_is_written(cache, tmp_path):
    path = next((cache.root / "recipes").iterdir())
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CacheCorrupt, match=rf"{path.name} is missing or damaged; run `diffsynth-pipe cache repair"):
        export(cache.root, tmp_path / "target", "zarr")
    assert not (tmp_path / "target").exists()


def test_what_a_complete_target_lost_is_copied_again(cache, tmp_path):
    first = export(cache.root, tmp_path / "target", "webdataset").snapshot
    lost = first.array_path(0)
    num_lost = np.count_nonzero(first.placements("latents", np.arange(NUM_SAMPLES))[:, 0] == 0)
    lost.unlink()
    first.path.write_bytes(b"no snapshot")
    done = export(cache.root, tmp_path / "target", "webdataset")
    assert 0 < num_lost < NUM_SAMPLES
    assert done.num_copied == num_lost
    assert_same_samples(done.snapshot, cache.latest())


def the_source(cache, target):
    target.symlink_to(cache.root)


def a_file(cache, target):
    target.write_text("mine")


def a_folder(cache, target):
    target.mkdir()
    (target / "notes.txt").write_text("mine")


def another_backend(cache, target):
    build(target, "zarr")


def other_samples(cache, target):
    build(target, "webdataset", range(NUM_SAMPLES - 1))


def other_records(cache, target):
    build(target, "webdataset")
    shutil.rmtree(target / "snapshots")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (the_source, "is or lies in the cache that is exported"),
        (a_file, "is a file, not a cache"),
        (a_folder, "holds 'notes.txt'"),
        (another_backend, "is a cache with backend 'zarr', not 'webdataset'"),
        (other_samples, "is a cache of other samples"),
        (other_records, "holds records that"),
    ],
)
def test_a_target_that_holds_something_else_is_refused_and_left_alone(make, words, cache, tmp_path, capsys):
    target = tmp_path / "target"
    make(cache, target)
    before = contents(tmp_path)
    assert main(["cache", "export", str(cache.root), str(target), "--backend", "webdataset"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("error: ")
    assert str(target) in printed.err
    assert words in printed.err
    assert contents(tmp_path) == before


def test_a_target_inside_of_the_source_is_refused(cache):
    with pytest.raises(CacheError, match="lies in the cache"):
        export(cache.root, cache.root / "tmp" / "export", "webdataset")
    assert list((cache.root / "tmp").iterdir()) == []


def test_a_cache_that_is_not_sealed_is_refused(tmp_path):
    cache = build(tmp_path / "cache")
    shutil.rmtree(cache.root / "snapshots")
    with pytest.raises(CacheNotFound, match="has no snapshot to export; run data-process"):
        export(cache.root, tmp_path / "target", "zarr")
