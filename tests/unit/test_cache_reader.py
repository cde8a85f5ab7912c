"""BatchReader and Prefetcher: padding, reuse, damage, threads, forks."""

import mmap
import os
import signal
import threading

import numpy as np
import pytest

from cache_store.contract import CacheCorrupt, CacheError, FieldSpec
from cache_store.maintain import repair
from cache_store.reader import BatchReader, Prefetcher
from cache_store.store import Cache, SealedSample

LATENTS = FieldSpec(name="latents", dtype="bfloat16", dims=("channel", "height", "width"))
TEXT = FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel"), ragged=True)
LENGTHS = (3, 40, 17, 1, 33, 16)
FIELDS = ("latents", "prompt_emb")


def key_of(number):
    return f"{number:032x}"


def latents_of(number):
    return np.random.default_rng(number).integers(1, 0x7F80, (4, 8, 8 + 4 * (number % 2)), np.uint16)


def text_of(number):
    return np.random.default_rng(100 + number).integers(1, 0x7F80, (LENGTHS[number % 6], 64), np.uint16)


def write(root, numbers):
    cache = Cache.open_or_new(root)
    with cache.writer() as writer:
        for number in numbers:
            writer.add("latents", key_of(number), {"latents": latents_of(number)}, [LATENTS])
            writer.add("text", key_of(number), {"prompt_emb": text_of(number)}, [TEXT])
    return cache


def seal(cache, num_samples):
    return cache.seal(
        [
            SealedSample(
                key_of(900 + n), f"bucket {n % 2}", f"metadata.csv row {n}", {"latents": key_of(n), "text": key_of(n)}
            )
            for n in range(num_samples)
        ],
        {},
    )


@pytest.fixture
def snapshot(tmp_path):
    return seal(write(tmp_path / "cache", range(12)), 12)


def assert_holds(batch, numbers):
    longest = max(len(text_of(number)) for number in numbers)
    for slot, number in enumerate(numbers):
        text = text_of(number)
        np.testing.assert_array_equal(batch.fields["latents"][slot], latents_of(number))
        np.testing.assert_array_equal(batch.fields["prompt_emb"][slot, : len(text)], text)
        assert not batch.fields["prompt_emb"][slot, len(text) :].any()
    assert batch.fields["prompt_emb"].shape == (len(numbers), longest, 64)
    assert batch.lengths["prompt_emb"].tolist() == [len(text_of(number)) for number in numbers]
    assert batch.positions.tolist() == list(numbers)
    assert batch.sample_ids == tuple(key_of(900 + number) for number in numbers)


# values


@pytest.mark.parametrize("num_threads", [0, 3])
def test_reused_buffers_start_at_pages_and_leak_nothing_into_padding(snapshot, num_threads):
    with BatchReader(snapshot, FIELDS, num_threads=num_threads) as reader:
        buffers = reader.buffers()
        for numbers in ([1, 7, 1], [3, 9], [9, 3, 5, 1, 11], [3], [2, 4, 0], [0]):
            batch = reader.read(numbers, buffers)
            assert_holds(batch, numbers)
            assert all(field.ctypes.data % mmap.PAGESIZE == 0 for field in batch.fields.values())


def test_memory_comes_from_the_given_allocator_and_is_used_again(snapshot):
    allocated = []

    def allocate(num_bytes):
        allocated.append(np.full(num_bytes, 0xFF, np.uint8))
        return allocated[-1]

    reader = BatchReader(snapshot, FIELDS, allocate=allocate)
    buffers = reader.buffers()
    first = reader.read([1, 7], buffers)
    assert all(any(np.shares_memory(field, memory) for memory in allocated) for field in first.fields.values())
    assert_holds(reader.read([7, 9], buffers), [7, 9])
    assert len(allocated) == 2
    assert_holds(reader.read([7, 9, 1, 11], buffers), [7, 9, 1, 11])
    assert len(allocated) == 4
    fresh = reader.read([1])
    assert_holds(reader.read([3]), [3])
    assert_holds(fresh, [1])


def test_only_the_asked_for_fields_are_opened(snapshot):
    for number, array in enumerate(snapshot.arrays):
        if array.layout.spec.name == "prompt_emb":
            snapshot.array_path(number).unlink()
    batch = BatchReader(snapshot, ["latents"]).read([0, 2])
    assert set(batch.fields) == {"latents"}
    assert batch.lengths == {}


@pytest.mark.parametrize("positions", [[], [0, 1]])
def test_a_batch_takes_samples_of_one_bucket(snapshot, positions):
    with pytest.raises(ValueError, match="samples of one bucket"):
        BatchReader(snapshot, FIELDS).read(positions)


def test_an_unknown_field_is_named(snapshot):
    with pytest.raises(CacheError, match="no field 'mask', only latents, prompt_emb"):
        BatchReader(snapshot, ["mask"])


def test_samples_of_a_bucket_that_differ_in_shape_are_named(tmp_path):
    cache = write(tmp_path / "cache", range(2))
    keys = [{"latents": key_of(n), "text": key_of(n)} for n in range(2)]
    snapshot = cache.seal([SealedSample(key_of(n), "same", f"row {n}", keys[n]) for n in range(2)], {})
    with pytest.raises(CacheError, match=r"latents of sample 0+1 \(row 1\) has shape \(4, 8, 12\), others"):
        BatchReader(snapshot, FIELDS).read([0, 1])


def test_long_items_take_several_reads(tmp_path):
    spec = FieldSpec(name="x", dtype="uint8", dims=("row", "column"), ragged=True)
    item = np.random.default_rng(0).integers(0, 255, (5003, 600), np.uint8)  # four rows a chunk, two destinations each
    cache = Cache.open_or_new(tmp_path / "cache")
    with cache.writer() as writer:
        writer.add("u", key_of(0), {"x": item}, [spec])
    snapshot = cache.seal([SealedSample(key_of(0), "b", "row 0", {"u": key_of(0)})], {})
    assert snapshot.arrays[0].num_chunks * 2 > 2 * os.sysconf("SC_IOV_MAX")
    np.testing.assert_array_equal(BatchReader(snapshot, ["x"]).read([0]).fields["x"][0], item)


def test_reads_that_return_less_than_asked_are_continued(snapshot, monkeypatch):
    preadv = os.preadv

    def short(fd, views, offset):
        room = 1000
        part = []
        for view in views:
            part.append(view[:room])
            room -= part[-1].nbytes
            if room == 0:
                break
        return preadv(fd, part, offset)

    monkeypatch.setattr(os, "preadv", short)
    assert_holds(BatchReader(snapshot, FIELDS).read([1, 7, 3]), [1, 7, 3])


# damage


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "flipped bit":
        content[100] ^= 1
    elif kind == "flipped index bit":
        content[-10] ^= 1
    elif kind == "zeros":
        content = bytes(len(content))
    elif kind == "cut short":
        content = content[:-1]
    elif kind == "too long":
        content += b"\0"
    path.unlink()
    if kind != "missing":
        path.write_bytes(content)


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("flipped bit", "fails its checksum"),
        ("flipped index bit", "damaged index"),
        ("zeros", "damaged index"),
        ("cut short", "bytes, not"),
        ("too long", "bytes, not"),
        ("missing", "is missing"),
    ],
)
def test_damage_names_the_sample_and_a_repair_cures_it(snapshot, field, kind, problem, num_threads):
    number = snapshot.placements(field, np.array([0]))[0, 0]
    path = snapshot.array_path(number)
    damage(path, kind)
    with BatchReader(snapshot, FIELDS, num_threads=num_threads) as reader, pytest.raises(CacheCorrupt) as caught:
        reader.read([0, 2])
    message = str(caught.value)
    assert message.startswith(f"{path}: {field} of sample {key_of(900)} (metadata.csv row 0)")
    assert problem in message
    assert message.endswith(f"run `diffsynth-pipe cache repair {snapshot.root}`")
    assert "\n" not in message

    repair(snapshot.root)
    again = seal(write(snapshot.root, range(12)), 12)
    assert_holds(BatchReader(again, FIELDS).read([0, 2]), [0, 2])


def test_a_file_cut_short_while_it_is_open_is_noticed(snapshot):
    reader = BatchReader(snapshot, FIELDS)
    reader.read([0])
    path = snapshot.array_path(snapshot.placements("latents", np.array([10]))[0, 0])
    os.truncate(path, 600)
    with pytest.raises(CacheCorrupt, match=r"metadata\.csv row 10\) is cut short"):
        reader.read([10])


def test_a_bad_read_is_repeated_once(snapshot, monkeypatch):
    preadv, num_calls = os.preadv, 0

    def flaky(fd, views, offset):
        nonlocal num_calls
        num_calls += 1
        num_read = preadv(fd, views, offset)
        if num_calls == 1:
            views[0][5] ^= 8
        return num_read

    monkeypatch.setattr(os, "preadv", flaky)
    assert_holds(BatchReader(snapshot, FIELDS).read([0]), [0])
    assert num_calls == 3


# threads and forks


def test_threads_share_a_reader(snapshot):
    reader = BatchReader(snapshot, FIELDS, num_threads=2)
    failures = []

    def read(seed):
        rng = np.random.default_rng(seed)
        buffers = reader.buffers()
        try:
            for _ in range(30):
                numbers = (2 * rng.integers(0, 6, 3) + seed % 2).tolist()
                assert_holds(reader.read(numbers, buffers), numbers)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader.close()
    assert failures == []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_reader_works_on_both_sides_of_a_fork(snapshot, num_threads):
    reader = BatchReader(snapshot, FIELDS, num_threads=num_threads)
    assert_holds(reader.read([0, 2]), [0, 2])
    with reader._lock:  # as a thread of the parent may hold it at the moment of the fork
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            status = 1
            try:
                for numbers in ([4, 6], [1, 3, 5]):
                    assert_holds(reader.read(numbers), numbers)
                status = 0
            finally:
                os._exit(status)
    assert_holds(reader.read([8, 10]), [8, 10])
    assert os.waitpid(child, 0)[1] == 0
    assert_holds(reader.read([0, 2]), [0, 2])
    reader.close()


# reading ahead


def batches_of(count):
    for tag in range(count):
        first = tag % 2
        yield tag, [first + 2 * ((tag + slot) % 6) for slot in range(1 + tag % 4)]


@pytest.mark.parametrize(("depth", "num_threads"), [(0, 1), (1, 1), (4, 2), (9, 4)])
def test_batches_come_in_order_and_stay_valid_until_the_next(snapshot, depth, num_threads):
    reader = BatchReader(snapshot, FIELDS)
    with Prefetcher(reader, batches_of(40), depth=depth, num_threads=num_threads) as prefetcher:
        tags = []
        for (tag, batch), (_, numbers) in zip(prefetcher, batches_of(40), strict=True):
            assert_holds(batch, numbers)
            tags.append(tag)
    assert tags == list(range(40))


def test_a_prefetcher_reads_only_depth_ahead_into_a_fixed_ring(snapshot):
    num_taken, num_allocated = 0, 0

    def counted():
        nonlocal num_taken
        for item in ((tag, [0, 2]) for tag in range(30)):
            num_taken += 1
            yield item

    def allocate(num_bytes):
        nonlocal num_allocated
        num_allocated += 1
        return np.empty(num_bytes, np.uint8)

    reader = BatchReader(snapshot, FIELDS, allocate=allocate)
    with Prefetcher(reader, counted(), depth=3) as prefetcher:
        for tag, batch in prefetcher:
            assert num_taken <= tag + 1 + 3
            assert_holds(batch, [0, 2])
    assert num_taken == 30
    assert num_allocated == (3 + 1) * len(FIELDS)


def test_an_error_comes_in_place_of_its_batch(snapshot):
    path = snapshot.array_path(snapshot.placements("latents", np.array([4]))[0, 0])
    content = bytearray(path.read_bytes())
    content[2 * (4 * 8 * 8 * 2 + 4)] ^= 1  # the third item of its shape: sample 4
    path.write_bytes(content)
    requests = [(tag, [2 * tag]) for tag in range(6)]
    with Prefetcher(BatchReader(snapshot, FIELDS), requests, depth=5) as prefetcher:
        assert [next(prefetcher)[0] for _ in range(2)] == [0, 1]
        with pytest.raises(CacheCorrupt, match="row 4"):
            next(prefetcher)
        with pytest.raises(StopIteration):
            next(prefetcher)


def test_an_error_of_the_plan_reaches_the_caller(snapshot):
    def plan():
        yield 0, [0]
        raise KeyError("plan")

    with Prefetcher(BatchReader(snapshot, FIELDS), plan()) as prefetcher:
        assert next(prefetcher)[0] == 0
        with pytest.raises(KeyError, match="plan"):
            next(prefetcher)
        with pytest.raises(StopIteration):
            next(prefetcher)


def test_leaving_early_stops_the_threads(snapshot):
    before = threading.active_count()
    with Prefetcher(BatchReader(snapshot, FIELDS), batches_of(10**9), num_threads=3) as prefetcher:
        next(prefetcher)
        assert threading.active_count() > before
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(prefetcher)
