"""A cache on ``s3://``, from its first record to a trained LoRA, against a real S3 API on loopback."""

import concurrent.futures
import contextlib
import http.client
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import obstore.store
import pytest
import zarr

from cache_store.backends import load_backend
from cache_store.contract import CacheCorrupt, CacheError, FieldSpec
from cache_store.durable import file_sizes, replace_file
from cache_store.export import export
from cache_store.journal import RecordIndex, read_commits
from cache_store.local_copies import LocalCopies
from cache_store.maintain import compact
from cache_store.object_path import root_of
from cache_store.reader import BatchReader
from cache_store.snapshot import publish, seal_path, tabulate
from cache_store.store import Cache, SealedSample
from cache_store.verify import verify
from diffsynth_pipe.cli import main
from diffsynth_pipe.stages.data_process import data_process
from diffsynth_pipe.stages.train import train

LATENTS = FieldSpec(name="latents", dtype="bfloat16", dims=("channel", "height", "width"))
TEXT = FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel"), ragged=True)
SAMPLE_BYTES = 4 * 16 * 16 * 2


def key_of(number):
    return f"{number:032x}"


def fields_of(number):
    rng = np.random.default_rng(number)
    return {
        "latents": rng.integers(0, 0x7F80, (4, 16, 16), np.uint16),
        "prompt_emb": rng.integers(0, 0x7F80, (number % 7 + 1, 8), np.uint16),
    }


def add_samples(cache, numbers):
    with cache.writer() as writer:
        for number in numbers:
            fields = fields_of(number)
            writer.add("latents", key_of(number), {"latents": fields["latents"]}, [LATENTS])
            writer.add("text", key_of(number), {"prompt_emb": fields["prompt_emb"]}, [TEXT])


def samples_of(numbers):
    return [
        SealedSample(key_of(n), "16x16", f"metadata.csv row {n}", {"latents": key_of(n), "text": key_of(n)})
        for n in numbers
    ]


def assert_holds(snapshot, numbers, **options):
    with BatchReader(snapshot, ["latents", "prompt_emb"], num_threads=4, **options) as reader:
        batch = reader.read(np.arange(len(numbers)))
    for place, number in enumerate(numbers):
        expected = fields_of(number)
        np.testing.assert_array_equal(batch.fields["latents"][place], expected["latents"])
        length = batch.lengths["prompt_emb"][place]
        np.testing.assert_array_equal(batch.fields["prompt_emb"][place, :length], expected["prompt_emb"])


@pytest.fixture
def location(bucket, request):
    """The location of a cache that is not there yet."""
    return f"s3://{bucket}/{request.node.name.translate(str.maketrans('[]', '--'))}"


@pytest.fixture(params=["zarr", "webdataset"])
def cache(location, request):
    """A cache of eight samples that two writers wrote, not sealed."""
    cache = Cache.open_or_new(root_of(location), request.param)
    add_samples(cache, range(5))
    add_samples(cache, range(4, 8))
    return cache


def objects_of(s3, location):
    bucket, _, prefix = location.removeprefix("s3://").partition("/")
    listed = s3.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", [])
    return {entry["Key"].removeprefix(f"{prefix}/"): entry["ETag"] for entry in listed}


def edit_object(s3, path, change):
    bucket, _, key = str(path).removeprefix("s3://").partition("/")
    data = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    s3.put_object(Bucket=bucket, Key=key, Body=change(data))


def test_what_was_written_is_read(cache, location):
    sealed = cache.seal(samples_of([3, 1, 7, 0]), {"family": "none"})
    snapshot = Cache.open(root_of(location)).latest()
    assert snapshot.digest == sealed.digest
    assert_holds(snapshot, [3, 1, 7, 0])
    assert verify(cache.root, full=True) == []


def test_zarr_python_reads_it_over_s3(location):
    cache = Cache.open_or_new(root_of(location))
    add_samples(cache, range(3))
    snapshot = cache.seal(samples_of(range(3)), {})
    array = snapshot.placements("latents", [0])[0, 0]
    store = obstore.store.S3Store.from_url(str(snapshot.segment_folder(array)), client_options={"allow_http": True})
    group = zarr.open_group(zarr.storage.ObjectStore(store, read_only=True), mode="r")
    expected = np.stack([fields_of(number)["latents"] for number in range(3)])
    np.testing.assert_array_equal(group["latents/4x16x16"][:], expected)


def test_a_second_sealer_is_refused_and_overwrites_nothing(cache, location, s3):
    cache.seal(samples_of(range(4)), {})
    before = objects_of(s3, location)
    columns, _ = tabulate(samples_of(range(8)), RecordIndex(read_commits(cache.root)))
    with pytest.raises(FileExistsError):
        publish(cache.root, 1, columns, {})
    assert objects_of(s3, location) == before
    # one that looks again takes the next number
    assert Cache.open(root_of(location)).seal(samples_of(range(8)), {}).number == 2
    assert before.items() <= objects_of(s3, location).items()


@pytest.mark.parametrize("where", ["disk", "s3"])
@pytest.mark.parametrize("left", [None, b"half a li"])
def test_a_snapshot_whose_sealer_was_killed_is_sealed(location, tmp_path, where, left):
    cache = Cache.open_or_new(root_of(location) if where == "s3" else tmp_path / "cache")
    add_samples(cache, range(4))
    snapshot = cache.seal(samples_of(range(4)), {})
    seal = seal_path(cache.root, snapshot.number)
    seal.unlink()
    if left is not None:
        replace_file(seal, left, tmp_path)
    assert verify(cache.root, full=True) == ["snapshots/000001.seal is missing or damaged"]
    assert cache.seal(samples_of(range(4)), {}).number == 1
    assert verify(cache.root, full=True) == []


class LossyProxy(BaseHTTPRequestHandler):
    """Hands requests on to the S3 server; the first answer to each create-only put is lost, and an error in its stead.

    The class itself counts, as the server makes a handler for each connection.
    """

    protocol_version = "HTTP/1.1"
    backend: str
    lost: set

    def log_message(self, *args):
        pass

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection(self.backend)
        connection.request(self.command, self.path, body, dict(self.headers))
        with connection.getresponse() as response:
            status, headers, data = response.status, response.getheaders(), response.read()
        if self.headers["If-None-Match"] and self.path not in self.lost:
            self.lost.add(self.path)
            status, headers, data = 503, [], b""
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer  # noqa: N815 - http.server's names


def test_an_answer_that_was_lost_costs_nothing(s3, s3_server, monkeypatch):
    s3.create_bucket(Bucket="lossy")
    LossyProxy.backend, LossyProxy.lost = s3_server["AWS_ENDPOINT_URL"].removeprefix("http://"), set()
    with ThreadingHTTPServer(("127.0.0.1", 0), LossyProxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        cache = Cache.open_or_new(root_of("s3://lossy/cache"))
        add_samples(cache, range(4))
        assert cache.seal(samples_of(range(4)), {}).number == 1
        assert {path.rpartition(".")[2] for path in LossyProxy.lost} == {"json", "jsonl", "npz"}
        assert len(list((cache.root / "journal").iterdir())) == 1, "the segment was written once"
        assert verify(cache.root, full=True) == []
        proxy.shutdown()


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from cache_store.object_path import root_of
from cache_store.store import Cache
import test_object_storage as shared

cache = Cache.open_or_new(root_of(sys.argv[1]))
with cache.writer(commit_seconds=float(sys.argv[3])) as writer:
    for number in range(int(sys.argv[4])):
        writer.add("latents", shared.key_of(number), {"latents": shared.fields_of(number)["latents"]}, [shared.LATENTS])
        print(number, flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def writing(location, *, commit_seconds, num_records):
    """Start a writer in a process of its own, wait until it has seven records, and kill it in the end."""
    command = [sys.executable, "-c", WRITER, location, str(Path(__file__).parent), str(commit_seconds)]
    with subprocess.Popen(
        [*command, str(num_records)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert "6\n" in iter(writer.stdout.readline, "")
        yield writer
        writer.kill()


def test_kill_9_loses_only_what_was_in_flight(location):
    with writing(location, commit_seconds=0, num_records=1000):
        pass
    cache = Cache.open(root_of(location))
    committed = cache.committed_keys()["latents"]
    # with commit_seconds=0 the line of a record comes after its commit
    assert committed >= {key_of(number) for number in range(7)}
    assert len(committed) < 1000
    add_samples(cache, range(12))
    assert_holds(cache.seal(samples_of(range(12)), {}), range(12))
    assert verify(cache.root, full=True) == []


def test_what_a_killed_writer_left_on_this_machine_is_removed(location, tmp_path, monkeypatch):
    """And what one that is alive has there is not."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    scratch = tmp_path / f"diffsynth-pipe-{os.getuid()}"
    with writing(location, commit_seconds=1000, num_records=7):
        (killed,) = scratch.iterdir()
        assert file_sizes(killed)
    with writing(f"{location}-alive", commit_seconds=1000, num_records=7) as writer:
        (alive,) = scratch.iterdir()
        assert alive != killed
        add_samples(Cache.open_or_new(root_of(f"{location}-own")), range(3))
        assert alive in scratch.iterdir()
        assert file_sizes(alive)
        writer.communicate()
        assert writer.returncode == 0
    committed = Cache.open(root_of(f"{location}-alive")).committed_keys()["latents"]
    assert committed == {key_of(number) for number in range(7)}
    assert not any(file_sizes(folder) for folder in scratch.iterdir())


def test_what_was_read_is_read_again_without_the_object_store(cache, s3, tmp_path):
    snapshot = cache.seal(samples_of(range(8)), {})
    copies = LocalCopies(snapshot.root, tmp_path, 10**9, snapshot.segments)
    assert_holds(snapshot, range(8), copies=copies)
    for array in range(len(snapshot.arrays)):
        snapshot.array_path(array).unlink()
    again = LocalCopies(snapshot.root, tmp_path, 10**9, snapshot.segments)
    assert_holds(snapshot, range(8), copies=again)
    with pytest.raises(CacheCorrupt, match="is in a file that is missing"):
        assert_holds(snapshot, range(8))


def test_a_torn_copy_is_fetched_again(cache, tmp_path):
    snapshot = cache.seal(samples_of(range(8)), {})
    assert_holds(snapshot, range(8), copies=LocalCopies(snapshot.root, tmp_path, 10**9, snapshot.segments))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size // 2))
    copies = LocalCopies(snapshot.root, tmp_path, 10**9, snapshot.segments)
    assert_holds(snapshot, range(8), copies=copies)
    assert_holds(snapshot, range(8), copies=copies)


def test_copies_keep_within_their_limit(location, tmp_path):
    cache = Cache.open_or_new(root_of(location))
    add_samples(cache, range(64))
    snapshot = cache.seal(samples_of(range(64)), {})
    limit = 20 * SAMPLE_BYTES
    copies = LocalCopies(snapshot.root, tmp_path, limit, snapshot.segments)
    for _ in range(2):
        assert_holds(snapshot, range(64), copies=copies)
    on_disk = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file())
    num_pages = 2 * len(snapshot.arrays)  # whole pages of the filesystem lie under the edges of what was kept
    assert 0 < on_disk <= limit + num_pages * 4096
    # segments that are not read any more make room for those that are
    LocalCopies(snapshot.root, tmp_path, 1, [])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_of_copies_that_cannot_be_is_named(cache, tmp_path):
    snapshot = cache.seal(samples_of(range(8)), {})
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CacheError, match="taken"):
        LocalCopies(snapshot.root, tmp_path / "taken", 10**9, snapshot.segments)


def test_damage_is_named(cache, s3):
    snapshot = cache.seal(samples_of(range(8)), {})
    path = snapshot.array_path(snapshot.placements("latents", [0])[0, 0])
    row = snapshot.placements("latents", [0])[0]
    offset = load_backend(snapshot.backend).offset(snapshot.arrays[row[0]].layout, int(row[1]))
    edit_object(s3, path, lambda data: data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
    with pytest.raises(CacheCorrupt, match=rf"latents of sample {key_of(0)} .* fails its checksum"):
        assert_holds(snapshot, range(8))
    assert any(f"latents of sample {key_of(0)}" in line for line in verify(cache.root, full=True))
    edit_object(s3, path, lambda data: data[: len(data) // 2])
    assert any("bytes, not" in line for line in verify(cache.root, full=False))
    with pytest.raises(CacheCorrupt, match="bytes, not"):
        snapshot.check_files()


def test_what_a_deleted_object_held_is_written_again(cache):
    snapshot = cache.seal(samples_of(range(8)), {})
    snapshot.array_path(0).unlink()
    committed = cache.committed_keys()
    assert 0 < sum(map(len, committed.values())) < 16
    add_samples(cache, [n for n in range(8) if not all(key_of(n) in committed[unit] for unit in ("latents", "text"))])
    assert_holds(cache.seal(samples_of(range(8)), {}), range(8))


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_of_two_first_writers_with_different_backends_one_is_refused(location, tmp_path, where):
    root = root_of(location) if where == "s3" else tmp_path / "cache"
    caches = [Cache.open_or_new(root, backend) for backend in ("zarr", "webdataset")]
    add_samples(caches[0], [0])
    with pytest.raises(CacheError, match="has backend 'zarr', not 'webdataset'"):
        add_samples(caches[1], [1])
    assert Cache.open(root).backend == "zarr"
    assert_holds(caches[0].seal(samples_of([0]), {}), [0])


def test_a_forked_reader_is_refused_and_a_spawned_one_reads(location):
    cache = Cache.open_or_new(root_of(location))
    add_samples(cache, [0])
    snapshot = cache.seal(samples_of([0]), {})
    outcomes = {}
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                outcomes[method] = pool.submit(snapshot.array_path(0).read_bytes).result(60)
            except CacheError as error:
                outcomes[method] = str(error)
    assert outcomes["fork"].endswith("start the processes that read by spawn")
    assert outcomes["spawn"] == snapshot.array_path(0).read_bytes()


def test_small_segments_are_compacted(location):
    cache = Cache.open_or_new(root_of(location))
    for number in range(6):
        add_samples(cache, [number])
    cache.seal(samples_of(range(6)), {})
    assert compact(cache) == (6, 1)
    assert_holds(cache.latest(), range(6))


def test_a_cache_goes_to_disk_and_back(cache, location, tmp_path):
    digest = cache.seal(samples_of(range(8)), {}).digest
    back = root_of(f"{location}-back")
    for source, target in ((cache.root, tmp_path / "disk"), (tmp_path / "disk", back)):
        assert export(source, target, "webdataset").num_copied == 16
        assert export(source, target, "webdataset").was_complete
    snapshot = Cache.open(back).latest()
    assert snapshot.digest == digest
    assert_holds(snapshot, range(8))
    with pytest.raises(CacheError, match="is or lies in the cache that is exported"):
        export(cache.root, cache.root / "inside", "zarr")


def test_a_bucket_that_is_not_there_is_one_clear_line(s3, capsys):
    assert main(["cache", "info", "s3://absent-bucket/cache"]) == 2
    assert capsys.readouterr().err.startswith("error: s3://absent-bucket/cache is not a cache")
    with pytest.raises(CacheError, match="absent-bucket"):
        add_samples(Cache.open_or_new(root_of("s3://absent-bucket/cache")), [0])


def test_copies_lie_where_asked_and_no_room_means_none(location, run_config, tmp_path):
    data_process(run_config(cache_path=location))
    for gigabytes in (0, 1):
        folder = tmp_path / f"copies-{gigabytes}"
        train(
            run_config(
                task="sft:train",
                cache_path=location,
                cache_copies_path=str(folder),
                cache_copies_gb=gigabytes,
                output_path=str(tmp_path / f"output-{gigabytes}"),
                max_steps=1,
                num_validation_samples=0,
            )
        )
        assert folder.exists() == (gigabytes > 0)


def test_the_command_line_from_photos_to_a_lora(location, run_file, tmp_path, cli, capsys):
    def command(*arguments):
        code = main([*map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    loras = []
    for cache_path in (location, str(tmp_path / "local")):
        run = run_file(cache_path=cache_path, output_path=str(tmp_path / f"output-{len(loras)}"))
        assert command("data-process", run)[0] == 0
        assert "hit" in command("plan", run)[1]
        trained = cli("train", str(run))
        assert trained.returncode == 0, trained.stderr
        loras.append(next((tmp_path / f"output-{len(loras)}").rglob("*.safetensors")).read_bytes())
    assert loras[0] == loras[1]

    assert f"{location}  6 samples" in command("cache", "ls", location)[1]
    assert "latents 6 (0 duplicates saved)" in command("cache", "info", location)[1]
    assert command("cache", "verify", location) == (0, f"{location}: every byte is what was written\n", "")
    assert "sample " in command("cache", "explain", location, run_file(cache_path=location))[1]
    for refused, cure in (("repair", "run data-process again"), ("gc", "cache export")):
        code, _, error = command("cache", refused, location)
        assert code == 2
        assert error.count("\n") == 1
        assert cure in error
