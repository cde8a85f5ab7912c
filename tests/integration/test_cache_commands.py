"""``diffsynth-pipe cache ...`` on a cache of real photos."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from cache_store.contract import FieldSpec
from cache_store.durable import file_checksum
from cache_store.journal import encode_line
from cache_store.manifest import FORMAT, SCHEMA, encode_manifest
from cache_store.snapshot import seal_path
from cache_store.store import Cache, SealedSample
from diffsynth_pipe.cli import main
from diffsynth_pipe.config import load_config
from diffsynth_pipe.stages.data_process import data_process
from diffsynth_pipe.stages.explain import changes_since
from diffsynth_pipe.stages.plan import plan_data_process, plan_train


@pytest.fixture
def config(run_config):
    config = run_config()
    data_process(config)
    return config


@pytest.fixture
def cache_command(capsys):
    """Run a cache command in this process; return its exit code, its lines, and its lines on stderr."""

    def run(*arguments):
        code = main(["cache", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


def test_a_cache_is_described_without_torch(config, tmp_path):
    script = (
        "import sys; from diffsynth_pipe.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'zarr', 'webdataset'} & set(sys.modules); sys.exit(code)"
    )
    outputs = []
    for command in (["ls", tmp_path], ["info", config.cache_dir], ["verify", config.cache_dir]):
        ended = subprocess.run(
            [sys.executable, "-c", script, "cache", *map(str, command)], capture_output=True, text=True, timeout=60
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        outputs.append(ended.stdout)
    listed, described, verified = outputs
    assert listed.startswith(f"{config.cache_dir}  6 samples  ")
    assert "latents 6 (0 duplicates saved), text 6 (1 duplicates saved)" in described
    assert "prompt_emb: min " in described
    assert verified == f"{config.cache_dir}: every byte is what was written\n"


def test_damage_is_named_and_repaired_by_encoding_what_is_lost_alone(config, run_file, cache_command):
    root = config.cache_dir
    snapshot = Cache.open(root).latest()
    path = snapshot.array_path(snapshot.placements("prompt_emb", [0])[0, 0])
    data = path.read_bytes()
    path.write_bytes(data[:3] + bytes([data[3] ^ 1]) + data[4:])

    assert cache_command("verify", root, "--quick")[0] == 0
    code, lines, errors = cache_command("verify", root)
    assert code == 2
    assert lines[0].endswith("fails its checksum")
    assert len(lines) == 2
    assert f"prompt_emb of sample {snapshot.sample_id(0)} ({snapshot.source(0)}) is damaged in " in lines[1]
    assert errors == [f"error: cache {root} is damaged; run `diffsynth-pipe cache repair {root}`"]

    code, lines, errors = cache_command("repair", root)
    assert code == 2
    assert lines[-1] == "records: 5 copied out of damaged files, 1 lost"
    assert "RUN.yaml" in errors[-1]

    code, lines, errors = cache_command("repair", root, run_file())
    assert code == 0
    assert lines[-1] == "encoded again: {'text': 1}"
    assert cache_command("verify", root)[0] == 0


def test_a_lost_snapshot_and_recipes_come_back_without_encoding(config, run_file, cache_command):
    root = config.cache_dir
    shutil.rmtree(root / "snapshots")
    shutil.rmtree(root / "recipes")
    code, lines, _ = cache_command("repair", root, run_file())
    assert code == 0
    assert lines[-1] == "encoded again: {}"
    assert cache_command("verify", root) == (0, [f"{root}: every byte is what was written"], [])


def test_a_damaged_snapshot_is_sealed_again_by_data_process(config, run_config):
    path = Cache.open(config.cache_dir).latest().path
    path.write_bytes(path.read_bytes()[:100])
    result = data_process(run_config())
    assert result.state == "Resumed"
    assert result.summary["encoded"] == {}
    assert len(Cache.open(config.cache_dir).latest()) == 6


def test_compaction_and_garbage_collection(config, run_config, cache_command, edit_rows):
    root = config.cache_dir
    edit_rows(lambda rows: rows[1].update(prompt="another caption"))
    data_process(run_config())
    sample_id = Cache.open(root).latest().sample_id(0)
    assert cache_command("compact", root)[1][0].startswith("segments: 2 before, 1 now")
    code, lines, _ = cache_command("gc", root, "--keep", "1", "--grace-hours", "0", "--dry-run")
    assert code == 0
    assert lines[:2] == ["snapshots/000001", "snapshots/000002"]
    assert lines[-1].startswith("would delete ")
    assert cache_command("gc", root, "--keep", "1", "--grace-hours", "0")[1][:-1] == lines[:-1]
    assert cache_command("verify", root)[0] == 0
    assert data_process(run_config()).state == "Cached"
    code, lines, _ = cache_command("explain", root, "--sample", sample_id[:8])
    assert code == 0
    assert lines[0].startswith(f"sample {sample_id}  ")
    assert [line.split()[0] for line in lines[1:3]] == ["latents", "text"]
    assert any('"encode_dtype": "float32"' in line for line in lines[3:])


def test_an_export_is_the_cache_of_the_same_run(config, run_config, cache_command, tmp_path):
    target = tmp_path / "tars"
    code, lines, _ = cache_command("export", config.cache_dir, target, "--backend", "webdataset")
    assert (code, lines) == (0, [f"{target}: 6 samples, 12 of 12 records copied"])
    moved = run_config(cache_path=str(target), cache_backend="webdataset")
    assert data_process(moved).state == "Cached"
    assert plan_train(moved).key == plan_train(config).key
    assert cache_command("verify", target)[0] == 0


def test_the_channels_of_latents_are_described(config, cache_command):
    items = []
    for folder in (config.cache_dir / "segments").iterdir():
        for _, array in zarr.open_group(folder, mode="r")["latents"].members():
            items += [(item.astype(np.uint32) << 16).view(np.float32).reshape(16, -1) for item in array[:]]
    assert len(items) == 6
    values = np.concatenate(items, axis=1).astype(np.float64)
    _, lines, _ = cache_command("info", config.cache_dir)
    for name, expected in (("means", values.mean(axis=1)), ("stds", values.std(axis=1))):
        (numbers,) = [line for line in lines if line.startswith(f"latents channel {name}: ")]
        found = [float(number) for number in numbers.partition(": ")[2].split()]
        np.testing.assert_allclose(found, expected, rtol=5e-3)
    far = [number for number, std in enumerate(values.std(axis=1)) if std < 0.5 or abs(values[number].mean()) > 1]
    (verdict,) = [line for line in lines if line.startswith("latents channels ")]
    assert verdict.startswith(f"latents channels {', '.join(map(str, far))} of 16 are far from mean 0 and std 1")


def test_explain_says_what_changed_since_the_seal(config, run_file, cache_command, edit_rows):
    root = config.cache_dir

    def changes(**parameters):
        code, lines, _ = cache_command("explain", root, run_file(**parameters), "--sample", "")
        assert code == 0
        return lines[7 * 3 + 2 :]

    assert changes() == ["samples: 6 as sealed, 0 changed, 0 new, 0 gone"]
    source = Cache.open(root).latest().source(1)
    edit_rows(lambda rows: [rows[0], {**rows[1], "prompt": "another caption"}, *rows[2:5]])
    assert changes() == [f"{source}: text by its prompt", "samples: 4 as sealed, 1 changed, 0 new, 1 gone"]
    *recipes, first, _, _, _, _, last = changes(encode_dtype="bfloat16")
    assert recipes == [f"recipe of {unit}: encode_dtype was 'float32', is 'bfloat16'" for unit in ("text", "latents")]
    assert first.endswith(": text by its recipe, latents by its recipe")
    assert last == "samples: 0 as sealed, 5 changed, 0 new, 1 gone"
    config = load_config(run_file(encode_dtype="bfloat16"), {})
    (lines,) = changes_since(config, [plan_data_process(config)]).values()
    assert (lines[:3], lines[-1], len(lines)) == ([*recipes, first], last, 6)


COMMANDS = ("ls", "info", "verify", "repair", "gc", "compact", "explain", "import-diffsynth")
# what could delete or write the most
OPTIONS = {"gc": ("--keep", "1", "--grace-hours", "0", "--unsealed")}


def write_cache(root):
    """Write a sealed cache of three samples in three segments."""
    cache, samples = Cache.open_or_new(root), []
    field = FieldSpec(name="latents", dtype="float32", dims=("channel",))
    recipe = cache.put_recipe({"unit": "latents"})
    with cache.writer(commit_seconds=0) as writer:
        for number in range(3):
            key = f"{number:032x}"
            writer.add("latents", key, {"latents": np.full(4, number, np.float32)}, [field])
            samples.append(SealedSample(key, "32x32", f"row {number + 1}", {"latents": key}))
    cache.seal(samples, {"family": "qwen_image", "units": {"latents": recipe}})
    assert len(list((root / "segments").iterdir())) == 3


def nothing(root):
    pass


def user_folder(root):
    for name in ("journal", "segments", "tmp"):
        (root / name).mkdir(parents=True)
    (root / "journal" / "monday.jsonl").write_text('{"mood": "good"}\n')
    (root / "tmp" / "notes.txt").write_text("mine")


def other_store(root):
    root.mkdir()
    (root / "store.json").write_text('{"format": "something else", "schema": 3}')


def write_store(root, **values):
    (root / "store.json").write_bytes(encode_manifest({"format": FORMAT, "schema": SCHEMA, "backend": "zarr"} | values))


def newer_journal(root):
    write_cache(root)
    session = "29991231T235959999999-1-abcdef"
    entry = {"schema": SCHEMA + 1, "session": session, "segment": f"{session}-000000", "chapters": []}
    (root / "journal" / f"{session}.jsonl").write_bytes(encode_line(entry))
    # something to repair or to collect, so that leaving all as it is means a refusal
    (root / "journal" / "29991231T235959999999-2-abcdef.jsonl").write_bytes(b"torn")
    (root / "tmp" / "unfinished").write_bytes(b"1")


def newer_snapshot(root):
    write_cache(root)
    (path,) = (root / "snapshots").glob("*.npz")
    with np.load(path) as file:
        columns = dict(file)
    np.savez(path, **columns | {"schema": np.int64(SCHEMA + 1)})
    seal = {"schema": SCHEMA + 1, "number": 1, "bytes": path.stat().st_size, "crc32c": file_checksum(path)}
    seal_path(root, 1).write_bytes(encode_line(seal))
    (root / "journal" / "29991231T235959999999-2-abcdef.jsonl").write_bytes(b"torn")


def after(change):
    """Return a function that writes a whole cache, then changes it."""

    def write(root):
        write_cache(root)
        change(root)

    return write


def without(*names):
    return after(lambda root: [shutil.rmtree(root / name) for name in names])


def emptied(name):
    def change(root):
        shutil.rmtree(root / name)
        (root / name).mkdir()

    return after(change)


def cut_short(pattern):
    def change(root):
        paths = [path for path in root.glob(pattern) if path.is_file()]
        assert paths
        for path in paths:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return after(change)


ALL_FOLDERS = ("segments", "journal", "recipes", "snapshots", "tmp")

# how the folder comes to be; the commands that succeed, because they need nothing of what is foreign or newer
FOREIGN = {
    "missing": (nothing, ("import-diffsynth",)),
    "empty": (lambda root: root.mkdir(), ("import-diffsynth",)),
    "user's folder": (user_folder, ()),
    "file": (lambda root: root.write_text("mine"), ()),
    "store.json of something else": (other_store, ()),
    "store.json is a folder": (lambda root: (root / "store.json").mkdir(parents=True), ()),
    "newer store.json": (after(lambda root: write_store(root, schema=SCHEMA + 1)), ()),
    "older store.json": (after(lambda root: write_store(root, schema=SCHEMA - 1)), ()),
    "newer backend": (after(lambda root: write_store(root, backend="parquet")), ()),
    "newer journal": (newer_journal, ("ls", "explain")),
    "newer snapshot": (newer_snapshot, ()),
}

# how the copy was cut short; a word of what verify says of it; the commands that succeed
HALF = {
    "only store.json": (without(*ALL_FOLDERS), "segments is missing", ("repair", "import-diffsynth")),
    "no segments": (without("segments"), "c/0/0 is missing", ("explain", "import-diffsynth")),
    "segments are empty": (emptied("segments"), "c/0/0 is missing", ("ls", "explain", "import-diffsynth")),
    "segments are cut": (
        cut_short("segments/**/0"),
        "bytes, not ",
        ("ls", "repair", "explain", "import-diffsynth"),
    ),
    "no journal": (without("journal"), "journal is missing", ("repair", "explain", "import-diffsynth")),
    "journal is empty": (emptied("journal"), "no journal has", tuple({*COMMANDS} - {"verify"})),
    "no snapshots": (without("snapshots"), "snapshots is missing", ("repair", "import-diffsynth")),
    "snapshot is cut": (cut_short("snapshots/*.npz"), "000001.npz is missing or damaged", ("import-diffsynth",)),
    "no recipes": (without("recipes"), "recipes is missing", ("explain", "import-diffsynth")),
    "no tmp": (without("tmp"), "every byte is what was written", COMMANDS),
    "store.json is empty": (after(lambda root: (root / "store.json").write_bytes(b"")), "", ("repair",)),
    "no store.json": (after(lambda root: (root / "store.json").unlink()), "", ("repair",)),
}


@pytest.fixture(scope="module")
def reference_cache(tmp_path_factory):
    """A cache of DiffSynth-Studio with one record."""
    folder = tmp_path_factory.mktemp("reference")
    latents = torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16)
    shared = {"input_latents": latents, "input_image": Image.new("RGB", (32, 32)), "height": 32, "width": 32}
    positive = {
        "prompt_emb": torch.ones(1, 5, 64, dtype=torch.bfloat16),
        "prompt_emb_mask": torch.ones(1, 5, dtype=torch.int64),
    }
    torch.save((shared, positive, {}), folder / "0.pth")
    return folder


@pytest.fixture
def run_command(cache_command, reference_cache):
    """Run a cache command on a folder; return its exit code, its lines, its lines on stderr, and what it changed."""

    def run(command, root):
        source = (reference_cache,) if command == "import-diffsynth" else ()
        before = contents(root)
        code, lines, errors = cache_command(command, root, *source, *OPTIONS.get(command, ()))
        now = contents(root)
        changed = {name for name in before.keys() | now.keys() if before.get(name, ...) != now.get(name, ...)}
        return code, lines, errors, changed & before.keys(), changed - before.keys()

    return run


def contents(root):
    """Return the bytes of a file, or of all files below a folder; None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in (root, *root.rglob("*")) if path.exists()}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("state", FOREIGN)
def test_what_is_no_cache_or_a_newer_one_is_refused_and_left_alone(state, command, tmp_path, run_command):
    root = tmp_path / "c"
    write, succeeding = FOREIGN[state]
    write(root)
    code, lines, errors, changed, added = run_command(command, root)
    assert not changed
    if command in succeeding:
        assert code == 0
        assert not added or command == "import-diffsynth"
        return
    assert (code, len(errors), added) == (2, 1, set())
    assert errors[0].startswith("error: ")
    assert str(root) in errors[0]
    assert not lines or command == "ls"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("state", HALF)
def test_half_a_copy_is_named_and_only_repair_changes_what_is_there(state, command, tmp_path, run_command):
    root = tmp_path / "c"
    write, word, succeeding = HALF[state]
    write(root)
    code, lines, errors, changed, added = run_command(command, root)
    assert not changed or command == "repair"
    assert not added or command in ("repair", "import-diffsynth") or (command, code) == ("compact", 0)
    if command in succeeding:
        assert code == 0
    else:
        assert (code, len(errors)) == (2, 1)
        assert errors[0].startswith("error: ")
        assert str(root) in errors[0]
        assert not lines or command in ("ls", "verify", "repair")
    if command == "verify":
        assert any(word in line for line in lines) == bool(word)


@pytest.mark.parametrize("command", ["repair", "explain"])
def test_the_run_file_must_be_of_the_cache(command, config, run_file, cache_command, tmp_path):
    code, _, errors = cache_command(command, config.cache_dir, run_file(cache_path=str(tmp_path / "other")))
    assert code == 2
    assert "cache_path" in errors[0]
