"""Damage of any kind is found, never read as data, and repaired; garbage goes, and nothing else."""

import contextlib
import json
import os
import random
import shutil

import numpy as np
import pytest

from cache_store.backends import backend_names, load_backend
from cache_store.contract import CacheCorrupt, CacheError, CacheNotFound, CacheSchemaError, FieldSpec
from cache_store.maintain import collect_garbage, compact, repair
from cache_store.manifest import SCHEMA, encode_manifest
from cache_store.reader import BatchReader
from cache_store.store import Cache, SealedSample
from cache_store.verify import verify

BACKENDS = backend_names()
LATENTS = FieldSpec(name="latents", dtype="bfloat16", dims=("channel", "height", "width"))
TEXT = FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel"), ragged=True)
SPECS = {"latents": LATENTS, "text": TEXT}
RECIPES = [{"unit": unit, "version": 1} for unit in SPECS]
NUM_SAMPLES = 8


def key_of(number):
    return f"{number:032x}"


def value_of(unit, number):
    """Return a record's value; of equal size for all numbers of one parity, so that files can be mistaken."""
    rng = np.random.default_rng([number, len(unit)])
    shape = (2, 4, 4 + 4 * (number % 2)) if unit == "latents" else (3 + number % 2, 64)
    return rng.integers(0, 0x7F80, shape, np.uint16)


def samples_of(numbers):
    return [
        SealedSample(key_of(100 + n), str(n % 2), f"metadata.csv row {n}", dict.fromkeys(SPECS, key_of(n)))
        for n in numbers
    ]


def add(writer, unit, number):
    return writer.add(unit, key_of(number), {SPECS[unit].name: value_of(unit, number)}, [SPECS[unit]])


def write_missing(cache, numbers):
    """Add the records that the cache lacks, as data-process does; return them."""
    committed = cache.committed_keys()
    missing = [(unit, n) for n in numbers for unit in SPECS if key_of(n) not in committed.get(unit, ())]
    with cache.writer() as writer:
        for unit, number in missing:
            add(writer, unit, number)
    return missing


def seal(cache, numbers):
    units = {recipe["unit"]: cache.put_recipe(recipe) for recipe in RECIPES}
    return cache.seal(samples_of(numbers), {"family": "tiny", "units": units})


def build(root, backend="zarr"):
    """Write a cache of two sessions with two segments each, and seal a part of it, then all."""
    cache = Cache.open_or_new(root, backend)
    for first in (0, NUM_SAMPLES // 2):
        with cache.writer() as writer:
            for number in range(first, first + NUM_SAMPLES // 2):
                for unit in SPECS:
                    add(writer, unit, number)
                if number % 2:
                    writer.commit()
        seal(cache, range(first + NUM_SAMPLES // 2))
    return cache


def assert_values(snapshot, numbers):
    assert len(snapshot) == len(numbers)
    with BatchReader(snapshot, [spec.name for spec in SPECS.values()]) as reader:
        for position, number in enumerate(numbers):
            batch = reader.read([position])
            assert batch.sample_ids == (key_of(100 + number),)
            for unit, spec in SPECS.items():
                np.testing.assert_array_equal(batch.fields[spec.name][0], value_of(unit, number))


def files_of(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@pytest.fixture
def cache(tmp_path):
    return build(tmp_path / "cache")


@pytest.fixture(scope="session")
def whole_caches(tmp_path_factory):
    """Caches to copy and damage."""
    folder = tmp_path_factory.mktemp("whole")
    for backend in BACKENDS:
        build(folder / backend, backend)
    return folder


# damage


def damage(root, name, kind, rng):
    """Damage a file of a cache; return what was done."""
    path = root / name
    data = path.read_bytes()
    if kind == "delete":
        path.unlink()
    elif kind == "zero length":
        path.write_bytes(b"")
    elif kind == "truncate":
        path.write_bytes(data[: rng.randrange(1, len(data))])
    elif kind == "flip":
        place = rng.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
    else:
        others = [other for other in files_of(root) if (root / other).read_bytes() != data]
        # mostly a file that can be mistaken for it
        alike = [other for other in others if (root / other).stat().st_size == len(data)]
        other = rng.choice(alike if alike and rng.random() < 0.7 else others)
        path.write_bytes((root / other).read_bytes())
        (root / other).write_bytes(data)
        return f"{kind} {name} and {other}"
    return f"{kind} {name}"


KINDS = ("delete", "zero length", "truncate", "flip", "swap")


def check_one_damage(whole, root, name, kind, rng):
    """Damage a copy of a cache; check that it is found, never read as data, and repaired."""
    shutil.copytree(whole, root)
    what = damage(root, name, kind, rng)

    try:
        found = verify(root, full=True)
    except CacheError as error:
        found = [str(error)]
    assert found, what
    assert all("\n" not in line for line in found)

    with contextlib.suppress(CacheError):  # or exactly the values that were written
        assert_values(Cache.open(root).latest(), range(NUM_SAMPLES))

    done = repair(root)
    cache = Cache.open(root)
    added = write_missing(cache, range(NUM_SAMPLES))
    lost = {(unit, key) for unit, keys in done.lost.items() for key in keys}
    if not ("journal/" in what and ".npz" in what):  # with both gone, nothing knows what was there
        assert {(unit, key_of(n)) for unit, n in added} == lost, what
    assert_values(seal(cache, range(NUM_SAMPLES)), range(NUM_SAMPLES))
    assert verify(root, full=True) == [], what
    again = repair(root)
    assert (again.lost, again.num_rescued, again.is_sealed) == ({}, 0, True)
    shutil.rmtree(root)
    return len(added)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_damage_is_found_never_read_and_repaired(backend, whole_caches, tmp_path):
    rng = random.Random(f"damage {backend}")
    whole = whole_caches / backend
    num_lost = []
    for number, name in enumerate(files_of(whole)):
        kinds = KINDS if number % 3 == 0 else rng.sample(KINDS, 2)
        num_lost += [check_one_damage(whole, tmp_path / "cache", name, kind, rng) for kind in kinds]
    assert len(num_lost) > 60
    assert max(num_lost) <= NUM_SAMPLES


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_cache_verifies(backend, whole_caches):
    assert verify(whole_caches / backend, full=True) == []
    assert verify(whole_caches / backend, full=False) == []


def test_verify_names_the_samples_and_fields_that_are_damaged(cache):
    snapshot = cache.latest()
    array, start, *_ = snapshot.placements("prompt_emb", np.array([3]))[0]
    path = snapshot.array_path(array)
    with path.open("r+b") as file:
        file.seek(load_backend("zarr").offset(snapshot.arrays[array].layout, start) + 5)
        file.write(b"\xaa")
    file = path.relative_to(cache.root).as_posix()
    assert verify(cache.root, full=False) == []
    assert verify(cache.root, full=True) == [
        f"{file} fails its checksum",
        f"prompt_emb of sample {key_of(103)} (metadata.csv row 3) is damaged in {file}",
    ]
    assert repair(cache.root).lost == {"text": {key_of(3)}}


def test_a_deleted_file_costs_only_its_records(cache):
    path = cache.latest().array_path(0)
    arrays = cache.latest().placements("latents", np.arange(NUM_SAMPLES))[:, 0]
    lost = np.flatnonzero(arrays == 0)
    path.unlink()
    assert write_missing(cache, range(NUM_SAMPLES)) == [("latents", n) for n in lost]
    assert_values(seal(cache, range(NUM_SAMPLES)), range(NUM_SAMPLES))


def test_whole_records_are_copied_out_of_damaged_files(cache):
    """A shard whose index is damaged holds whole records; of one that is cut short the first ones are whole."""
    for number in range(len(cache.latest().arrays)):
        path = cache.latest().array_path(number)
        if number % 2:
            os.truncate(path, path.stat().st_size - 1)
        else:
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CacheCorrupt, match="cache repair"):
        assert_values(cache.latest(), range(NUM_SAMPLES))
    done = repair(cache.root)
    assert (done.lost, done.num_rescued, done.is_sealed) == ({}, 2 * NUM_SAMPLES, True)
    assert verify(cache.root, full=True) == []
    assert_values(cache.latest(), range(NUM_SAMPLES))


def test_metadata_is_written_again_without_touching_a_record(cache):
    before = {path: path.read_bytes() for path in cache.root.rglob("*") if path.is_file()}
    for path in cache.root.rglob("zarr.json"):
        path.write_text("{}")
    assert repair(cache.root).num_rescued == 0
    assert {path: path.read_bytes() for path in before} == before


def test_a_lost_snapshot_is_not_replaced_by_an_older_one(cache):
    path = cache.latest().path
    for loss in (path.unlink, lambda: None):
        loss()
        with pytest.raises(CacheNotFound, match=r"000002\.npz is missing; run data-process"):
            cache.latest()
        assert not repair(cache.root).is_sealed
    assert verify(cache.root, full=False) == [
        "snapshots/000002.npz was lost: run data-process to seal the samples again"
    ]
    assert seal(cache, range(NUM_SAMPLES)).number == 3
    assert verify(cache.root, full=True) == []


def test_repair_keeps_a_record_that_was_encoded_again(cache):
    """A damaged older copy must not take the place of the newer one."""
    newer = value_of("latents", 0) ^ 1
    with cache.writer() as writer:
        writer.add("latents", key_of(0), {"latents": newer}, [LATENTS])
    old = cache.latest().array_path(0)
    old.write_bytes(old.read_bytes()[:-1] + b"?")
    repair(cache.root)
    snapshot = seal(cache, range(NUM_SAMPLES))
    np.testing.assert_array_equal(BatchReader(snapshot, ["latents"]).read([0]).fields["latents"][0], newer)


@pytest.mark.parametrize("command", [lambda root: verify(root, full=True), repair, collect_garbage])
def test_a_folder_that_is_no_cache_or_a_newer_one_is_refused(command, tmp_path, cache):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        with pytest.raises(CacheNotFound, match="is not a cache"):
            command(tmp_path / folder)
    path = cache.root / "store.json"
    path.write_bytes(encode_manifest({**json.loads(path.read_text()), "schema": SCHEMA + 1}))
    with pytest.raises(CacheSchemaError, match="newer"):
        command(cache.root)


# garbage


def test_nothing_is_garbage_that_a_snapshot_or_a_writer_needs(cache):
    before = files_of(cache.root)
    with cache.writer() as writer:
        add(writer, "latents", 50)
        with pytest.raises(CacheError, match="in use"):
            collect_garbage(cache.root, keep=1, grace_s=0)
        with pytest.raises(CacheError, match="in use"):
            repair(cache.root)
    # no snapshot names it yet, the next one may
    assert collect_garbage(cache.root, keep=1, grace_s=0).names() == ["snapshots/000001"]
    assert set(before) - set(files_of(cache.root)) == {"snapshots/000001.npz", "snapshots/000001.seal"}
    assert key_of(50) in cache.committed_keys()["latents"]
    assert len(collect_garbage(cache.root, keep=1, grace_s=0, unsealed=True).segments) == 1
    assert key_of(50) not in cache.committed_keys()["latents"]


def test_superseded_snapshots_and_segments_go_after_the_grace_period(cache):
    first, second = cache.snapshot(1), cache.snapshot(2)
    dropped = set(first.segments)
    seal(cache, range(NUM_SAMPLES // 2, NUM_SAMPLES))
    for grace_s, dry_run in ((3600, False), (0, True)):
        found = collect_garbage(cache.root, keep=1, grace_s=grace_s, dry_run=dry_run)
        assert second.path.exists()
        assert cache.committed_keys()["latents"] >= {key_of(0)}
    assert found.snapshots == [1, 2]
    assert set(found.segments) == dropped
    (cache.root / "tmp").rmdir()  # as a copy that leaves out empty folders does
    garbage = collect_garbage(cache.root, keep=1, grace_s=0)
    assert garbage == found
    assert [path for path in (first.path, second.path) if path.exists()] == []
    assert {path.name for path in (cache.root / "segments").iterdir()} == set(cache.latest().segments)
    assert verify(cache.root, full=True) == []
    assert_values(cache.latest(), range(NUM_SAMPLES // 2, NUM_SAMPLES))
    assert write_missing(cache, range(NUM_SAMPLES)) == [(unit, n) for n in range(4) for unit in SPECS]
    assert collect_garbage(cache.root, keep=1, grace_s=0).names() == []
    # the journal of what is gone is gone too, and so is the line that retracted it
    sessions = {path.name.rpartition("-")[0] for path in (cache.root / "segments").iterdir()}
    assert {path.stem for path in (cache.root / "journal").iterdir()} == sessions


def test_nothing_is_garbage_while_the_newest_snapshot_lacks_a_file(cache):
    with cache.writer() as writer:
        for number in range(NUM_SAMPLES):
            for unit in SPECS:
                add(writer, unit, number)
    again = seal(cache, range(NUM_SAMPLES))
    shutil.rmtree(again.segment_folder(0))
    with pytest.raises(CacheCorrupt, match=r"is missing; run data-process again"):
        collect_garbage(cache.root, keep=1, grace_s=0)
    assert write_missing(cache, range(NUM_SAMPLES)) == []  # the records from before are there
    assert_values(seal(cache, range(NUM_SAMPLES)), range(NUM_SAMPLES))
    assert "snapshots/000003" in collect_garbage(cache.root, keep=1, grace_s=0).names()


def test_leftovers_of_killed_writers_go(cache):
    (cache.root / "tmp" / "20260101T000000000000-1-abcdef-000000" / "latents").mkdir(parents=True)
    (cache.root / "tmp" / "snapshot-1-abcdef01").write_bytes(b"half")
    (cache.root / "segments" / "20260101T000000000000-1-abcdef-000001").mkdir()
    assert len(verify(cache.root, full=False)) == 1
    assert len(collect_garbage(cache.root, grace_s=3600).leftovers) == 0
    assert len(collect_garbage(cache.root, grace_s=0).leftovers) == 3
    assert verify(cache.root, full=True) == []
    assert_values(cache.latest(), range(NUM_SAMPLES))


# compaction


@pytest.mark.parametrize("backend", BACKENDS)
def test_compaction_reads_the_same_from_fewer_segments(backend, tmp_path):
    cache = build(tmp_path / "cache", backend)
    digest = cache.latest().digest
    assert compact(cache) == (4, 1)
    assert cache.latest().digest == digest
    assert_values(cache.latest(), range(NUM_SAMPLES))
    assert compact(cache) == (1, 1)
    assert len(collect_garbage(cache.root, keep=1, grace_s=0).segments) == 4
    assert len(list((cache.root / "segments").iterdir())) == 1
    assert verify(cache.root, full=True) == []
    assert_values(Cache.open(cache.root).latest(), range(NUM_SAMPLES))


def test_compaction_copies_no_damage(cache):
    path = cache.latest().array_path(0)
    path.write_bytes(b"?" + path.read_bytes()[1:])
    with pytest.raises(CacheCorrupt, match=r"record 0+ is damaged; run `diffsynth-pipe cache repair"):
        compact(cache)
    assert cache.latest().number == 2
