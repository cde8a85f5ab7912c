"""Importing a cache of the reference: its values arrive, its pickles cannot run anything."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from cache_store.contract import RecordRefused
from cache_store.reader import BatchReader
from cache_store.store import Cache
from diffsynth_pipe.cli import main
from diffsynth_pipe.errors import DataError
from diffsynth_pipe.stages.import_diffsynth import import_diffsynth


def record(seed, prompt="a cat", num_tokens=5):
    """One record as the reference's data_process writes it for Qwen-Image."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 16, 4, 6, generator=generator).bfloat16()
    text = torch.Generator().manual_seed(len(prompt))
    positive = {
        "prompt": prompt,
        "prompt_emb": torch.randn(1, num_tokens, 64, generator=text).bfloat16(),
        "prompt_emb_mask": torch.ones(1, num_tokens, dtype=torch.int64),
    }
    shared = {
        "input_latents": torch.randn(1, 16, 4, 6, generator=generator).bfloat16(),
        "noise": noise,
        "latents": noise,
        "input_image": Image.new("RGB", (48, 32)),
        "height": 32,
        "width": 48,
        "cfg_scale": 1,
        "rand_device": torch.device("cuda:0"),
        "use_gradient_checkpointing": True,
    }
    negative = {name: value for name, value in positive.items() if name != "prompt"} | {"negative_prompt": ""}
    return shared, positive, negative


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "reference" / "0"
    folder.mkdir(parents=True)
    for number in range(3):
        torch.save(record(number, prompt="a cat" if number < 2 else "two dogs"), folder / f"{number}.pth")
    return folder.parent


def test_fields_arrive_and_equal_captions_are_stored_once(source, tmp_path):
    before = {path: path.read_bytes() for path in source.rglob("*.pth")}
    result = import_diffsynth(source, tmp_path / "cache", "qwen_image")
    assert result.summary == {"num_samples": 3, "num_records": 3 + 2}
    snapshot = Cache.open(tmp_path / "cache").latest()
    assert snapshot.header["family"] == "qwen_image"
    batch = BatchReader(snapshot, ["latents", "prompt_emb"]).read(range(3))
    for number in range(3):
        shared, positive, _ = record(number, prompt="a cat" if number < 2 else "two dogs")
        latents = shared["input_latents"][0].view(torch.uint16).numpy()
        np.testing.assert_array_equal(batch.fields["latents"][number, :, 0], latents)
        np.testing.assert_array_equal(batch.fields["prompt_emb"][number], positive["prompt_emb"][0].view(torch.uint16))
    assert {path: path.read_bytes() for path in source.rglob("*.pth")} == before
    assert import_diffsynth(source, tmp_path / "cache", "qwen_image").key == result.key


def test_speech_to_video_comes_with_poses_if_all_records_have_them(source, tmp_path):
    def speech(seed, *, has_poses):
        draw = torch.Generator().manual_seed(seed)
        first, others, poses = (torch.randn(1, 16, n, 4, 6, generator=draw).bfloat16() for n in (1, 2, 2))
        context = torch.nn.functional.pad(torch.randn(1, 3, 64, generator=draw), (0, 0, 0, 509)).bfloat16()
        shared = {
            "input_latents": torch.cat([first, others], dim=2),
            "first_frame_latents": first,
            "s2v_pose_latents": poses if has_poses else None,
        }
        audio = torch.randn(1, 3, 32, 8, generator=draw).bfloat16()
        expected = {"latents": others, "reference_latents": first, "pose_latents": poses, "audio_embeds": audio}
        return (shared, {"context": context, "audio_embeds": audio}, {}), expected

    for number in range(3):
        torch.save(speech(number, has_poses=True)[0], source / "0" / f"{number}.pth")
    import_diffsynth(source, tmp_path / "cache", "wan_s2v")
    snapshot = Cache.open(tmp_path / "cache").latest()
    assert set(snapshot.header["units"]) == {"text", "latents", "reference", "audio", "pose"}
    _, expected = speech(1, has_poses=True)
    found = BatchReader(snapshot, list(expected)).read([1])
    for name, value in expected.items():
        np.testing.assert_array_equal(found.fields[name], value.view(torch.uint16).numpy())
    torch.save(speech(1, has_poses=False)[0], source / "0" / "1.pth")
    with pytest.raises(DataError, match=r"1\.pth: has pose_latents where 0\.pth has not, or the other way round$"):
        import_diffsynth(source, tmp_path / "cache", "wan_s2v")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([1, 2], "not (inputs_shared"),
        (({}, {}, {}), "prompt_emb_mask"),
        (({"height": 32}, {"prompt_emb_mask": 3}, {}), "lacks"),
        (b"PK no zip", "is not a record"),
    ],
)
def test_another_file_is_refused(source, tmp_path, content, word):
    if isinstance(content, bytes):
        (source / "0" / "1.pth").write_bytes(content)
    else:
        torch.save(content, source / "0" / "1.pth")
    with pytest.raises(DataError, match=r"1\.pth") as error:
        import_diffsynth(source, tmp_path / "cache", "qwen_image")
    assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pickle_that_would_run_something_is_refused_unrun(source, tmp_path):
    shared, positive, negative = record(1)
    torch.save((shared | {"note": Evil(str(tmp_path / "owned"))}, positive, negative), source / "0" / "1.pth")
    with pytest.raises(DataError, match=r"1\.pth.*mkdir"):
        import_diffsynth(source, tmp_path / "cache", "qwen_image")
    assert not (tmp_path / "owned").exists()


def test_nan_is_refused_by_name(source, tmp_path):
    shared, positive, negative = record(1)
    shared["input_latents"][0, 0, 0, 0] = float("nan")
    torch.save((shared, positive, negative), source / "0" / "1.pth")
    with pytest.raises(RecordRefused, match=r"0/1\.pth"):
        import_diffsynth(source, tmp_path / "cache", "qwen_image")


def test_the_command_imports_and_refuses_in_one_line(source, tmp_path, capsys):
    assert main(["cache", "import-diffsynth", str(tmp_path / "cache"), str(source)]) == 0
    assert "num_samples: 3" in capsys.readouterr().out
    assert len(Cache.open(tmp_path / "cache").latest()) == 3
    (source / "0" / "1.pth").write_bytes(b"PK no zip")
    for arguments, word in (([], "1.pth"), (["--family", "nothing"], "'nothing' is not one of")):
        assert main(["cache", "import-diffsynth", str(tmp_path / "other"), str(source), *arguments]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert word in line
    assert not (tmp_path / "other").exists() or Cache.open(tmp_path / "other").latest() is None


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.pth file"):
        import_diffsynth(tmp_path, tmp_path / "cache", "qwen_image")
    assert not (tmp_path / "cache").exists()
