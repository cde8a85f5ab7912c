"""Reserved samples: kept as any other by every command that rewrites a cache, counted and batched by none."""

import numpy as np
import pytest

from cache_store.backends import backend_names
from cache_store.contract import FieldSpec
from cache_store.describe import describe
from cache_store.export import export
from cache_store.maintain import collect_garbage, compact, repair
from cache_store.reader import BatchReader, Prefetcher
from cache_store.store import RESERVED_BUCKET, Cache, SealedSample
from cache_store.verify import verify

LATENTS = FieldSpec(name="latents", dtype="bfloat16", dims=("channel", "height", "width"))
TEXT = FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel"), ragged=True)
LENGTHS = (9, 3, 5)
RESERVED_ID = "0" * 32
EMPTY = "e" * 32


def key_of(number):
    return f"{number:032x}"


def text_of(length):
    return np.random.default_rng(length).integers(1, 0x7F80, (length, 64), np.uint16)


def latents_of(number):
    return np.random.default_rng(100 + number).integers(1, 0x7F80, (4, 8, 8), np.uint16)


@pytest.fixture(params=backend_names())
def cache(request, tmp_path):
    """Three rows and the reserved sample, whose text is committed in a segment of its own."""
    cache = Cache.open_or_new(tmp_path / "cache", request.param)
    with cache.writer() as writer:
        for number, length in enumerate(LENGTHS):
            writer.add("latents", key_of(number), {"latents": latents_of(number)}, [LATENTS])
            writer.add("text", key_of(number), {"prompt_emb": text_of(length)}, [TEXT])
        writer.commit()
        writer.add("text", EMPTY, {"prompt_emb": text_of(1)}, [TEXT])
    samples = [
        SealedSample(key_of(10 + n), "8x8", f"row {n}", {"latents": key_of(n), "text": key_of(n)}) for n in range(3)
    ]
    samples.append(SealedSample(RESERVED_ID, RESERVED_BUCKET, "nothing", {"latents": key_of(0), "text": EMPTY}))
    cache.seal(samples, {"family": "tiny", "units": {}})
    return cache


def assert_holds(root):
    snapshot = Cache.open(root).latest()
    assert len(snapshot) == 3
    assert {name: members.tolist() for name, members in snapshot.bucket_members.items()} == {"8x8": [0, 1, 2]}
    assert snapshot.num_records == {"latents": 3, "text": 4}
    assert snapshot.reserved == {RESERVED_ID: 3}
    with BatchReader(snapshot, ["latents", "prompt_emb"]) as reader:
        batch = reader.read([snapshot.reserved[RESERVED_ID]])
    np.testing.assert_array_equal(batch.fields["prompt_emb"][0], text_of(1))
    assert verify(root, full=True) == []


def test_every_command_keeps_them(cache, tmp_path):
    assert_holds(cache.root)
    assert "duplicates" in (records := next(line for line in describe(cache.root) if line.startswith("records")))
    assert records.endswith("latents 3 (0 duplicates saved), text 4 (0 duplicates saved)")
    export(cache.root, tmp_path / "target", cache.backend)
    assert_holds(tmp_path / "target")
    compact(cache)
    collect_garbage(cache.root, keep=1, grace_s=0)
    assert_holds(cache.root)
    (number,) = cache.latest().placements("prompt_emb", np.array([1]))[:, 0]
    path = cache.latest().array_path(number)
    data = bytearray(path.read_bytes())
    start = data.find(text_of(3).tobytes()[:64])
    data[start] ^= 1
    path.write_bytes(data)
    done = repair(cache.root)
    assert done.lost == {"text": {key_of(1)}}
    with cache.writer() as writer:
        writer.add("text", key_of(1), {"prompt_emb": text_of(3)}, [TEXT])
    cache.seal(list(cache.latest().samples()), cache.latest().header)
    assert_holds(cache.root)


def test_damage_to_them_is_named(cache):
    snapshot = cache.latest()
    path = snapshot.array_path(snapshot.placements("prompt_emb", np.array([3]))[0, 0])
    data = bytearray(path.read_bytes())
    data[data.find(text_of(1).tobytes()[:64])] ^= 1
    path.write_bytes(data)
    assert any(f"sample {RESERVED_ID} (nothing)" in line for line in verify(cache.root, full=True))


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_field_is_read_of_them_instead_and_padded_to_what_was_read(cache, prefetch):
    snapshot = cache.latest()
    empty = snapshot.reserved[RESERVED_ID]
    with BatchReader(snapshot, ["latents", "prompt_emb"]) as reader:
        instead = {"prompt_emb": np.array([empty, 1, empty])}
        if prefetch:
            with Prefetcher(reader, [("first", [0, 1, 2]), ("second", [0, 1, 2], instead)]) as batches:
                assert next(batches)[1].lengths["prompt_emb"].tolist() == list(LENGTHS)
                tag, batch = next(batches)
            assert tag == "second"
        else:
            buffers = reader.buffers()
            reader.read([0, 1, 2], buffers)  # leaves longer texts in the memory
            batch = reader.read([0, 1, 2], buffers, instead)
        assert batch.lengths["prompt_emb"].tolist() == [1, 3, 1]
        assert batch.fields["prompt_emb"].shape == (3, 3, 64)
        for slot, length in enumerate((1, 3, 1)):
            np.testing.assert_array_equal(batch.fields["prompt_emb"][slot, :length], text_of(length))
            assert not batch.fields["prompt_emb"][slot, length:].any()
        for slot in range(3):
            np.testing.assert_array_equal(batch.fields["latents"][slot], latents_of(slot))
        assert batch.sample_ids == tuple(key_of(10 + number) for number in range(3))
