"""Reads shuffled samples of a cache on S3 at a round trip of 20 ms, and the same ones with zarr-python.

``python tests/bench/bench_s3.py`` prints one line per way. The server is SeaweedFS, behind a proxy that
delays every byte by 10 ms each way. All ways return checked data.
"""

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import boto3
import botocore.config
import numpy as np
import obstore.store
import zarr

from cache_store.contract import FieldSpec
from cache_store.local_copies import LocalCopies
from cache_store.object_path import root_of
from cache_store.reader import BatchReader, Prefetcher
from cache_store.store import Cache, SealedSample

ONE_WAY_S = 0.01
USER, PASSWORD = "anyone", "anything"
LATENTS = FieldSpec(name="latents", dtype="bfloat16", dims=("channel", "height", "width"))
SHAPE = (16, 64, 64)
NUM_SAMPLES, BATCH_SIZE, NUM_ROUNDS = 256, 4, 5
ZARR_SHARE = 16  # it is slow, and reads only this part of each round


def main():
    data = np.random.default_rng(0).integers(0, 0x7F80, (NUM_SAMPLES, *SHAPE), np.uint16)
    os.environ.update(AWS_ACCESS_KEY_ID=USER, AWS_SECRET_ACCESS_KEY=PASSWORD, AWS_DEFAULT_REGION="us-east-1")
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder) / "server") as port:
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{start(delay, port)}"
        snapshot = write(Cache.open_or_new(root_of("s3://caches/bench")), data)
        copies = LocalCopies(snapshot.root, Path(folder) / "copies", 10**10, snapshot.segments)
        ways = {
            "zarr-python, sample by sample": zarr_reader(snapshot),
            "ours, sample by sample": single_reader(snapshot),
            "ours, batches read ahead": prefetcher(snapshot, None),
            "ours, a second epoch": prefetcher(snapshot, copies),
        }
        for way in ways.values():
            check(way, data)
        times = {name: [] for name in ways}
        for _ in range(NUM_ROUNDS):
            for name, way in ways.items():
                order = random.sample(range(NUM_SAMPLES), NUM_SAMPLES)
                if name.startswith("zarr"):
                    order = order[: NUM_SAMPLES // ZARR_SHARE]
                begin = time.perf_counter()
                for _ in way(order):
                    pass
                times[name].append((time.perf_counter() - begin) / len(order))
    base = statistics.median(times["zarr-python, sample by sample"])
    print(
        f"{NUM_SAMPLES} samples of {data[0].nbytes / 1e3:.0f} kB, round trip {2e3 * ONE_WAY_S:.0f} ms,"
        f" batches of {BATCH_SIZE}"
    )
    for name, values in times.items():
        seconds = statistics.median(values)
        print(f"{name:32} {1e3 * seconds:8.2f} ms per sample {base / seconds:8.1f}x zarr-python")


def write(cache, data):
    keys = [f"{number:032x}" for number in range(len(data))]
    with cache.writer() as writer:
        for key, item in zip(keys, data, strict=True):
            writer.add("latents", key, {"latents": item}, [LATENTS])
    return cache.seal([SealedSample(key, "all", "bench", {"latents": key}) for key in keys], {})


def zarr_reader(snapshot):
    folder = str(snapshot.segment_folder(0))
    store = obstore.store.S3Store.from_url(folder, client_options={"allow_http": True})
    array = zarr.open_group(zarr.storage.ObjectStore(store, read_only=True), mode="r")["latents/16x64x64"]
    starts = snapshot.placements("latents", np.arange(len(snapshot)))[:, 1].tolist()
    return lambda order: ([number, array[starts[number]]] for number in order)


def single_reader(snapshot):
    reader = BatchReader(snapshot, ["latents"])
    return lambda order: ([number, reader.read([number]).fields["latents"][0]] for number in order)


def prefetcher(snapshot, copies):
    reader = BatchReader(snapshot, ["latents"], num_threads=32, copies=copies)

    def read(order):
        batches = [(order[i : i + BATCH_SIZE],) * 2 for i in range(0, len(order), BATCH_SIZE)]
        with Prefetcher(reader, batches, depth=16, num_threads=8) as ahead:
            for numbers, batch in ahead:
                yield from zip(numbers, batch.fields["latents"], strict=True)

    return read


def check(way, data):
    order = random.sample(range(len(data)), len(data))
    for number, item in way(order):
        assert np.array_equal(item, data[number])


def start(target, *args):
    """Run a server in a process of its own and return its port."""
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=target, args=(theirs, *args), daemon=True).start()
    return ours.recv()


@contextlib.contextmanager
def serve(folder):
    """Run an S3 server over a folder; yield its port."""
    folder.mkdir()
    config = folder / "users.json"
    user = {"name": USER, "credentials": [{"accessKey": USER, "secretKey": PASSWORD}], "actions": ["Admin"]}
    config.write_text(json.dumps({"identities": [user]}), encoding="utf-8")
    names = [f"-{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [Path(sys.executable).with_name("weed"), "server", f"-dir={folder}", "-ip=127.0.0.1", "-s3"]
    command += [f"-s3.config={config}", *(f"{name}={port}" for name, port in ports.items())]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            create_bucket(ports["-s3.port"])
            yield ports["-s3.port"]
        finally:
            server.terminate()


def free_ports(number):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [bound.getsockname()[1] for bound in sockets]


def create_bucket(port):
    retries = botocore.config.Config(retries={"total_max_attempts": 12, "mode": "standard"})
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", config=retries)
    client.create_bucket(Bucket="caches")


def delay(pipe, target_port):
    asyncio.run(_delay(pipe, target_port))


async def _delay(pipe, target_port):
    async def connect(reader, writer):
        upstream, downstream = await asyncio.open_connection("127.0.0.1", target_port)
        for end in (writer, downstream):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.gather(pump(reader, downstream), pump(upstream, writer))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def pump(reader, writer):
    """Pass on every byte when it is ONE_WAY_S old."""
    loop = asyncio.get_running_loop()
    waiting = asyncio.Queue()

    async def send():
        while True:
            due, data = await waiting.get()
            await asyncio.sleep(max(0, due - loop.time()))
            if not data:
                writer.close()
                return
            writer.write(data)

    sender = asyncio.create_task(send())
    data = b"-"
    while data:
        try:
            data = await reader.read(1 << 20)
        except ConnectionError:
            data = b""
        waiting.put_nowait((loop.time() + ONE_WAY_S, data))
    await sender


if __name__ == "__main__":
    main()
