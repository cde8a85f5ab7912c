"""The sigma grids, weights and noising against published tables, closed forms and diffusers' scheduler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffsynth_pipe.contracts import FlowMatchSchedule
from diffsynth_pipe.training.flow_match import add_noise, bell_weights, sigma_grid

QWEN_IMAGE = FlowMatchSchedule(shift_type="exponential", shift=0.8, terminal=0.02)
FLUX = FlowMatchSchedule(shift_type="linear", shift=3.0, u_end=0.003 / 1.002, include_end=True)
FLUX2 = FlowMatchSchedule(shift_type="exponential", shift=0.8, u_end=1 / 1000, include_end=True)
WAN = FlowMatchSchedule(shift_type="linear", shift=5.0)
Z_IMAGE = FlowMatchSchedule(shift_type="linear", shift=3.0)


@pytest.mark.parametrize(
    ("schedule", "median", "last", "mean"),
    [
        pytest.param(FLUX, 0.7515, 0.008929, 0.678, id="flux"),
        pytest.param(WAN, 0.8339, 0.004980, 0.748, id="wan"),
        pytest.param(Z_IMAGE, 0.7508, 0.002994, 0.677, id="z_image"),
        pytest.param(QWEN_IMAGE, 0.6963, 0.020000, 0.638, id="qwen_image"),
        pytest.param(FLUX2, 0.6908, 0.002223, 0.631, id="flux2"),
    ],
)
def test_grid_matches_the_reference_table(schedule, median, last, mean):
    sigmas = sigma_grid(schedule)
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (1000,)
    assert sigmas[0] == 1
    assert (sigmas.diff() < 0).all()
    assert float(sigmas[499]) == pytest.approx(median, abs=1e-4)
    assert float(sigmas[-1]) == pytest.approx(last, abs=5e-7)
    assert float(sigmas.mean()) == pytest.approx(mean, abs=5e-4)


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        pytest.param(QWEN_IMAGE, [0.104, 0.507, 1.179, 1.683, 1.181, 0.510, 0.259, 0], id="qwen_image"),
        pytest.param(FLUX, [0.114, 0.548, 1.257, 1.794, 1.258, 0.544, 0.276, 0], id="flux"),
        pytest.param(WAN, [0.126, 0.638, 1.464, 2.076, 1.456, 0.631, 0.318, 0], id="wan"),
        pytest.param(Z_IMAGE, [0.115, 0.551, 1.261, 1.798, 1.261, 0.547, 0.275, 0], id="z_image"),
    ],
)
def test_weights_match_the_reference_table(schedule, weights):
    sigmas = sigma_grid(schedule)
    computed = bell_weights(sigmas, sigmas)
    assert computed.dtype == torch.float32
    assert float(computed.double().mean()) == pytest.approx(1, abs=1e-6)
    assert computed[0] == 0
    for sigma, weight in zip([0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0], weights, strict=True):
        nearest = int((sigmas - sigma).abs().argmin())
        assert float(computed[nearest]) == pytest.approx(weight, abs=6e-4)


@pytest.mark.parametrize(
    ("schedule", "config"),
    [
        pytest.param(
            QWEN_IMAGE,
            {"use_dynamic_shifting": True, "time_shift_type": "exponential", "shift_terminal": 0.02},
            id="qwen_image",
        ),
        pytest.param(FLUX2, {"use_dynamic_shifting": True, "time_shift_type": "exponential"}, id="flux2"),
        pytest.param(WAN, {"shift": 5.0}, id="wan"),
        pytest.param(Z_IMAGE, {"shift": 3.0}, id="z_image"),
        pytest.param(FLUX, {"shift": 3.0}, id="flux"),
    ],
)
def test_grid_equals_that_of_the_diffusers_scheduler(schedule, config):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    u = np.linspace(1, schedule.u_end, 1000 if schedule.include_end else 1001)[:1000]
    scheduler.set_timesteps(sigmas=u.tolist(), mu=schedule.shift if "use_dynamic_shifting" in config else None)
    # The scheduler computes in fp32; near 1 that is 6e-8 per operation.
    torch.testing.assert_close(sigma_grid(schedule), scheduler.sigmas[:-1], rtol=0, atol=3e-7)


def test_a_short_grid_can_be_worked_out_by_hand():
    linear = FlowMatchSchedule(shift_type="linear", shift=3.0, num_steps=2)
    assert sigma_grid(linear).tolist() == pytest.approx([1, 0.75])  # 3·½/(1+2·½)
    exponential = FlowMatchSchedule(shift_type="exponential", shift=math.log(2), num_steps=2)
    assert sigma_grid(exponential).tolist() == pytest.approx([1, 2 / 3])  # 2/(2+2-1)
    stretched = FlowMatchSchedule(shift_type="linear", shift=1.0, num_steps=4, terminal=0.1)
    assert sigma_grid(stretched).tolist() == pytest.approx([1, 0.7, 0.4, 0.1])
    inclusive = FlowMatchSchedule(shift_type="linear", shift=1.0, num_steps=3, u_end=0.5, include_end=True)
    assert sigma_grid(inclusive).tolist() == pytest.approx([1, 0.75, 0.5])


def test_noise_is_mixed_per_sample_in_fp32():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 2, 1, 4, 4, generator=generator).bfloat16()
    noise = torch.randn(latents.shape, generator=generator)
    noisy = add_noise(latents, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert noisy.dtype == torch.float32
    assert torch.equal(noisy[0], latents[0].float())
    assert torch.equal(noisy[1], noise[1])
    torch.testing.assert_close(noisy[2], torch.lerp(latents[2].float(), noise[2], 0.25))
