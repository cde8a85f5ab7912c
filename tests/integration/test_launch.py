"""Real processes under the guard: a FIFO that all of them hold open is at its end exactly when the last one is gone."""

import contextlib
import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import pytest

from diffsynth_pipe.config import load_config
from diffsynth_pipe.errors import LaunchError, PipeError
from diffsynth_pipe.gpu_lock import hold, visible_gpus
from diffsynth_pipe.launch import run_supervised, stage_config

DEADLINE_S = 60

# A child and, in a session of its own as torchrun's ranks are, a grandchild. Both hold the FIFO and wait for a signal.
TREE = """
import os, signal, subprocess, sys
fifo, on_term, role = sys.argv[1:]

def save(*_):
    os.write(out, b"saved\\n")
    os._exit(0)

if role != "grandchild":
    again = [sys.executable, "-I", "-S", "-c", os.environ["TREE"], fifo, on_term, "grandchild"]
    subprocess.Popen(again, start_new_session=True, stdout=subprocess.PIPE).stdout.readline()
    on_term = "die"
out = os.open(fifo, os.O_WRONLY)
signal.signal(signal.SIGTERM, {"die": signal.SIG_DFL, "save": save, "ignore": signal.SIG_IGN}[on_term])
os.write(out, f"ready {os.getpid()}\\n".encode())
print("running", flush=True)
while role != "leave":
    signal.pause()
"""


class Witness:
    """The reading end of the FIFO."""

    def __init__(self, path):
        os.mkfifo(path)
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.text = ""

    def read_until(self, pattern):
        """Read until the pattern is there (None: until no process holds the FIFO) and return its match."""
        deadline = time.monotonic() + DEADLINE_S
        while not (pattern and re.search(pattern, self.text)):
            readable, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert readable, f"no {pattern or 'end of file'} in {DEADLINE_S} s, only {self.text!r}"
            data = os.read(self.fd, 65536)
            if not data:
                assert pattern is None, f"all processes are gone without {pattern!r}, only {self.text!r}"
                return None
            self.text += data.decode()
        return re.search(pattern, self.text)

    def both_ready(self):
        return self.read_until(r"ready \d+\n(.*\n)*ready \d+\n")

    def all_gone(self):
        self.read_until(None)


@pytest.fixture
def witness(tmp_path, monkeypatch):
    monkeypatch.setenv("TREE", TREE)
    witness = Witness(tmp_path / "fifo")
    yield witness
    os.close(witness.fd)


def python(code, *arguments):
    return [sys.executable, "-u", "-I", "-S", "-c", textwrap.dedent(code), *map(str, arguments)]


def tree(witness, on_term="die", role="stay"):
    return python(TREE, witness.path, on_term, role)


def run(command, tmp_path, **options):
    """Run a command under the guard and return its lines."""
    lines = []
    run_supervised(command, **{"run_dir": tmp_path / "run", "log_name": "x.log", "on_line": lines.append, **options})
    return lines


def wait_until_free(run_dir):
    with (run_dir / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


def test_output_reaches_the_caller_and_the_log(tmp_path):
    code = "import os, sys; print('out'); print('err', file=sys.stderr); print(os.environ['EXTRA'])"
    assert run(python(code), tmp_path, env={"EXTRA": "given"}) == ["out", "err", "given"]
    assert run(python("print('again')"), tmp_path) == ["again"]
    assert (tmp_path / "run" / "x.log").read_text() == "out\nerr\ngiven\nagain\n"


def test_prepare_runs_once_the_directory_is_ours(tmp_path):
    def prepare():
        with (tmp_path / "run" / ".lock").open("a") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return bool((tmp_path / "run" / "input").write_text("prepared"))

    code = "import pathlib, sys; print(pathlib.Path(sys.argv[1]).read_text())"
    assert run(python(code, tmp_path / "run" / "input"), tmp_path, prepare=prepare) == ["prepared"]


def test_failure_names_its_cause_and_carries_the_last_lines(tmp_path):
    with pytest.raises(LaunchError) as caught:
        run(python("print('before'); raise KeyError('no such thing')"), tmp_path)
    assert str(caught.value) == (
        f"x ended with exit code 1: KeyError: 'no such thing'; all output is in {tmp_path / 'run' / 'x.log'}"
    )
    assert "before\n" in caught.value.__notes__[0]


def test_failure_of_several_ranks_names_the_cause_of_the_first(tmp_path):
    code = """
        import sys
        print("[rank0]: Traceback (most recent call last):\\n[rank0]: KeyError: 'first'")
        print("[rank0]: ValueError: of the first")
        print("[rank1]: RuntimeError: Connection reset by peer")
        print("torch.distributed.elastic.multiprocessing.errors.ChildFailedError:")
        sys.exit(1)
    """
    with pytest.raises(LaunchError, match=r"^x ended with exit code 1: ValueError: of the first; all output is in "):
        run(python(code), tmp_path)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")])
def test_death_by_a_signal_names_the_signal(tmp_path, number, name):
    with pytest.raises(LaunchError, match=rf"^x ended with {name}: last words; all output is in "):
        run(python(f"import os; print('last words', flush=True); os.kill(os.getpid(), {int(number)})"), tmp_path)


def test_command_that_does_not_exist(tmp_path):
    with pytest.raises(LaunchError, match=r"exit code 127: .*cannot start '/no/such/program': No such file"):
        run(["/no/such/program"], tmp_path)


LAUNCHERS = {
    "plain": [],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no"),
    ],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_refusal_of_the_command_is_carried_over_as_its_one_line(tmp_path, launcher):
    script = tmp_path / "refuse.py"
    script.write_text("import sys\nprint('working')\nprint('error: lora_rank: bad', file=sys.stderr)\nsys.exit(2)\n")
    with pytest.raises(PipeError) as caught:
        run([sys.executable, *LAUNCHERS[launcher], str(script)], tmp_path)
    assert str(caught.value) == "lora_rank: bad"
    assert not isinstance(caught.value, LaunchError)


def test_refusal_of_another_rank_is_carried_over_too(tmp_path):
    with pytest.raises(PipeError, match=r"^NaN in cat\.jpg$"):
        run(python("import sys; print('error in rank 3: NaN in cat.jpg'); sys.exit(2)"), tmp_path)


def test_error_line_with_another_exit_code_is_a_failure(tmp_path):
    with pytest.raises(LaunchError, match="exit code 3"):
        run(python("import sys; print('error: something'); sys.exit(3)"), tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_descendant_outlives_the_caller(tmp_path, witness, number):
    code = "import signal, sys; from pathlib import Path; from diffsynth_pipe.launch import *\n"
    # A test run in the background of a shell hands down that SIGINT is ignored.
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "run_supervised(sys.argv[2:], run_dir=Path(sys.argv[1]), log_name='x.log', on_line=lambda line: None)"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run"), *tree(witness)], stderr=subprocess.DEVNULL
    ) as caller:
        witness.both_ready()
        caller.send_signal(number)
        witness.all_gone()
    wait_until_free(tmp_path / "run")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_exception_in_the_caller_stops_all_and_lets_them_save(tmp_path, witness, error):
    def stop(line):
        witness.both_ready()
        raise error

    with pytest.raises(error):
        run(tree(witness, "save"), tmp_path, on_line=stop)
    wait_until_free(tmp_path / "run")
    witness.all_gone()
    assert witness.text.endswith("saved\n")


def test_descendant_that_ignores_sigterm_is_killed_after_the_grace(tmp_path, witness):
    def stop(line):
        witness.both_ready()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tree(witness, "ignore"), tmp_path, on_line=stop, guard_grace_s=0.3)
    witness.all_gone()


def test_descendants_that_a_finished_command_left_behind_are_stopped(tmp_path, witness):
    run(tree(witness, "save", "leave"), tmp_path)
    witness.all_gone()
    assert witness.text.endswith("saved\n")


@pytest.mark.parametrize("what", ["run directory", "GPU"])
def test_the_next_run_waits_until_the_last_descendant_is_gone(tmp_path, monkeypatch, witness, capsys, what):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    device = {"gpus": ["GPU-b", "GPU-a"]} if what == "GPU" else {}
    second_dir = tmp_path / ("other" if what == "GPU" else "run")

    def stop(line):
        witness.both_ready()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tree(witness, "ignore"), tmp_path, on_line=stop, grace_s=0, **device)
    assert "still stopping" in capsys.readouterr().err
    lines = []

    def on_line(line):
        lines.append(line)
        if line.startswith("waiting"):
            for pid in re.findall(r"ready (\d+)", witness.text):
                with contextlib.suppress(ProcessLookupError):  # the guard may be faster
                    os.kill(int(pid), signal.SIGKILL)

    run(python("print('mine')"), tmp_path, run_dir=second_dir, on_line=on_line, **device)
    name = "GPU GPU-a" if what == "GPU" else str(tmp_path / "run")
    assert re.match(rf"waiting for {re.escape(name)}, in use by process \d+", lines[0])
    assert re.match(rf"waited \d+ s for {re.escape(name)}", lines[1])
    assert lines[-1] == "mine"
    witness.all_gone()


def test_runs_on_other_gpus_do_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with hold("GPU-a", tmp_path, print):
        assert run(python("print('mine')"), tmp_path, gpus=["GPU-b"]) == ["mine"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, ["GPU-aa", "GPU-bb"]), ("1", ["GPU-bb"]), ("GPU-a", ["GPU-aa"]), ("1,0,1", ["GPU-bb", "GPU-aa"]), ("", [])],
)
def test_visible_gpus_are_named_by_their_uuid(tmp_path, monkeypatch, visible, expected):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf '0, GPU-aa\\n1, GPU-bb\\n'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == expected
    show = python("import os; print(os.environ['CUDA_DEVICE_ORDER'])")
    assert run(show, tmp_path) == ["PCI_BUS_ID"]  # as the driver numbers them
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert run(show, tmp_path) == ["FASTEST_FIRST"]
    assert visible_gpus() == (["GPU-aa", "GPU-bb"] if visible in ("1", "1,0,1") else expected)


def test_progress_bar_is_thinned_to_what_a_terminal_shows_last(tmp_path):
    code = "from tqdm import tqdm\nfor _ in tqdm(range(1000), mininterval=0, miniters=1): pass\nprint('done')"
    lines = run([sys.executable, "-c", code], tmp_path)
    assert (tmp_path / "run" / "x.log").read_bytes().count(b"\r") >= 1000
    assert lines[-1] == "done"
    assert "100%|" in lines[-2]
    assert len(lines) <= 4
    assert not any("\r" in line for line in lines)


def test_progress_bar_shows_while_it_moves(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    go_on = os.open(fifo, os.O_RDWR)
    lines = []

    def on_line(line):
        lines.append(line)
        os.write(go_on, b".")

    # Waits, in the middle of the line, until the caller has seen the bar.
    code = f"""
        import os, select, sys
        print("\\r 10%|#", end="\\r 20%|##", flush=True)
        seen = select.select([os.open(sys.argv[1], os.O_RDWR)], [], [], {DEADLINE_S})[0]
        print("\\r100%|##########")
        sys.exit(0 if seen else 3)
    """
    run(python(code, fifo), tmp_path, on_line=on_line)
    os.close(go_on)
    assert lines == [" 20%|##", "100%|##########"]


@pytest.mark.parametrize("task", ["sft", "sft:data_process", "sft:train"])
def test_both_stages_of_a_run_share_one_cache(tmp_path, task):
    config = load_config(None, {"dataset_base_path": "data", "output_path": "out", "task": task})
    stages = [stage_config(config, stage) for stage in ("data_process", "train")]
    assert [stage.task for stage in stages] == ["sft:data_process", "sft:train"]
    assert [stage.cache_dir for stage in stages] == [config.cache_dir] * 2


def test_two_runs_of_one_config_encode_each_record_once_and_no_stage_needs_prefect(run_file, tmp_path, monkeypatch):
    """Neither the commands nor any process that they start imports it."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "prefect.py").write_text("raise AssertionError('prefect is imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "blocked"), prepend=os.pathsep)
    code = """if True:
        import sys
        from pathlib import Path
        from diffsynth_pipe.config import load_config
        from diffsynth_pipe.launch import launch_data_process
        print(launch_data_process(load_config(Path(sys.argv[1]), {})).state)
    """
    command = [sys.executable, "-c", code, str(run_file())]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=DEADLINE_S * 3) for process in both]
    assert sorted(out.strip() for out, _ in outputs) == ["Cached", "Completed"], outputs
    assert len(list((tmp_path / "cache" / "journal").iterdir())) == 1
    for stage, state in (("data-process", "Cached"), ("train", "Completed")):
        command = [sys.executable, "-m", "diffsynth_pipe.cli", stage, str(run_file())]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert state in done.stdout
