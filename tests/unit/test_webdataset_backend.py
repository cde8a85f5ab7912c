"""Caches with the webdataset backend, as other programs see them: tar, safetensors, the webdataset library."""

import json
import tarfile

import google_crc32c
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import webdataset

from cache_store.backends.webdataset_shards import PLUGIN
from cache_store.contract import STORAGE_DTYPES, FieldSpec
from cache_store.reader import BatchReader
from cache_store.store import Cache, SealedSample

SAFETENSORS_DTYPES = {
    "bfloat16": ("BF16", torch.bfloat16),
    "float32": ("F32", torch.float32),
    "float16": ("F16", torch.float16),
    "int64": ("I64", torch.int64),
    "int32": ("I32", torch.int32),
    "uint8": ("U8", torch.uint8),
}
MASK = FieldSpec(name="mask", dtype="uint8", dims=("token",))
LENGTHS = (3, 1, 40, 7, 21)


def key_of(number):
    return f"{number:032x}"


def latents_of(number, spec):
    shape = (4, 6, 6 + 2 * (number % 2))
    return np.random.default_rng(number).integers(0, 0x3C00, shape).astype(spec.storage_dtype)


def text_of(number, spec):
    return np.random.default_rng(number).integers(0, 100, (LENGTHS[number], 5)).astype(spec.storage_dtype)


def mask_of(number):
    return np.full(3, number, np.uint8)


def specs_of(dtype):
    return (
        FieldSpec(name="latents", dtype=dtype, dims=("channel", "height", "width")),
        FieldSpec(name="prompt_emb", dtype=dtype, dims=("token", "channel"), ragged=True),
    )


def write(root, dtype):
    """Write five samples in two segments; an odd number of bytes precedes the text of each."""
    latents, text = specs_of(dtype)
    cache = Cache.open_or_new(root, "webdataset")
    with cache.writer() as writer:
        for number in range(len(LENGTHS)):
            writer.add("latents", key_of(number), {"latents": latents_of(number, latents)}, [latents])
            fields = {"mask": mask_of(number), "prompt_emb": text_of(number, text)}
            writer.add("text", key_of(number), fields, [MASK, text])
            if number == 2:
                writer.commit()
    return cache


def archives(cache):
    return sorted((cache.root / "segments").rglob("*.tar"))


def bits(tensor):
    """Return a tensor's values in the dtype in which the store hands them over."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_the_webdataset_library_reads_what_was_written(dtype, tmp_path):
    cache = write(tmp_path / "cache", dtype)
    latents, text = specs_of(dtype)
    found = {"latents": [], "text": []}
    for path in archives(cache):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode():
            tensors = safetensors.torch.load(sample["safetensors"])
            description = sample["json"]
            number = int(sample["__key__"], 16)
            expected = (
                {"latents": latents_of(number, latents)}
                if description["unit"] == "latents"
                else {"mask": mask_of(number), "prompt_emb": text_of(number, text)}
            )
            assert description["key"] == sample["__key__"]
            assert description["fields"].keys() == expected.keys()
            assert tensors.keys() == {name + end for name in expected for end in ("", ".crc32c")}
            for name, item in expected.items():
                np.testing.assert_array_equal(bits(tensors[name]), item)
                assert tensors[name].dtype == SAFETENSORS_DTYPES["uint8" if name == "mask" else dtype][1]
                field = description["fields"][name]
                assert field["shape"] == list(item.shape)
                assert field["crc32c"] == tensors[f"{name}.crc32c"].item() == google_crc32c.value(item.tobytes())
            found[description["unit"]].append(number)
    assert {unit: sorted(numbers) for unit, numbers in found.items()} == {unit: list(range(5)) for unit in found}


def test_dtype_and_dims_are_told_to_other_readers(tmp_path):
    cache = write(tmp_path / "cache", "bfloat16")
    path = next(path for path in archives(cache) if path.name.startswith("latents"))
    with tarfile.open(path) as archive:
        content = archive.extractfile(f"{key_of(0)}.safetensors").read()
        description = json.load(archive.extractfile(f"{key_of(0)}.json"))
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["latents"] == {"dtype": "BF16", "shape": [4, 6, 6], "data_offsets": [0, 288]}
    assert description["fields"]["latents"]["dims"] == ["channel", "height", "width"]


def test_an_unpacked_member_is_a_safetensors_file(tmp_path):
    cache = write(tmp_path / "cache", "float32")
    path = next(path for path in archives(cache) if path.name.startswith("text"))
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    with safetensors.safe_open(tmp_path / "unpacked" / f"{key_of(0)}.safetensors", "pt") as file:
        np.testing.assert_array_equal(file.get_tensor("prompt_emb").numpy(), text_of(0, specs_of("float32")[1]))


def test_an_archive_holds_the_records_of_one_unit_and_shape_and_nothing_of_the_machine(tmp_path):
    cache = write(tmp_path / "cache", "bfloat16")
    assert sorted(path.name for path in archives(cache)) == sorted(
        2 * ["latents-4x6x6.tar", "latents-4x6x8.tar", "text-3-5.tar"]
    )
    for path in archives(cache):
        assert path.read_bytes().endswith(bytes(2 * tarfile.BLOCKSIZE))
        with tarfile.open(path) as archive:
            members = archive.getmembers()
        keys = [member.name.partition(".")[0] for member in members[::2]]
        assert keys == sorted(set(keys))
        assert [member.name for member in members] == [
            f"{key}.{suffix}" for key in keys for suffix in ("safetensors", "json")
        ]
        for member in members:
            assert member.isfile()
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.pax_headers == {}


def test_placements_are_where_tarfile_and_safetensors_say(tmp_path):
    cache = write(tmp_path / "cache", "float16")
    text = specs_of("float16")[1]
    keys = [{"latents": key_of(n), "text": key_of(n)} for n in range(5)]
    snapshot = cache.seal([SealedSample(key_of(n), str(n % 2), f"row {n}", keys[n]) for n in range(5)], {})
    for array, start, num_rows, digest in snapshot.placements("prompt_emb", np.arange(5)).tolist():
        with tarfile.open(snapshot.array_path(array)) as archive:
            member = next(
                member for member in archive if member.offset_data <= start < member.offset_data + member.size
            )
            content = archive.extractfile(member).read()
        num_header_bytes = 8 + int.from_bytes(content[:8], "little")
        assert num_header_bytes % 8 == 0
        first, end = json.loads(content[8:num_header_bytes])["prompt_emb"]["data_offsets"]
        assert start == PLUGIN.offset(snapshot.arrays[array].layout, start)
        assert start == member.offset_data + num_header_bytes + first
        assert end - first == num_rows * 5 * 2
        number = int(member.name.partition(".")[0], 16)
        assert content[num_header_bytes + first : num_header_bytes + end] == text_of(number, text).tobytes()
        assert digest == google_crc32c.value(text_of(number, text).tobytes())
        assert content[num_header_bytes + end :][:4] == digest.to_bytes(4, "little")
    batch = BatchReader(snapshot, ["prompt_emb", "mask", "latents"]).read([0, 2, 4])
    assert batch.lengths["prompt_emb"].tolist() == [3, 40, 21]
    np.testing.assert_array_equal(batch.fields["mask"], np.stack([mask_of(n) for n in (0, 2, 4)]))
    np.testing.assert_array_equal(batch.fields["prompt_emb"][2, :21], text_of(4, text))
    assert not batch.fields["prompt_emb"][2, 21:].any()
