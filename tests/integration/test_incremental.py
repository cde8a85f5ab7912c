"""What a change costs: the records that are encoded again, counted in the journal, and the samples that are sealed.

``pytest -s tests/integration/test_incremental.py`` prints the table.
"""

import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cache_store.journal import read_journal
from cache_store.store import Cache
from diffsynth_pipe.stages.data_process import data_process

IMAGES = Path(__file__).parents[2] / "deploy" / "demo" / "images"
CHANGEABLE = ("photos", "models", "cache")
MAX_PIXELS = 2304


@pytest.fixture
def root(run_parameters, photos, edit_rows, tiny_repo, tmp_path, monkeypatch):
    """A folder with ``photos``, ten of them, and ``models``; two captions are shared by two photos each."""
    more = {"grass.jpg": "grass", "gravel_left.jpg": "gravel", "gravel_right.jpg": "gravel", "hubble.jpg": "galaxies"}
    edit_rows(lambda rows: rows.extend(new_row(photos, name, prompt) for name, prompt in more.items()))
    shutil.copytree(tiny_repo.parent, tmp_path / "models" / tiny_repo.parent.name)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))  # after run_parameters set it
    return tmp_path


def new_row(photos, name, prompt):
    shutil.copy(IMAGES / name, photos)
    return {"image": name, "prompt": prompt}


def recaption(root, rows):
    rows[0]["prompt"] += ", at night"


def change_weights(component, root, rows):
    (path,) = (root / "models").glob(f"*/*/{component}/*.safetensors")
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path, {"format": "pt"})


def add_first(root, rows):
    rows.insert(0, new_row(root / "photos", "retina.jpg", "a retina"))


def remove_first(root, rows):
    del rows[0]


def rename_image(root, rows):
    (root / "photos" / rows[1]["image"]).rename(root / "photos" / "renamed.jpg")
    rows[1]["image"] = "renamed.jpg"


def change_nothing(root, rows):
    pass


# change: what it does, parameters; text encoded, latents encoded, samples sealed
TABLE = {
    "nothing": (change_nothing, {}, (0, 0, 10)),
    "caption of one row": (recaption, {}, (1, 0, 10)),
    "VAE weights": (partial(change_weights, "vae"), {}, (0, 10, 10)),
    "text encoder weights": (partial(change_weights, "text_encoder"), {}, (8 + 1, 0, 10)),  # and the empty caption
    "+10 % rows": (add_first, {}, (1, 1, 11)),
    "-10 % rows": (remove_first, {}, (0, 0, 9)),
    "image file renamed": (rename_image, {}, (0, 0, 10)),
    "max_pixels": (change_nothing, {"max_pixels": MAX_PIXELS // 2}, (0, 10, 10)),
}


def test_a_change_costs_what_it_touches(root, run_config, edit_rows):
    measured = {"(first run)": run(root, run_config(max_pixels=MAX_PIXELS))}
    for name in CHANGEABLE:
        (root / name).rename(root / f"first-{name}")
    for change, (apply, parameters, _) in TABLE.items():
        # the same paths every time, as for a user who edits in place
        for name in CHANGEABLE:
            shutil.copytree(root / f"first-{name}", root / name)
        edit_rows(partial(apply, root))
        measured[change] = run(root, run_config(**{"max_pixels": MAX_PIXELS, **parameters}))
        for name in CHANGEABLE:
            shutil.rmtree(root / name)

    print(f"\n{'change':<22}{'text encoded':>14}{'latents encoded':>17}{'samples sealed':>16}")
    for change, (text, latents, samples) in measured.items():
        print(f"{change:<22}{text:>14}{latents:>17}{samples:>16}")
    assert measured == {"(first run)": (8 + 1, 10, 10)} | {change: counts for change, (_, _, counts) in TABLE.items()}


def run(root, config):
    """Bring the cache up to date; return how many records of each unit were written, and the samples sealed."""
    before = num_written(root / "cache")
    data_process(config)
    written = num_written(root / "cache") - before
    return written["text"], written["latents"], len(Cache.open(root / "cache").latest())


def num_written(cache_dir):
    """Count the records in the journal by unit; one that was written twice counts twice."""
    written = Counter()
    for commit in read_journal(cache_dir).commits:
        written.update({unit: len(records.keys) for unit, records in commit.units.items()})
    return written
