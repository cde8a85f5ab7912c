"""Sigma grid and weights of every family against the reference's formulas, in float64, for all 1000 steps."""

import numpy as np
import pytest

from diffsynth_pipe.contracts import load_family
from diffsynth_pipe.training.flow_match import bell_weights, sigma_grid

FROM_ONE_TO_ZERO = np.linspace(1, 0, 1001)[:-1]


def linear(u, shift):
    return shift * u / (1 + (shift - 1) * u)


def exponential(u, mu=0.8):
    return np.exp(mu) / (np.exp(mu) + 1 / u - 1)


def stretched(sigmas, terminal=0.02):
    z = 1 - sigmas
    return 1 - z / (z[-1] / (1 - terminal))


QWEN_IMAGE = stretched(exponential(FROM_ONE_TO_ZERO))
GRIDS = {
    "flux": linear(np.linspace(1, 0.003 / 1.002, 1000), 3),
    "flux2": exponential(np.linspace(1, 1 / 1000, 1000)),
    "qwen_image": QWEN_IMAGE,
    "qwen_image_edit": QWEN_IMAGE,
    "wan": linear(FROM_ONE_TO_ZERO, 5),
    "wan_s2v": linear(FROM_ONE_TO_ZERO, 5),
    "wan_ti2v": linear(FROM_ONE_TO_ZERO, 5),
    "z_image": linear(FROM_ONE_TO_ZERO, 3),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grid_and_weights_are_the_references(name):
    grid, expected = sigma_grid(load_family(name).schedule), GRIDS[name]
    np.testing.assert_allclose(grid.double().numpy(), expected, rtol=0, atol=1e-6)
    y = np.exp(-2 * ((1000 * expected - 500) / 1000) ** 2)
    weights = (y - y.min()) * 1000 / (y - y.min()).sum()
    np.testing.assert_allclose(bell_weights(grid, grid).double().numpy(), weights, rtol=0, atol=1e-6)
