"""Improved distribution matching distillation (DMD2, Yin et al., arXiv 2405.14867), with the reference's formulas.

Noise levels σ go from 0 to 1, x_σ = (1-σ)·x₀ + σ·ε, and a denoiser's velocity v gives x₀ = x_σ - σ·v.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from diffsynth_pipe.config import comma_list
from diffsynth_pipe.contracts import FIRST_FRAME_FIELD, Batch, Turn
from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.training.discriminator import feature_maps, make_discriminator
from diffsynth_pipe.training.flow_match import add_noise, sigma_grid
from diffsynth_pipe.training.lora import add_lora, lora_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.nn import Module

    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.contracts import Draws, FlowMatchSchedule, ModelFamily

STUDENT, TEACHER, FAKE_SCORE, DISCRIMINATOR = "dit", "dit_teacher", "dit_fake_score", "discriminator"
MAX_SIGMA = 0.999
"""Where the uniform schedule of the student starts at most."""
EPSILON = 1e-6


class DistributionMatching:
    """The objective of the task ``dmd2``; see ``Objective``.

    Three denoisers start as one: the student ``dit``, which is what the run trains; the frozen ``dit_teacher``, whose
    distribution it is to have; and ``dit_fake_score``, which learns to denoise what the student makes. Where the
    student is a LoRA the fake score is another, and all three share the base's weights. The discriminator tells real
    latents from the student's by the teacher's features.

    Raises:
        ConfigError: The student's steps do not fit.
    """

    def __init__(self, config: RunConfig, family: ModelFamily) -> None:
        self.sigmas = student_sigmas(config, family.schedule)
        has_discriminator = config.dmd2_gan_loss_weight > 0
        self.learning_rates: Mapping[str, float] = {
            FAKE_SCORE: config.dmd2_fake_score_learning_rate or config.learning_rate
        }
        if has_discriminator:
            rate = config.dmd2_discriminator_learning_rate or config.learning_rate
            self.learning_rates = {**self.learning_rates, DISCRIMINATOR: rate}
        student = Turn(name="student", max_grad_norm=config.dmd2_student_grad_clip_norm or math.inf)
        critic = Turn(name="critic", max_grad_norm=config.max_grad_norm, of_helpers=True)
        self.turns: tuple[Turn, ...] = (student, *[critic] * (config.dmd2_student_update_freq - 1))
        self.guidance = config.dmd2_teacher_cfg_scale
        self.needs_empty_caption = self.guidance != 1
        self.empty_caption: Batch | None = None
        self.lineage: Mapping[str, object] = {
            "student_sigmas": self.sigmas,
            "student_sample_type": config.dmd2_student_sample_type,
        }
        self._config = config
        self._family = family
        self._indices: tuple[int, ...] = ()

    def helpers(self, dit: Module) -> Mapping[str, Module]:
        """Return teacher, fake score and discriminator; see ``Objective``."""
        by_lora = bool(self._config.lora_base_model)
        teacher, fake_score = (copy_of(dit, share=by_lora) for _ in range(2))
        teacher.requires_grad_(requires_grad=False).eval()
        if by_lora:
            add_lora(fake_score, lora_settings(self._config, self._family.lora_target_modules), self._config.seed)
        models = {TEACHER: teacher, FAKE_SCORE: fake_score.train()}
        if DISCRIMINATOR in self.learning_rates:
            models[DISCRIMINATOR], self._indices = make_discriminator(self._config, self._family, dit)
        return models

    def loss(self, models: Mapping[str, Module], batch: Batch, draws: Draws, turn: Turn | None) -> Tensor:
        """Return one loss per sample, fp32 ``[batch]``; in a validation the energy score, see ``energy_scores``."""
        if turn is None:
            samples = self.sample(models, batch, draws)
            return energy_scores(self._generated(samples, batch), self._generated(self._latents(batch), batch))
        is_student = not turn.of_helpers
        models[STUDENT].train(is_student)
        models[FAKE_SCORE].train(not is_student)
        return self._student_loss(models, batch, draws) if is_student else self._critic_loss(models, batch, draws)

    def sample(self, models: Mapping[str, Module], batch: Batch, draws: Draws) -> Tensor:
        """Return what the student makes of noise in its steps, fp32, shaped as the latents.

        ``sde`` noises each prediction of x₀ anew to the next level, ``ode`` takes Euler's step.
        """
        latents = self._latents(batch)
        x = self.sigmas[0] * draws.noise(latents)
        for number, (sigma, following) in enumerate(itertools.pairwise(self.sigmas)):
            levels = torch.full((len(x),), sigma, device=x.device)
            x0 = self._denoise(models, STUDENT, batch, x, levels)
            if self._config.dmd2_student_sample_type == "sde":
                x = add_noise(x0, draws.noise(latents, f"sampling/{number}"), torch.full_like(levels, following))
            else:
                x = x + (following - sigma) / sigma * (x - x0)
        return x

    def _student_loss(self, models: Mapping[str, Module], batch: Batch, draws: Draws) -> Tensor:
        """Return the matching loss and the weighted generator loss; gradients are the student's alone."""
        latents = self._latents(batch)
        generated = self._generate(models, batch, draws)
        sigma = matching_sigmas(draws.uniform(), self._config).to(latents.device)
        noisy = add_noise(generated, draws.noise(latents, "matching"), sigma)
        with torch.no_grad():
            fake = self._denoise(models, FAKE_SCORE, batch, noisy, sigma)
        weight, teacher = self._config.dmd2_gan_loss_weight, models[TEACHER]
        # One call for both: the prediction without gradients, the features with them.
        with torch.set_grad_enabled(weight > 0), feature_maps(self._family, teacher, self._indices, latents) as maps:
            real = self._denoise(models, TEACHER, batch, noisy, sigma).detach()
        if self.empty_caption is not None:
            with torch.no_grad():
                unguided = self._denoise(models, TEACHER, _with_caption(batch, self.empty_caption), noisy, sigma)
            real = unguided + self.guidance * (real - unguided)
        loss = matching_loss(*(self._generated(x, batch) for x in (generated, real, fake)))
        if weight > 0:
            discriminator = models[DISCRIMINATOR]
            frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
            logits = torch.func.functional_call(discriminator, frozen, (maps,))
            loss = loss + weight * functional.softplus(-logits).mean(1)
        return loss

    def _critic_loss(self, models: Mapping[str, Module], batch: Batch, draws: Draws) -> Tensor:
        """Return the fake score's loss and the discriminator's."""
        config, latents = self._config, self._latents(batch)
        with torch.no_grad():
            generated = self._generate(models, batch, draws)
            sigma = matching_sigmas(draws.uniform(), config).to(latents.device)
            noise = draws.noise(latents, "matching")
            noisy = add_noise(generated, noise, sigma)
        fake = self._denoise(models, FAKE_SCORE, batch, noisy, sigma)
        loss = self._generated(fake - generated, batch).square().flatten(1).mean(1)
        if config.dmd2_gan_loss_weight > 0:
            discriminator = models[DISCRIMINATOR]
            fake_logits = discriminator(self._features(models, batch, noisy, sigma))
            real_logits = discriminator(self._features(models, batch, add_noise(latents, noise, sigma), sigma))
            loss = loss + (functional.softplus(fake_logits) + functional.softplus(-real_logits)).mean(1)
            if config.dmd2_gan_logit_reg_weight > 0:
                squares = 0.5 * (real_logits.square() + fake_logits.square()).mean(1)
                loss = loss + config.dmd2_gan_logit_reg_weight * squares
            if config.dmd2_gan_r1_reg_weight > 0:
                # As in the reference and in FastGen: clean latents with this noise, told to be at σ.
                near = latents.float() + config.dmd2_gan_r1_reg_alpha * draws.noise(latents, "r1")
                near_logits = discriminator(self._features(models, batch, near, sigma))
                loss = loss + config.dmd2_gan_r1_reg_weight * (real_logits - near_logits).square().mean(1)
        return loss

    def _generate(self, models: Mapping[str, Module], batch: Batch, draws: Draws) -> Tensor:
        """Return the student's x₀ from a step of its schedule that each sample draws, fp32.

        Its input is the real latents, noised to that level; noise alone where there is one step only.
        """
        latents = self._latents(batch)
        num_steps = len(self.sigmas) - 1
        steps = (draws.uniform("student_step") * num_steps).long()
        sigma = torch.tensor(self.sigmas, dtype=torch.float32)[steps].to(latents.device)
        noise = draws.noise(latents, "student")
        noisy = add_noise(latents if num_steps > 1 else torch.zeros_like(latents), noise, sigma)
        return self._denoise(models, STUDENT, batch, noisy, sigma)

    def _denoise(self, models: Mapping[str, Module], name: str, batch: Batch, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return a denoiser's x₀, fp32."""
        asked = {**models, "dit": models[name]}
        velocity = self._family.predict_velocity(asked, batch, noisy.to(self._latents(batch).dtype), sigma)
        return noisy - sigma.view(-1, *[1] * (noisy.ndim - 1)) * velocity.float()

    def _features(self, models: Mapping[str, Module], batch: Batch, noisy: Tensor, sigma: Tensor) -> list[Tensor]:
        with torch.no_grad(), feature_maps(self._family, models[TEACHER], self._indices, noisy) as maps:
            self._denoise(models, TEACHER, batch, noisy, sigma)
        return maps

    def _latents(self, batch: Batch) -> Tensor:
        return batch.fields[self._family.latents_field]

    @staticmethod
    def _generated(latents: Tensor, batch: Batch) -> Tensor:
        """Leave out a first frame that is given."""
        return latents[:, :, 1:] if FIRST_FRAME_FIELD in batch.fields else latents


def student_sigmas(config: RunConfig, schedule: FlowMatchSchedule) -> tuple[float, ...]:
    """Return the noise levels of the student's steps, falling, and a final 0.

    Raises:
        ConfigError: ``dmd2_student_t_list`` lists another number of steps, or the family's grid has more points.
    """
    num_steps = config.dmd2_student_sample_steps
    if config.dmd2_student_t_list is not None:
        sigmas = tuple(map(float, comma_list(config.dmd2_student_t_list)))
        if len(sigmas) != num_steps + 1:
            raise ConfigError(
                f"dmd2_student_t_list: {len(sigmas)} levels are for {len(sigmas) - 1} steps, but "
                f"dmd2_student_sample_steps is {num_steps}; list one level more than steps"
            )
        return sigmas
    if config.dmd2_student_schedule == "family":
        # Stretching a grid to its terminal sigma takes two points: with one it is 0/0.
        if num_steps == 1 and schedule.terminal is not None:
            message = "dmd2_student_schedule: the family's grid has no single step; raise dmd2_student_sample_steps"
            raise ConfigError(message)
        return (*sigma_grid(dataclasses.replace(schedule, num_steps=num_steps)).tolist(), 0.0)
    start = min(config.dmd2_matching_t_max, MAX_SIGMA)
    return tuple(torch.linspace(start, 0, num_steps + 1, dtype=torch.float64).tolist())


def matching_sigmas(u: Tensor, config: RunConfig) -> Tensor:
    """Map uniform numbers to the noise levels at which distributions are compared, from high levels to low ones; fp32.

    ``logitnormal`` squeezes sigmoid(mean + std·z) into the range instead of cutting it.
    """
    quantile = 1 - u
    if config.dmd2_matching_t_sampling == "logitnormal":
        normal = torch.special.ndtri(quantile)
        quantile = torch.sigmoid(config.dmd2_matching_t_mean + config.dmd2_matching_t_std * normal)
    low, high = config.dmd2_matching_t_min, config.dmd2_matching_t_max
    return (low + quantile * (high - low)).float()


def matching_loss(generated: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Return a loss per sample whose gradient at ``generated`` is that of matching distributions, over the elements.

    It is ½·mean((x - sg(x - g))²) with g = (fake - real) / (mean|x - real| + 1e-6), so the gradient is g / elements;
    DMD's equation 7 and 8 (Yin et al., arXiv 2311.18828).

    Args:
        generated: What the student made, x.
        real: The teacher's x₀ from it, noised.
        fake: The fake score's x₀ from the same.
    """
    with torch.no_grad():
        distance = (generated - real).abs().flatten(1).mean(1).view(-1, *[1] * (generated.ndim - 1))
        target = generated - (fake - real) / (distance + EPSILON)
    return 0.5 * (generated - target).square().flatten(1).mean(1)


def energy_scores(samples: Tensor, real: Tensor) -> Tensor:
    """Return the energy score of each sample of one caption, fp32 ``[batch]``, in root mean squares of elements.

    |x - y| - ½·mean|x - x'| over the other samples x' of the batch: in the mean over captions it is smallest if x has
    the distribution of the real y (Gneiting and Raftery 2007, "Strictly proper scoring rules", equation 21).

    Args:
        samples: Samples for the same caption.
        real: Real latents, the same in each row.
    """
    rows = samples.float().flatten(1)
    error = (rows - real.float().flatten(1)).square().mean(1).sqrt()
    if len(rows) == 1:
        return error
    spread = (rows[:, None] - rows[None]).square().mean(2).sqrt().sum(1) / (len(rows) - 1)
    return error - 0.5 * spread


def copy_of(model: Module, *, share: bool) -> Module:
    """Return a model of the same structure, with weights of its own or the very same."""
    tensors = (*model.parameters(), *model.buffers()) if share else ()
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _with_caption(batch: Batch, caption: Batch) -> Batch:
    """Give all samples of a batch this caption."""
    count = len(batch.sample_ids)
    fields = {name: field.expand(count, *field.shape[1:]) for name, field in caption.fields.items()}
    lengths = {name: length.expand(count) for name, length in caption.lengths.items()}
    return dataclasses.replace(batch, fields={**batch.fields, **fields}, lengths={**batch.lengths, **lengths})
