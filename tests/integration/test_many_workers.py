"""Stage 1 in several processes at once, started by the launchers that people use: what one process would have made."""

import os
import signal
import subprocess
import sys
from itertools import chain

import pytest
from small_caches import assert_refused, assert_same, num_committed, read_all, truncate_jpeg
from small_trainings import free_port

from cache_store.journal import read_journal
from cache_store.store import Cache
from diffsynth_pipe.data.images import ImageInput
from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.stages.data_process import data_process
from diffsynth_pipe.stages.plan import plan_data_process

NUM_RECORDS = 12
"""Six photos, five captions and the empty one."""

TRAIN = ("-m", "diffsynth_pipe.train")


def launchers(num_processes):
    return {
        "accelerate": (
            *("accelerate.commands.launch", "--multi_gpu", "--num_machines=1", f"--num_processes={num_processes}"),
            *("--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"),
        ),
        "torchrun": ("torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"),
    }


def launch(launcher, num_processes, run_file):
    command = [sys.executable, "-m", *launchers(num_processes)[launcher], *TRAIN, "--config", str(run_file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def encoded_keys(cache_dir):
    """Return all keys that a journal ever named, repeated ones too, by the process that wrote them."""
    keys = {}
    for commit in read_journal(cache_dir).commits:
        of_session = keys.setdefault(commit.segment.rsplit("-", 1)[0], [])
        of_session += [(unit, key) for unit, records in commit.units.items() for key in records.keys]
    return list(keys.values())


def assert_whole_and_encoded_once(config, num_sessions):
    by_session = encoded_keys(config.cache_dir)
    assert len(by_session) == num_sessions
    keys = list(chain(*by_session))
    assert len(keys) == len(set(keys)) == NUM_RECORDS
    snapshot = Cache.open(config.cache_dir).latest()
    assert (snapshot.number, len(snapshot)) == (1, 6)
    assert plan_data_process(config).verdict == "hit"


@pytest.fixture
def alone(run_config, tmp_path):
    """The cache that one process makes."""
    config = run_config(cache_path=str(tmp_path / "alone"))
    data_process(config)
    return config.cache_dir


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_processes_make_the_cache_of_one(run_config, run_file, alone, launcher):
    done = launch(launcher, 2, run_file(task="sft:data_process"))
    assert done.returncode == 0, done.stderr
    config = run_config()
    assert_whole_and_encoded_once(config, num_sessions=2)
    assert Cache.open(config.cache_dir).latest().header["digest"] == Cache.open(alone).latest().header["digest"]
    assert_same(read_all(config.cache_dir), read_all(alone))
    assert "data_process text, rank 0 of 2: 100%" in done.stderr
    assert "data_process text, rank 1 of 2: 100%" not in done.stderr
    assert f"data_process: Completed  {config.cache_dir}" in done.stdout


def test_the_launcher_starts_as_many_processes_as_asked(run_config, run_file, cli):
    run = run_file(data_process_num_processes=2)
    done = cli("data-process", run)
    assert done.returncode == 0, done.stderr
    assert_whole_and_encoded_once(run_config(), num_sessions=2)
    assert "data_process: Cached" in cli("data-process", run).stdout


def test_the_line_of_a_failing_rank_reaches_the_launcher(run_config, run_file, photos, cli):
    name = truncate_jpeg(photos)
    done = launch("torchrun", 2, run_file(task="sft:data_process"))
    assert done.returncode == 1  # torchrun's own; its report has that of the rank
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert name in line
    assert num_committed(run_config().cache_dir) > 0
    assert_refused(cli("data-process", run_file(data_process_num_processes=2)), name, "row 3")


def test_another_number_of_processes_goes_on_after_a_kill(run_config, run_file, alone):
    config = run_config()
    run = run_file(task="sft:data_process", cache_commit_seconds=0)
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    killed = subprocess.Popen([sys.executable, *TRAIN, "--config", str(run)], env=env, stderr=subprocess.DEVNULL)
    while killed.poll() is None and not num_committed(config.cache_dir):
        pass
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    other = subprocess.run([sys.executable, *TRAIN, "--config", str(run)], env={**env, "RANK": "1"}, timeout=120)
    assert other.returncode == 0  # it waits for nobody
    assert plan_data_process(config).verdict == "resume"
    done = launch("torchrun", 3, run)
    assert done.returncode == 0, done.stderr
    keys = list(chain(*encoded_keys(config.cache_dir)))
    assert len(keys) == len(set(keys)) == NUM_RECORDS
    assert_same(read_all(config.cache_dir), read_all(alone))


def test_sigterm_keeps_what_is_encoded(run_config, monkeypatch):
    """A launcher sends it to the other ranks when one fails."""
    config = run_config(cache_commit_seconds=600)
    load = ImageInput.load

    def load_and_stop(image):
        os.kill(os.getpid(), signal.SIGTERM)
        return load(image)

    monkeypatch.setattr(ImageInput, "load", load_and_stop)
    with pytest.raises(SystemExit) as stopped:
        data_process(config)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len(Cache.open(config.cache_dir).committed_keys()["text"]) == 6


def test_another_number_of_processes_than_the_config_names_is_refused(run_config, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="data_process_num_processes: is 2, but 4 were started"):
        data_process(run_config(data_process_num_processes=2))


@pytest.mark.parametrize(("rank", "world_size"), [("2", "2"), ("-1", "2"), ("one", "2"), ("1", None)])
def test_a_rank_without_a_share_is_refused(run_config, monkeypatch, rank, world_size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ConfigError, match=rf"^RANK={rank} WORLD_SIZE={world_size or 1}: shares are numbered from 0"):
        data_process(run_config())
    assert not run_config().cache_dir.exists()
