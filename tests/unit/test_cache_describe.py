"""What ``cache info`` says of channels and notes."""

import numpy as np
import pytest
import zarr

from cache_store.channels import read_channels
from cache_store.contract import FieldSpec
from cache_store.describe import describe
from cache_store.export import export
from cache_store.journal import read_notes
from cache_store.maintain import collect_garbage, compact, repair
from cache_store.store import Cache, SealedSample

LATENTS = FieldSpec(name="latents", dtype="bfloat16", dims=("channel", "frame", "height", "width"))
TEXT = FieldSpec(name="prompt_emb", dtype="float32", dims=("token", "channel"), ragged=True)
NUM_CHANNELS = 4


def key_of(number):
    return f"{number:032x}"


def latents_of(number, scale=1.0, shift=0.0):
    """Return normal numbers, scaled and shifted by channel, as bfloat16."""
    rng = np.random.default_rng(number)
    values = rng.standard_normal((NUM_CHANNELS, 1, 8, 8 + 8 * (number % 2)), np.float32)
    scale, shift = (np.broadcast_to(value, NUM_CHANNELS).reshape(-1, 1, 1, 1) for value in (scale, shift))
    return ((values * scale + shift).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write(cache, latents):
    """Write latents in segments of three, and seal all."""
    with cache.writer() as writer:
        for number, item in enumerate(latents):
            writer.add("latents", key_of(number), {"latents": item}, [LATENTS])
            if number % 3 == 2:
                writer.commit()
    return seal(cache, range(len(latents)))


def seal(cache, numbers):
    return cache.seal([SealedSample(key_of(n), "b", f"row {n}", {"latents": key_of(n)}) for n in numbers], {})


def lines_about(root, start):
    return [line.removeprefix(start) for line in describe(root) if line.startswith(start)]


def moments_by_zarr(root):
    """Return the mean and the deviation of each channel over all latents, as zarr-python and numpy see them."""
    items = []
    for folder in (root / "segments").iterdir():
        for _, array in zarr.open_group(folder, mode="r")["latents"].members():
            floats = (array[:].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
            items += [item.reshape(len(item), -1) for item in floats]
    values = np.concatenate(items, axis=1)
    return values.mean(axis=1), values.std(axis=1)


@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_channel_statistics_are_those_of_all_values(shift, tmp_path):
    scale = np.array([0.1, 1, 3, 20])
    latents = [latents_of(number, scale * (1 + number), shift) for number in range(8)]
    snapshot = write(Cache.open_or_new(tmp_path / "cache"), latents)
    assert len(snapshot.segments) == 3
    found = read_channels(snapshot.root, snapshot.segments)["latents", NUM_CHANNELS]
    mean, std = moments_by_zarr(snapshot.root)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.std, std, rtol=1e-5)
    assert found.count == sum(item[0].size for item in latents)
    assert lines_about(snapshot.root, "latents channel means: ") == [" ".join(f"{value:.3g}" for value in found.mean)]
    assert lines_about(snapshot.root, "latents channel stds: ") == [" ".join(f"{value:.3g}" for value in found.std)]
    assert not any("approximate" in line for line in describe(snapshot.root))


@pytest.mark.parametrize(
    ("scale", "shift", "verdict"),
    [
        (1, 0, ": all 4 are near mean 0 and std 1"),
        ([0.6, 1.8, 1, 1], [0, 0, -0.9, 0.9], ": all 4 are near mean 0 and std 1"),
        ([1, 2.2, 1, 0.4], 0, " 1, 3 of 4 are far from mean 0 and std 1: |mean| above 1, or std outside 0.5 to 2"),
        (1, [1.2, 0, 0, -1.2], " 0, 3 of 4 are far from mean 0 and std 1: |mean| above 1, or std outside 0.5 to 2"),
    ],
)
def test_channels_that_no_normalised_latent_has_are_named(scale, shift, verdict, tmp_path):
    write(Cache.open_or_new(tmp_path / "cache"), [latents_of(number, scale, shift) for number in range(40)])
    (found,) = lines_about(tmp_path / "cache", "latents channels")
    assert found.partition(";")[0] == verdict


def test_segments_that_hold_more_than_the_snapshot_are_told(tmp_path):
    cache = Cache.open_or_new(tmp_path / "cache")
    write(cache, [latents_of(number) for number in range(6)])
    seal(cache, [0, 3])
    # one segment holds records 0 to 2, the other 3 to 5: of 64 values each, twice as many if the number is odd
    assert lines_about(cache.root, "latents channels: approximate, ") == [
        "the segments hold 576 values each, the snapshot 192"
    ]
    seal(cache, range(3))
    assert lines_about(cache.root, "latents channels: approximate, ") == []


def test_items_of_one_field_may_differ_in_channels(tmp_path):
    write(Cache.open_or_new(tmp_path / "cache"), [latents_of(0), latents_of(1)[:2], latents_of(2)[:2]])
    assert [len(line.split()) for line in lines_about(tmp_path / "cache", "latents channel means: ")] == [4, 2]


# notes


def write_text(cache, notes):
    """Write one text per note, none if it is empty, and seal a sample of each; the last sample shares its text."""
    with cache.writer() as writer:
        for number, note in enumerate(notes):
            item = np.full((1 + number, 3), number, np.float32)
            writer.add("text", key_of(number), {"prompt_emb": item}, [TEXT], note=note)
            writer.commit()
    numbers = [*range(len(notes)), len(notes) - 1]
    samples = [
        SealedSample(key_of(100 + place), "b", f"row {place}", {"text": key_of(number)})
        for place, number in enumerate(numbers)
    ]
    return cache.seal(samples, {})


def test_notes_name_their_samples_and_cost_other_records_nothing(tmp_path):
    write_text(Cache.open_or_new(tmp_path / "none"), ["", "", ""])
    assert b"note" not in b"".join(path.read_bytes() for path in (tmp_path / "none").rglob("*.jsonl"))
    assert not any("notes" in line for line in describe(tmp_path / "none"))
    write_text(Cache.open_or_new(tmp_path / "some"), ["", "cut by 7", "", "cut by 9"])
    assert describe(tmp_path / "some")[-4:] == [
        "notes       3",
        f"  {key_of(101)}  row 1  text: cut by 7",
        f"  {key_of(103)}  row 3  text: cut by 9",
        f"  {key_of(104)}  row 4  text: cut by 9",
    ]


def test_ten_notes_are_listed_and_the_others_counted(tmp_path):
    write_text(Cache.open_or_new(tmp_path / "cache"), [f"cut by {number}" for number in range(12)])
    lines = describe(tmp_path / "cache")[-12:]
    assert lines[0] == "notes       13"
    assert lines[10] == f"  {key_of(109)}  row 9  text: cut by 9"
    assert lines[11] == "  and 3 more"


def compact_and_collect(cache):
    compact(cache)
    collect_garbage(cache.root, keep=1, grace_s=0)
    return cache.root


def repair_and_collect(cache):
    snapshot = cache.latest()
    for number in range(len(snapshot.arrays)):
        path = snapshot.array_path(number)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    repair(cache.root)
    collect_garbage(cache.root, keep=1, grace_s=0)
    return cache.root


def export_beside(cache):
    return export(cache.root, cache.root.with_name("export"), "webdataset").snapshot.root


@pytest.mark.parametrize("change", [compact_and_collect, repair_and_collect, export_beside])
def test_notes_go_with_their_records(change, tmp_path):
    cache = Cache.open_or_new(tmp_path / "cache")
    notes = {("text", key_of(0)): "cut by 7", ("text", key_of(2)): "cut by 9"}
    old = write_text(cache, ["cut by 7", "", "cut by 9"])
    root = change(cache)
    journal = "".join(path.read_text() for path in (root / "journal").iterdir())
    assert not any(f'"segment":"{segment}"' in journal for segment in old.segments)
    assert read_notes(root) == notes
