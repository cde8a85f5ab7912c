"""The training loop: counts in optimizer steps, knows neither family nor task nor where the samples come from."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from diffsynth_pipe.errors import LaunchError
from diffsynth_pipe.training import checkpoints
from diffsynth_pipe.training.metrics import Metrics
from diffsynth_pipe.training.randomness import SampleDraws
from diffsynth_pipe.training.sampler import BucketSampler
from diffsynth_pipe.training.sources import to_device
from diffsynth_pipe.training.validation import validation_loss

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor
    from torch.nn import Parameter

    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.contracts import Batch
    from diffsynth_pipe.training.engine import Engine
    from diffsynth_pipe.training.sampler import BatchPlan
    from diffsynth_pipe.training.sources import SampleSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """What is trained, and what its file says.

    Attributes:
        parameters: By their names in the file.
        adapter: Rank and alpha, as diffusers stores them.
        lineage: What the weights were made from.
    """

    parameters: Mapping[str, Parameter]
    adapter: Mapping[str, object]
    lineage: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended.

    Attributes:
        num_steps: Optimizer steps.
        loss_before: Validation loss before the first step; None without validation samples.
        loss_after: Validation loss after the last.
        lora_path: The last checkpoint.
        lora_digest: Digest of its bytes; empty on other ranks than 0.
    """

    num_steps: int
    loss_before: float | None
    loss_after: float | None
    lora_path: Path
    lora_digest: str


class Loop:
    """One run of training on this rank.

    Args:
        config: The run.
        engine: Holds the models.
        source: Yields the samples.
        lora: What is trained.
        run_dir: Gets ``metrics.jsonl`` and the checkpoints.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        engine: Engine,
        source: SampleSource,
        lora: Lora,
        run_dir: Path,
    ) -> None:
        self._config = config
        self._engine = engine
        self._accelerator = engine.accelerator
        self._source = source
        self._lora = lora
        self._run_dir = run_dir
        self._micro_steps = config.gradient_accumulation_steps
        self._global_batch_size = config.batch_size * self._micro_steps * self._accelerator.num_processes
        self._sampler = BucketSampler(source.bucket_sizes, self._global_batch_size, config.seed)

    def run(self) -> TrainResult:
        """Train from the first step to the last.

        Raises:
            LaunchError: A loss or a weight is NaN or Inf.
        """
        config = self._config
        num_steps = self._sampler.num_steps(config.num_epochs * config.dataset_repeat)
        lora_path, lora_digest = self._run_dir, ""
        with (
            Metrics(self._run_dir, num_steps, enabled=self._accelerator.is_main_process) as metrics,
            contextlib.closing(self._batches(num_steps)) as batches,
        ):
            loss_before = self._validate()
            metrics.write(0, validation_loss=loss_before)
            for step in range(1, num_steps + 1):
                values = self._step(step, batches)
                metrics.write(step, epoch=self._sampler.finished_passes(step - 1) // config.dataset_repeat, **values)
                metrics.advance(values)
                if step == num_steps or self._is_checkpoint_due(step):
                    lora_path, lora_digest = self._save(step)
            loss_after = self._validate()
            metrics.write(num_steps, validation_loss=loss_after)
        return TrainResult(
            num_steps=num_steps,
            loss_before=loss_before,
            loss_after=loss_after,
            lora_path=lora_path,
            lora_digest=lora_digest,
        )

    def _is_checkpoint_due(self, step: int) -> bool:
        if self._config.save_steps:
            return step % self._config.save_steps == 0
        repeat = self._config.dataset_repeat
        return step == self._sampler.num_steps(self._sampler.finished_passes(step) // repeat * repeat)

    def _plans(self, num_steps: int) -> Iterator[BatchPlan]:
        """Yield this rank's micro-batches of all steps."""
        for step in range(num_steps):
            yield from self._sampler.plan(step).micro_batches(
                rank=self._accelerator.process_index,
                world_size=self._accelerator.num_processes,
                batch_size=self._config.batch_size,
            )

    def _batches(self, num_steps: int) -> Generator[Batch]:
        for batch in self._source.batches(self._plans(num_steps)):
            yield to_device(batch, self._accelerator.device, self._engine.compute_dtype)

    def _step(self, step: int, batches: Iterator[Batch]) -> dict[str, Any]:
        """Take one optimizer step on the global batch; return what the metrics say of it."""
        accelerator, engine = self._accelerator, self._engine
        begin, waited_s = time.perf_counter(), 0.0
        losses: list[Tensor] = []
        sample_ids: list[str] = []
        grad_norm = math.nan
        for _ in range(self._micro_steps):
            wait_begin = time.perf_counter()
            batch = next(batches)
            waited_s += time.perf_counter() - wait_begin
            with accelerator.accumulate(engine.model):
                draws = SampleDraws(self._config.seed, batch.sample_ids, batch.visits)
                loss = engine.model(batch, draws)
                accelerator.backward(loss.mean())
                if accelerator.sync_gradients:
                    # DeepSpeed has clipped and stepped by now; it only returns the norm here.
                    norm = accelerator.clip_grad_norm_(self._lora.parameters.values(), self._config.max_grad_norm)
                    grad_norm = float(norm)
                engine.optimizer.step()
                engine.optimizer.zero_grad()
            losses.append(loss.detach())
            sample_ids.extend(batch.sample_ids)
        mean_loss = self._mean_loss(step, torch.cat(losses), sample_ids)
        if not math.isfinite(grad_norm):
            raise LaunchError(f"step {step}: the norm of the gradients is {grad_norm}; lower --learning_rate")
        elapsed_s = time.perf_counter() - begin
        return {
            "loss": mean_loss,
            "lr": self._config.learning_rate,
            "grad_norm": grad_norm,
            "samples_per_s": round(self._global_batch_size / elapsed_s, 3),
            "data_wait_share": round(waited_s / elapsed_s, 4),
        }

    def _mean_loss(self, step: int, losses: Tensor, sample_ids: list[str]) -> float:
        """Return the mean over the global batch; equal on all ranks, so that all of them stop at a NaN."""
        gathered = self._accelerator.gather(losses)
        if gathered.isfinite().all():
            return float(gathered.double().mean())
        from accelerate.utils import gather_object

        finite = losses.isfinite().tolist()
        bad = [sample_id for sample_id, is_finite in zip(sample_ids, finite, strict=True) if not is_finite]
        raise LaunchError(
            f"step {step}: the loss is NaN or Inf for sample {', '.join(gather_object(bad))}; "
            "lower --learning_rate or --max_grad_norm"
        )

    def _save(self, step: int) -> tuple[Path, str]:
        tensors = checkpoints.gather(self._lora.parameters)
        path = self._run_dir / f"step-{step:06d}.safetensors"
        if not self._accelerator.is_main_process:
            return path, ""
        return path, checkpoints.write_lora(path, tensors, self._lora.adapter, {**self._lora.lineage, "step": step})

    def _validate(self) -> float | None:
        return validation_loss(
            self._engine.model,
            self._source,
            self._config.num_validation_samples,
            self._accelerator.device,
            self._engine.compute_dtype,
        )
