"""Fixtures for all tests: no network, no writing outside of the temporary folders, one tiny model."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

PATTERNS = {
    "dit": "transformer/diffusion_pytorch_model*.safetensors",
    "text_encoder": "text_encoder/model*.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
DEMO = Path(__file__).parents[1] / "deploy" / "demo"

# Read when huggingface_hub, transformers and torch are imported; test processes and what they start inherit them.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", DO_NOT_TRACK="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The same examples on every run: a failure is a change's, not luck's.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def _own_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache folder out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg-cache")))
        yield


@pytest.fixture(scope="session")
def tiny_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny qwen_image repository, ``<base>/tiny/Qwen-Image``; tests must not write into it."""
    from diffsynth_pipe.families.qwen_image import PLUGIN

    folder = tmp_path_factory.mktemp("models") / "tiny" / "Qwen-Image"
    PLUGIN.write_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def template_repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tiny repositories of the families that take template models, by family."""
    from diffsynth_pipe.contracts import load_family

    folder = tmp_path_factory.mktemp("templates")
    for name in ("flux2", "z_image"):
        load_family(name).write_tiny(folder / name)
    return folder


def write_rows(folder, rows):
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def edit_rows(photos):
    """Rewrite the metadata of ``photos`` through a function of its rows."""

    def edit(change):
        with (photos / "metadata.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        write_rows(photos, change(rows) or rows)

    return edit


@pytest.fixture
def model_ids(tiny_repo):
    """Return ``--model_id_with_origin_paths`` for some components of the tiny repository."""

    def ids(*components):
        model_id = f"{tiny_repo.parent.name}/{tiny_repo.name}"
        return ",".join(f"{model_id}:{PATTERNS[name]}" for name in components)

    return ids


@pytest.fixture
def photos(tmp_path):
    """A data set of six of the demo's photos, two of them with the same caption."""
    with (DEMO / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:6]
    folder = tmp_path / "photos"
    folder.mkdir()
    for row in rows:
        shutil.copy(DEMO / row["image"], folder)
        row["image"] = Path(row["image"]).name
    rows[3]["prompt"] = rows[2]["prompt"]
    write_rows(folder, rows)
    return folder


@pytest.fixture
def run_parameters(photos, tiny_repo, model_ids, tmp_path, monkeypatch):
    """Parameters of a small run, as a dict; the environment points to the tiny repository."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_repo.parents[1]))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    return {
        "dataset_base_path": str(photos),
        "dataset_metadata_path": str(photos / "metadata.csv"),
        "max_pixels": 4096,
        "encode_dtype": "float32",
        "model_id_with_origin_paths": model_ids("dit", "text_encoder", "vae"),
        "output_path": str(tmp_path / "output"),
        "cache_path": str(tmp_path / "cache"),
        "lora_base_model": "dit",
        "lora_rank": 4,
        "learning_rate": 1e-3,
        "accelerate_config_file": str(DEMO.parent / "accelerate" / "single_process.yaml"),
    }


@pytest.fixture
def run_file(run_parameters, tmp_path):
    """Write the parameters, with changes, to a run file and return its path."""

    def write(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**run_parameters, **changes}), encoding="utf-8")
        return path

    return write


@pytest.fixture
def run_config(run_parameters):
    """Return the config of a small run, with changes."""
    from diffsynth_pipe.config import load_config

    return lambda **changes: load_config(None, {**run_parameters, **changes})


@pytest.fixture(scope="session")
def cli():
    """Run the command line in a process of its own and return the finished process."""

    def run(*arguments):
        command = [sys.executable, "-m", "diffsynth_pipe.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="session")
def s3_server():
    """The environment that leads to an S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """A client of the S3 server; the environment leads there too."""
    import boto3

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    return boto3.client("s3")


@pytest.fixture
def bucket(s3):
    """The name of a bucket."""
    s3.create_bucket(Bucket="caches")
    return "caches"
