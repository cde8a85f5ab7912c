"""Loss on a fixed bank of samples, noise levels and noise, beside the base model's: it falls if the model learns."""

from __future__ import annotations

import bisect
import contextlib
import math
import statistics
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from diffsynth_pipe.errors import LaunchError
from diffsynth_pipe.training.loss_module import LossModule
from diffsynth_pipe.training.randomness import TIMESTEP, SampleDraws
from diffsynth_pipe.training.sampler import BatchPlan
from diffsynth_pipe.training.sources import to_device

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from accelerate import Accelerator
    from torch import Tensor
    from torch.nn import Module

    from diffsynth_pipe.training.sources import SampleSource

NUM_LEVELS = 4
"""Noise levels per sample where the loss depends on one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What one validation measured. Losses are means over the samples of each sample's mean over the noise levels.

    A margin is half of a 95 % confidence interval, t(0.975; n - 1) · s / √n with Student's t and the deviation s of n
    samples; None for a single sample. That of the improvement is over the samples' differences, so it is far smaller
    than the losses' own where they move together.

    Attributes:
        step: Optimizer steps before it.
        loss: Of the model as it is.
        loss_by_level: One loss per noise level, the noisiest first.
        base_loss: Of the model before the first step, without a LoRA or a template model.
        improvement: ``base_loss`` - ``loss``.
        held_out: Whether the samples are kept from training.
    """

    step: int
    loss: float
    loss_margin: float | None
    loss_by_level: tuple[float, ...]
    base_loss: float
    base_loss_by_level: tuple[float, ...]
    improvement: float
    improvement_margin: float | None
    num_samples: int
    held_out: bool

    def values(self) -> dict[str, Any]:
        """Return all but the step under the names of the metrics: ``validation_loss``."""
        return {f"validation_{name}": value for name, value in asdict(self).items() if name != "step"}

    def __str__(self) -> str:
        def margin(value: float | None) -> str:
            return "" if value is None else f" +- {value:.4f}"

        samples = f"{self.num_samples} {'held-out' if self.held_out else 'training'} samples"
        return (
            f"step {self.step}: validation loss {self.loss:.4f}{margin(self.loss_margin)}, "
            f"base model {self.base_loss:.4f}, {'better' if self.improvement >= 0 else 'worse'} by "
            f"{abs(self.improvement):.4f}{margin(self.improvement_margin)} (95 %, {samples})"
        )


@dataclass(slots=True, kw_only=True)
class EarlyStopping:
    """Knows the best validation so far, and says when too many have passed since.

    Attributes:
        patience: Validations without improvement that end the run; None: none does.
        best_step: Step of the smallest loss, the first of equal ones; None before any.
        best_loss: That loss.
        num_without_improvement: Validations since.
    """

    patience: int | None
    best_step: int | None = None
    best_loss: float | None = None
    num_without_improvement: int = 0

    def update(self, step: int, loss: float) -> bool:
        """Take note of a validation; return whether it is the best so far."""
        improved = self.best_loss is None or loss < self.best_loss
        if improved:
            self.best_step, self.best_loss, self.num_without_improvement = step, loss, 0
        else:
            self.num_without_improvement += 1
        return improved

    @property
    def should_stop(self) -> bool:
        """Whether the run is to end."""
        return self.patience is not None and self.num_without_improvement >= self.patience


class ValidationDraws:
    """Draws of the bank: visit k stands for noise level k; no seed of a run changes them.

    The levels are the middles of ``num_levels`` equal parts of their distribution, the noisiest first.
    """

    def __init__(self, sample_ids: Sequence[str], visits: Sequence[int], num_levels: int = NUM_LEVELS) -> None:
        self._levels = visits
        self._num_levels = num_levels
        self._draws = SampleDraws(0, sample_ids, visits, stream="validation")

    def noise(self, like: Tensor, purpose: str = "noise") -> Tensor:
        """Return standard normal noise, fp32, of the shape and on the device of ``like``."""
        return self._draws.noise(like, purpose)

    def uniform(self, purpose: str = TIMESTEP) -> Tensor:
        """Return the middle of each item's part of the noise levels, fp64; for other purposes random numbers."""
        if purpose != TIMESTEP:
            return self._draws.uniform(purpose)
        return torch.tensor([(2 * level + 1) / (2 * self._num_levels) for level in self._levels], dtype=torch.float64)


class Validator:
    """Measures the validation loss of a run, and of the model that it started from.

    Args:
        model: Returns one loss per sample; as an engine wraps it.
        source: Holds the bank.
        accelerator: Of the ranks, which share the work; the result does not depend on their number.
        compute_dtype: Dtype of the float fields.
        num_samples: At most so many samples of the source make up the bank.
        held_out: Whether they are kept from training.
        num_levels: Noise levels per sample; 1 where the loss depends on none.
    """

    def __init__(
        self,
        model: Module,
        source: SampleSource,
        accelerator: Accelerator,
        compute_dtype: torch.dtype,
        *,
        num_samples: int,
        held_out: bool,
        num_levels: int = NUM_LEVELS,
    ) -> None:
        self._model = model
        self._source = source
        self._accelerator = accelerator
        self._compute_dtype = compute_dtype
        self._num_levels = num_levels
        self._plans = validation_plans(source.bucket_sizes, num_samples, num_levels)
        self._held_out = held_out
        self.base: list[list[float]] | None = None
        """Losses of the base model, ``[samples][levels]``, once they are measured. A resumed run must set them."""

    @property
    def num_samples(self) -> int:
        """Size of the bank."""
        return len(self._plans)

    def measure(self, step: int) -> Validation | None:
        """Measure; None if the bank is empty. The first call also measures the base. Every rank must take part.

        Raises:
            LaunchError: A loss is NaN or Inf.
        """
        if not self._plans:
            return None
        if self.base is None:
            with lora_off(self._model), template_off(self._model):
                self.base = self._losses(step)
        losses = self._losses(step)
        per_sample, base_per_sample = map(_row_means, (losses, self.base))
        loss, loss_margin = mean_and_margin(per_sample)
        improvement, improvement_margin = mean_and_margin(
            [before - after for before, after in zip(base_per_sample, per_sample, strict=True)]
        )
        return Validation(
            step=step,
            loss=loss,
            loss_margin=loss_margin,
            loss_by_level=_column_means(losses),
            base_loss=statistics.fmean(base_per_sample),
            base_loss_by_level=_column_means(self.base),
            improvement=improvement,
            improvement_margin=improvement_margin,
            num_samples=len(losses),
            held_out=self._held_out,
        )

    @torch.no_grad()
    def _losses(self, step: int) -> list[list[float]]:
        """Return one loss per sample and level. Ranks take turns; equally often, as ZeRO-3 wants it."""
        world_size, num_plans = self._accelerator.num_processes, len(self._plans)
        num_rounds = -(-num_plans // world_size)
        mine = range(self._accelerator.process_index, num_rounds * world_size, world_size)
        losses = []
        with _eval_mode(self._model):
            for raw in self._source.batches([self._plans[number % num_plans] for number in mine]):
                batch = to_device(raw, self._accelerator.device, self._compute_dtype)
                losses.append(self._model(batch, ValidationDraws(batch.sample_ids, batch.visits, self._num_levels)))
        gathered = self._accelerator.gather(torch.stack(losses)).double().cpu()
        if not gathered.isfinite().all():
            raise LaunchError(f"step {step}: the validation loss is NaN or Inf; lower --learning_rate")
        in_order = gathered.view(world_size, num_rounds, self._num_levels).transpose(0, 1).flatten(0, 1)
        rows: list[list[float]] = in_order[:num_plans].tolist()
        return rows


def validation_plans(bucket_sizes: Mapping[str, int], num_samples: int, num_levels: int) -> list[BatchPlan]:
    """Choose samples spread evenly over the buckets, one batch per sample with one item per noise level."""
    names, ends = list(bucket_sizes), list(accumulate(bucket_sizes.values()))
    num_chosen = min(num_samples, ends[-1])
    plans = []
    for place in (number * ends[-1] // num_chosen for number in range(num_chosen)):
        bucket = names[bisect.bisect_right(ends, place)]
        index = place - (ends[names.index(bucket)] - bucket_sizes[bucket])
        plans.append(BatchPlan(bucket, (index,) * num_levels, tuple(range(num_levels))))
    return plans


@contextlib.contextmanager
def lora_off(model: Module) -> Generator[None]:
    """Let a model compute as if it had no LoRA."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)


@contextlib.contextmanager
def template_off(model: Module) -> Generator[None]:
    """Let the denoiser compute as if there were no template model."""
    templates = [module.template for module in model.modules() if isinstance(module, LossModule) and module.template]
    for template in templates:
        template.enabled = False
    try:
        yield
    finally:
        for template in templates:
            template.enabled = True


@contextlib.contextmanager
def _eval_mode(model: Module) -> Generator[None]:
    """Switch dropout off, and every module back to its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def mean_and_margin(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and half of its 95 % confidence interval; None for a single value."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    return mean, student_t95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def student_t95(degrees_of_freedom: int) -> float:
    """Return the t for which -t < T < t has probability 0.95 under Student's distribution.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4, solved by bisection of θ = atan(t/√ν).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _student_coverage(middle, degrees_of_freedom) < 0.95:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees_of_freedom) * math.tan(low)


def _student_coverage(theta: float, degrees_of_freedom: int) -> float:
    is_odd = degrees_of_freedom % 2
    if degrees_of_freedom == 1:
        return 2 * theta / math.pi
    term = total = math.cos(theta) if is_odd else 1.0
    for k in range(2 + is_odd, degrees_of_freedom, 2):
        term *= math.cos(theta) ** 2 * (k - 1) / k
        total += term
    area = math.sin(theta) * total
    return 2 / math.pi * (theta + area) if is_odd else area


def _row_means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(row) for row in rows]


def _column_means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(statistics.fmean(column) for column in zip(*rows, strict=True))
