"""Cache, Writer and Snapshot: what is refused, what is kept, what a seal says."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from datetime import datetime, timedelta
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from cache_store.contract import (
    CacheCorrupt,
    CacheError,
    CacheNotFound,
    CacheSchemaError,
    FieldSpec,
    RecordRefused,
)
from cache_store.manifest import SCHEMA
from cache_store.reader import BatchReader
from cache_store.store import Cache, SealedSample, recipe_id, samples_digest

NOBODY = 65534
LATENTS = FieldSpec(name="latents", dtype="bfloat16", dims=("channel", "height", "width"))
TEXT = FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel"), ragged=True)


def key_of(number):
    return f"{number:032x}"


def latents_of(number, shape=(4, 8, 8)):
    return np.random.default_rng(number).integers(0, 0x7F80, shape, np.uint16)


def add(writer, number, **changes):
    return writer.add("latents", key_of(number), {"latents": latents_of(number)}, [LATENTS], **changes)


def samples_of(numbers):
    return [SealedSample(key_of(n), "8x8", f"metadata.csv row {n}", {"latents": key_of(n)}) for n in numbers]


@pytest.fixture
def cache(tmp_path):
    cache = Cache.open_or_new(tmp_path / "cache")
    with cache.writer() as writer:
        for number in range(4):
            add(writer, number)
    return cache


# opening


def test_open_or_new_writes_nothing_until_the_first_record(tmp_path):
    root = tmp_path / "a" / "cache"
    cache = Cache.open_or_new(root)
    with cache.writer():
        pass
    with pytest.raises(RecordRefused), cache.writer() as writer:
        writer.add("latents", key_of(0), {"latents": np.full((1, 1, 1), 0x7FC0, np.uint16)}, [LATENTS])
    assert cache.committed_keys() == {}
    assert cache.latest() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "[]", '{"format": "other"}'])
def test_a_folder_that_is_no_cache_is_not_opened(tmp_path, content):
    if content is not None:
        (tmp_path / "store.json").write_text(content)
    with pytest.raises(CacheNotFound, match="is not a cache"):
        Cache.open(tmp_path)


def test_a_folder_with_other_files_is_not_made_a_cache(tmp_path):
    (tmp_path / "metadata.csv").write_text("image,prompt")
    with pytest.raises(CacheError, match=r"holds 'metadata\.csv'"):
        Cache.open_or_new(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"schema": SCHEMA + 1}, CacheSchemaError, "newer"),
        ({"schema": SCHEMA - 1}, CacheSchemaError, "older"),
        ({"backend": "tape"}, CacheSchemaError, "'tape' is not one of"),
    ],
)
def test_a_newer_older_or_foreign_store_is_refused(cache, change, error, message):
    path = cache.root / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=message):
        Cache.open(cache.root)


def test_a_damaged_store_json_is_named(cache):
    (cache.root / "store.json").write_text("{")
    with pytest.raises(CacheCorrupt, match=r"store\.json is damaged"):
        Cache.open(cache.root)


@pytest.mark.parametrize("place", ["file/cache", "/proc/cache"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError) as caught, Cache.open_or_new(tmp_path / place).writer() as writer:
        add(writer, 0)
    assert "\n" not in str(caught.value)
    assert "cache" in str(caught.value)


@pytest.fixture
def read_only_folder():
    """A folder that this process may read and not write; as root, who may write anywhere, it becomes nobody."""
    with tempfile.TemporaryDirectory() as folder:
        is_root = os.geteuid() == 0
        if is_root:
            os.chown(folder, NOBODY, -1)
        Path(folder).chmod(0o500)
        if is_root:
            os.seteuid(NOBODY)
        try:
            yield Path(folder)
        finally:
            if is_root:
                os.seteuid(0)
            Path(folder).chmod(0o700)


def test_a_read_only_folder_is_one_line(read_only_folder):
    writer = Cache.open_or_new(read_only_folder / "c").writer()
    with pytest.raises(CacheError, match=r"Permission denied.*check permissions") as caught, writer:
        add(writer, 0)
    assert "\n" not in str(caught.value)
    assert not list(read_only_folder.iterdir())


def test_recipes_are_stored_once_under_the_digest_of_their_canonical_json(cache):
    first = cache.put_recipe({"b": [1, 2], "a": "ü"})
    assert cache.put_recipe({"a": "ü", "b": [1, 2]}) == first == recipe_id({"a": "ü", "b": [1, 2]})
    assert cache.put_recipe({"a": "ü", "b": [2, 1]}) != first
    assert (cache.root / "recipes" / f"{first}.json").read_text() == '{"a":"ü","b":[1,2]}'


# writing


@pytest.mark.parametrize("pattern", [0x7FC0, 0xFFC1, 0x7F80, 0xFF80, 0x7F81])
def test_nan_and_inf_in_bfloat16_are_refused(tmp_path, pattern):
    item = latents_of(0)
    item[1, 2, 3] = pattern
    with pytest.raises(
        RecordRefused, match=r"latents of row 7 \(cat\.jpg\): 1 of 256 values of latents are NaN or Inf"
    ):
        Cache.open_or_new(tmp_path / "c").writer().add(
            "latents", key_of(0), {"latents": item}, [LATENTS], label="row 7 (cat.jpg)"
        )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_in_floats_are_refused(tmp_path, dtype, value):
    spec = FieldSpec(name="x", dtype=dtype, dims=("d",))
    with pytest.raises(RecordRefused, match="2 of 3 values"):
        Cache.open_or_new(tmp_path / "c").writer().add(
            "u", key_of(0), {"x": np.array([1, value, value], dtype)}, [spec]
        )


def test_the_largest_and_smallest_finite_values_are_kept(tmp_path):
    spec = FieldSpec(name="x", dtype="bfloat16", dims=("d",))
    item = np.array([0x7F7F, 0xFF7F, 0x0001, 0x8001, 0x0000, 0x8000], np.uint16)
    cache = Cache.open_or_new(tmp_path / "c")
    with cache.writer() as writer:
        writer.add("u", key_of(0), {"x": item}, [spec])
    snapshot = cache.seal([SealedSample(key_of(0), "b", "row 0", {"u": key_of(0)})], {})
    np.testing.assert_array_equal(BatchReader(snapshot, ["x"]).read([0]).fields["x"][0], item)


@pytest.mark.parametrize(
    ("fields", "specs", "message"),
    [
        ({"latents": np.zeros((1, 1, 1), np.float32)}, [LATENTS], "is float32, not <u2 for bfloat16"),
        ({"latents": np.zeros((1, 1), np.uint16)}, [LATENTS], r"has shape \(1, 1\), not \('channel'"),
        ({"latents": np.zeros((0, 1, 1), np.uint16)}, [LATENTS], "is empty"),
        ({"prompt_emb": np.zeros((0, 64), np.uint16)}, [TEXT], "is empty"),
        ({"prompt_emb": np.zeros((1, 64), np.uint16)}, [LATENTS], r"fields \['prompt_emb'\] are not \['latents'\]"),
    ],
)
def test_a_record_that_is_not_what_its_field_says_is_refused(tmp_path, fields, specs, message):
    with pytest.raises(RecordRefused, match=message):
        Cache.open_or_new(tmp_path / "c").writer().add("u", key_of(0), fields, specs)


def test_keys_and_declarations_are_checked(tmp_path):
    other = FieldSpec(name="latents", dtype="float32", dims=("d",))
    with Cache.open_or_new(tmp_path / "c").writer() as writer:
        for key in ("", "A" * 32, "../" + "0" * 29, "0" * 33):
            with pytest.raises(ValueError, match="32 lowercase hex digits"):
                writer.add("latents", key, {"latents": latents_of(0)}, [LATENTS])
        add(writer, 0)
        with pytest.raises(ValueError, match="was declared as"):
            writer.add("latents", key_of(1), {"latents": np.zeros(1, np.float32)}, [other])
        with pytest.raises(ValueError, match="taken"):
            writer.add("other", key_of(1), {"latents": np.zeros(1, np.float32)}, [other])


def test_a_key_is_stored_once_per_writer(tmp_path):
    cache = Cache.open_or_new(tmp_path / "c")
    with cache.writer() as writer:
        assert add(writer, 0)
        assert not add(writer, 0)
        writer.commit()
        assert not add(writer, 0)
    assert len(list((cache.root / "segments").iterdir())) == 1
    assert cache.committed_keys() == {"latents": {key_of(0)}}


class Lagging(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) - timedelta(days=1)


@pytest.mark.parametrize("clock", [datetime, Lagging])
def test_of_two_writers_with_one_key_the_last_counts(cache, monkeypatch, clock):
    monkeypatch.setattr("cache_store.journal.datetime", clock)
    with cache.writer() as writer:
        writer.add("latents", key_of(1), {"latents": latents_of(99)}, [LATENTS])
    snapshot = cache.seal(samples_of(range(4)), {})
    batch = BatchReader(snapshot, ["latents"]).read([0, 1])
    np.testing.assert_array_equal(batch.fields["latents"], [latents_of(0), latents_of(99)])
    assert snapshot.num_records == {"latents": 4}


@pytest.mark.parametrize("limits", [{"segment_bytes": 1}, {"commit_seconds": 0}])
def test_limits_commit_while_writing(tmp_path, limits):
    cache = Cache.open_or_new(tmp_path / "c")
    with cache.writer(**limits) as writer:
        for number in range(3):
            add(writer, number)
            assert cache.committed_keys() == {"latents": {key_of(n) for n in range(number + 1)}}


def test_many_shapes_do_not_run_out_of_files(tmp_path):
    spec = FieldSpec(name="x", dtype="uint8", dims=("d",))
    cache = Cache.open_or_new(tmp_path / "c")
    with cache.writer() as writer:
        for number in range(300):
            writer.add("u", key_of(number), {"x": np.ones(1 + number, np.uint8)}, [spec])
    assert len(list((cache.root / "segments").iterdir())) == 2
    snapshot = cache.seal([SealedSample(key_of(n), str(n), f"row {n}", {"u": key_of(n)}) for n in range(300)], {})
    reader = BatchReader(snapshot, ["x"])
    for _ in range(2):  # more files than stay open
        assert [reader.read([n]).fields["x"].shape[1] for n in range(300)] == list(range(1, 301))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_whole_records_survive_an_exception(tmp_path, error):
    cache = Cache.open_or_new(tmp_path / "c")

    def write():
        with cache.writer() as writer:
            add(writer, 0)
            add(writer, 1)
            raise error

    with pytest.raises(error):
        write()
    assert cache.committed_keys() == {"latents": {key_of(0), key_of(1)}}
    assert list((cache.root / "tmp").iterdir()) == []


def test_a_failed_commit_forgets_its_records_and_the_writer_goes_on(tmp_path, monkeypatch):
    cache = Cache.open_or_new(tmp_path / "c")

    def no_space(fd):
        raise OSError(28, "No space left on device")

    with cache.writer() as writer:
        add(writer, 0)
        writer.commit()
        add(writer, 1)
        monkeypatch.setattr(os, "fdatasync", no_space)
        with pytest.raises(CacheError, match="No space left on device"):
            writer.commit()
        monkeypatch.undo()
        assert add(writer, 1)
    assert cache.committed_keys() == {"latents": {key_of(0), key_of(1)}}
    assert list((cache.root / "tmp").iterdir()) == []
    snapshot = cache.seal(samples_of(range(2)), {})
    batch = BatchReader(snapshot, ["latents"]).read([0, 1])
    np.testing.assert_array_equal(batch.fields["latents"], [latents_of(0), latents_of(1)])


def test_data_is_on_disk_before_the_name_and_the_name_before_the_journal_line(tmp_path, monkeypatch):
    cache = Cache.open_or_new(tmp_path / "c")
    events = []

    def trace(name, path_of):
        call = getattr(os, name)

        def traced(*args, **kwargs):
            events.append((name, path_of(args[0])))
            return call(*args, **kwargs)

        monkeypatch.setattr(os, name, traced)

    def path_of_fd(fd):
        return str(Path(f"/proc/self/fd/{fd}").readlink())

    with cache.writer() as writer:
        add(writer, 0)
        for name, path_of in {"fsync": path_of_fd, "fdatasync": path_of_fd, "write": path_of_fd, "rename": str}.items():
            trace(name, path_of)
        writer.commit()
        monkeypatch.undo()

    (segment,) = (cache.root / "segments").iterdir()
    (journal,) = (cache.root / "journal").iterdir()
    unfinished = cache.root / "tmp" / segment.name
    renamed = events.index(("rename", str(unfinished)))
    for path in (segment, *segment.rglob("*")):
        before_rename = events[:renamed]
        name = str(unfinished / path.relative_to(segment))
        writes = [place for place, event in enumerate(before_rename) if event == ("write", name)]
        assert ("fsync", name) in before_rename[max(writes, default=0) :]
    tail = [
        event for event in events[renamed + 1 :] if event[1] in (str(segment.parent), str(journal.parent), str(journal))
    ]
    assert tail == [
        ("fsync", str(segment.parent)),
        ("fsync", str(journal.parent)),
        ("write", str(journal)),
        ("fdatasync", str(journal)),
    ]


# the journal


def test_a_torn_or_damaged_journal_line_is_as_if_never_written(cache):
    with cache.writer() as writer:
        add(writer, 8)
        writer.commit()
        add(writer, 9)
    path = max((cache.root / "journal").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    lines = path.read_bytes()
    first = lines.index(b"\n") + 1
    for end in (first + 3, first + 9, first + 40, len(lines) - 2):
        path.write_bytes(lines[:end])
        assert cache.committed_keys()["latents"] == {key_of(n) for n in (0, 1, 2, 3, 8)}
    path.write_bytes(lines[:40] + b"X" + lines[41:])
    assert cache.committed_keys()["latents"] == {key_of(n) for n in (0, 1, 2, 3, 9)}


def test_a_newer_journal_is_refused(cache):
    payload = b'{"schema":%d}' % (SCHEMA + 1)
    line = b"%08x %b\n" % (google_crc32c.value(payload), payload)
    (cache.root / "journal" / "new.jsonl").write_bytes(line)
    with pytest.raises(CacheSchemaError, match="newer"):
        cache.committed_keys()


@pytest.mark.parametrize("loss", ["delete", "truncate", "delete segment"])
def test_a_segment_that_lost_bytes_is_encoded_again_and_sealed_anew(cache, loss):
    sealed = cache.seal(samples_of(range(4)), {})
    (segment,) = (cache.root / "segments").iterdir()
    shard = sealed.array_path(0)
    if loss == "delete":
        shard.unlink()
    elif loss == "truncate":
        os.truncate(shard, shard.stat().st_size - 1)
    else:
        segment.rename(cache.root / "elsewhere")
    assert cache.committed_keys() == {}
    with pytest.raises(CacheCorrupt, match=r"c/0/0/0/0 .*run data-process again"):
        sealed.check_files()
    with cache.writer() as writer:
        for number in range(4):
            add(writer, number)
    again = cache.seal(samples_of(range(4)), {})
    again.check_files()
    assert (again.number, again.digest) == (2, sealed.digest)
    batch = BatchReader(again, ["latents"]).read(range(4))
    np.testing.assert_array_equal(batch.fields["latents"], [latents_of(n) for n in range(4)])


# sealing


def test_a_seal_keeps_order_header_and_digest(cache):
    samples = samples_of([2, 0, 3, 1])
    samples[1] = SealedSample(key_of(0), "other", "Zeile ü", {"latents": key_of(3)})
    snapshot = cache.seal(iter(samples), {"family": "tiny", "units": {"latents": "f" * 32}})
    for opened in (snapshot, Cache.open(cache.root).latest(), cache.snapshot(1)):
        assert len(opened) == 4
        assert [opened.sample_id(i) for i in range(4)] == [s.sample_id for s in samples]
        assert [opened.source(i) for i in range(4)] == [s.source for s in samples]
        assert opened.bucket_names == ["8x8", "other"]
        assert {name: members.tolist() for name, members in opened.bucket_members.items()} == {
            "8x8": [0, 2, 3],
            "other": [1],
        }
        assert opened.fields == {"latents": LATENTS}
        assert opened.field_shapes() == {"latents": {(4, 8, 8)}}
        assert opened.num_records == {"latents": 3}
        assert opened.payload_bytes == 3 * 4 * 8 * 8 * 2
        assert opened.header["family"] == "tiny"
        assert opened.header["units"] == {"latents": "f" * 32}
        assert opened.header["parent"] is None
        assert opened.header["digest"] == opened.digest == samples_digest(samples)
        opened.check_files()


def test_the_digest_covers_ids_buckets_keys_and_order_but_not_sources():
    samples = [SealedSample(key_of(n), "b", f"row {n}", {"u": key_of(n), "v": key_of(n + 9)}) for n in range(3)]
    digest = samples_digest(samples)
    a, b, c = samples
    assert (
        samples_digest(iter([a, b, SealedSample(c.sample_id, "b", "moved", dict(reversed(c.keys.items())))])) == digest
    )
    changed = [
        [b, a, c],
        [a, b],
        [a, b, SealedSample(key_of(7), "b", "", c.keys)],
        [a, b, SealedSample(c.sample_id, "B", "", c.keys)],
        [a, b, SealedSample(c.sample_id, "b", "", {"u": key_of(11), "v": key_of(2)})],
    ]
    digests = {samples_digest(samples) for samples in changed}
    assert len(digests) == len(changed)
    assert digest not in digests


def test_sealing_the_same_samples_again_changes_nothing(cache):
    first = cache.seal(samples_of(range(4)), {"family": "x"})
    assert cache.seal(samples_of(range(4)), {"family": "y"}).header == first.header
    second = cache.seal(samples_of(range(3)), {})
    assert (second.number, second.header["parent"]) == (2, 1)
    assert [path.name for path in sorted((cache.root / "snapshots").glob("*.npz"))] == ["000001.npz", "000002.npz"]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (samples_of([0, 5]), "row 5: latents record 0+5 is not in the cache"),
        ([], "no samples"),
        ([samples_of([0])[0], SealedSample(key_of(1), "b", "row 1", {})], r"row 1: units \[\] are not \['latents'\]"),
    ],
)
def test_samples_that_cannot_be_sealed(cache, samples, message):
    with pytest.raises(CacheError, match=message):
        cache.seal(samples, {})
    assert cache.latest() is None


def test_a_field_that_changed_between_sessions_is_refused(cache):
    other = FieldSpec(name="latents", dtype="float16", dims=("channel", "height", "width"))
    with cache.writer() as writer:
        writer.add("latents", key_of(5), {"latents": np.zeros((4, 8, 8), np.float16)}, [other])
    with pytest.raises(CacheError, match="'latents' is stored as"):
        cache.seal(samples_of([0, 5]), {})
    mask = FieldSpec(name="mask", dtype="uint8", dims=("d",))
    with cache.writer() as writer:
        fields = {"latents": latents_of(6), "mask": np.ones(1, np.uint8)}
        writer.add("latents", key_of(6), fields, [LATENTS, mask])
    with pytest.raises(CacheError, match="'mask' of unit 'latents' is not in all records"):
        cache.seal(samples_of([0, 6]), {})
    assert set(cache.seal(samples_of([0, 1]), {}).fields) == {"latents"}


def test_sealers_at_the_same_time_get_numbers_of_their_own(cache):
    barrier = threading.Barrier(4)
    sealed = []

    def seal(count):
        barrier.wait()
        sealed.append(Cache.open(cache.root).seal(samples_of(range(count)), {}))

    threads = [threading.Thread(target=seal, args=(count,)) for count in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(snapshot.number for snapshot in sealed) == [1, 2, 3, 4]
    assert {len(cache.snapshot(number)) for number in range(1, 5)} == {1, 2, 3, 4}


def test_a_damaged_snapshot_is_an_error_until_it_is_sealed_again(cache):
    path = cache.seal(samples_of(range(4)), {}).path
    content = path.read_bytes()
    intact = cache.latest()
    num_noticed = 0
    for place in range(0, len(content), 13):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        try:
            opened = cache.latest()
        except (CacheCorrupt, CacheSchemaError):
            num_noticed += 1
        else:  # a byte that nobody reads, such as a date in the archive
            assert opened.header == intact.header
            assert [opened.sample_id(i) for i in range(4)] == [intact.sample_id(i) for i in range(4)]
    assert num_noticed > len(content) / 13 / 4
    # Each bit that tells how the first member is to be read, where zipfile raises the most kinds of errors.
    directory = content.index(b"PK\x01\x02")
    for bit in range(8 * directory, 8 * (directory + 46)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert cache.latest().header == intact.header
        except (CacheCorrupt, CacheSchemaError):
            num_noticed += 1
    path.write_bytes(content[:100])
    with pytest.raises(CacheCorrupt, match=r"000001\.npz is damaged: [^\n]*; run data-process"):
        cache.latest()
    assert cache.seal(samples_of(range(4)), {}).number == 2
    with pytest.raises(CacheNotFound, match=r"000007\.npz is missing"):
        cache.snapshot(7)


# size


def test_the_store_adds_little_to_its_payload(tmp_path):
    rng = np.random.default_rng(0)
    cache = Cache.open_or_new(tmp_path / "c")
    samples, payload_bytes = [], 0
    with cache.writer() as writer:
        for number in range(20):
            shape = [(16, 1, 64, 48), (16, 1, 48, 64), (16, 1, 56, 56)][number % 3]
            spec = FieldSpec(name="latents", dtype="bfloat16", dims=("c", "f", "h", "w"))
            records = {
                "latents": ({"latents": rng.integers(0, 0x7F80, shape, np.uint16)}, spec),
                "text": ({"prompt_emb": rng.integers(0, 0x7F80, (int(rng.integers(12, 30)), 64), np.uint16)}, TEXT),
            }
            for unit, (fields, spec) in records.items():
                writer.add(unit, key_of(number), fields, [spec])
                payload_bytes += sum(array.nbytes for array in fields.values())
            samples.append(
                SealedSample(key_of(number), str(shape), "metadata.csv row", dict.fromkeys(records, key_of(number)))
            )
    for unit in ("latents", "text"):
        cache.put_recipe({"unit": unit, "weights": "0" * 32, "template": "x" * 300})
    snapshot = cache.seal(samples, {"family": "tiny", "units": {}})
    assert snapshot.payload_bytes == payload_bytes
    disk_bytes = sum(path.stat().st_size for path in cache.root.rglob("*") if path.is_file())
    assert disk_bytes <= 1.05 * payload_bytes


def test_a_million_samples_open_in_bounded_memory(tmp_path):
    num_samples, num_texts = 1_000_000, 1000
    cache = Cache.open_or_new(tmp_path / "c")
    cache.put_recipe({})
    write_large_journal(cache.root, num_samples, num_texts)
    sealed = cache.seal(
        (
            SealedSample(
                key_of(n), f"{n % 7}", f"metadata.csv row {n}", {"latents": key_of(n), "text": key_of(n % num_texts)}
            )
            for n in range(num_samples)
        ),
        {},
    )
    # the high-water mark of the address space: ru_maxrss would count the parent's too
    program = (
        "import sys; from pathlib import Path; from cache_store.store import Cache\n"
        "def peak_kib(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "before = peak_kib()\n"
        "snapshot = Cache.open(Path(sys.argv[1])).latest()\n"
        "members = snapshot.bucket_members['3']\n"
        "assert members.tolist() == list(range(3, len(snapshot), 7))\n"
        "last = members[-1]\n"
        "print(peak_kib() - before, len(snapshot), last, snapshot.source(last), snapshot.sample_id(last))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, cache.root], capture_output=True, text=True, check=True
    ).stdout
    used_kib, *values = output.split()
    last = max(n for n in range(num_samples - 7, num_samples) if n % 7 == 3)
    assert values == [str(num_samples), str(last), "metadata.csv", "row", str(last), key_of(last)]
    assert sealed.path.stat().st_size / 1024 < int(used_kib) < 300 * 1024
    assert sealed.num_records == {"latents": num_samples, "text": num_texts}
    assert sealed.path.stat().st_size < 150 * num_samples


def write_large_journal(root, num_samples, num_texts):
    """Commit a segment of one-value records whose shards are holes."""
    fields = {"latents": num_samples, "text": num_texts}
    arrays, files, units = [], {}, {}
    for number, (name, count) in enumerate(fields.items()):
        file = f"{name}/1/c/0/0"
        path = root / "segments" / "large" / file
        path.parent.mkdir(parents=True)
        path.touch()
        os.truncate(path, 22 * count + 4)
        files[file] = [22 * count + 4, 0]
        arrays.append(
            {
                "field": name,
                "dtype": "bfloat16",
                "dims": ["d"],
                "ragged": False,
                "item_shape": [1],
                "chunk_rows": 1,
                "file": file,
                "num_chunks": count,
            }
        )
        columns = {
            "array": [number] * count,
            "start": list(range(count)),
            "num_rows": [1] * count,
            "digest": [0] * count,
        }
        units[name] = {"keys": "".join(map(key_of, range(count))), "fields": {name: columns}}
    entry = {"schema": 1, "segment": "large", "backend": "zarr", "arrays": arrays, "files": files, "units": units}
    payload = json.dumps(entry).encode()
    (root / "journal" / "large.jsonl").write_bytes(b"%08x %b\n" % (google_crc32c.value(payload), payload))


def test_a_journal_that_vanishes_after_it_was_listed_is_left_out(cache):
    # a link to nothing is listed and cannot be read, as a journal that garbage collection deletes in between
    (cache.root / "journal" / "spent.jsonl").symlink_to("nothing")
    assert cache.committed_keys() == {"latents": {key_of(number) for number in range(4)}}


def test_a_cache_that_another_writer_creates_meanwhile_is_opened(tmp_path):
    class Raced(type(tmp_path)):
        """Another writer creates the cache between two looks at the folder."""

        def exists(self):
            found = super().exists()
            if self.name == "store.json" and not found:
                Cache.open_or_new(tmp_path / "cache").put_recipe({"unit": "text"})
            return found

    (tmp_path / "cache").mkdir()
    assert Cache.open_or_new(Raced(tmp_path / "cache")).backend == "zarr"
