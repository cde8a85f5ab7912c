"""What a person sees of a run in Prefect's UI, in a real browser; ``make screenshots`` keeps its pictures."""

import io
import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from PIL import Image
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

KEPT = ("run", "plan", "progress", "report")
CHROMIUM = Path("/usr/bin/chromium")
OFFLINE = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
OFFLINE += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SECRET = "only-in-the-environment-7f3a"
SECRETS = dict.fromkeys(["WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PREFECT_API_AUTH_STRING"], SECRET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ui")


@pytest.fixture
def runs(stack, folder, run_parameters, monkeypatch):
    """A run, the same again, another rank of the LoRA; their tasks and artifacts. The environment holds secrets."""
    for name, value in SECRETS.items():
        monkeypatch.setitem(stack.env, name, value)
    stack.restart_worker()
    paths = {"output_path": str(folder / "output"), "cache_path": str(folder / "cache")}
    config = {**run_parameters, **paths, "dataset_repeat": 12, "validation_steps": 12, "num_validation_samples": 4}
    found = []
    for overrides in ({}, {}, {"dataset_repeat": 1, "lora_rank": 8}):
        run = stack.wait_for_state(stack.submit(config, overrides=overrides).id)
        assert run.state_name == "Completed", run.state
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        artifacts = {item.key: item for item in stack.client.read_artifacts(flow_run_filter=chosen)}
        found.append(SimpleNamespace(run=run, artifacts=artifacts, tasks=stack.task_states(run.id)))
    assert psutil.Process(stack.worker.pid).environ()["WANDB_API_KEY"] == SECRET
    yield found
    monkeypatch.undo()
    stack.restart_worker()


@pytest.fixture
def page(folder):
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=OFFLINE)
        yield browser.new_page(viewport={"width": 1280, "height": 900})
        browser.close()


def files_with(needle, *folders):
    paths = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if needle in path.read_bytes()]


def test_a_run_shows_itself_and_no_secret(stack, runs, page, folder):
    first, again, changed = runs
    assert first.tasks == {"data_process": "Completed", "train": "Completed"}
    assert again.tasks == {"data_process": "Cached", "train": "Cached"}
    assert set(first.artifacts) == {"plan", "data-process-progress", "train-progress", "loss", "report"}

    # The server's database among them, with all parameters, logs and artifacts.
    assert files_with(first.run.name.encode(), stack.folder)
    assert not files_with(SECRET.encode(), stack.folder, folder)

    pictures = Path(os.environ.get("SCREENSHOTS", folder))

    def visit(path, name, *texts, height=760):
        page.set_viewport_size({"width": 1280, "height": height})
        page.goto(f"http://127.0.0.1:{stack.port}/v2/{path}")
        for text in texts:
            page.get_by_text(text).first.wait_for()
        page.wait_for_load_state("networkidle")
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
        picture.save((pictures if name in KEPT else folder) / f"{name}.png", optimize=True)

    def artifact(run, key):
        return f"artifacts/artifact/{run.artifacts[key].id}"

    def image_widths():
        images = page.locator("img[src^='data:image/svg']")
        images.first.wait_for()
        return images.evaluate_all("all => all.map(image => image.naturalWidth)")

    assert first.run.name.startswith("qwen_image lora r4 on photos, ")
    visit(f"runs/flow-run/{again.run.id}?tab=TaskRuns", "cached", again.run.name, "Cached")
    visit(artifact(first, "train-progress"), "progress", "72 of 72", "step/s")
    visit(artifact(changed, "plan"), "plan", "lora_rank was 4, is 8", height=560)
    visit(artifact(first, "loss"), "loss", "Artifact")
    assert image_widths() == [720]
    visit(artifact(first, "report"), "report", "pipe.load_lora_weights", height=1740)
    assert image_widths() == [720, 720]
    visit(f"runs/flow-run/{first.run.id}?tab=TaskRuns", "run", first.run.name, "data_process", "train", height=860)
