"""DMD2: distil a teacher into a student of few steps by matching distributions, with a fake score and a GAN."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.contracts import EncodeUnit, ModelFamily, Objective


class DistributionMatchingDistillation:
    """The task ``dmd2``; real latents serve the discriminator, and noised ones as the student's inputs."""

    draws_noise_levels = False
    takes_turns = True

    def units(self, family: ModelFamily) -> tuple[EncodeUnit, ...]:
        """Return the family's units."""
        return family.units

    def objective(self, config: RunConfig, family: ModelFamily) -> Objective:
        """Set the task up for a run; see ``TurnTakingTask``."""
        from diffsynth_pipe.training.distribution_matching import DistributionMatching

        return DistributionMatching(config, family)


PLUGIN = DistributionMatchingDistillation()
