"""What every cache backend must do: the same values back, deterministic bytes, damage noticed, and foreign readers."""

import itertools
import math
import re
import shutil

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_store.backends import backend_names, load_backend
from cache_store.contract import STORAGE_DTYPES, CacheCorrupt, CacheSchemaError, FieldSpec
from cache_store.reader import BatchReader
from cache_store.store import Cache, SealedSample

BACKENDS = backend_names()


def fixed(dtype, num_dims):
    return FieldSpec(name=f"f_{dtype}", dtype=dtype, dims=tuple(f"d{i}" for i in range(num_dims)))


def ragged(dtype):
    return FieldSpec(name=f"r_{dtype}", dtype=dtype, dims=("row", "column"), ragged=True)


def random_item(rng, spec, shape):
    dtype = np.dtype(spec.storage_dtype)
    if spec.dtype == "bfloat16":
        # every finite bit pattern: sign, exponents below all ones, mantissa
        return (rng.integers(0, 0x7F80, shape) | (rng.integers(0, 2, shape) << 15)).astype(dtype)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def key_of(number):
    return f"{number:032x}"


def write(root, backend, records, specs, commit_after=()):
    cache = Cache.open_or_new(root, backend)
    with cache.writer() as writer:
        for number, record in enumerate(records):
            assert writer.add("unit", key_of(number), record, specs)
            if number in commit_after:
                writer.commit()
    return cache


def seal(cache, buckets):
    return cache.seal(
        [SealedSample(key_of(n), bucket, f"row {n}", {"unit": key_of(n)}) for n, bucket in enumerate(buckets)], {}
    )


def assert_holds(batch, records, specs):
    for spec in specs:
        for slot, record in enumerate(records):
            item = record[spec.name]
            found = batch.fields[spec.name][slot]
            np.testing.assert_array_equal(found[: len(item)] if spec.ragged else found, item)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_batches_hold_the_values_that_were_written(backend, data, tmp_path):
    root = tmp_path / "cache"
    shutil.rmtree(root, ignore_errors=True)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    item_shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    width = data.draw(st.sampled_from([1, 3, 64, 700, 3000]))
    specs = [fixed(data.draw(st.sampled_from(list(STORAGE_DTYPES))), len(item_shape))]
    specs.append(ragged(data.draw(st.sampled_from(list(STORAGE_DTYPES)))))
    num_rows = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=8))
    records = [
        {specs[0].name: random_item(rng, specs[0], item_shape), specs[1].name: random_item(rng, specs[1], (n, width))}
        for n in num_rows
    ]
    commits = data.draw(st.sets(st.integers(0, len(records)), max_size=3))
    snapshot = seal(write(root, backend, records, specs, commits), ["b"] * len(records))
    positions = data.draw(st.lists(st.integers(0, len(records) - 1), min_size=1, max_size=6))

    batch = BatchReader(snapshot, [spec.name for spec in specs]).read(positions)

    longest = max(num_rows[position] for position in positions)
    expected = np.zeros((len(positions), longest, width), specs[1].storage_dtype)
    for slot, position in enumerate(positions):
        expected[slot, : num_rows[position]] = records[position][specs[1].name]
    np.testing.assert_array_equal(batch.fields[specs[1].name], expected)
    np.testing.assert_array_equal(
        batch.fields[specs[0].name], np.stack([records[position][specs[0].name] for position in positions])
    )
    assert batch.lengths[specs[1].name].tolist() == [num_rows[position] for position in positions]
    assert batch.sample_ids == tuple(key_of(position) for position in positions)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_records_give_same_bytes_and_the_journal_knows_them(backend, tmp_path):
    rng = np.random.default_rng(0)
    specs = [fixed("bfloat16", 3), ragged("float32")]
    records = [
        {
            specs[0].name: random_item(rng, specs[0], (4, 6, 8 + n % 2)),
            specs[1].name: random_item(rng, specs[1], (n, 9)),
        }
        for n in range(1, 6)
    ]
    contents = []
    for run in "ab":
        folder = tmp_path / run
        folder.mkdir()
        segment = load_backend(backend).open_segment(folder)
        for number, record in enumerate(records):
            segment.append("unit", key_of(number), record, specs)
        _, files = segment.finish()
        found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert files == {name: (len(data), google_crc32c.value(data)) for name, data in found.items()}
        contents.append(found)
    assert contents[0] == contents[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flipped_byte_is_noticed_or_lies_outside_of_every_item(backend, tmp_path):
    rng = np.random.default_rng(1)
    specs = [fixed("uint8", 2), ragged("bfloat16")]
    records = [
        {specs[0].name: random_item(rng, specs[0], (3, 5)), specs[1].name: random_item(rng, specs[1], (n, 64))}
        for n in (1, 33)
    ]
    snapshot = seal(write(tmp_path / "cache", backend, records, specs), ["b", "b"])
    names = [spec.name for spec in specs]
    for path in {snapshot.array_path(number) for number in range(len(snapshot.arrays))}:
        original = path.read_bytes()
        noticed = np.zeros(len(original), bool)
        for place in range(0, len(original), 1 + len(original) // 400):
            path.write_bytes(original[:place] + bytes([original[place] ^ 0x10]) + original[place + 1 :])
            try:
                batch = BatchReader(snapshot, names).read([0, 1])
            except CacheCorrupt as error:
                assert re.search(r"sample 0+[01] \(row [01]\)", str(error))  # noqa: PT017
                noticed[place] = True
            else:
                assert_holds(batch, records, specs)
        path.write_bytes(original)
        for place in range(0, len(original), 1 + len(original) // 400):
            rows = [row.tobytes() for record in records for item in record.values() for row in item]
            inside = any(original.find(row, max(0, place - len(row) + 1), place + len(row)) >= 0 for row in rows)
            assert noticed[place] or not inside
        assert noticed.any()
    assert_holds(BatchReader(snapshot, names).read([0, 1]), records, specs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_files_of_one_size_that_changed_places_are_noticed(backend, tmp_path):
    rng = np.random.default_rng(3)
    spec = fixed("bfloat16", 2)
    records = [{spec.name: random_item(rng, spec, shape)} for shape in [(4, 6), (6, 4), (4, 6), (6, 4)]]
    snapshot = seal(write(tmp_path / "cache", backend, records, [spec], commit_after={1}), "abab")
    paths = sorted(snapshot.array_path(number) for number in range(len(snapshot.arrays)))
    assert len({path.stat().st_size for path in paths}) == 1
    contents = {path: path.read_bytes() for path in paths}
    for first, second in itertools.combinations(paths, 2):
        first.write_bytes(contents[second])
        second.write_bytes(contents[first])
        num_noticed = 0
        for position in range(4):
            try:
                batch = BatchReader(snapshot, [spec.name]).read([position])
            except CacheCorrupt:
                num_noticed += 1
            else:
                np.testing.assert_array_equal(batch.fields[spec.name][0], records[position][spec.name])
        assert num_noticed == 2
        first.write_bytes(contents[first])
        second.write_bytes(contents[second])


@pytest.mark.parametrize("backend", BACKENDS)
def test_units_whose_shapes_are_the_same_keep_apart(backend, tmp_path):
    specs = {unit: FieldSpec(name=f"of_{unit}", dtype="int32", dims=("d",)) for unit in ("a", "a_3", "b")}
    cache = Cache.open_or_new(tmp_path / "cache", backend)
    with cache.writer() as writer:
        for number, (unit, spec) in enumerate(specs.items()):
            writer.add(unit, key_of(0), {spec.name: np.full(3, number, np.int32)}, [spec])
        for unit in ("a-3", "../a", "A", ""):
            with pytest.raises(ValueError, match="is not lower-case letters, digits and _"):
                writer.add(unit, key_of(0), {"x": np.ones(3, np.int32)}, [specs["a"]])
    snapshot = cache.seal([SealedSample(key_of(0), "b", "row 0", dict.fromkeys(specs, key_of(0)))], {})
    batch = BatchReader(snapshot, list(snapshot.fields)).read([0])
    assert {name: values[0].tolist() for name, values in batch.fields.items()} == {
        spec.name: [number] * 3 for number, spec in enumerate(specs.values())
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_store_adds_at_most_three_percent_to_its_payload(backend, tmp_path):
    rng = np.random.default_rng(4)
    specs = {
        "latents": FieldSpec(name="latents", dtype="bfloat16", dims=("channel", "frame", "height", "width")),
        "text": FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel"), ragged=True),
    }
    cache = Cache.open_or_new(tmp_path / "cache", backend)
    samples, payload_bytes = [], 0
    with cache.writer() as writer:
        for number in range(40):
            height, width = [(128, 128), (96, 160), (160, 96), (112, 144)][number % 4]
            shapes = {"latents": (16, 1, height, width), "text": (int(rng.integers(20, 300)), 3584)}
            for unit, shape in shapes.items():
                item = random_item(rng, specs[unit], shape)
                writer.add(unit, key_of(number), {specs[unit].name: item}, [specs[unit]])
                payload_bytes += item.nbytes
            keys = dict.fromkeys(shapes, key_of(number))
            samples.append(SealedSample(key_of(number), f"{height}x{width}", f"row {number}", keys))
    assert cache.seal(samples, {}).payload_bytes == payload_bytes
    disk_bytes = sum(path.stat().st_size for path in cache.root.rglob("*") if path.is_file())
    assert payload_bytes < disk_bytes <= 1.03 * payload_bytes


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_says_what_its_backend_is(backend, tmp_path):
    spec = fixed("float32", 1)
    write(tmp_path / "cache", backend, [{spec.name: np.ones(3, np.float32)}], [spec])
    assert Cache.open(tmp_path / "cache").backend == backend
    for other in set(BACKENDS) - {backend}:
        with pytest.raises(CacheSchemaError, match=f"has backend '{backend}', not '{other}'; set cache_backend"):
            Cache.open_or_new(tmp_path / "cache", other)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_zarr_python_reads_what_the_reader_reads(dtype, tmp_path):
    rng = np.random.default_rng(2)
    scalar = FieldSpec(name="scalar", dtype=dtype, dims=())
    specs = [fixed(dtype, 3), ragged(dtype), scalar]
    shapes = [(2, 4, 6 + 2 * (n % 2)) for n in range(7)]
    num_rows = [1, 200, 31, 32, 33, 7, 64]
    records = [
        {
            specs[0].name: random_item(rng, specs[0], shape),
            specs[1].name: random_item(rng, specs[1], (rows, 40)),
            "scalar": random_item(rng, scalar, ()),
        }
        for shape, rows in zip(shapes, num_rows, strict=True)
    ]
    cache = write(tmp_path / "cache", "zarr", records, specs, commit_after={3})
    snapshot = seal(cache, map(str, shapes))
    reader = BatchReader(snapshot, [spec.name for spec in specs])

    seen = 0
    for folder in sorted((cache.root / "segments").iterdir()):
        group = zarr.open_group(folder, mode="r")
        assert {path: type(node) for path, node in group.members()} == {spec.name: zarr.Group for spec in specs}
        next_item, next_row = {}, 0
        for number in range(seen, seen + group["scalar/scalar"].shape[0]):
            batch = reader.read([number])
            path = f"{specs[0].name}/{'x'.join(map(str, shapes[number]))}"
            place = next_item.setdefault(path, 0)
            next_item[path] += 1
            np.testing.assert_array_equal(group[path][place], records[number][specs[0].name])
            np.testing.assert_array_equal(batch.fields[specs[0].name][0], group[path][place])
            text = group[f"{specs[1].name}/40"]
            rows = text[next_row : next_row + num_rows[number]]
            np.testing.assert_array_equal(rows, records[number][specs[1].name])
            np.testing.assert_array_equal(batch.fields[specs[1].name][0], rows)
            next_row += math.ceil(num_rows[number] / text.chunks[0]) * text.chunks[0]
            np.testing.assert_array_equal(group["scalar/scalar"][number - seen], records[number]["scalar"])
        assert next_row == text.shape[0]
        assert all(group[path].shape[0] == count for path, count in next_item.items())
        array = group[f"{specs[1].name}/40"]
        assert array.attrs["torch_dtype"] == dtype
        assert array.metadata.dimension_names == ("row", "column")
        seen += group["scalar/scalar"].shape[0]
    assert seen == len(records)


def test_an_unknown_backend_is_refused(tmp_path):
    with pytest.raises(CacheSchemaError, match="'tape' is not one of"):
        Cache.open_or_new(tmp_path / "cache", "tape")
