"""One new file is a family: nothing else is edited."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with one more file: Qwen-Image with a square patch rule of its own."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("cache_store", "diffsynth_pipe", "flows", "tests"):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "pyproject.toml", copy)
    families = copy / "diffsynth_pipe" / "families"
    text = (families / "qwen_image.py").read_text("utf-8")
    changed = text.replace('architecture = "Qwen-Image"', 'architecture = "My-Model"').replace(
        "size_multiple = 16", "size_multiple = 32"
    )
    assert changed.count("My-Model") == changed.count("size_multiple = 32") == 1
    (families / "my_model.py").write_text(changed, "utf-8")
    return copy


def run(project, *arguments):
    environment = {**os.environ, "PYTHONPATH": f"{project}{os.pathsep}{project / 'tests'}"}
    return subprocess.run([sys.executable, *arguments], cwd=project, env=environment, capture_output=True, text=True)


def test_the_command_line_writes_its_tiny_repository(project):
    done = run(project, "-m", "diffsynth_pipe.cli", "tiny-model", "tiny", "--family", "my_model")
    assert done.returncode == 0, done.stderr
    assert (project / "tiny" / "model_index.json").is_file()


def test_the_config_knows_it(project):
    code = (
        "from diffsynth_pipe.config import load_config\n"
        "print(load_config(None, {'dataset_base_path': '.', 'family': 'my_model'}).family)\n"
    )
    assert run(project, "-c", code).stdout == "my_model\n"


def test_the_conformance_suites_run_it(project):
    suites = [f"tests/contract/test_{name}_conformance.py" for name in ("family", "task")]
    done = run(project, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-k", "my_model and not qwen_image", *suites)
    passed = re.search(r"^(\d+) passed", done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout
    assert passed, done.stdout
    assert int(passed[1]) >= 40
