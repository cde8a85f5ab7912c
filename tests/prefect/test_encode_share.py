"""Stage 1 over several workers that share a folder: the cache of one process, and no share left behind."""

import contextlib
import fcntl
from itertools import chain
from pathlib import Path

import pytest
from small_caches import assert_same, read_all

from cache_store.journal import read_journal
from cache_store.store import Cache
from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.stages.data_process import data_process
from flows.cache_then_train import cache_then_train

NUM_RECORDS = 12
"""Six photos, five captions and the empty one."""


@pytest.fixture
def second_worker(stack):
    """Another worker of the pool; each takes one run at a time."""
    worker = stack.spawn_worker("--name", "second")
    stack.wait(lambda: any(w.name == "second" for w in stack.client.read_workers_for_work_pool("local")))
    yield
    stack.kill(worker)


@pytest.fixture
def start(stack, run_parameters):
    """Submit a run with two shares; return it and, when the server has it, the run of share 1."""

    def submit():
        run = stack.submit(run_parameters, stages=["data_process"], encode_workers=2)

        def share():
            found = [r for r in stack.client.read_flow_runs() if r.created > run.created and "share 1 of 2" in r.name]
            return found and found[0]

        return run, stack.wait(share)

    return submit


@contextlib.contextmanager
def held_up(cache_dir, index):
    """Keep a share from starting its process."""
    folder = Path(f"{cache_dir}-logs", f"share-{index}-of-2")
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def keys_by_session(cache_dir):
    keys = {}
    for commit in read_journal(cache_dir).commits:
        of_session = keys.setdefault(commit.segment.rsplit("-", 1)[0], [])
        of_session += [(unit, key) for unit, records in commit.units.items() for key in records.keys]
    return list(keys.values())


def assert_each_encoded_once(by_session):
    keys = list(chain(*by_session))
    assert len(keys) == len(set(keys)) == NUM_RECORDS


@pytest.mark.usefixtures("second_worker")
def test_two_workers_make_the_cache_of_one_process(stack, start, run_config, tmp_path):
    config = run_config()
    with held_up(config.cache_dir, 0):
        run, share = start()
        stack.wait_for_state(share.id, "Running")
    assert stack.wait_for_state(run.id).state_name == "Completed"
    assert stack.client.read_flow_run(share.id).state_name == "Completed"
    by_session = keys_by_session(config.cache_dir)
    assert len(by_session) == 2
    assert_each_encoded_once(by_session)
    alone = run_config(cache_path=str(tmp_path / "alone"))
    data_process(alone)
    made, wanted = Cache.open(config.cache_dir), Cache.open(alone.cache_dir)
    assert made.latest().header["digest"] == wanted.latest().header["digest"]
    assert_same(read_all(config.cache_dir), read_all(alone.cache_dir))


def test_a_share_that_no_worker_takes_is_cancelled_and_encoded_by_the_run(stack, start, run_config):
    run, share = start()
    assert stack.wait_for_state(run.id).state_name == "Completed"
    assert stack.client.read_flow_run(share.id).state_name == "Cancelled"
    assert_each_encoded_once(keys_by_session(run_config().cache_dir))
    assert len(Cache.open(run_config().cache_dir).latest()) == 6


@pytest.mark.usefixtures("second_worker")
def test_a_share_that_fails_is_encoded_by_the_run(stack, start, run_config):
    cache_dir = run_config().cache_dir
    with held_up(cache_dir, 0):
        (cache_dir.parent / f"{cache_dir.name}-logs" / "share-1-of-2").write_text("no folder")
        run, share = start()
        stack.wait_for_state(share.id, "Failed")
    assert stack.wait_for_state(run.id).state_name == "Completed"
    assert_each_encoded_once(keys_by_session(cache_dir))


@pytest.mark.usefixtures("second_worker")
def test_a_cancelled_run_takes_its_shares_along(stack, start, run_config):
    from prefect.states import Cancelling

    cache_dir = run_config().cache_dir
    with held_up(cache_dir, 0), held_up(cache_dir, 1):
        run, share = start()
        stack.wait_for_state(share.id, "Running")
        stack.client.set_flow_run_state(run.id, Cancelling())
        assert stack.wait_for_state(run.id).state_name == "Cancelled"
        assert stack.wait_for_state(share.id).state_name == "Cancelled"


@pytest.mark.parametrize(("changes", "force"), [({}, ("data_process",)), ({"data_process_num_processes": 2}, ())])
def test_contradictions_are_refused(run_config, changes, force):
    with pytest.raises(ConfigError, match="encode_workers"):
        cache_then_train.fn(run_config(**changes), force=force, encode_workers=2)
