"""Reads shuffled batches from caches of both backends, and the same bytes into the same batch buffers by other ways.

``python tests/bench/bench_reader.py`` prints one line per way. All files are in the page cache, so that the table
compares what the storage cannot hide: the work of the CPU. Every way is checked against the data once, untimed.

``preadv only`` is the speed of light: the requests of our reader and no more, made ready before the clock starts.
Whatever is true of its ratios to the other ways is out of our reader's reach on the machine at hand.
"""

import itertools
import math
import os
import statistics
import tempfile
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import webdataset
import zarr
from awscrt.checksums import crc32c

from cache_store.backends import backend_names, load_backend
from cache_store.contract import CHECKSUM_BYTES, FieldSpec, Placement
from cache_store.reader import BatchReader, Prefetcher, whole_pages
from cache_store.store import Cache, SealedSample

LATENTS = FieldSpec(name="latents", dtype="bfloat16", dims=("channel", "frame", "height", "width"))
TEXT = FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel"), ragged=True)
FIELDS = (LATENTS.name, TEXT.name)
TEXT_CHANNELS = 3584
NUM_SAMPLES_OF_SHAPE = {
    (16, 1, 128, 128): 48,
    (16, 1, 112, 144): 24,
    (16, 1, 144, 112): 24,
    (16, 1, 96, 168): 16,
    (16, 21, 60, 104): 8,
}
BATCH_SIZE, NUM_ROUNDS = 4, 15
BASE = "one .pth per sample, weights_only=False"
MEMORY = "memory (memcpy only)"
LOADER = "DataLoader, 2 workers, .pth"
LIGHT = "preadv only, zarr"
LIGHT_LOADER = "preadv only, zarr, 2 threads"
ZARR = "zarr-python"
ZARR_SHARE = 10  # it is slow, and reads only this part of each round
LOADER_PASSES = 4  # what reads ahead reads more, so that the batches that it is ahead by count little


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    data = random_samples(rng)
    num_bytes = sum(item.nbytes for sample in data for item in sample)
    with tempfile.TemporaryDirectory() as folder:
        ways = ways_to_read(Path(folder), data)
        for name, way in ways.items():
            check(way(batches_of(data, rng)), data, is_padded=name not in (LIGHT, LIGHT_LOADER))
        times = {name: [] for name in ways}
        for _, (name, way) in itertools.product(range(NUM_ROUNDS), ways.items()):
            order = batches_of(data, rng)
            if name == ZARR:
                order = order[: len(order) // ZARR_SHARE]
            elif name in (LOADER, LIGHT_LOADER) or name.startswith("Prefetcher"):
                order *= LOADER_PASSES
            start = time.perf_counter()
            num_read = sum(
                latents.nbytes + sum(len(data[number][1]) for number in numbers) * TEXT_CHANNELS * 2
                for numbers, latents, _ in way(order)
            )
            times[name].append((time.perf_counter() - start) / num_read)
    print(f"{len(data)} samples, {num_bytes / 1e6:.0f} MB, batches of {BATCH_SIZE}, median of {NUM_ROUNDS} rounds")
    print(f"{'way':<52}{'MB/s':>8}{'x .pth':>10}{'x memcpy':>10}{'x DataLoader':>14}{'x preadv, 1 and 2 threads':>27}")
    for name, own in times.items():
        # round by round, as the machine's speed drifts
        ratios = (
            statistics.median(base / time for base, time in zip(times[other], own, strict=True))
            for other in (BASE, MEMORY, LOADER, LIGHT, LIGHT_LOADER)
        )
        speed = 1e-6 / statistics.median(own)
        print("{:<52}{:>8.0f}{:>10.2f}{:>10.2f}{:>14.2f}{:>20.2f}{:>7.2f}".format(name, speed, *ratios))


def random_samples(rng):
    """Return latents and text of each sample, bfloat16 bits; the buckets' sizes are multiples of the batch size."""
    shapes = [shape for shape, count in NUM_SAMPLES_OF_SHAPE.items() for _ in range(count)]
    lengths = np.clip(rng.lognormal(np.log(120), 0.6, len(shapes)), 20, 500).astype(int)
    return [
        (rng.integers(0, 0x7F00, shape, np.uint16), rng.integers(0, 0x7F00, (length, TEXT_CHANNELS), np.uint16))
        for shape, length in zip(shapes, lengths, strict=True)
    ]


def batches_of(data, rng):
    """Return all samples in random batches, each of one bucket."""
    batches = []
    for shape in NUM_SAMPLES_OF_SHAPE:
        members = rng.permutation([number for number, (latents, _) in enumerate(data) if latents.shape == shape])
        batches += members.reshape(-1, BATCH_SIZE).tolist()
    rng.shuffle(batches)
    return batches


def check(batches, data, *, is_padded):
    for numbers, latents, text in batches:
        for slot, number in enumerate(numbers):
            length = len(data[number][1])
            np.testing.assert_array_equal(latents[slot], data[number][0])
            np.testing.assert_array_equal(text[slot, :length], data[number][1])
            assert not is_padded or not text[slot, length:].any()


def ways_to_read(root, data):
    """Store the data in all forms; return the ways: from batches of sample numbers to (numbers, latents, text)."""
    longest = max(len(text) for _, text in data)
    latents_buffers, text_buffer = batch_buffers(longest)

    def collated(samples):
        """Copy (number, latents, text) into the buffers, batch by batch; text is padded to the longest of its batch."""
        numbers, lengths = [], []
        for number, latents, text in samples:
            slot, buffer = len(numbers), latents_buffers[latents.shape]
            buffer[slot] = latents
            text_buffer[slot, : len(text)] = text
            numbers.append(number)
            lengths.append(len(text))
            if len(numbers) == BATCH_SIZE:
                for slot, length in enumerate(lengths):
                    text_buffer[slot, length : max(lengths)] = 0
                yield numbers, buffer, text_buffer[:, : max(lengths)]
                numbers, lengths = [], []

    def one_by_one(load):
        return lambda order: collated((number, *load(number)) for number in itertools.chain.from_iterable(order))

    files = write_files(root, data)
    ways = {
        MEMORY: one_by_one(data.__getitem__),
        BASE: one_by_one(lambda number: load_pth(files[number, "pth"], weights_only=False)),
        "one .pth per sample, weights_only=True": one_by_one(lambda number: load_pth(files[number, "pth"])),
        "one safetensors per sample": one_by_one(lambda number: load_safetensors(files[number, "safetensors"])),
        "one safetensors per sample, crc32c checked": one_by_one(
            lambda number: load_checked(files[number, "safetensors"])
        ),
        LOADER: data_loader([files[number, "pth"] for number in range(len(data))]),
    }
    for backend in backend_names():
        snapshot = write_cache(root / backend, backend, data)
        segments = sorted((root / backend / "segments").iterdir())
        if backend == "zarr":
            ways[LIGHT], ways[LIGHT_LOADER] = speed_of_light(snapshot, data)
            ways[ZARR] = one_by_one(zarr_loader(segments, data))
        else:
            archives = [str(path) for segment in segments for path in sorted(segment.iterdir())]
            ways["webdataset's iteration, in order"] = lambda _, archives=archives: collated(iterate_tar(archives))
        ways[f"BatchReader, {backend}, crc32c checked"] = batch_reader(snapshot)
        ways[f"Prefetcher, {backend}, 1 thread ahead, crc32c checked"] = prefetcher(snapshot, data)
    return ways


def batch_buffers(longest):
    """Return memory for the latents of a batch by their shape, and for its text."""

    def memory(*shape):
        return whole_pages(2 * math.prod(shape)).view(np.uint16).reshape(shape)

    latents = {shape: memory(BATCH_SIZE, *shape) for shape in NUM_SAMPLES_OF_SHAPE}
    return latents, memory(BATCH_SIZE, longest, TEXT_CHANNELS)


def speed_of_light(snapshot, data):
    """Return ways that make the requests of our reader into reused buffers: by this thread, and by two ahead of it."""
    num_sets = 4  # three in flight, and the one that is looked at
    fds = [os.open(snapshot.array_path(number), os.O_RDONLY) for number in range(len(snapshot.arrays))]
    places = [[Placement(*row) for row in snapshot.placements(name, np.arange(len(data))).tolist()] for name in FIELDS]
    longest = max(len(text) for _, text in data)
    ignored = memoryview(bytearray(1 << 16))

    def request(place, target):
        layout = snapshot.arrays[place.array].layout
        num_bytes, chunk_bytes = place.num_rows * layout.row_bytes, layout.chunk_bytes(place.num_rows)
        target = memoryview(target.reshape(-1).view(np.uint8))
        views = []
        for start in range(0, num_bytes, chunk_bytes):
            end = min(start + chunk_bytes, num_bytes)
            views += [target[start:end], ignored[: start + chunk_bytes - end + CHECKSUM_BYTES]]
        return fds[place.array], views, load_backend(snapshot.backend).offset(layout, place.start)

    def buffer_set():
        latents, text = batch_buffers(longest)
        requests = {
            (number, slot): [
                request(places[0][number], latents[item.shape][slot]),
                request(places[1][number], text[slot]),
            ]
            for number, (item, _) in enumerate(data)
            for slot in range(BATCH_SIZE)
        }

        def read(numbers):
            for slot, number in enumerate(numbers):
                for fd, views, offset in requests[number, slot]:
                    os.preadv(fd, views, offset)
            return numbers, latents[data[numbers[0]][0].shape], text

        return read

    reads = [buffer_set() for _ in range(num_sets)]
    pool = ThreadPoolExecutor(2)

    def ahead(order):
        pending = deque()
        for numbers, read in zip(order, itertools.cycle(reads), strict=False):
            pending.append(pool.submit(read, numbers))
            if len(pending) == num_sets - 1:
                yield pending.popleft().result()
        yield from (batch.result() for batch in pending)

    return (lambda order: map(reads[0], order)), ahead


def batch_reader(snapshot):
    reader = BatchReader(snapshot, FIELDS)
    buffers = reader.buffers()
    return lambda order: map(unpack, (reader.read(batch, buffers) for batch in order))


def prefetcher(snapshot, data):
    """Return a way that lives on between rounds, as in a training; it draws batches of its own."""
    rng = np.random.default_rng(1)
    plan = itertools.chain.from_iterable(batches_of(data, rng) for _ in itertools.count())
    ahead = Prefetcher(BatchReader(snapshot, FIELDS), enumerate(plan))
    return lambda order: (unpack(next(ahead)[1]) for _ in order)


def unpack(batch):
    return batch.positions.tolist(), batch.fields[LATENTS.name], batch.fields[TEXT.name]


def data_loader(paths):
    """Return a way by torch's DataLoader, whose workers live on between rounds and collate in shared memory."""
    order = []

    def collate(samples):
        numbers, latents, text = zip(*samples, strict=True)
        padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(item) for item in text], batch_first=True)
        return numbers, torch.stack([torch.from_numpy(item) for item in latents]), padded

    class Samples(torch.utils.data.Dataset):
        def __getitem__(self, number):
            return number, *load_pth(paths[number], weights_only=False)

    loader = torch.utils.data.DataLoader(
        Samples(), batch_sampler=order, collate_fn=collate, num_workers=2, persistent_workers=True
    )

    def read(batches):
        order[:] = batches
        return ((numbers, latents.numpy(), text.numpy()) for numbers, latents, text in loader)

    return read


def write_cache(root, backend, data):
    cache = Cache.open_or_new(root, backend)
    samples = []
    with cache.writer() as writer:
        for number, sample in enumerate(data):
            key = f"{number:032x}"
            writer.add("sample", key, dict(zip(FIELDS, sample, strict=True)), [LATENTS, TEXT])
            samples.append(SealedSample(key, str(sample[0].shape), f"sample {number}", {"sample": key}))
    return cache.seal(samples, {})


def write_files(root, data):
    files = {}
    for number, sample in enumerate(data):
        tensors = {name: torch.from_numpy(item).view(torch.bfloat16) for name, item in zip(FIELDS, sample, strict=True)}
        for suffix, save in (("pth", torch.save), ("safetensors", safetensors.torch.save_file)):
            files[number, suffix] = root / f"{number}.{suffix}"
            save(tensors, files[number, suffix])
    return files


def bits_of(tensors):
    return [tensors[name].view(torch.uint16).numpy() for name in FIELDS]


def load_pth(path, *, weights_only=True):
    return bits_of(torch.load(path, weights_only=weights_only))  # noqa: TID251 (the format of others, measured)


def load_safetensors(path):
    return bits_of(safetensors.torch.load_file(path))


def load_checked(path):
    content = path.read_bytes()
    crc32c(content)
    return bits_of(safetensors.torch.load(content))


def iterate_tar(archives):
    for sample in webdataset.WebDataset(archives, shardshuffle=False):
        yield int(sample["__key__"], 16), *bits_of(safetensors.torch.load(sample["safetensors"]))


def zarr_loader(segments, data):
    """Return a function from a sample's number to its arrays; samples lie in the order in which they were added."""
    places = {}
    for segment in segments:
        group = zarr.open_group(segment, mode="r")
        shapes = dict(group[LATENTS.name].arrays())
        text = group[f"{TEXT.name}/{TEXT_CHANNELS}"]
        num_left = {name: array.shape[0] for name, array in shapes.items()}
        start = 0
        while any(num_left.values()):
            number = len(places)
            name = "x".join(map(str, data[number][0].shape))
            length = len(data[number][1])
            places[number] = (shapes[name], shapes[name].shape[0] - num_left[name], text, start, start + length)
            num_left[name] -= 1
            start += -(-length // text.chunks[0]) * text.chunks[0]

    def load(number):
        latents, item, text, start, end = places[number]
        return latents[item], text[start:end]

    return load


if __name__ == "__main__":
    main()
