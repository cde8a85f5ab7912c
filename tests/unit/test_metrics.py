"""The numbers of a run, read back from JSON lines, CSV and TensorBoard; new, resumed and started over."""

import csv
import json
import os
import struct
import sys
from pathlib import Path

import google_crc32c
import pytest

from diffsynth_pipe.config import load_config
from diffsynth_pipe.errors import ConfigError, LaunchError
from diffsynth_pipe.training.metrics import Metrics
from diffsynth_pipe.training.trackers import check_packages


def config(**values):
    return load_config(None, {"dataset_base_path": "data", **values})


LOGGED = config(enable_csv_log=True, enable_tensorboard_log=True)


def write_steps(run_dir, steps, resume_step=None, config=LOGGED):
    with Metrics(config, run_dir, 10, resume_step=resume_step, enabled=True) as metrics:
        for step in steps:
            if step % 2 == 0:
                metrics.write(
                    step, validation_loss=step / 4, validation_loss_by_level=(0.5, step), validation_held_out=True
                )
            if step:
                metrics.write(step, loss=1 / step, lr=None)


def expected(steps):
    """Return the numbers of these steps as (step, key) -> value."""
    train = {(step, "loss"): 1 / step for step in steps if step}
    for step in steps:
        if step % 2 == 0:
            train |= {(step, "validation_loss"): step / 4}
            train |= {(step, "validation_loss_by_level/0"): 0.5, (step, "validation_loss_by_level/1"): step}
    return train


def json_steps(run_dir):
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def csv_values(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    values = {(int(row["step"]), row["key"]): float(row["value"]) for row in rows}
    assert len(values) == len(rows), "a row stands there twice"
    return values


def records(path):
    """Parse a TFRecord file: length, its masked crc32c, bytes, their masked crc32c."""

    def masked(data):
        crc = google_crc32c.value(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    data, start = path.read_bytes(), 0
    while start < len(data):
        length, length_crc = struct.unpack_from("<QI", data, start)
        assert masked(data[start : start + 8]) == length_crc
        record = data[start + 12 : start + 12 + length]
        assert (masked(record),) == struct.unpack_from("<I", data, start + 12 + length)
        yield record
        start += length + 16


def tensorboard_values(run_dir):
    from tensorboardX.proto.event_pb2 import Event

    values = {}
    for path in sorted((run_dir / "tensorboard_log").iterdir()):
        for event in map(Event.FromString, records(path)):
            for value in event.summary.value:
                assert (event.step, value.tag) not in values, "a value stands there twice"
                values[event.step, value.tag] = value.simple_value
    return values


def test_all_readers_see_the_same_numbers(tmp_path):
    write_steps(tmp_path, range(6))
    assert json_steps(tmp_path) == [0, 1, 2, 2, 3, 4, 4, 5]
    assert csv_values(tmp_path) == expected(range(6))
    assert tensorboard_values(tmp_path) == pytest.approx(expected(range(6)))


def test_a_resumed_run_goes_on_behind_its_step(tmp_path):
    write_steps(tmp_path, range(8))
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    with (tmp_path / "metrics.jsonl").open("a") as file, (tmp_path / "metrics.csv").open("a") as table:
        file.write('{"step": 8, "lo')  # a crash cut them short
        table.write("8,lo")
    write_steps(tmp_path, range(5, 10), resume_step=4)
    assert json_steps(tmp_path) == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:7] == before[:7]
    assert csv_values(tmp_path) == expected(range(10))
    assert tensorboard_values(tmp_path) == pytest.approx(expected(range(10)))
    assert not list(tmp_path.glob("metrics.1.*"))


def test_a_tracker_that_is_asked_for_late_gets_the_whole_history(tmp_path):
    write_steps(tmp_path, range(8), config=config())
    assert not (tmp_path / "metrics.csv").exists()
    write_steps(tmp_path, range(5, 10), resume_step=4)
    assert csv_values(tmp_path) == expected(range(10))
    assert tensorboard_values(tmp_path) == pytest.approx(expected(range(10)))


def test_a_damaged_line_is_named(tmp_path):
    write_steps(tmp_path, range(8))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 1', '"step": ', 1))
    with pytest.raises(LaunchError) as caught:
        write_steps(tmp_path, range(5, 10), resume_step=4)
    assert str(caught.value) == f"{path} line 2 is damaged; move the file away, then run again"


def test_a_run_that_resumes_at_a_line_that_is_cut_short_drops_it(tmp_path):
    write_steps(tmp_path, range(3))
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text[:-5])
    write_steps(tmp_path, [], resume_step=9)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(text.splitlines(keepends=True)[:-1])


def test_a_run_that_starts_over_keeps_the_old_numbers(tmp_path):
    write_steps(tmp_path, range(8))
    old = (tmp_path / "metrics.jsonl").read_bytes()
    write_steps(tmp_path, range(3))
    assert (tmp_path / "metrics.1.jsonl").read_bytes() == old
    assert json_steps(tmp_path) == [0, 1, 2, 2]
    assert csv_values(tmp_path) == expected(range(3))
    assert tensorboard_values(tmp_path) == pytest.approx(expected(range(3)))


def write_to_full_disk(run_dir, file):
    with Metrics(LOGGED, run_dir, 10, enabled=True) as metrics:
        (path,) = (path for path in Path("/proc/self/fd").iterdir() if path.resolve() == run_dir / file)
        device = os.open("/dev/full", os.O_WRONLY)
        os.dup2(device, int(path.name))
        os.close(device)
        metrics.write(1, loss=1.0)


@pytest.mark.parametrize(("file", "named"), [("metrics.jsonl", "{}/metrics.jsonl"), ("metrics.csv", "enable_csv_log")])
def test_a_full_disk_is_one_line_that_names_what_cannot_be_written(tmp_path, file, named):
    with pytest.raises(LaunchError) as caught:
        write_to_full_disk(tmp_path, file)
    assert str(caught.value).startswith(f"{named.format(tmp_path)}: [Errno 28] No space left on device; ")
    opened = {path.resolve() for path in Path("/proc/self/fd").iterdir()}
    assert not [path for path in opened if path.is_relative_to(tmp_path)]


def test_files_that_cannot_be_opened_are_one_line(tmp_path):
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(LaunchError) as caught:
        write_steps(tmp_path, range(1))
    assert str(caught.value).startswith(f"{tmp_path}/metrics.jsonl: [Errno 21] Is a directory: ")


def test_other_ranks_write_nothing(tmp_path, capfd):
    with Metrics(LOGGED, tmp_path, 10, enabled=False) as metrics:
        metrics.write(1, loss=1.0)
        metrics.advance({"loss": 1.0})
        metrics.say("hello")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "package"),
    [("enable_wandb_log", "wandb"), ("enable_swanlab_log", "swanlab"), ("enable_tensorboard_log", "tensorboardX")],
)
def test_a_tracker_without_its_package_is_refused(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        check_packages(config(**{name: True}))
    assert str(caught.value) == f"{name}: needs a package that is not installed; pip install {package}"
    check_packages(config())


@pytest.mark.parametrize("package", ["wandb", "swanlab"])
def test_a_service_without_a_login_is_refused_in_one_line(tmp_path, monkeypatch, package):
    pytest.importorskip(package)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "SWANLAB_API_KEY", "SWANLAB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # the user's login
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError) as caught:
        write_steps(tmp_path, [], config=config(**{f"enable_{package}_log": True}))
    assert str(caught.value).startswith(f"enable_{package}_log: ")
    assert str(caught.value).endswith(f"; log in with `{package} login`, or set {package.upper()}_MODE=offline")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("variable", ["", "from-environment"])
def test_wandb_gets_the_numbers(tmp_path, monkeypatch, variable):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_PROJECT", variable)
    write_steps(tmp_path, range(4), config=config(enable_wandb_log=True, wandb_project="from-config"))
    wandb.teardown()  # its service writes the file
    (path,) = tmp_path.glob("wandb_log/wandb/offline-run-*/*.wandb")
    assert path.read_bytes().count(b"from-environment") == bool(variable)
    assert path.read_bytes().count(b"from-config") == (1 if variable else 2)  # once in the run's parameters
    assert b"validation_loss_by_level/1" in path.read_bytes()


@pytest.mark.parametrize("variable", ["", "from-environment"])
def test_swanlab_gets_the_numbers(tmp_path, monkeypatch, variable):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_PROJECT", variable)
    write_steps(tmp_path, range(4), config=config(enable_swanlab_log=True, swanlab_project="from-config"))
    (path,) = tmp_path.glob("swanlab_log/**/*.swanlab")
    assert (variable or "from-config").encode() in path.read_bytes()
    assert b"validation_loss" in path.read_bytes()
