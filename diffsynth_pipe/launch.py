"""Run a stage in processes of its own, so that none outlives the run and the device's memory is given back.

This process -> guard -> command -> ranks. The output goes to a file, which this process follows: a pipe would block the
ranks behind a slow reader and kill them with a dead one. The guard stops all that the command started (see ``guard``).
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections import deque
from os import SEEK_END, environ, getpid
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import yaml

from cache_store.durable import move_aside
from diffsynth_pipe.contracts import load_task
from diffsynth_pipe.errors import ConfigError, LaunchError, PipeError
from diffsynth_pipe.gpu_lock import DEVICE_ORDER, hold, visible_gpus, wait_for_lock
from diffsynth_pipe.stages.plan import STATE_OF_VERDICT, StageResult, plan_data_process, plan_train, summarize
from diffsynth_pipe.training.run_dir import disk_errors, drop_states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from diffsynth_pipe.config import RunConfig, Stage
    from diffsynth_pipe.stages.plan import StagePlan

LAUNCH_FILES = Path(__file__).resolve().parents[1] / "deploy" / "accelerate"
ZERO3_CPU_OFFLOAD, SINGLE_PROCESS = LAUNCH_FILES / "zero3_cpu_offload.yaml", LAUNCH_FILES / "single_process.yaml"

GUARD_GRACE_S = 120.0
"""How long the ranks may take to save after SIGTERM. It outlasts the caller's own grace: the guard works on alone."""

PROGRESS_S = 5.0
"""Least time between two lines from a progress bar that is still moving."""

_POLL_S = 0.2
_NUM_KEPT_LINES = 200
_NUM_NOTE_LINES = 40

_REFUSAL = re.compile(r"error(?: in rank \d+)?: (.*)")
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_EXCEPTION = re.compile(r"(\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception)\b.*)")
_LAUNCHER_EXCEPTION = re.compile(r"\b(?:ChildFailedError|CalledProcessError|SignalException)\b")
_CHILD_EXITED_WITH_2 = re.compile(r"exitcode\s*: 2\b|non-zero exit status 2\b")


def print_line(line: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def stage_config(config: RunConfig, *stages: Stage) -> RunConfig:
    """Return the config of one stage of a run, or of both; they use the same cache."""
    task = config.task_name if len(stages) > 1 else f"{config.task_name}:{stages[0]}"
    return config.model_copy(update={"task": task, "cache_path": str(config.cache_dir)})


def plan_stages(config: RunConfig, stages: Iterable[Stage]) -> list[StagePlan]:
    """Plan these stages exactly as ``launch_data_process`` and ``launch_train`` will."""
    plans = []
    samples_digest = None
    if "data_process" in stages:
        plans.append(plan_data_process(stage_config(config, "data_process")))
        samples_digest = plans[0].key
    if "train" in stages:
        plans.append(plan_train(stage_config(config, "train"), samples_digest))
    return plans


def data_process_log_dir(config: RunConfig) -> Path:
    """Return where the log and the config of stage 1 lie: beside the cache, which may hold nothing but itself."""
    local = config.cache_dir if isinstance(config.cache_dir, Path) else Path(config.output_path) / "cache"
    return local.with_name(f"{local.name}-logs")


def launch_data_process(
    config: RunConfig, force: bool = False, on_line: Callable[[str], None] = print_line
) -> StageResult:
    """Fill the cache in processes of its own, ``data_process_num_processes`` of them.

    Args:
        config: The run; its ``task`` may name another stage.
        force: Encode even if the cache holds everything.
        on_line: Gets each line of the output.

    Raises:
        PipeError: The stage refused the input; the message is its own.
        LaunchError: The process ended badly.
    """
    # Saved as asked for: ``resume`` goes on to train if both stages were wanted.
    config = stage_config(config, "data_process", *(() if config.stage else ("train",)))
    log_dir = data_process_log_dir(config)
    saved = log_dir / "data_process.yaml"
    command = [sys.executable, "-m"]
    if (num_processes := config.data_process_num_processes) > 1:
        # torchrun names the ranks, and stops all if one fails; they need no process group
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}", "-m"]
    command += ["diffsynth_pipe.cli", "data-process", "--config", str(saved)]
    if force:
        command.append("--force")
    return _launch(config, plan_data_process, force, command, log_dir, saved, on_line)


def launch_share(config: RunConfig, index: int, count: int, on_line: Callable[[str], None] = print_line) -> None:
    """Encode share ``index`` of ``count`` of what the cache lacks, in a process of its own.

    Args:
        config: The run; its ``task`` may name another stage.
        index: From 0.
        count: The shares are cut the same way whoever encodes them.
        on_line: Gets each line of the output.

    Raises:
        PipeError: The stage refused the input; the message is its own.
        LaunchError: The process ended badly.
    """
    config = stage_config(config, "data_process")
    # A folder of its own, so that no share waits for the lock of another.
    log_dir = data_process_log_dir(config) / f"share-{index}-of-{count}"
    saved = log_dir / "data_process.yaml"

    def prepare() -> bool:
        config.save(saved)
        return True

    run_supervised(
        [sys.executable, "-m", "diffsynth_pipe.cli", "data-process", "--config", str(saved)],
        run_dir=log_dir,
        log_name="data_process.log",
        on_line=on_line,
        env={"RANK": str(index), "WORLD_SIZE": str(count)},
        prepare=prepare,
    )


def launch_train(config: RunConfig, force: bool = False, on_line: Callable[[str], None] = print_line) -> StageResult:
    """Train from the cache under ``accelerate launch``.

    Args:
        config: The run; its ``task`` may name another stage.
        force: Train even if this run is trained already.
        on_line: Gets each line of the output.

    Raises:
        ConfigError: ``accelerate_config_file`` cannot be used.
        PipeError: The stage refused the input; the message is its own.
        LaunchError: The ranks ended badly.
    """
    config = stage_config(config, "train")
    run_dir = plan_train(config).path
    assert isinstance(run_dir, Path)
    saved = run_dir / "config.yaml"
    # DeepSpeed cannot take turns.
    default = SINGLE_PROCESS if load_task(config.task_name).takes_turns else ZERO3_CPU_OFFLOAD
    settings = config.accelerate_config_file or str(default)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", settings]
    command = [*launcher, "-m", "diffsynth_pipe.train", "--config", str(saved)]
    gpus = [] if _read_launch_file(Path(settings)).get("use_cpu") else visible_gpus()
    return _launch(config, plan_train, force, command, run_dir, saved, on_line, gpus)


def _read_launch_file(path: Path) -> Mapping[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"accelerate_config_file: {path} cannot be read: {reason}; correct the path or the file"
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(f"accelerate_config_file: {path} holds no settings; see those in {LAUNCH_FILES}")
    return settings


def _launch(
    config: RunConfig,
    plan_stage: Callable[[RunConfig], StagePlan],
    force: bool,
    command: Sequence[str],
    run_dir: Path,
    saved_config: Path,
    on_line: Callable[[str], None],
    gpus: Sequence[str] = (),
) -> StageResult:
    plan = plan_stage(config)
    if plan.verdict == "hit" and not force:
        if plan.stage == "train":
            drop_states(run_dir)
        return StageResult(stage=plan.stage, state="Cached", key=plan.key, path=plan.path, summary=summarize(plan))
    log_name = f"{plan.stage}.log"

    def prepare() -> bool:
        nonlocal plan
        plan = plan_stage(config)  # another process may have done the work while this one waited
        if plan.stage == "train" and plan.path != run_dir:
            message = f"{config.cache_dir} was sealed anew while {run_dir} was waited for; start again"
            raise LaunchError(message)
        if plan.verdict == "hit" and not force:
            return False
        config.with_absolute_paths().save(saved_config)
        if force:
            move_aside(run_dir / "run.json")  # only a training run has one
        return True

    ran = run_supervised(
        command,
        run_dir=run_dir,
        log_name=log_name,
        on_line=on_line,
        # torchrun's own 30 s would cut a long save short.
        env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(GUARD_GRACE_S))},
        prepare=prepare,
        gpus=gpus,
    )
    done = plan_stage(config)
    if done.verdict != "hit":
        message = f"{plan.stage} ended without an error but is not complete: {done.why}; see {run_dir / log_name}"
        raise LaunchError(message)
    state = "Completed" if ran and plan.verdict == "hit" else STATE_OF_VERDICT[plan.verdict]
    return StageResult(stage=done.stage, state=state, key=done.key, path=done.path, summary=summarize(done))


def run_supervised(
    command: Sequence[str],
    *,
    run_dir: Path,
    log_name: str,
    on_line: Callable[[str], None],
    env: Mapping[str, str] | None = None,
    grace_s: float = 25.0,
    guard_grace_s: float = GUARD_GRACE_S,
    prepare: Callable[[], bool] | None = None,
    gpus: Sequence[str] = (),
) -> bool:
    """Run a command under the guard until it and all that it started have ended.

    Waits, and says for whom, while another call's descendants use ``run_dir`` or one of the GPUs.

    Call it from the main thread: signals raise there, and the kernel takes the end of the calling thread for our death.

    Args:
        command: Program and arguments.
        run_dir: Created if missing; one command at a time may use it.
        log_name: File in ``run_dir`` that the output is appended to.
        on_line: Gets each line; of a progress bar what a terminal shows, at most every ``PROGRESS_S``.
        env: Laid over this process's environment, which without ``CUDA_DEVICE_ORDER`` gets ``DEVICE_ORDER``.
        grace_s: How long an exception here waits for the descendants to stop.
        guard_grace_s: How long the descendants may take after SIGTERM before SIGKILL.
        prepare: Called once ``run_dir`` is ours; the command starts if it returns True.
        gpus: Names of the GPUs that are to be this command's alone, as ``visible_gpus`` returns them.

    Returns:
        Whether the command was run.

    Raises:
        PipeError: The command ended with code 2 after one ``error:`` line; the message is that line.
        LaunchError: The command ended with another code; the last lines are in its notes.
    """
    log_path = run_dir / log_name
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(_locked(run_dir, on_line))
        if prepare is not None and not prepare():
            return False
        # After the run directory, and in one order: two runs cannot wait for each other.
        devices = [stack.enter_context(hold(gpu, run_dir, on_line)) for gpu in sorted(gpus)]
        log, written = stack.enter_context(log_path.open("ab")), stack.enter_context(log_path.open("rb"))
        lines = _Follow(written)
        kept: deque[str] = deque(maxlen=_NUM_KEPT_LINES)

        held: list[str] = []

        def pass_on(*, final: bool = False) -> None:
            for line in lines.read(time.monotonic(), final=final):
                kept.append(line)
                # After a refusal comes the launcher's report of it, which says no more.
                if held or _REFUSAL.match(line):
                    held.append(line)
                else:
                    on_line(line)

        guard = subprocess.Popen(
            [
                *(sys.executable, "-m", "diffsynth_pipe.guard"),
                *("--parent", str(getpid()), "--grace", str(guard_grace_s), "--", *command),
            ],
            env={"CUDA_DEVICE_ORDER": DEVICE_ORDER, **environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # the locks last until the guard has seen the last descendant go
            pass_fds=[held_file.fileno() for held_file in (lock, *devices)],
        )
        try:
            lock.truncate(0)
            lock.write(str(guard.pid).encode())
            lock.flush()
            while guard.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    guard.wait(_POLL_S)
                pass_on()
            pass_on(final=True)
        finally:
            if guard.poll() is None:
                guard.terminate()
                try:
                    guard.wait(grace_s)
                except subprocess.TimeoutExpired:
                    print_line(
                        f"still stopping after {grace_s:g} s; process {guard.pid} sees to it and frees {run_dir}"
                    )
        failure = _failure(guard.returncode, list(kept), log_path) if guard.returncode else None
        if failure is None or isinstance(failure, LaunchError):
            for line in held:
                on_line(line)
        if failure is not None:
            raise failure
    return True


@contextlib.contextmanager
def _locked(run_dir: Path, on_line: Callable[[str], None]) -> Iterator[BinaryIO]:
    with disk_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        opened = (run_dir / ".lock").open("a+b")
    with opened as lock:
        wait_for_lock(lock, str(run_dir), on_line)
        yield lock


class _Follow:
    """Turns what is appended to a log into the lines that a terminal would show."""

    def __init__(self, log: BinaryIO) -> None:
        self._log = log
        self._log.seek(0, SEEK_END)
        self._open_line = b""
        self._last_progress = ""
        self._progress_at = -PROGRESS_S

    def read(self, now_s: float, *, final: bool = False) -> list[str]:
        """Return the new lines; of an open line that a progress bar redraws, its present text once in a while."""
        *ended, open_line = (self._open_line + self._log.read()).split(b"\n")
        if final:
            ended.append(open_line)
            open_line = b""
        self._open_line = b"\r".join(open_line.split(b"\r")[-2:])
        texts = [text for text in map(_visible, ended) if text and text != self._last_progress]
        if b"\r" in self._open_line and now_s - self._progress_at >= PROGRESS_S:
            progress = _visible(self._open_line)
            if progress and progress != self._last_progress:
                self._last_progress, self._progress_at = progress, now_s
                texts.append(progress)
        return texts


def _visible(line: bytes) -> str:
    drawn = _ESCAPE.sub("", line.decode(errors="replace")).split("\r")
    return next((text.rstrip() for text in reversed(drawn) if text.strip()), "")


def _failure(exit_code: int, lines: Sequence[str], log_path: Path) -> PipeError:
    refusals = [match[1] for line in lines if (match := _REFUSAL.match(line))]
    # A launcher ends with 1 whatever its ranks ended with, and says so in its report.
    if refusals and (exit_code == 2 or any(map(_CHILD_EXITED_WITH_2.search, lines))):
        return PipeError(refusals[-1])
    ended = f"exit code {exit_code}"
    if exit_code < 0 or exit_code > 128:
        with contextlib.suppress(ValueError):
            ended = signal.Signals(-exit_code if exit_code < 0 else exit_code - 128).name
    error = LaunchError(f"{log_path.stem} ended with {ended}: {_cause(lines)}; all output is in {log_path}")
    error.add_note("\n".join(["last lines:", *lines[-_NUM_NOTE_LINES:]]))
    return error


def _cause(lines: Sequence[str]) -> str:
    """Return the last exception of the rank that failed first, but the launcher's own; else the last line."""
    found = [match for line in lines if (match := _EXCEPTION.match(line)) and not _LAUNCHER_EXCEPTION.search(line)]
    # The other ranks fail because that one is gone, and say so with exceptions of their own.
    first_rank = next((match[1] for match in found if match[1]), None)
    of_first = [match[2] for match in found if match[1] == first_rank]
    return of_first[-1] if of_first else lines[-1] if lines else "no output"
