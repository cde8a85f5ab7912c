"""Artifacts of a run, without a server."""

from pathlib import Path
from threading import Event

import pytest

from diffsynth_pipe.stages.plan import StagePlan
from flows import report

DEADLINE_S = 60


@pytest.fixture
def sent(monkeypatch):
    """What is sent, by the name of Prefect's function."""
    calls = []

    def record(name):
        return lambda **values: calls.append((name, values)) or "id"

    for name in ("create_progress_artifact", "update_progress_artifact", "create_markdown_artifact"):
        monkeypatch.setattr(report, name, record(name))
    return calls


def test_a_bar_becomes_progress_with_rate_and_time_left(sent):
    with report.Reporter() as reporter:
        reporter.line("train-progress", "train:  25%|##5       | 18/72 [00:06<00:18,  3.00step/s, loss=1.2]")
    assert sent == [
        (
            "create_progress_artifact",
            {
                "key": "train-progress",
                "progress": 25.0,
                "description": "train: 18 of 72, 00:18 left, 3.00step/s, loss=1.2",
            },
        )
    ]


def test_the_plan_says_why_and_shortens_keys(sent):
    plan = StagePlan(stage="train", verdict="resume", key="a" * 64, path=Path("x"), why="stopped after step 7, a|b")
    with report.Reporter() as reporter:
        reporter.plan([plan], {"train": ["lora_rank was 8, is 2"]})
    ((_, values),) = sent
    assert values["markdown"].splitlines() == [
        "| stage | verdict | why |",
        "| --- | --- | --- |",
        "| train | resume | stopped after step 7, a\\|b |",
        "",
        "**train** `aaaaaaaaaaaa` in `x`",
        "",
        "Not as before:",
        "",
        "- lora_rank was 8, is 2",
    ]


def test_a_server_that_hangs_or_fails_neither_holds_up_nor_fails_a_stage(monkeypatch):
    hangs, entered, ended = Event(), Event(), Event()

    def hang(**values):
        entered.set()
        hangs.wait(DEADLINE_S)
        ended.set()
        raise OSError("no server")

    monkeypatch.setattr(report, "create_progress_artifact", hang)
    monkeypatch.setattr(report, "_CLOSE_S", 0.1)
    with report.Reporter() as reporter:
        for percent in range(100):
            reporter.line("train-progress", f"train: {percent}%| | {percent}/100 [00:01<00:01, 9.00step/s]")
        assert entered.wait(DEADLINE_S)
    assert not ended.is_set()
    hangs.set()
