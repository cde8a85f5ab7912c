"""The conformance suites run every family; what is large in a real one is made small here."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _small_edit_images():
    """Let Qwen-Image-Edit see the images to be edited at a hundredth of their area."""
    from diffsynth_pipe.families import qwen_image_edit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen_image_edit, "LATENTS_AREA_PX", 96 * 96)
        patch.setattr(qwen_image_edit, "PICTURE_AREA_PX", 64 * 64)
        yield
