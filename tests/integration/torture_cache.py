"""The long form of the cache's kill and damage tests: ``python tests/integration/torture_cache.py [ROUNDS] [CASES]``.

Kill: two writers, a sealer, a garbage collector and a compactor work on one cache and are killed at a random moment,
again and again. What a writer said was committed must still be there, and every snapshot must hold each sample once,
with its values. Damage: a file of a small cache is deleted, cut, emptied, flipped or swapped; see the unit test.
"""

import collections
import contextlib
import functools
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import test_cache_maintain as unit_tests

from cache_store.backends import backend_names
from cache_store.contract import CacheError
from cache_store.maintain import collect_garbage, compact
from cache_store.store import Cache
from cache_store.verify import verify

# What a kill may leave, each of which the next run of a command copes with.
AFTER_A_KILL = re.compile(
    r"segments/\S+ has no journal line|journal/\S+ is empty|journal/\S+ line \d+ is damaged, or its writer was killed"
    r"|snapshots/\d+\.(seal|npz) is missing or damaged"
)
NUM_NEW = 40


def write(root, backend, numbers, acknowledged):
    cache = Cache.open_or_new(root, backend)
    committed = cache.committed_keys().get("text", set())
    missing = [number for number in numbers if unit_tests.key_of(number) not in committed]
    for start in range(0, len(missing), 4):
        with cache.writer() as writer:
            for number in missing[start : start + 4]:
                for unit in unit_tests.SPECS:
                    unit_tests.add(writer, unit, number)
        os.write(acknowledged, b"".join(b"%d\n" % number for number in missing[start : start + 4]))


def committed_numbers(cache):
    keys = cache.committed_keys()
    return sorted(int(key, 16) for key in keys.get("latents", set()) & keys.get("text", set()))


def seal(root):
    cache = Cache.open(root)
    unit_tests.seal(cache, committed_numbers(cache))


def again(work, counts, name):
    """Do a thing until killed; note that it was done, or refused because others were at work."""
    pause = random.Random()  # a seed of its own in each process
    while True:
        try:
            work()
            os.write(counts, f"{name}\n".encode())
        except CacheError:
            os.write(counts, f"{name} refused\n".encode())
        time.sleep(pause.uniform(0, 0.02))


def torture_by_kills(root, backend, num_rounds, rng):
    logs = {
        name: os.open(root.with_suffix(f".{name}"), os.O_RDWR | os.O_CREAT | os.O_APPEND) for name in ("ack", "ops")
    }
    for round_number in range(num_rounds):
        num_samples = NUM_NEW * (round_number + 1)
        works = [
            functools.partial(write, root, backend, range(0, num_samples, 2), logs["ack"]),
            functools.partial(write, root, backend, range(1, num_samples, 2), logs["ack"]),
            lambda: again(lambda: seal(root), logs["ops"], "seal"),
            lambda: again(lambda: compact(Cache.open(root)), logs["ops"], "compact"),
            lambda: again(lambda: collect_garbage(root, keep=1, grace_s=0), logs["ops"], "gc"),
        ]
        children = [multiprocessing.get_context("fork").Process(target=work) for work in works]
        for child in children:
            child.start()
        time.sleep(rng.uniform(0.02, 0.6))
        rng.shuffle(children)
        for child in children:
            child.kill()
        for child in children:
            child.join()
        failed = [child for child in children if child.exitcode == 1]
        assert not failed, f"round {round_number}: a process failed"
        check_after_kill(root, round_number)
    counts = collections.Counter(root.with_suffix(".ops").read_text().splitlines())
    print(
        f"{backend}: {num_rounds} rounds of kills, {len(committed_numbers(Cache.open(root)))} samples, {dict(counts)}"
    )


def check_after_kill(root, round_number):
    acknowledged = {int(line) for line in root.with_suffix(".ack").read_text().splitlines()}
    if not (root / "store.json").exists():
        assert not acknowledged
        return
    cache = Cache.open(root)
    committed = committed_numbers(cache)
    assert acknowledged <= set(committed), f"round {round_number}: lost {sorted(acknowledged - set(committed))}"
    latest = cache.latest()
    if latest is not None:
        numbers = [int(sample.sample_id, 16) - 100 for sample in latest.samples()]
        assert len(set(numbers)) == len(numbers), f"round {round_number}: a sample twice"
        unit_tests.assert_values(latest, numbers)
    lines = [line for line in verify(root, full=True) if not AFTER_A_KILL.match(line)]
    assert not lines, f"round {round_number}: {lines}"
    if committed and round_number % 5 == 0:
        unit_tests.assert_values(unit_tests.seal(cache, committed), committed)


def torture_by_damage(folder, backend, num_cases, rng):
    whole = folder / f"whole-{backend}"
    unit_tests.build(whole, backend)
    cases = collections.Counter()
    for _ in range(num_cases):
        name, kind = rng.choice(unit_tests.files_of(whole)), rng.choice(unit_tests.KINDS)
        unit_tests.check_one_damage(whole, folder / "damaged", name, kind, rng)
        cases[kind] += 1
    print(f"{backend}: {num_cases} cases of damage found and repaired, {dict(cases)}")


def main(num_rounds=100, num_cases=1000):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        for backend in backend_names():
            torture_by_damage(Path(name), backend, num_cases, rng)
            torture_by_kills(Path(name) / f"cache-{backend}", backend, num_rounds, rng)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
