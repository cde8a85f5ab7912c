"""Flow matching: the sigma grid of training, how noise levels are drawn and weighted, and the noising of latents."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from diffsynth_pipe.contracts import NoiseLevel
from diffsynth_pipe.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.contracts import FlowMatchSchedule, ResolutionShift


def sigma_grid(schedule: FlowMatchSchedule) -> Tensor:
    """Compute the noise levels that training draws from.

    Returns:
        Sigmas from 1 downwards, fp32 ``[num_steps]``, on CPU; computed in fp64.
    """
    num_points = schedule.num_steps + (0 if schedule.include_end else 1)
    u = torch.linspace(1.0, schedule.u_end, num_points, dtype=torch.float64)[: schedule.num_steps]
    # The exponential shift e^μ/(e^μ+1/u-1) is the linear one with s = e^μ.
    sigmas = shift_sigmas(u, math.exp(schedule.shift) if schedule.shift_type == "exponential" else schedule.shift)
    if schedule.terminal is not None:
        remainder = 1 - sigmas
        sigmas = 1 - remainder * ((1 - schedule.terminal) / remainder[-1])
    return sigmas.float()


def shift_sigmas(sigmas: Tensor, s: float) -> Tensor:
    """Return s·σ/(1+(s-1)·σ): for s above 1 more noise. Shifting by 1/s takes it back."""
    return s * sigmas / (1 + (s - 1) * sigmas)


def bell_weights(sigmas: Tensor, grid: Tensor) -> Tensor:
    """Weigh noise levels: exp(-2·(σ-½)²), lowered until its minimum over a grid is 0, scaled to mean 1 over the grid.

    The normaliser belongs to the whole grid, so the weight of a σ differs from family to family, and it is 0 at σ = 1.
    It is not negative for any σ in [0, 1] if the grid starts at 1.

    Args:
        sigmas: Noise levels, on the grid or not.
        grid: A whole grid, ``[num_steps]``.

    Returns:
        One weight per sigma, fp32.
    """
    bell, bell_of_grid = (torch.exp(-2 * (values.double() - 0.5) ** 2) for values in (sigmas, grid))
    lowest = bell_of_grid.min()
    return ((bell - lowest) / (bell_of_grid - lowest).mean()).float()


def min_snr_weights(sigmas: Tensor, gamma: float) -> Tensor:
    """Weigh noise levels as Min-SNR does: min((1-σ)², γ·σ²), fp32.

    Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (arXiv 2303.09556), weigh the error of
    predicted clean data by min(SNR, γ). Here x_σ = (1-σ)·x₀ + σ·ε and v = ε - x₀, so SNR = ((1-σ)/σ)², and
    x₀ = x_σ - σ·v: an error of v is one of x₀ times σ². Hence σ²·min(SNR, γ). Its mean is not 1.
    """
    sigmas = sigmas.double()
    return torch.minimum((1 - sigmas) ** 2, gamma * sigmas**2).float()


def resolution_shift(shift: ResolutionShift, num_tokens: int) -> float:
    """Return e^μ, the linear shift that inference takes for this many latent tokens."""
    slope = (shift.max_shift - shift.base_shift) / (shift.max_seq_len - shift.base_seq_len)
    return math.exp(shift.base_shift + slope * (num_tokens - shift.base_seq_len))


class SigmaDistribution:
    """How a run draws its noise levels, and weighs them.

    ``grid`` takes each level of the family's grid equally often. ``uniform`` takes all of (0, 1], and ``logit_normal``
    is sigmoid of a normal number (Esser et al., arXiv 2403.03206, equation 19, where t is our σ); both are shifted
    afterwards. All are cut to the wanted range of σ, not squeezed into it.

    Args:
        schedule: The family's.
        config: The run.

    Raises:
        ConfigError: The range holds no level of the grid, or the family knows no shift by resolution.
    """

    def __init__(self, schedule: FlowMatchSchedule, config: RunConfig) -> None:
        self._config = config
        self._grid = sigma_grid(schedule)
        self._resolution_shift = schedule.resolution_shift
        if config.timestep_shift == "resolution" and schedule.resolution_shift is None:
            raise ConfigError(f"timestep_shift: family {config.family!r} has no shift by resolution; set a number")
        # as the reference rounds the boundaries
        first, end = (
            int(boundary * schedule.num_steps)
            for boundary in (config.min_timestep_boundary, config.max_timestep_boundary)
        )
        levels = self._grid[first:end]
        self._levels = levels[(levels >= config.min_sigma) & (levels <= config.max_sigma)]
        if config.timestep_sampling == "grid" and not len(self._levels):
            raise ConfigError(
                f"min_sigma, max_sigma: no level of the family's grid, 1 down to {self._grid[-1]:.4g}, lies in"
                f" {config.min_sigma:g} to {config.max_sigma:g}; widen the range"
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest sigma that can be drawn."""
        if self._config.timestep_sampling != "grid":
            return self._config.min_sigma, self._config.max_sigma
        return float(self._levels.min()), float(self._levels.max())

    def draw(self, u: Tensor, num_tokens: int) -> NoiseLevel:
        """Map uniform numbers to noise levels; see ``NoiseLevels``."""
        if self._config.timestep_sampling != "grid":
            sigma = self._continuous(u, num_tokens).float()
            return NoiseLevel(sigma, sigma, self._weights(sigma))
        num_levels = len(self._levels)
        sigma = self._levels[(u * num_levels).long().clamp(max=num_levels - 1)]
        if not self._config.snap_timesteps_to_bf16:
            return NoiseLevel(sigma, sigma, self._weights(sigma))
        # The reference hands the model the rounded timestep, and looks up the level nearest to it, the first of two.
        timestep = (1000 * sigma).bfloat16()
        sigma = self._grid[(1000 * self._grid - timestep[:, None]).abs().argmin(1)]
        return NoiseLevel(sigma, timestep.float() / 1000, self._weights(sigma))

    def _continuous(self, u: Tensor, num_tokens: int) -> Tensor:
        """Return the quantile at 1-u of the distribution, cut to the range of the run."""
        config = self._config
        s = config.timestep_shift or 1.0
        if s == "resolution":
            assert self._resolution_shift is not None
            s = resolution_shift(self._resolution_shift, num_tokens)
        bounds = torch.tensor([config.min_sigma, config.max_sigma], dtype=torch.float64)
        mean, std = config.logit_mean, config.logit_std
        lowest, highest = shift_sigmas(bounds, 1 / s)
        if config.timestep_sampling == "logit_normal":
            lowest, highest = torch.special.ndtr((torch.logit(torch.stack((lowest, highest))) - mean) / std)
        quantile = highest - u * (highest - lowest)
        if config.timestep_sampling == "logit_normal":
            quantile = torch.sigmoid(mean + std * torch.special.ndtri(quantile))
        return shift_sigmas(quantile, s).clamp(*bounds.tolist())

    def _weights(self, sigma: Tensor) -> Tensor:
        if self._config.loss_weighting == "bell":
            return bell_weights(sigma, self._grid)
        if self._config.loss_weighting == "min_snr":
            return min_snr_weights(sigma, self._config.min_snr_gamma)
        return torch.ones_like(sigma)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return (1-σ)·latents + σ·noise in fp32, of the shape of ``latents``.

    Args:
        latents: Clean latents, ``[batch, ...]``, any float dtype.
        noise: Standard normal noise of the same shape.
        sigma: Noise level of each sample in [0, 1], ``[batch]``.
    """
    sigma = sigma.float().view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents.float() + sigma * noise.float()
