"""Flow matching: the sigma grid of training, the loss weights on it, and the noising of latents."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth_pipe.contracts import FlowMatchSchedule


def sigma_grid(schedule: FlowMatchSchedule) -> Tensor:
    """Compute the noise levels that training draws from.

    Returns:
        Sigmas from 1 downwards, fp32 ``[num_steps]``, on CPU; computed in fp64.
    """
    num_points = schedule.num_steps + (0 if schedule.include_end else 1)
    u = torch.linspace(1.0, schedule.u_end, num_points, dtype=torch.float64)[: schedule.num_steps]
    # The exponential shift e^μ/(e^μ+1/u-1) is the linear one with s = e^μ.
    s = math.exp(schedule.shift) if schedule.shift_type == "exponential" else schedule.shift
    sigmas = s * u / (1 + (s - 1) * u)
    if schedule.terminal is not None:
        remainder = 1 - sigmas
        sigmas = 1 - remainder * ((1 - schedule.terminal) / remainder[-1])
    return sigmas.float()


def bell_weights(sigmas: Tensor) -> Tensor:
    """Weigh each noise level of a grid: exp(-2·(σ-½)²), lowered until its minimum is 0, scaled to mean 1 over the grid.

    The normaliser belongs to the whole grid, so the weight of a σ differs from family to family, and it is 0 at σ = 1.

    Args:
        sigmas: A whole grid, ``[num_steps]``.

    Returns:
        One weight per sigma, fp32 ``[num_steps]``.
    """
    bell = torch.exp(-2 * (sigmas.double() - 0.5) ** 2)
    bell -= bell.min()
    return (bell / bell.mean()).float()


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return (1-σ)·latents + σ·noise in fp32, of the shape of ``latents``.

    Args:
        latents: Clean latents, ``[batch, ...]``, any float dtype.
        noise: Standard normal noise of the same shape.
        sigma: Noise level of each sample in [0, 1], ``[batch]``.
    """
    sigma = sigma.float().view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents.float() + sigma * noise.float()
