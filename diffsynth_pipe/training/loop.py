"""The training loop: counts in optimizer steps, knows neither family nor task nor where the samples come from."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from diffsynth_pipe.contracts import load_task
from diffsynth_pipe.errors import ConfigError, LaunchError, TrainingStopped
from diffsynth_pipe.training import run_dir as run_dirs
from diffsynth_pipe.training import state as states
from diffsynth_pipe.training.metrics import LossByDecile, Metrics
from diffsynth_pipe.training.optim import MovingAverage, learning_rates
from diffsynth_pipe.training.randomness import CaptionDropout, SampleDraws
from diffsynth_pipe.training.signals import StopSignals
from diffsynth_pipe.training.sources import to_device
from diffsynth_pipe.training.validation import NUM_LEVELS, EarlyStopping, Validator

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from torch.nn import Parameter

    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.contracts import Batch, Objective, Turn
    from diffsynth_pipe.training.engine import Engine
    from diffsynth_pipe.training.outputs import Output
    from diffsynth_pipe.training.sampler import BatchPlan, BucketSampler
    from diffsynth_pipe.training.sources import SampleSource
    from diffsynth_pipe.training.validation import Validation

logger = logging.getLogger(__name__)

STATE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Where a stopped run goes on.

    Attributes:
        checkpoint: Holds the weights and the optimizer.
        state: What its ``state.json`` says.
    """

    checkpoint: run_dirs.Checkpoint
    state: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended.

    Attributes:
        num_steps: Optimizer steps.
        loss_before: Validation loss before the first step; None without validation samples.
        validation: The validation after the last.
        best: Step and loss of the best validation after the first step.
        checkpoint: The last checkpoint.
        files: The files in it that a user loads, relative to the run directory.
    """

    num_steps: int
    loss_before: float | None
    validation: Validation | None
    best: Mapping[str, float | None] | None
    checkpoint: run_dirs.Checkpoint
    files: Sequence[str]


class Loop:
    """One run of training on this rank.

    Args:
        config: The run.
        key: Its key, by which its checkpoints are known.
        engine: Holds the models.
        source: Yields the samples to train on.
        bank: Yields the samples to validate with.
        sampler: The order of the former, in global batches.
        objective: What the steps are for.
        trainable: What is trained, by the names in the ``LossModule``.
        outputs: What a checkpoint holds for users.
        run_dir: Gets ``metrics.jsonl`` and the checkpoints.
        resume: Where to go on; None for the start.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        key: str,
        engine: Engine,
        source: SampleSource,
        bank: SampleSource,
        sampler: BucketSampler,
        objective: Objective,
        trainable: Mapping[str, Parameter],
        outputs: Sequence[Output],
        run_dir: Path,
        resume: ResumePoint | None,
    ) -> None:
        self._config = config
        self._key = key
        self._engine = engine
        self._accelerator = engine.accelerator
        self._source = source
        self._trainable = trainable
        self._turns = objective.turns
        helpers = tuple(f"models.{name}." for name in objective.learning_rates)
        self._averaged = {name: weight for name, weight in trainable.items() if not name.startswith(helpers)}
        self._outputs = outputs
        self._run_dir = run_dir
        self._resume = resume
        self._num_micro_batches = self._accelerator.gradient_accumulation_steps * self._accelerator.num_processes
        self._sampler = sampler
        self._num_steps = self._sampler.num_steps(config.num_epochs * config.dataset_repeat)
        if config.max_steps is not None:
            self._num_steps = min(self._num_steps, config.max_steps)
        self._learning_rate = learning_rates(config, self._num_steps)
        self._moving_average: MovingAverage | None = None
        task = load_task(config.task_name)
        self._draws_levels = task.draws_noise_levels or task.takes_turns  # turns have levels of their own
        self._loss_by_decile = LossByDecile()
        self._early_stopping = EarlyStopping(patience=config.early_stopping_patience)
        self._validator = Validator(
            engine.model,
            bank,
            engine.accelerator,
            engine.compute_dtype,
            num_samples=config.num_validation_samples,
            held_out=config.num_held_out_samples > 0,
            num_levels=NUM_LEVELS if self._draws_levels else 1,
        )
        self._loss_before: float | None = None
        self._saved_at = time.monotonic()
        # Steps of the checkpoints to keep. The settings do not tell, as earlier attempts may have had others.
        self._asked_for: set[int] = (
            set(resume.state.get("asked_for", ()))
            if resume
            else {checkpoint.step for checkpoint in run_dirs.list_checkpoints(run_dir)}
        )

    @property
    def engine_description(self) -> str:
        """One line on the engine, for people and for ``run.json``."""
        return self._engine.description

    def run(self) -> TrainResult:
        """Train from the first step, or from where the run stopped, to the last.

        Raises:
            ConfigError: It goes on, but is to be validated on another number of samples.
            LaunchError: A loss or a weight is NaN or Inf, or the optimizer's state cannot be saved.
            TrainingStopped: A signal asked for it; the state is saved.
        """
        config = self._config
        began_at = step = self._restore() if self._resume else 0
        stopping = self._early_stopping
        validation: Validation | None = None
        saved: tuple[run_dirs.Checkpoint, list[str]] | None = None
        with (
            StopSignals(self._peers()) as signals,
            Metrics(
                config,
                self._run_dir,
                self._num_steps,
                resume_step=step if self._resume else None,
                enabled=self._accelerator.is_main_process,
            ) as metrics,
            contextlib.closing(self._batches(step)) as batches,
        ):
            if not self._resume:
                with signals.peers_needed():
                    validation = self._validate(0, metrics)
                self._loss_before = validation.loss if validation else None
            while step < self._num_steps and not stopping.should_stop:
                step += 1
                with signals.peers_needed():
                    values = self._step(step, batches)
                if step == began_at + 1:  # not at the first checkpoint, hours later
                    states.check_optimizer(self._engine, self._trainable)
                metrics.write(step, epoch=self._sampler.finished_passes(step - 1) // config.dataset_repeat, **values)
                metrics.advance(values)
                with signals.peers_needed():
                    stop, save = self._agree(signals.received is not None, self._is_state_due())
                save |= stop or self._is_checkpoint_due(step)
                validation = None
                if self._is_validation_due(step):
                    with signals.peers_needed():
                        validation = self._validate(step, metrics)
                    if validation is not None and stopping.update(step, validation.loss):
                        save = True
                        if config.checkpoints_total_limit is None:
                            self._asked_for.add(step)  # or it would give way to the next best
                if save or stopping.should_stop:
                    if self._draws_levels:
                        metrics.write(step, loss_by_noise_decile=self._loss_by_decile.take())
                    with self._rank_0_needed(signals):
                        saved = self._save(step)
                if stop and step < self._num_steps and not stopping.should_stop:
                    self._leave_together(signals)
                    raise TrainingStopped(step, signals.received)
            if stopping.should_stop:
                metrics.say(
                    f"stopped at step {step} of {self._num_steps}: no better validation since {stopping.best_step}"
                )
            # Both are missing where a run was killed between its last checkpoint and its end.
            with signals.peers_needed():
                validation = validation or self._validate(step, metrics)
            with self._rank_0_needed(signals):
                saved = saved or self._save(step)
            self._leave_together(signals)
        return TrainResult(
            num_steps=step,
            loss_before=self._loss_before,
            validation=validation,
            best={"step": stopping.best_step, "loss": stopping.best_loss} if validation else None,
            checkpoint=saved[0],
            files=[f"{saved[0].path.name}/{file}" for file in saved[1]],
        )

    def _restore(self) -> int:
        """Go back to the saved state; return its step.

        Raises:
            ConfigError: It was validated on another number of samples.
        """
        assert self._resume is not None
        checkpoint, state = self._resume.checkpoint, self._resume.state
        folder = checkpoint.state_folder
        num_samples = len(state["base_losses"] or ())
        if num_samples != self._validator.num_samples:
            raise ConfigError(
                f"num_validation_samples: the run began with {num_samples}, whose losses those to come are compared "
                f"with, but this is a bank of {self._validator.num_samples}; set it to {num_samples}"
            )
        states.load_optimizer(self._engine, self._trainable, folder, state["optimizer"])
        states.load_group_numbers(self._engine, state.get("optimizer_groups", ()))
        if self._config.use_ema:
            weights = states.current_weights(self._engine, self._averaged)
            averages = safetensors.torch.load_file(folder / f"{states.EMA}.safetensors") if weights else {}
            self._moving_average = MovingAverage(
                {name: averages[name].to(weight.device) for name, weight in weights.items()}, self._config.ema_decay
            )
        self._loss_before = state["loss_before"]
        self._validator.base = state["base_losses"]
        self._early_stopping = EarlyStopping(**state["early_stopping"])
        self._accelerator.print(f"goes on after step {checkpoint.step} of {self._num_steps}")
        return checkpoint.step

    def _is_checkpoint_due(self, step: int) -> bool:
        if step == self._num_steps:
            return True
        if self._config.save_steps:
            return step % self._config.save_steps == 0
        repeat = self._config.dataset_repeat
        return step == self._sampler.num_steps(self._sampler.finished_passes(step) // repeat * repeat)

    def _is_validation_due(self, step: int) -> bool:
        every = self._config.validation_steps
        return step == self._num_steps or (step % every == 0 if every else self._is_checkpoint_due(step))

    def _is_state_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self._config.save_minutes * 60

    def _agree(self, *wishes: bool) -> list[bool]:
        """Return for each wish whether any rank has it."""
        if self._accelerator.num_processes == 1:
            return list(wishes)
        mine = torch.tensor([wishes], dtype=torch.int32, device=self._accelerator.device)
        agreed: list[bool] = self._accelerator.gather(mine).bool().any(0).tolist()
        return agreed

    def _peers(self) -> list[int]:
        """Return the process ids of the other ranks on this machine."""
        if self._accelerator.num_processes == 1:
            return []
        from accelerate.utils import gather_object

        machine = (platform.node(), os.environ.get("GROUP_RANK"))  # torchrun's number of it
        ranks = gather_object([(machine, os.getpid())])
        return [pid for its_machine, pid in ranks if its_machine == machine and pid != os.getpid()]

    def _leave_together(self, signals: StopSignals) -> None:
        """Let no rank end before rank 0 has saved: rank 0 would take it for one that died."""
        with self._rank_0_needed(signals):
            self._accelerator.wait_for_everyone()

    def _rank_0_needed(self, signals: StopSignals) -> contextlib.AbstractContextManager[None]:
        """Mark code in which the others wait for rank 0, while it still writes what would be lost without it."""
        return contextlib.nullcontext() if self._accelerator.is_main_process else signals.peers_needed()

    def _plans(self, first_step: int) -> Iterator[BatchPlan]:
        """Yield this rank's micro-batches from this step on, counted from 0."""
        for step in range(first_step, self._num_steps):
            plan = self._sampler.plan(step)
            yield from plan.micro_batches(
                rank=self._accelerator.process_index,
                world_size=self._accelerator.num_processes,
                batch_size=len(plan.indices) // self._num_micro_batches,
            )

    def _batches(self, first_step: int) -> Generator[Batch]:
        config = self._config
        dropout = CaptionDropout(config.seed, config.caption_dropout) if config.caption_dropout else None
        for batch in self._source.batches(self._plans(first_step), dropout):
            yield to_device(batch, self._accelerator.device, self._engine.compute_dtype)

    def _step(self, step: int, batches: Iterator[Batch]) -> dict[str, Any]:
        """Take one optimizer step on the global batch; return what the metrics say of it."""
        accelerator, engine = self._accelerator, self._engine
        begin, waited_s = time.perf_counter(), 0.0
        losses: list[Tensor] = []
        deciles: list[Tensor] = []
        sample_ids: list[str] = []
        grad_norm = math.nan
        turn = self._turns[(step - 1) % len(self._turns)]
        learning_rate = self._learning_rate(step - 1)
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        for micro_step in range(accelerator.gradient_accumulation_steps):
            wait_begin = time.perf_counter()
            batch = next(batches)
            waited_s += time.perf_counter() - wait_begin
            with accelerator.accumulate(engine.model):
                self._seed_dropout(step, micro_step)
                draws = SampleDraws.of(batch, self._config.seed)
                loss = engine.model(batch, draws, turn)
                accelerator.backward(loss.mean())
                if accelerator.sync_gradients:
                    # DeepSpeed has clipped and stepped by now; it only returns the norm here.
                    norm = accelerator.clip_grad_norm_(self._trainable.values(), turn.max_grad_norm)
                    grad_norm = float(norm)
                engine.optimizer.step()
                engine.optimizer.zero_grad()
            losses.append(loss.detach())
            deciles.append((draws.uniform() * LossByDecile.NUM_DECILES).long().to(loss.device))
            sample_ids.extend(batch.sample_ids)
        mean_loss = self._mean_loss(step, turn, torch.cat(losses), torch.cat(deciles), sample_ids)
        if not math.isfinite(grad_norm):
            raise LaunchError(f"step {step}: the norm of the gradients is {grad_norm}; lower --learning_rate")
        if self._config.use_ema:
            self._update_moving_average(step)
        elapsed_s = time.perf_counter() - begin
        by_turn = {f"{turn.name}_loss": mean_loss} if len(self._turns) > 1 else {}
        return {
            "loss": mean_loss,
            **by_turn,
            "lr": learning_rate,
            "grad_norm": grad_norm,
            "samples_per_s": round(len(sample_ids) * accelerator.num_processes / elapsed_s, 3),
            "data_wait_share": round(waited_s / elapsed_s, 4),
        }

    def _mean_loss(self, step: int, turn: Turn, losses: Tensor, deciles: Tensor, sample_ids: list[str]) -> float:
        """Return the mean over the global batch; equal on all ranks, so that all of them stop at a NaN."""
        gathered, gathered_deciles = self._accelerator.gather((losses, deciles))
        if gathered.isfinite().all():
            if not turn.of_helpers:
                self._loss_by_decile.add(gathered_deciles, gathered)
            return float(gathered.double().mean())
        from accelerate.utils import gather_object

        finite = losses.isfinite().tolist()
        bad = [sample_id for sample_id, is_finite in zip(sample_ids, finite, strict=True) if not is_finite]
        raise LaunchError(
            f"step {step}: the loss is NaN or Inf for sample {', '.join(gather_object(bad))}; "
            "lower --learning_rate or --max_grad_norm"
        )

    def _seed_dropout(self, step: int, micro_step: int) -> None:
        """Make what torch draws by itself a function of the step, so that a resumed run draws the same."""
        name = f"{self._config.seed}/dropout/{step}/{micro_step}/{self._accelerator.process_index}"
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a walk up the stack first
        if torch.cuda.is_available():
            torch.cuda.manual_seed(seed)

    def _update_moving_average(self, step: int) -> None:
        """Take the weights of this step into the average, which rank 0 keeps, if the step was for them."""
        num_cycles, place = divmod(step - 1, len(self._turns))
        if self._turns[place].of_helpers:
            return
        weights = states.current_weights(self._engine, self._averaged)
        if self._moving_average is None:
            self._moving_average = MovingAverage(weights, self._config.ema_decay)
        else:
            in_a_cycle = [not turn.of_helpers for turn in self._turns]
            self._moving_average.update(weights, num_cycles * sum(in_a_cycle) + sum(in_a_cycle[: place + 1]))

    def _save(self, step: int) -> tuple[run_dirs.Checkpoint, list[str]]:
        """Publish a checkpoint; return it, and the files in it that a user loads. Every rank must take part."""
        engine, is_main = self._engine, self._accelerator.is_main_process
        weights = states.master_weights(engine, self._trainable)
        ema = self._moving_average  # on the training device
        averages = ema and {name: weight.cpu() for name, weight in ema.weights.items()}
        files: list[str] = []
        if self._is_checkpoint_due(step):
            self._asked_for.add(step)

        def write(folder: Path) -> None:
            for output in self._outputs:
                files.extend(output.write(folder, weights, step))
                if averages:
                    files.extend(output.write(folder, averages, step, "_ema"))
            state_folder = folder / run_dirs.STATE_FOLDER
            state_folder.mkdir()
            safetensors.torch.save_file(weights, state_folder / f"{states.WEIGHTS}.safetensors")
            if averages:
                safetensors.torch.save_file(averages, state_folder / f"{states.EMA}.safetensors")
            numbers = states.write_optimizer(engine, self._trainable, state_folder)
            run_dirs.write_state(
                state_folder,
                {
                    "version": STATE_VERSION,
                    "key": self._key,
                    "step": step,
                    "asked_for": sorted(self._asked_for),
                    "num_micro_batches": self._num_micro_batches,
                    "optimizer": numbers,
                    "optimizer_groups": states.group_numbers(engine),
                    "loss_before": self._loss_before,
                    "base_losses": self._validator.base,
                    "early_stopping": asdict(self._early_stopping),
                },
            )

        if is_main:
            with run_dirs.disk_errors(f"step {step} cannot be saved in {self._run_dir}"):
                checkpoint = run_dirs.publish(self._run_dir, step, write)
                self._thin_out(run_dirs.NUM_STATES)
        else:
            states.write_optimizer(engine, self._trainable, self._run_dir)  # its collectives, no file
            checkpoint = run_dirs.checkpoint_of(self._run_dir, step)
        self._saved_at = time.monotonic()
        num_bytes = sum(weight.nbytes for weight in weights.values())
        self._accelerator.print(f"saved {checkpoint.path.name}, gathered {num_bytes / 1e6:.2f} MB of trained weights")
        return checkpoint, files

    def drop_states(self) -> None:
        """Delete what only serves to resume, once the run is known to be finished; rank 0 alone."""
        self._thin_out(0)

    def _thin_out(self, num_states: int) -> None:
        run_dirs.thin_out(
            self._run_dir,
            is_due=lambda step: step in self._asked_for or self._is_checkpoint_due(step),
            limit=self._config.checkpoints_total_limit,
            best=self._early_stopping.best_step,
            num_states=num_states,
        )

    def _validate(self, step: int, metrics: Metrics) -> Validation | None:
        validation = self._validator.measure(step)
        if validation:
            metrics.write(step, **validation.values())
            metrics.say(validation)
        return validation
