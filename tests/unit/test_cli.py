import json
import os
import signal
import subprocess
import sys

import pytest
from PIL import Image

from diffsynth_pipe.cli import main
from diffsynth_pipe.config import RunConfig, load_config

HEAVY = ("torch", "transformers", "diffusers", "accelerate", "deepspeed", "peft", "prefect", "zarr", "modelscope")

# Runs the command line, then tells which heavy packages it imported.
LIST_IMPORTS = f"""
import json, sys
from diffsynth_pipe.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print(json.dumps([code, sorted(set({(*HEAVY, "numpy")!r}) & set(sys.modules))]))
"""

# Stands where the flow stands: parses the command line as the flow does and shows what arrived.
FLOW = """
import json, os, sys
from diffsynth_pipe.flags import FlagParser, add_config_flags, config_from_args

parser = FlagParser(prog="flow")
parser.add_argument("--stages")
parser.add_argument("--force")
add_config_flags(parser)
args = parser.parse_flags()
print(json.dumps([os.getpid(), args.stages, args.force, config_from_args(args).model_dump(exclude_unset=True)]))
"""


def python(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dataset_base_path: data\nlora_rank: 4\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["schema"]])
def test_help_and_schema_import_nothing_heavy(arguments, tmp_path):
    ended = python("-c", LIST_IMPORTS, *arguments, cwd=tmp_path)
    assert json.loads(ended.stdout.splitlines()[-1]) == [0, []]


def test_plan_shows_a_table_without_torch(tmp_path, tiny_repo):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "metadata.csv").write_text("image,prompt\na.png,a red square\n", encoding="utf-8")
    patterns = ("transformer/*.safetensors", "text_encoder/*.safetensors", "vae/*.safetensors")
    flags = [
        *("--dataset_base_path", "data", "--dataset_metadata_path", "data/metadata.csv", "--lora_base_model", "dit"),
        *("--model_id_with_origin_paths", ",".join(f"tiny/Qwen-Image:{pattern}" for pattern in patterns)),
    ]
    script = f"import os; os.environ.update(DIFFSYNTH_MODEL_BASE_PATH={str(tiny_repo.parents[1])!r}){LIST_IMPORTS}"
    ended = python("-c", script, "plan", *flags, cwd=tmp_path)
    *table, last = ended.stdout.splitlines()
    code, imported = json.loads(last)
    assert (code, ended.stderr) == (0, "")
    assert set(imported) <= {"numpy"}
    assert table[0].split() == ["stage", "verdict", "key", "why"]
    assert [line.split()[:2] for line in table[1:]] == [["data_process", "build"], ["train", "build"]]
    assert {line.index("build") for line in table[1:]} == {table[0].index("verdict")}
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "argument COMMAND: invalid choice: 'trian'"),
        (["train", "absent.yaml"], "run file absent.yaml cannot be read"),
        (["plan"], "dataset_base_path: required"),
        (["plan", "run.yaml", "--lora_rnak", "3"], "unknown argument '--lora_rnak'; did you mean '--lora_rank'?"),
        (["train", "run.yaml", "--lora_rank", "0"], "lora_rank: must be greater than or equal to 1, got '0'"),
        (["train", "run.yaml", "--lora_rank"], "argument --lora_rank: expected one argument"),
        (
            ["train", "run.yaml", "--audio_processor_path", "audio"],
            "audio_processor_path: has no effect with family 'qwen_image'",
        ),
        (["train", "run.yaml", "--task", "sft:data_process"], "task: 'sft:data_process' has no train stage"),
        (["data-process", "run.yaml", "--task", "sft:train"], "task: 'sft:train' has no data_process stage"),
        (["run", "run.yaml", "--seed", "x"], "seed: must be a valid integer"),
        (["run", "run.yaml", "--config", "run.yaml"], "argument --config: not allowed with argument RUN.yaml"),
        (["tiny-model", "folder", "--family", "qwen"], "family: 'qwen' is not one of"),
        (["tiny-model", "run.yaml"], "'run.yaml' is not a folder; choose a new one"),
        (["tiny-model", "run.yaml/folder"], "run.yaml/folder: [Errno 17] File exists: 'run.yaml'"),
        (["cache", "gc", ".", "--grace-hours", "-1"], "argument --grace-hours: must be a number from 0 on, got '-1'"),
        (["cache", "gc", ".", "--keep", "0"], "argument --keep: must be a whole number from 1 on, got '0'"),
    ],
)
def test_what_the_user_can_cure_is_one_line_and_exit_code_2(arguments, message, run_file, monkeypatch, capsys):
    monkeypatch.chdir(run_file.parent)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1


def test_the_process_exits_with_that_code(run_file):
    ended = python("-m", "diffsynth_pipe.cli", "run", "run.yaml", "--lora_rank", "0", cwd=run_file.parent)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: lora_rank: must be greater than or equal to 1, got '0'\n"


def test_a_reader_who_stops_reading_ends_it_in_silence(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "diffsynth_pipe.cli", "schema"]
    ended = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("command", "flag", "message"), [("plan", "--lora_rank=0", "lora_rank: "), ("run", "--stages=trian", "--stages: ")]
)
def test_debug_shows_the_traceback(run_file, command, flag, message):
    ended = python("-m", "diffsynth_pipe.cli", command, "run.yaml", flag, "--debug", cwd=run_file.parent)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback")
    assert f"ConfigError: {message}" in ended.stderr


def test_schema_is_that_of_the_run_file(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == RunConfig.model_json_schema()


def test_help_shows_every_flag_and_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name in RunConfig.model_fields:
        assert f"--{name} " in shown
    assert "[default: 32]" in shown


def test_run_becomes_the_flow_and_hands_over_what_was_typed(run_file):
    flows = run_file.parent / "path" / "flows"
    flows.mkdir(parents=True)
    (flows / "__init__.py").touch()
    (flows / "cache_then_train.py").write_text(FLOW, encoding="utf-8")
    flags = ["--model_paths", '["a b", ["c=d"]]', "--use_gradient_checkpointing", "--output_path=-x y", "--seed", "3"]
    command = [
        sys.executable,
        "-m",
        "diffsynth_pipe.cli",
        "run",
        "run.yaml",
        *flags,
        "--stages",
        "train",
        "--force=train",
    ]
    with subprocess.Popen(
        command,
        cwd=run_file.parent,
        env=os.environ | {"PYTHONPATH": str(flows.parent)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(output) == [
        process.pid,
        "train",
        "train",
        {
            "dataset_base_path": "data",
            "lora_rank": 4,
            "model_paths": ["a b", ["c=d"]],
            "use_gradient_checkpointing": True,
            "output_path": "-x y",
            "seed": 3,
        },
    ]


def test_tiny_model_writes_a_repository(tmp_path, capsys):
    assert main(["tiny-model", str(tmp_path / "tiny")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'tiny'}\n"
    assert (tmp_path / "tiny" / "model_index.json").is_file()


def test_submit_leaves_the_plan_to_the_worker_where_the_cache_is_not_here(
    tiny_repo, model_ids, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_repo.parents[1]))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    cache = tmp_path / "cache"
    submitted = []
    monkeypatch.setattr(os, "execv", lambda _, command: submitted.extend(command))
    flags = ["--task", "sft:train", "--dataset_base_path", tmp_path, "--cache_path", cache, "--lora_base_model", "dit"]
    assert main(["submit", *map(str, flags), "--model_id_with_origin_paths", model_ids("dit")]) == 0
    output = capsys.readouterr().out.splitlines()
    assert str(cache) in output[0]
    assert output[-1] == "The worker will plan the run"
    parameters = json.loads(submitted[submitted.index("--params") + 1])
    assert (parameters["stages"], parameters["config"]["cache_path"]) == (["train"], str(cache))
    assert not cache.exists()


def test_resume_of_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no run: ")


@pytest.mark.parametrize("folder", ["cache", "cache-logs"])
def test_resume_runs_the_flow_with_the_saved_config(tmp_path, monkeypatch, folder):
    path = tmp_path / "cache-logs" / "data_process.yaml"
    load_config(None, {"dataset_base_path": "x", "output_path": str(tmp_path)}).save(path)
    started = []
    monkeypatch.setattr(os, "execv", lambda _, command: started.extend(command))
    assert main(["resume", str(tmp_path / folder), "--debug"]) == 0
    assert started[1:] == ["-P", "-m", "flows.cache_then_train", f"--config={path}", "--debug"]


def test_resume_of_a_moved_folder_is_refused(tmp_path, capsys):
    load_config(None, {"dataset_base_path": "x", "output_path": "y"}).save(tmp_path / "cache-logs/data_process.yaml")
    assert main(["resume", str(tmp_path / "cache")]) == 2
    assert "start in y/cache-logs; " in capsys.readouterr().err
