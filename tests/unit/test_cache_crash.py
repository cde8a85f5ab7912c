"""Writers that are killed: at every durable step, and at any moment."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from cache_store.contract import FieldSpec
from cache_store.reader import BatchReader
from cache_store.store import Cache, SealedSample
from cache_store.verify import verify

LATENTS = FieldSpec(name="latents", dtype="bfloat16", dims=("channel", "height", "width"))
TEXT = FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel"), ragged=True)

DURABLE_CALLS = ("write", "fsync", "fdatasync", "rename", "replace", "link", "mkdir", "unlink")


def key_of(number):
    return f"{number:032x}"


def record(number):
    rng = np.random.default_rng(number)
    return {
        "latents": rng.integers(0, 0x7F80, (2, 4, 4 + 4 * (number % 2)), np.uint16),
        "prompt_emb": rng.integers(0, 0x7F80, (1 + number % 40, 64), np.uint16),
    }


def write_missing(root, numbers, commit_every, on_commit=lambda: None):
    cache = Cache.open_or_new(root)
    done = cache.committed_keys().get("sample", set())
    with cache.writer() as writer:
        for count, number in enumerate((n for n in numbers if key_of(n) not in done), 1):
            writer.add("sample", key_of(number), record(number), [LATENTS, TEXT])
            if count % commit_every == 0:
                writer.commit()
                on_commit()


def samples_of(numbers):
    return [SealedSample(key_of(n), str(n % 2), f"row {n}", {"sample": key_of(n)}) for n in numbers]


def committed(root):
    if not (root / "store.json").exists():
        return []
    return sorted(int(key, 16) for key in Cache.open(root).committed_keys().get("sample", ()))


def assert_readable(root, numbers):
    """Seal these records and compare each with what was written."""
    if not numbers:
        return
    snapshot = Cache.open(root).seal(samples_of(numbers), {})
    reader = BatchReader(snapshot, ["latents", "prompt_emb"])
    for position, number in enumerate(numbers):
        batch = reader.read([position])
        for name, array in record(number).items():
            np.testing.assert_array_equal(batch.fields[name][0], array)


def kill_at(step):
    """Make this process die in its n-th durable call; a write is left half done."""
    num_calls = 0

    def wrapped(name, call):
        def crash(*args, **kwargs):
            nonlocal num_calls
            num_calls += 1
            if num_calls == step:
                if name == "write":
                    call(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return crash

    for name in DURABLE_CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))


def die_in_child(step, work):
    """Run the work in a child that dies at a step; return whether it did."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            kill_at(step)
            work()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_at_any_step_of_writing_and_sealing_leaves_whole_records(tmp_path):
    numbers = range(4)
    sizes = set()
    step = 0
    while True:
        step += 1
        root = tmp_path / str(step)

        def work(root=root):
            write_missing(root, numbers, commit_every=2)
            Cache.open(root).seal(samples_of(numbers), {})

        died = die_in_child(step, work)
        survivors = committed(root)
        assert survivors in ([], [0, 1], [0, 1, 2, 3])
        sizes.add(len(survivors))
        if (root / "store.json").exists():
            latest = Cache.open(root).latest()
            assert latest is None or (len(latest) == 4 and survivors == [0, 1, 2, 3])
        assert_readable(root, survivors)
        write_missing(root, numbers, commit_every=2)
        assert committed(root) == list(numbers)
        assert_readable(root, list(numbers))
        assert not [line for line in verify(root, full=True) if "snapshots/" in line], "sealing again cures it"
        if not died:
            break
    assert sizes == {0, 2, 4}
    assert step > 50


def writer_main(root, first, last, commit_every):
    write_missing(root, range(first, last), commit_every, on_commit=lambda: print("committed", flush=True))
    print("done", flush=True)


def start_writer(root, first, last):
    program = (
        "import importlib.util, sys\n"
        "from pathlib import Path\n"
        "spec = importlib.util.spec_from_file_location('crash', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "module.writer_main(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), 5)\n"
    )
    command = [sys.executable, "-c", program, __file__, str(root), str(first), str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_writers_killed_again_and_again_lose_and_spoil_nothing(tmp_path):
    root, num_records = tmp_path / "cache", 600
    num_commits = 0
    for round_number in range(4):
        writers = [start_writer(root, 0, num_records // 2), start_writer(root, num_records // 2, num_records)]
        for writer in writers:
            for _ in range(2 + 3 * round_number):
                num_commits += writer.stdout.readline() == "committed\n"
        for writer in writers:
            writer.kill()
            writer.communicate()
        survivors = committed(root)
        assert len(survivors) >= 5 * num_commits
        assert_readable(root, survivors)
    finishers = [start_writer(root, 0, num_records // 2), start_writer(root, num_records // 2, num_records)]
    for writer in finishers:
        assert writer.communicate()[0].endswith("done\n")
    assert committed(root) == list(range(num_records))
    assert_readable(root, list(range(num_records)))

    uninterrupted = tmp_path / "uninterrupted"
    write_missing(uninterrupted, range(num_records), commit_every=5)
    sealed = [Cache.open(folder).seal(samples_of(range(num_records)), {}) for folder in (root, uninterrupted)]
    assert sealed[0].digest == sealed[1].digest
    assert_readable(uninterrupted, list(range(num_records)))
