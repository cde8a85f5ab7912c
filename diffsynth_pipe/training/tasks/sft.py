"""Supervised fine-tuning: weighted mean squared error of the velocity at a drawn noise level."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffsynth_pipe.contracts import FIRST_FRAME_FIELD

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.nn import Module

    from diffsynth_pipe.contracts import Batch, Draws, EncodeUnit, ModelFamily, NoiseLevels


class SupervisedFineTuning:
    """The task ``sft``."""

    draws_noise_levels = True
    takes_turns = False

    def units(self, family: ModelFamily) -> tuple[EncodeUnit, ...]:
        """Return the family's units."""
        return family.units

    def loss(
        self, family: ModelFamily, models: Mapping[str, Module], batch: Batch, draws: Draws, levels: NoiseLevels
    ) -> Tensor:
        """Return w(σ) · mean((v(x_σ, σ) - (noise - latents))²) per sample, fp32 ``[batch]``.

        A first frame that is given is no part of the mean.
        x_σ = (1-σ)·latents + σ·noise is computed in fp32 and handed to the model in the dtype of the batch.
        """
        from diffsynth_pipe.training.flow_match import add_noise

        latents = batch.fields[family.latents_field]
        level = levels.draw(draws.uniform(), family.num_tokens(latents.shape))
        noise = draws.noise(latents)
        noisy = add_noise(latents, noise, level.sigma.to(latents.device))
        velocity = family.predict_velocity(models, batch, noisy.to(latents.dtype), level.model_sigma.to(latents.device))
        error = velocity.float() - (noise - latents.float())
        if FIRST_FRAME_FIELD in batch.fields:
            error = error[:, :, 1:]
        return error.square().flatten(1).mean(1) * level.weight.to(latents.device)


PLUGIN = SupervisedFineTuning()
