"""Direct distillation: sample an image from its row's own noise in few steps, and compare it with the teacher's."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from cache_store.contract import FieldSpec
from diffsynth_pipe.contracts import EncodeUnit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.nn import Module

    from diffsynth_pipe.contracts import Batch, Components, Draws, ModelFamily, NoiseLevels

STEPS = "num_inference_steps"


class DirectDistillation:
    """The task ``direct_distill``: the image of a row is what a teacher made of its seed in many guided steps."""

    draws_noise_levels = False
    takes_turns = False

    def units(self, family: ModelFamily) -> tuple[EncodeUnit, ...]:
        """Return the family's units, the one that draws the row's noise, and the one that stores its steps."""
        # Stretching a grid to its terminal sigma takes two points: with one it is 0/0.
        fewest = 1 if family.schedule.terminal is None else 2
        sampling = EncodeUnit(
            name="sampling",
            inputs=(STEPS, "cfg_scale"),
            outputs=(FieldSpec(name=STEPS, dtype="int32", dims=()),),
            component=None,
            encode=_store_steps,
            parse={STEPS: lambda cell: _parse_steps(cell, fewest), "cfg_scale": _parse_cfg_scale},
            bucket_by=(STEPS,),
        )
        return (*family.units, family.noise_unit, sampling)

    def loss(
        self,
        family: ModelFamily,
        models: Mapping[str, Module],
        batch: Batch,
        draws: Draws,  # noqa: ARG002 - the noise is the row's
        levels: NoiseLevels,  # noqa: ARG002 - all steps are taken
    ) -> Tensor:
        """Return mean((x - latents)²) per sample, fp32 ``[batch]``; gradients flow through all steps.

        x starts as the row's noise. Euler steps x + v·(σ_next - σ) are taken in fp32 over the family's grid with
        ``num_inference_steps`` points, the last one to σ = 0, without guidance.
        """
        import torch

        from diffsynth_pipe.training.flow_match import sigma_grid

        noise, latents = batch.fields["noise"], batch.fields[family.latents_field]
        (num_steps,) = set(batch.fields[STEPS].tolist())
        sigmas = sigma_grid(dataclasses.replace(family.schedule, num_steps=num_steps)).tolist()
        x = noise.float()
        for sigma, sigma_next in itertools.pairwise((*sigmas, 0.0)):
            told = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
            x = x + family.predict_velocity(models, batch, x.to(noise.dtype), told).float() * (sigma_next - sigma)
        return (x - latents.float()).square().flatten(1).mean(1)


def _store_steps(_: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    import torch

    return {STEPS: torch.tensor(inputs[STEPS], dtype=torch.int32)}


def _parse_steps(cell: Any, fewest: int) -> int:
    try:
        num_steps = int(str(cell))
    except ValueError:
        num_steps = 0
    if not fewest <= num_steps <= 1000:
        message = f"a whole number from {fewest} to 1000"
        raise ValueError(message)
    return num_steps


def _parse_cfg_scale(cell: Any) -> int:
    """Read the scale of the student; the reference takes the column, and trains at 1 whatever it says."""
    try:
        is_one = float(str(cell)) == 1
    except ValueError:
        is_one = False
    if not is_one:
        message = "1: the student is trained without guidance, which the teacher's images should have had"
        raise ValueError(message)
    return 1


PLUGIN = DirectDistillation()
