"""``diffsynth-pipe run`` as a user types it: the flow, its own Prefect server, ZeRO-3 with CPU offload."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

PROJECT = Path(__file__).parents[2]
ENGINE = "engine DeepSpeedEngine, ZeRO stage 3, offload optimizer=cpu param=cpu, world size 1, compute float32"


@pytest.fixture(scope="module")
def run_file(tiny_repo, tmp_path_factory):
    """The demo's run file on its first four photos, at 64 x 64 pixels."""
    folder = tmp_path_factory.mktemp("run")
    demo = PROJECT / "deploy" / "demo"
    with (demo / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:4]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    parameters = yaml.safe_load((demo / "qwen_image.yaml").read_text("utf-8"))
    models = parameters["model_id_with_origin_paths"].replace("tiny/qwen_image:", "tiny/Qwen-Image:")
    parameters |= {
        "model_id_with_origin_paths": models,
        "dataset_base_path": str(demo),
        "dataset_metadata_path": str(folder / "metadata.jsonl"),
        "max_pixels": 4096,
        "num_epochs": 1,
        "output_path": str(folder / "output"),
        "cache_path": str(folder / "cache"),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(parameters), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(run_file, tiny_repo):
    def start(*arguments):
        environment = {
            **os.environ,
            "PREFECT_HOME": str(run_file.parent / "prefect"),
            "DIFFSYNTH_MODEL_BASE_PATH": str(tiny_repo.parents[1]),
            "DIFFSYNTH_SKIP_DOWNLOAD": "True",
        }
        command = [sys.executable, "-m", "diffsynth_pipe.cli", "run", str(run_file), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)

    return start


@pytest.fixture(scope="module")
def first(run):
    finished = run()
    assert finished.returncode == 0, finished.stderr
    return finished


def test_the_first_run_caches_and_trains_under_zero3(first):
    assert "data_process: Completed" in first.stdout
    assert "train: Completed" in first.stdout
    assert ENGINE in first.stdout
    assert "Traceback" not in first.stderr


def test_the_printed_lines_load_the_lora_into_diffusers(first, run_file):
    import diffusers

    lines = [line.strip() for line in first.stdout.splitlines()]
    start = lines.index("load it in diffusers:") + 1
    load, apply, sample = lines[start : start + 3]
    names = {"QwenImagePipeline": diffusers.QwenImagePipeline}
    exec(load, names)
    names["pipe"].set_progress_bar_config(disable=True)
    call = sample.replace('"your prompt"', '"a cat", height=64, width=64, num_inference_steps=2, generator=seeded()')
    names["seeded"] = lambda: torch.Generator().manual_seed(0)
    exec(call, names)
    before = names["image"]
    exec(apply, names)
    exec(call, names)
    assert names["image"].size == (64, 64)
    assert names["image"].tobytes() != before.tobytes()
    assert Path(re.search(r'load_lora_weights\("(.*)"\)', apply)[1]).parents[2] == run_file.parent / "output"


def test_the_second_run_finds_everything_done(first, run):
    second = run()
    assert second.returncode == 0, second.stderr
    assert "data_process: Cached" in second.stdout
    assert "train: Cached" in second.stdout
    assert "Loading weights" not in second.stderr


def test_a_wrong_parameter_is_refused_before_the_flow_starts(run):
    refused = run("--lora_rank", "0")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: lora_rank")
    assert len(refused.stderr.splitlines()) == 1
