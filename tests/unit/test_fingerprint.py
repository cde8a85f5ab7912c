import json
import multiprocessing
import os
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from blake3 import blake3

from cache_store.contract import FieldSpec
from diffsynth_pipe import fingerprint
from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import ComponentFiles, EncodeUnit
from diffsynth_pipe.errors import DataError
from diffsynth_pipe.fingerprint import (
    bytes_digest,
    component_digest,
    digest_files,
    file_digest,
    json_digest,
    record_key,
    run_name,
    unit_recipe,
)

# The first 32 hex digits of BLAKE3 of the empty input, from the official test vectors.
BLAKE3_OF_NOTHING = "af1349b9f5f9a1a6a0404dea36dcc949"


@pytest.fixture
def database(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "diffsynth-pipe" / "digests.sqlite3"


@pytest.fixture
def an_hour_later(monkeypatch):
    """Files just written count as settled."""
    now_ns = time.time_ns
    monkeypatch.setattr(fingerprint, "time", SimpleNamespace(time_ns=lambda: now_ns() + 3600 * 10**9))


def rows(database):
    with sqlite3.connect(database) as connection:
        return connection.execute("SELECT path, digest FROM digests").fetchall()


def poison(database):
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE digests SET digest = 'remembered'")


def test_digests_are_blake3_of_the_bytes(tmp_path, database):
    content = os.urandom(3 * fingerprint.BLOCK_BYTES + 17)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "empty").write_bytes(b"")
    assert file_digest(tmp_path / "a") == bytes_digest(content) == blake3(content).hexdigest()[:32]
    assert file_digest(tmp_path / "empty") == BLAKE3_OF_NOTHING


def test_many_files_keep_their_order_and_may_repeat(tmp_path, database):
    paths = [tmp_path / f"{index}" for index in range(20)]
    for index, path in enumerate(paths):
        path.write_bytes(bytes([index]))
    asked = [*reversed(paths), paths[3]]
    assert digest_files(asked, num_threads=4) == [bytes_digest(path.read_bytes()) for path in asked]
    assert digest_files([], num_threads=4) == []


def test_a_settled_file_is_hashed_once(tmp_path, database, an_hour_later):
    path = tmp_path / "a"
    path.write_bytes(b"content")
    file_digest(path)
    poison(database)
    (tmp_path / "link").symlink_to(path)
    assert digest_files([path, tmp_path / "link"], num_threads=1) == ["remembered", "remembered"]


def test_a_file_that_just_changed_is_not_remembered(tmp_path, database):
    path = tmp_path / "a"
    path.write_bytes(b"content")
    file_digest(path)
    assert rows(database) == []


@pytest.mark.parametrize("replaced", [False, True], ids=["in place", "renamed over"])
def test_new_content_of_same_size_and_mtime_is_hashed(tmp_path, database, an_hour_later, replaced):
    path = tmp_path / "a"
    path.write_bytes(b"content")
    before = path.stat()
    file_digest(path)
    target = tmp_path / "new" if replaced else path
    target.write_bytes(b"CONTENT")
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    target.replace(path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert file_digest(path) == bytes_digest(b"CONTENT")
    assert len(rows(database)) == 1


def test_a_broken_database_costs_time_only(tmp_path, database, caplog):
    database.parent.mkdir(parents=True)
    database.write_bytes(b"this is not a database" * 100)
    (tmp_path / "a").write_bytes(b"content")
    assert file_digest(tmp_path / "a") == bytes_digest(b"content")
    assert "digests.sqlite3 cannot be used" in caplog.text


def test_an_unwritable_place_costs_time_only(tmp_path, database, caplog):
    (tmp_path / "xdg").write_text("a file where the folder should be")
    (tmp_path / "a").write_bytes(b"content")
    assert file_digest(tmp_path / "a") == bytes_digest(b"content")
    assert "cannot be used" in caplog.text


def test_missing_file_is_one_line(tmp_path, database):
    with pytest.raises(DataError, match=r"nowhere: cannot be read \(No such file or directory\)"):
        file_digest(tmp_path / "nowhere")


def digest_and_report(paths, results):
    results.put(digest_files(paths, num_threads=2))


def test_processes_share_the_database(tmp_path, database):
    paths = []
    for index in range(50):
        paths.append(tmp_path / f"{index}")
        paths[-1].write_bytes(bytes([index]))
        os.utime(paths[-1], ns=(0, 0))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=digest_and_report, args=(paths, results)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert answers == [[bytes_digest(path.read_bytes()) for path in paths]] * 3


def test_json_digest_depends_on_the_value_alone():
    value = {"b": [1, 2.5, None, True], "a": "猫 \U0001f431"}
    shuffled = json.loads(json.dumps(dict(reversed(value.items())), indent=3))
    canonical = '{"a":"猫 \U0001f431","b":[1,2.5,null,true]}'
    assert json_digest(value) == json_digest(shuffled) == bytes_digest(canonical.encode())
    assert json_digest([1, "2"]) != json_digest(["1", 2])
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_digest(float("nan"))


def component(folder: Path, **changes: bytes) -> ComponentFiles:
    files = {
        "encoder/config.json": b"{}",
        "encoder/model-1.safetensors": b"one",
        "encoder/model-2.safetensors": b"two",
        "encoder/README.md": b"about",
        "tokenizer/vocab.json": b"words",
        "tokenizer/.lock": b"",
    } | changes
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return ComponentFiles(
        weights=tuple(sorted((folder / "encoder").glob("*.safetensors"))),
        folder=folder / "encoder",
        companions={"tokenizer": folder / "tokenizer"},
    )


def test_component_digest_covers_content_and_not_place(tmp_path, database):
    original = component_digest(component(tmp_path / "a"))
    assert original == component_digest(component(tmp_path / "elsewhere" / "b"))
    assert original == component_digest(
        component(tmp_path / "c", **{"encoder/README.md": b"x", "tokenizer/.lock": b"x", "tokenizer/model.bin": b"x"})
    )
    changed = [
        {"encoder/config.json": b"{ }"},
        {"encoder/model-2.safetensors": b"TWO"},
        {"encoder/model-3.safetensors": b"three"},
        {"tokenizer/vocab.json": b"WORDS"},
        {"tokenizer/merges.txt": b""},
    ]
    digests = {component_digest(component(tmp_path / f"changed-{i}", **change)) for i, change in enumerate(changed)}
    assert len(digests | {original}) == len(changed) + 1


def test_every_part_of_a_unit_is_in_its_recipe():
    field = FieldSpec(name="latents", dtype="bfloat16", dims=("channel", "height"))
    unit = {"name": "latents", "inputs": ("image",), "outputs": (field,), "component": "vae", "encode": dict}

    def digest(component_digest="c", encode_dtype="float32", **changes):
        return json_digest(unit_recipe(EncodeUnit(**(unit | changes)), component_digest, encode_dtype))

    changed = [
        digest(),
        digest(component_digest="d"),
        digest(component_digest=None),
        digest(encode_dtype="bfloat16"),
        digest(name="other"),
        digest(inputs=("image", "mask")),
        digest(outputs=(FieldSpec(name="latents", dtype="float32", dims=("channel", "height")),)),
        digest(outputs=(FieldSpec(name="latents", dtype="bfloat16", dims=("channel", "height"), ragged=True),)),
        digest(component="vae_2"),
        digest(recipe={"posterior": "mode"}),
        digest(version=2),
    ]
    assert len(set(changed)) == len(changed)
    assert digest(encode=list) == digest()


def test_recipe_is_json(tmp_path):
    unit = EncodeUnit(
        name="text",
        inputs=("prompt",),
        outputs=(FieldSpec(name="emb", dtype="bfloat16", dims=("token", "channel"), ragged=True),),
        component=None,
        encode=dict,
        recipe={"drop": 34},
    )
    recipe = unit_recipe(unit, None, "float32")
    assert json.loads(json.dumps(recipe)) == recipe


def test_record_key_keeps_inputs_apart():
    keys = [record_key("r", ["a", "b"]), record_key("r", ["b", "a"]), record_key("r", ["ab"]), record_key("ra", ["b"])]
    assert len(set(keys)) == 4
    assert all(len(key) == 32 for key in keys)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_paths": ["other.safetensors"]},
        {"model_id_with_origin_paths": "other/Model:*.safetensors"},
        {"tokenizer_path": "tokenizer"},
        {"lora_checkpoint": "start.safetensors"},
        {"resume_from_checkpoint": "start.safetensors"},
        {"dataset_metadata_path": "data/other.csv"},
        {"quant_options": "dit.safetensors:bitsandbytes_nf4"},
        {"lora_rank": 8},
    ],
)
def test_runs_that_read_other_files_or_differ_in_a_parameter_have_other_names(changes):
    parameters = {"dataset_base_path": "data", "dataset_metadata_path": "data/m.csv", "lora_base_model": "dit"}
    parameters |= {"model_paths": ["dit.safetensors"], "model_id_with_origin_paths": "a/Model:*.safetensors"}
    name, other = (
        run_name(load_config(None, values), ("train",)) for values in (parameters, {**parameters, **changes})
    )
    assert name.startswith("qwen_image lora r32 on data, ")
    assert name != other


def test_a_run_has_one_name_wherever_it_is_submitted_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(None, {"dataset_base_path": "data", "model_paths": ["dit.safetensors"], "output_path": "out"})
    name = run_name(config, ("data_process",))
    assert run_name(config.model_copy(update={"output_path": "elsewhere", "save_steps": 5}), ("data_process",)) == name
    absolute = config.with_absolute_paths()
    monkeypatch.chdir("/")
    assert run_name(absolute, ("data_process",)) == name
