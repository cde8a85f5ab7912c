"""What tests of stage 1 share: how to read, compare and damage its small caches and data sets."""

import numpy as np

from cache_store.reader import BatchReader
from cache_store.store import Cache


def read_all(cache_dir):
    """Return the fields of every sample as the reader gives them."""
    snapshot = Cache.open(cache_dir).latest()
    reader = BatchReader(snapshot, ["latents", "prompt_emb"])
    samples = {}
    for index in range(len(snapshot)):
        batch = reader.read([index])
        samples[snapshot.sample_id(index)] = {name: array[0].copy() for name, array in batch.fields.items()}
    return samples


def assert_same(one, other):
    assert list(one) == list(other)
    for sample_id, fields in one.items():
        for name, array in fields.items():
            np.testing.assert_array_equal(array, other[sample_id][name])


def num_committed(cache_dir):
    try:
        return sum(map(len, Cache.open(cache_dir).committed_keys().values()))
    except FileNotFoundError:
        return 0


def truncate_jpeg(photos):
    image = photos / (photos / "metadata.csv").read_text("utf-8").splitlines()[3].split(",")[0]
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    return image.name


def assert_refused(finished, *words):
    """One line, exit code 2, each of the words in it."""
    assert finished.returncode == 2, finished.stderr
    line = finished.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in finished.stderr
    for word in words:
        assert word in line, line
