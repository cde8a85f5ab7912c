"""A disk that refuses in the middle of a write: one clear error, nothing lost that was committed, and it goes on after.

``RLIMIT_FSIZE`` stands for a full disk: the kernel itself refuses the write, at any byte of a file.
"""

import subprocess
import sys

import numpy as np
import pytest

from cache_store.contract import FieldSpec
from cache_store.reader import BatchReader
from cache_store.store import Cache, SealedSample

SPEC = FieldSpec(name="latents", dtype="float32", dims=("channel",))
NUM_RECORDS = 40
WRITE = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from cache_store.contract import CacheError, FieldSpec
from cache_store.store import Cache

root, limit, commit_every, num_records = Path(sys.argv[1]), *map(int, sys.argv[2:])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
spec = FieldSpec(name="latents", dtype="float32", dims=("channel",))
try:
    with Cache.open_or_new(root).writer() as writer:
        for number in range(num_records):
            writer.add("latents", f"{number:032x}", {"latents": np.full(1000, number, "f4")}, [spec])
            if number % commit_every == commit_every - 1:
                writer.commit()
except CacheError as error:
    sys.exit(f"error: {error}")
"""


def write(root, limit_bytes, commit_every):
    command = [sys.executable, "-c", WRITE, root, limit_bytes, commit_every, NUM_RECORDS]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("limit_bytes", "commit_every"), [(9_000, 2), (30_000, 50), (1500, 1), (60_001, 15), (5000, 1)]
)
def test_what_was_committed_stays_and_the_rest_is_written_later(tmp_path, limit_bytes, commit_every):
    root = tmp_path / "cache"
    full = write(root, limit_bytes, commit_every)
    assert full.returncode == 1
    assert full.stderr.startswith(f"error: cache {root}: ")
    assert "File too large" in full.stderr or "was cut short" in full.stderr
    assert len(full.stderr.splitlines()) == 1
    committed = len(Cache.open(root).committed_keys().get("latents", ()))
    assert committed < NUM_RECORDS
    assert committed % commit_every == 0

    assert write(root, 10**9, commit_every).returncode == 0
    cache = Cache.open(root)
    keys = [f"{number:032x}" for number in range(NUM_RECORDS)]
    samples = [SealedSample(sample_id=key, bucket="a", source="row", keys={"latents": key}) for key in keys]
    batch = BatchReader(cache.seal(samples, {}), ["latents"]).read(range(NUM_RECORDS))
    np.testing.assert_array_equal(batch.fields["latents"], np.repeat(np.arange(40, dtype="f4")[:, None], 1000, axis=1))
