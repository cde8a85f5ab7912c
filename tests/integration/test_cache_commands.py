"""``diffsynth-pipe cache ...`` on a cache of real photos."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import zarr

from cache_store.store import Cache
from diffsynth_pipe.cli import main
from diffsynth_pipe.stages.data_process import data_process
from diffsynth_pipe.stages.plan import plan_train


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
    assert "latents 6 (0 duplicates saved), text 5 (1 duplicates saved)" in described
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
    assert lines[-1] == "records: 4 copied out of damaged files, 1 lost"
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
    assert (code, lines) == (0, [f"{target}: 6 samples, 11 of 11 records copied"])
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
        return lines[6 * 3 + 2 :]

    assert changes() == ["samples: 6 as sealed, 0 changed, 0 new, 0 gone"]
    source = Cache.open(root).latest().source(1)
    edit_rows(lambda rows: [rows[0], {**rows[1], "prompt": "another caption"}, *rows[2:5]])
    assert changes() == [f"{source}: text by its prompt", "samples: 4 as sealed, 1 changed, 0 new, 1 gone"]
    *recipes, first, _, _, _, _, last = changes(encode_dtype="bfloat16")
    assert recipes == [f"recipe of {unit}: encode_dtype was 'float32', is 'bfloat16'" for unit in ("text", "latents")]
    assert first.endswith(": text by its recipe, latents by its recipe")
    assert last == "samples: 0 as sealed, 5 changed, 0 new, 1 gone"


@pytest.mark.parametrize("command", ["info", "verify", "repair", "gc", "compact", "explain"])
@pytest.mark.parametrize("state", ["missing", "empty", "newer", "half"])
def test_what_is_no_cache_is_one_line_and_exit_code_2(command, state, tmp_path, cache_command):
    root = tmp_path / "c"
    if state != "missing":
        root.mkdir()
    if state == "newer":
        (root / "store.json").write_text('{"format": "diffsynth-pipe cache", "schema": 2, "backend": "zarr"}')
    if state == "half":
        (root / "store.json").write_text('{"format": "diffsynth-pipe ca')
    code, lines, errors = cache_command(command, root)
    assert (code, lines, len(errors)) == (2, [], 1)
    assert errors[0].startswith("error: ")
    assert str(root) in errors[0]


@pytest.mark.parametrize("command", ["repair", "explain"])
def test_the_run_file_must_be_of_the_cache(command, config, run_file, cache_command, tmp_path):
    code, _, errors = cache_command(command, config.cache_dir, run_file(cache_path=str(tmp_path / "other")))
    assert code == 2
    assert "cache_path" in errors[0]
