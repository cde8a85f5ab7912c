"""Checkpoints of a run that is killed at the worst of moments."""

import pytest

from diffsynth_pipe.training import run_dir as run_dirs


class Killed(BaseException):
    pass


def publish(run_dir, text):
    def write(folder):
        (folder / "lora").write_text(text)
        (folder / run_dirs.STATE_FOLDER).mkdir()
        (folder / run_dirs.STATE_FOLDER / "weights").write_text(text)
        run_dirs.write_state(folder / run_dirs.STATE_FOLDER, {"text": text})

    return run_dirs.publish(run_dir, 5, write)


def texts(run_dir):
    return [(found.step, (found.path / "lora").read_text()) for found in run_dirs.resumable(run_dir)]


def test_a_kill_while_a_step_is_saved_again_costs_neither_state(tmp_path, monkeypatch):
    def kill(*_):
        raise Killed

    publish(tmp_path, "first")
    monkeypatch.setattr(run_dirs, "publish_folder", kill)
    with pytest.raises(Killed):
        publish(tmp_path, "second")
    monkeypatch.undo()
    assert texts(tmp_path) == []
    with run_dirs.only_training(tmp_path):
        assert texts(tmp_path) == [(5, "first")]
        publish(tmp_path, "third")
    with run_dirs.only_training(tmp_path):
        assert texts(tmp_path) == [(5, "third")]


def test_states_of_a_finished_run_are_dropped_but_not_below_one_at_work(tmp_path):
    checkpoint = publish(tmp_path, "first")
    with run_dirs.only_training(tmp_path):
        run_dirs.drop_states(tmp_path)
        assert checkpoint.is_resumable
    run_dirs.drop_states(tmp_path)
    assert not checkpoint.state_folder.exists()
    assert (checkpoint.path / "lora").read_text() == "first"


def test_states_stay_where_the_run_directory_cannot_be_written(tmp_path):
    checkpoint = publish(tmp_path, "first")
    (tmp_path / run_dirs._LOCK).mkdir()  # root, too, is refused to open it
    run_dirs.drop_states(tmp_path)
    assert checkpoint.is_resumable


def test_reading_a_state_costs_no_digest_of_its_files(tmp_path):
    """Rank 0 alone reads them whole, and tells the others."""
    checkpoint = publish(tmp_path, "first")
    weights = checkpoint.state_folder / "weights"
    assert run_dirs.damaged_states(tmp_path) == {}
    weights.write_text("sec0nd")
    assert checkpoint.read_state()["text"] == "first"
    assert run_dirs.damaged_states(tmp_path) == {5: f"{weights} is not what was written"}
