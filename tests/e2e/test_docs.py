"""The pages of docs/ that say how to run: their commands are run, or marked as needing what is not here."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from small_trainings import free_port

from diffsynth_pipe.cli import _parser

PROJECT = Path(__file__).parents[2]
PAGES = ("one_gpu", "team_server", "kubernetes", "cluster")
BIN = Path(sys.executable).parent
NEEDS = {"needs-gpu": "GPU", "needs-docker": "Docker", "needs-kubernetes": "cluster", "needs-cluster": "machine"}
BLOCK = re.compile(r"^```shell *([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page(name):
    return (PROJECT / "docs" / f"{name}.md").read_text("utf-8")


def marked_blocks():
    return [(name, *block) for name in PAGES for block in BLOCK.findall(page(name)) if block[0]]


def calls(script):
    """Yield the words of each call of ``diffsynth-pipe`` and ``prefect``."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        words = words[:-1] if words[-1:] == ["&"] else words
        while words and re.match(r"\w+=", words[0]):
            words = words[1:]
        if words and words[0] in ("diffsynth-pipe", "prefect"):
            yield words


def living(prefect_home):
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT_HOME") == str(prefect_home):
                yield process
        except psutil.Error:
            pass


@pytest.fixture
def run_page(tmp_path):
    """Run the unmarked blocks of a page in a copy of deploy/, on four photos of 64 x 64 pixels; return the output."""
    shutil.copytree(PROJECT / "deploy", tmp_path / "deploy")
    demo = tmp_path / "deploy" / "demo"
    with (demo / "metadata.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    with (demo / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows[:4]])
    small = {
        "max_pixels": 4096,
        "dataset_repeat": 1,
        "num_epochs": 1,
        "accelerate_config_file": "deploy/accelerate/single_process.yaml",
    }
    run_file = demo / "qwen_image.yaml"
    run_file.write_text(yaml.safe_dump(yaml.safe_load(run_file.read_text("utf-8")) | small), encoding="utf-8")
    home = tmp_path / "prefect"

    def run(name):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "DIFFSYNTH_"))}
        env |= {
            "PATH": f"{BIN}:{env['PATH']}",
            "PREFECT_HOME": str(home),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }
        script = "".join(text for mark, text in BLOCK.findall(page(name)) if not mark)
        # The port of the pages may be taken.
        script = script.replace("4200", str(free_port()))
        trace = tmp_path / "trace"
        with trace.open("wb") as file:
            # -m as in a terminal: without job control, bash starts jobs that ignore SIGINT, which stops a worker.
            done = subprocess.run(
                ["bash", "-meuxo", "pipefail", "-c", script], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, timeout=300,
            )  # fmt: skip
        assert done.returncode == 0, trace.read_text("utf-8")[-4000:]
        return trace.read_text("utf-8")

    yield run
    for process in living(home):
        process.kill()


def trained(folder):
    return sorted(folder.glob("build/demo/qwen_image/output/train-*/step-*/dit_lora.safetensors"))


def test_one_gpu(run_page, tmp_path):
    output = run_page("one_gpu")
    assert "every byte is what was written" in output
    assert len(trained(tmp_path)) == 2


def test_team_server(run_page, tmp_path):
    output = run_page("team_server")
    assert re.findall(r"^(?:401|200)$", output, re.MULTILINE) == ["401", "200"]
    assert len(re.findall("^nothing to do", output, re.MULTILINE)) == 1
    assert len(trained(tmp_path)) == 1
    # bash's trace has the password; no other file may: database, logs, saved configs.
    password = re.search(r"team:([0-9a-f]{32})", output)[1].encode()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "trace"]
    assert not [path for path in files if password in path.read_bytes()]


def test_cluster(run_page, bucket, tmp_path):
    output = run_page("cluster")
    assert "data_process: Cached" in output
    assert len(trained(tmp_path)) == 1


@pytest.mark.parametrize("name", PAGES)
def test_every_block_is_run_or_says_above_what_it_needs(name):
    text = page(name)
    assert len(BLOCK.findall(text)) * 2 == len(re.findall("^```", text, re.MULTILINE))
    for block in BLOCK.finditer(text):
        above = text[: block.start()].rstrip().rpartition("\n\n")[2]
        if block[1]:
            assert re.match(f"Needs .*{NEEDS[block[1]]}.*; not run by the tests", above), above
        else:
            assert "not run by the tests" not in above
    assert f"docs/{name}.md" in (PROJECT / "README.md").read_text("utf-8")


@pytest.mark.parametrize(("name", "mark", "script"), marked_blocks())
def test_marked_blocks_parse_and_their_flags_exist(name, mark, script, tmp_path):
    subprocess.run(["bash", "-n", "-c", script], check=True)
    for program, *words in calls(script):
        if program == "diffsynth-pipe":
            _parser().parse_flags(words)
            continue
        flags = [word for word in words if word.startswith("--") and word != "--no-prompt"]
        commands = [word for word in words if word != "--no-prompt"]
        commands = commands[: next(i for i, word in enumerate([*commands, "--"]) if word.startswith("--"))][:2]
        env = {**os.environ, "PREFECT_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "prefect", *commands, "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
        assert set(flags) <= set(re.findall(r"--[a-z-]+", shown))
    for path in re.findall(r"\bdeploy/[\w/.-]+", script):
        assert (PROJECT / path).is_file()
