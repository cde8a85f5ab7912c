"""Fixtures for all tests: no network, no writing outside of the temporary folders, one tiny model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Read when huggingface_hub, transformers and torch are imported; test processes and what they start inherit them.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", DO_NOT_TRACK="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The same examples on every run: a failure is a change's, not luck's.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def _own_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache folder out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg-cache")))
        yield


@pytest.fixture(scope="session")
def tiny_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny qwen_image repository, ``<base>/tiny/Qwen-Image``; tests must not write into it."""
    from diffsynth_pipe.families.qwen_image import PLUGIN

    folder = tmp_path_factory.mktemp("models") / "tiny" / "Qwen-Image"
    PLUGIN.write_tiny(folder)
    return folder
