"""Reads shuffled batches from a cache, and the same bytes into the same batch buffer by other ways.

``python tests/bench/bench_reader.py`` prints one line per way. All files are in the page cache, so that the table
compares what the storage cannot hide: the work of the CPU.
"""

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import google_crc32c
import numpy as np
import zarr

from cache_store.contract import FieldSpec
from cache_store.reader import BatchReader, Prefetcher
from cache_store.store import Cache, SealedSample

SPECS = (
    FieldSpec(name="latents", dtype="bfloat16", dims=("channel", "frame", "height", "width")),
    FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel"), ragged=True),
)
NUM_SAMPLES, BATCH_SIZE, NUM_ROUNDS = 96, 4, 9
LATENT_SHAPE, TEXT_CHANNELS = (16, 1, 128, 128), 3584
BASE = "one raw file per sample"
ZARR = "zarr-python"
ZARR_SHARE = 12  # it reads only this part of each round


def main():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(120), 0.6, NUM_SAMPLES), 20, 500).astype(int)
    data = [
        {
            "latents": rng.integers(0, 0x7F00, LATENT_SHAPE, np.uint16),
            "prompt_emb": rng.integers(0, 0x7F00, (length, TEXT_CHANNELS), np.uint16),
        }
        for length in lengths
    ]
    num_bytes = sum(array.nbytes for fields in data for array in fields.values())
    with tempfile.TemporaryDirectory() as folder:
        ways = ways_to_read(Path(folder), data)
        times = {name: [] for name in ways}
        for _, (name, read) in itertools.product(range(NUM_ROUNDS), ways.items()):
            order = rng.permutation(NUM_SAMPLES).reshape(-1, BATCH_SIZE)
            part = order[: len(order) // ZARR_SHARE] if name == ZARR else order
            start = time.perf_counter()
            read(part)
            times[name].append((time.perf_counter() - start) * len(order) / len(part))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{NUM_SAMPLES} samples, {num_bytes / 1e6:.0f} MB, batches of {BATCH_SIZE}, median of {NUM_ROUNDS} rounds")
    print(f"{'way':<44}{'MB/s':>8}{'x raw file':>12}")
    for name, median in medians.items():
        print(f"{name:<44}{num_bytes / median / 1e6:>8.0f}{medians[BASE] / median:>12.2f}")


def ways_to_read(root, data):
    """Store the data in all forms; return a function per way, from batches of sample numbers."""
    longest = max(len(fields["prompt_emb"]) for fields in data)
    latents = np.zeros((BATCH_SIZE, *LATENT_SHAPE), np.uint16)
    text = np.zeros((BATCH_SIZE, longest, TEXT_CHANNELS), np.uint16)

    def collated(load):
        def read(order):
            for slot, number in itertools.chain.from_iterable(map(enumerate, order)):
                fields = load(number)
                latents[slot] = fields["latents"]
                text[slot, : len(fields["prompt_emb"])] = fields["prompt_emb"]
                text[slot, len(fields["prompt_emb"]) :] = 0

        return read

    snapshot = write_cache(root / "cache", data)
    reader = BatchReader(snapshot, ["latents", "prompt_emb"])
    buffers = reader.buffers()
    in_turn = np.arange(NUM_SAMPLES).reshape(-1, BATCH_SIZE)
    ahead = Prefetcher(reader, enumerate(itertools.cycle(in_turn)))
    write_raw_files(root, data)
    return {
        "memory (memcpy only)": collated(data.__getitem__),
        BASE: collated(lambda number: parse_raw((root / f"{number}.raw").read_bytes())),
        "one raw file per sample, crc32c checked": collated(lambda number: parse_checked(root / f"{number}.raw")),
        ZARR: collated(zarr_loader(next((root / "cache" / "segments").iterdir()), data)),
        "BatchReader, crc32c checked": lambda order: [reader.read(batch, buffers) for batch in order],
        "Prefetcher, 2 threads, crc32c checked": lambda order: [next(ahead) for _ in order],
    }


def write_cache(root, data):
    cache = Cache.open_or_new(root)
    samples = []
    with cache.writer() as writer:
        for number, fields in enumerate(data):
            key = f"{number:032x}"
            writer.add("sample", key, fields, SPECS)
            samples.append(SealedSample(key, "all", f"sample {number}", {"sample": key}))
    return cache.seal(samples, {})


def write_raw_files(root, data):
    for number, fields in enumerate(data):
        header = json.dumps({name: array.shape for name, array in fields.items()}).encode()
        payload = b"".join(array.tobytes() for array in fields.values())
        (root / f"{number}.raw").write_bytes(len(header).to_bytes(8, "little") + header + payload)


def parse_raw(content):
    start = 8 + int.from_bytes(content[:8], "little")
    fields = {}
    for name, shape in json.loads(content[8:start]).items():
        fields[name] = np.frombuffer(content, np.uint16, int(np.prod(shape)), start).reshape(shape)
        start += fields[name].nbytes
    return fields


def parse_checked(path):
    content = path.read_bytes()
    google_crc32c.value(content)
    return parse_raw(content)


def zarr_loader(segment, data):
    group = zarr.open_group(segment, mode="r")
    latents, text = (next(iter(group[name].arrays()))[1] for name in ("latents", "prompt_emb"))
    lengths = [len(fields["prompt_emb"]) for fields in data]
    chunk_rows = text.chunks[0]
    starts = np.cumsum([0] + [-(-length // chunk_rows) * chunk_rows for length in lengths])
    return lambda number: {
        "latents": latents[number],
        "prompt_emb": text[starts[number] : starts[number] + lengths[number]],
    }


if __name__ == "__main__":
    main()
