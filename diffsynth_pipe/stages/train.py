"""Stage 2: train a LoRA, whole models, or both, from a sealed snapshot or from live encoders. Runs in every rank."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_store.durable import replace_file
from cache_store.local_copies import LocalCopies
from cache_store.object_path import ObjectPath
from diffsynth_pipe.config import comma_list
from diffsynth_pipe.contracts import EMPTY_CAPTION_ID, TEMPLATE_MODEL, load_family, load_task, module_of
from diffsynth_pipe.errors import CacheMismatch, ConfigError
from diffsynth_pipe.fingerprint import component_digest, json_digest
from diffsynth_pipe.stages.plan import (
    STATE_OF_VERDICT,
    StageResult,
    caption_fields,
    check_empty_caption,
    files_after_cut,
    initial_weights,
    latest_snapshot,
    lora_file_digests,
    model_of,
    plan_cut,
    plan_encoding,
    plan_train,
    reads_empty_caption,
    summarize,
    trainable_models,
)
from diffsynth_pipe.training.run_dir import (
    damaged_states,
    disk_errors,
    drop_states,
    file_digest,
    only_training,
    resumable,
)
from diffsynth_pipe.training.trackers import check_packages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from accelerate import Accelerator
    from torch import Tensor
    from torch.nn import Module

    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.contracts import Batch, ComponentFiles, ModelFamily, Objective, Turn
    from diffsynth_pipe.graph import Cut
    from diffsynth_pipe.stages.plan import StagePlan
    from diffsynth_pipe.training.loop import Loop, ResumePoint
    from diffsynth_pipe.training.loss_module import LossModule
    from diffsynth_pipe.training.outputs import Output
    from diffsynth_pipe.training.sampler import BucketSampler
    from diffsynth_pipe.training.sources import SampleSource

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> StageResult:
    """Train, and write ``run.json`` at the very end; a run that has one is left as it is.

    With ``sft:train`` the samples are the newest snapshot's, and only the models after the cut are opened. With ``sft``
    they are encoded in this process, to the same bits, and the run has the same key. A run that was stopped goes on
    from its newest checkpoint.

    Raises:
        CacheNotFound: There is no sealed snapshot.
        CacheMismatch: The cache was made for another denoiser, or to train other models.
        TrainingStopped: A signal came; the state is saved.
        ModelError, ConfigError, LaunchError: As their messages say.
    """
    check_packages(config)
    family = load_family(config.family)
    split = plan_cut(config, family)
    files = files_after_cut(config, family)
    source = _cached_source(config, family, split, files) if config.stage == "train" else _live_source(config)
    return _train(config, family, split, files, source)


def _cached_source(
    config: RunConfig, family: ModelFamily, split: Cut, files: Mapping[str, ComponentFiles]
) -> SampleSource:
    """Open the newest snapshot and check that its fields fit the models."""
    from diffsynth_pipe.training.sources import CachedSource

    snapshot = latest_snapshot(config)
    if snapshot.header["family"] != config.family:
        raise CacheMismatch(
            f"cache {snapshot.root} is of family {snapshot.header['family']!r}, not {config.family!r}; "
            "set family, or run data-process into another cache_path"
        )
    shapes = {name: min(shapes) for name, shapes in snapshot.field_shapes().items()}
    missing = [name for name in split.crossing if name not in shapes]
    if missing:
        trained = ", ".join(sorted(trainable_models(config)))
        raise CacheMismatch(
            f"cache {snapshot.root} holds {', '.join(shapes)}, but training {trained} "
            f"also needs {', '.join(missing)}; "
            "run data-process with this run's task, trainable_models and lora_base_model"
        )
    for unit in family.units:
        unread = [spec.name for spec in unit.outputs if spec.name in shapes and spec.name not in split.crossing]
        if unread and unit.enabled_by and unit.enabled_by not in comma_list(config.extra_inputs):
            raise CacheMismatch(
                f"cache {snapshot.root} holds {unread[0]}, which training would leave out: extra_inputs lacks "
                f"{unit.enabled_by}; name it, or run data-process without it"
            )
    family.check_fields(json.loads((files["dit"].folder / "config.json").read_text(encoding="utf-8")), shapes)
    check_empty_caption(config, split)
    if (reader := reads_empty_caption(config)) and EMPTY_CAPTION_ID not in snapshot.reserved:
        raise CacheMismatch(
            f"cache {snapshot.root} holds no record of the empty caption, which {reader} needs; run data-process"
            " again (an imported cache cannot have one)"
        )
    copies = None
    if isinstance(snapshot.root, ObjectPath) and config.cache_copies_gb > 0:
        num_bytes = int(config.cache_copies_gb * 1e9)
        copies = LocalCopies(snapshot.root, config.cache_copies_dir, num_bytes, snapshot.segments)
    num_threads = max(1, config.dataset_num_workers)
    return CachedSource(
        snapshot, split.crossing, caption_fields=caption_fields(split), num_threads=num_threads, copies=copies
    )


def _live_source(config: RunConfig) -> SampleSource:
    from diffsynth_pipe.stages.live import LiveSource

    encoding = plan_encoding(config)
    check_empty_caption(config, encoding.cut)
    return LiveSource(config, encoding)


def _train(
    config: RunConfig, family: ModelFamily, split: Cut, files: Mapping[str, ComponentFiles], source: SampleSource
) -> StageResult:
    from diffsynth_pipe.training import engine as engines
    from diffsynth_pipe.training.sources import hold_out

    # Refused before a model is loaded.
    train_source, bank = (
        hold_out(source, config.num_held_out_samples) if config.num_held_out_samples else (source, source)
    )
    accelerator = engines.start_accelerator(config)
    with accelerator.main_process_first():
        # The first rank digests the weights; the others find the digests it stored.
        plan = plan_train(config, source.digest)
        lineage = {
            "version": version("diffsynth-pipe"),
            "config_digest": json_digest(config.keyed("weights")),
            "samples_digest": source.digest,
            "base_model_digest": component_digest(files["dit"]),
            **initial_weights(config),
            "seed": config.seed,
            "lora_files": lora_file_digests(config),
        }
    run_dir = plan.path
    assert isinstance(run_dir, Path)
    if plan.verdict == "hit":
        if accelerator.is_main_process:
            drop_states(run_dir)
        accelerator.end_training()
        return StageResult(stage="train", state="Cached", key=plan.key, path=run_dir, summary=summarize(plan))
    with contextlib.ExitStack() as held:
        if accelerator.is_main_process:
            with disk_errors(run_dir):
                run_dir.mkdir(parents=True, exist_ok=True)
                held.enter_context(only_training(run_dir))
                config.with_absolute_paths().save(run_dir / "config.yaml")
            _warn_of_other_expert(family, config, files["dit"])
        accelerator.wait_for_everyone()  # rank 0 may have put back a checkpoint
        resume = _resume_point(run_dir, plan.key, accelerator)
        engines.check_resume_step(accelerator, resume.checkpoint.step if resume else 0, run_dir)
        engines.set_accumulation(accelerator, config, resume.state["num_micro_batches"] if resume else None)
        objective = _objective(config, family, accelerator)
        lineage |= objective.lineage
        model, outputs = _load_models(config, family, split, files, accelerator, lineage, train_source, objective)
        if objective.needs_empty_caption:
            objective.empty_caption = _empty_caption(train_source, split, accelerator)
        loop = _make_loop(config, family, accelerator, model, outputs, train_source, bank, plan, resume, objective)
        begin = time.perf_counter()
        result = loop.run()
        run = {
            "key": plan.key,
            "num_steps": result.num_steps,
            "loss_before": result.loss_before,
            "loss_after": result.validation and result.validation.loss,
            "best": result.best,
            "validation": result.validation and asdict(result.validation),
            "files": list(result.files),
            "lora_path": next((file for file in result.files if file.endswith("_lora.safetensors")), None),
            **_base_model(files["dit"]),
            "load_argument": ", load_into_transformer_2=True" if files["dit"].folder.name == "transformer_2" else "",
            "initial_weights": config.resume_from_checkpoint and str(Path(config.resume_from_checkpoint).resolve()),
            "engine": loop.engine_description,
            "world_size": accelerator.num_processes,
            "elapsed_s": round(time.perf_counter() - begin, 3),
        }
        if accelerator.is_main_process:
            with disk_errors(run_dir):
                run["digests"] = {file: file_digest(run_dir / file) for file in result.files}
                replace_file(run_dir / "run.json", (json.dumps(run, indent=2) + "\n").encode(), run_dir)
                loop.drop_states()
    accelerator.end_training()
    return StageResult(stage="train", state=STATE_OF_VERDICT[plan.verdict], key=plan.key, path=run_dir, summary=run)


def _objective(config: RunConfig, family: ModelFamily, accelerator: Accelerator) -> Objective:
    """Set up what is minimised."""
    from diffsynth_pipe.training.engine import refuse_turns
    from diffsynth_pipe.training.flow_match import SigmaDistribution
    from diffsynth_pipe.training.loss_module import OneLoss

    task = load_task(config.task_name)
    if task.takes_turns:
        refuse_turns(accelerator, config)
        objective: Objective = task.objective(config, family)
        return objective
    return OneLoss(family, task, SigmaDistribution(family.schedule, config), config.max_grad_norm)


def _empty_caption(source: SampleSource, split: Cut, accelerator: Accelerator) -> Batch:
    """Return a batch of one with the fields made of the caption for the empty one."""
    from diffsynth_pipe.training.engine import compute_dtype
    from diffsynth_pipe.training.randomness import CaptionDropout
    from diffsynth_pipe.training.sampler import BatchPlan
    from diffsynth_pipe.training.sources import to_device

    plan = BatchPlan(next(iter(source.bucket_sizes)), (0,), (0,))
    (raw,) = source.batches([plan], CaptionDropout(seed=0, probability=1.0))
    names = caption_fields(split)
    kept = replace(
        raw,
        fields={name: raw.fields[name] for name in names},
        lengths={name: raw.lengths[name] for name in names if name in raw.lengths},
    )
    return to_device(kept, accelerator.device, compute_dtype())


def _load_models(
    config: RunConfig,
    family: ModelFamily,
    split: Cut,
    files: Mapping[str, ComponentFiles],
    accelerator: Accelerator,
    lineage: Mapping[str, object],
    source: SampleSource,
    objective: Objective,
) -> tuple[LossModule, list[Output]]:
    """Load the models after the cut, ready to be trained; return them, and what a checkpoint holds of them."""
    from diffsynth_pipe.training import engine as engines
    from diffsynth_pipe.training.gradient_checkpointing import checkpoint_function, enable
    from diffsynth_pipe.training.lora_file import resolution_of
    from diffsynth_pipe.training.loss_module import LossModule
    from diffsynth_pipe.training.templates import TemplateInjection
    from diffsynth_pipe.training.weights import load_checkpoint

    recompute = checkpoint_function(config, engines.deepspeed_settings(accelerator))
    components = {
        name: engines.load_component(accelerator, name, family.components[name], component, config)
        for name, component in files.items()
    }
    for name, component in components.items():
        for switch, turn_on in family.components[name].switches.items():
            if getattr(config, switch):
                turn_on(module_of(component))
        for setting in family.components[name].settings:
            setattr(module_of(component), setting, getattr(config, setting))
    # As in the reference: helpers of a denoiser that is trained in full, such as its teacher, have the weights before.
    starts_alone = bool(objective.learning_rates) and not config.lora_base_model
    prefixes = ["pipe.dit.", "dit.", f"{family.lora_prefix}."]
    if config.resume_from_checkpoint is not None and not starts_alone:
        load_checkpoint(components["dit"], Path(config.resume_from_checkpoint), prefixes)
    outputs, helpers = _make_trainable(
        config,
        family,
        components,
        files,
        lineage,
        resolution_of(source.bucket_sizes),
        objective,
        device=accelerator.device,
        writes=accelerator.is_main_process,
    )
    if config.resume_from_checkpoint is not None and starts_alone:
        load_checkpoint(components["dit"], Path(config.resume_from_checkpoint), prefixes)
    if recompute is not None:
        denoisers = [helper for helper in helpers.values() if isinstance(helper, type(components["dit"]))]
        # A template model is told of it, and decides itself.
        others = [component for name, component in components.items() if name != TEMPLATE_MODEL]
        for component in (*others, *denoisers):
            enable(module_of(component), recompute)
    template = None
    if TEMPLATE_MODEL in components:
        template = TemplateInjection(
            components[TEMPLATE_MODEL],
            components["dit"],
            hot_loading=config.enable_lora_hot_loading,
            arguments={
                "use_gradient_checkpointing": config.use_gradient_checkpointing,
                "use_gradient_checkpointing_offload": config.use_gradient_checkpointing_offload,
            },
        )
    return LossModule(objective, {**components, **helpers}, split, template), outputs


def _warn_of_other_expert(family: ModelFamily, config: RunConfig, files: ComponentFiles) -> None:
    """Warn if one of two denoisers is trained at noise levels at which inference takes the other.

    diffusers takes ``transformer`` from the repository's ``boundary_ratio`` of the noise upwards.
    """
    from diffsynth_pipe.training.flow_match import SigmaDistribution

    index = files.folder.parent / "model_index.json"
    ratio = json.loads(index.read_text(encoding="utf-8")).get("boundary_ratio") if index.is_file() else None
    if ratio is None:
        return
    is_low_expert = files.folder.name in family.components["dit"].other_subfolders
    if config.task_name == "dmd2":
        low, high = config.dmd2_matching_t_min, config.dmd2_matching_t_max
        flag = "dmd2_matching_t_max" if is_low_expert else "dmd2_matching_t_min"
    else:
        low, high = SigmaDistribution(family.schedule, config).bounds
        flag = "min_timestep_boundary" if is_low_expert else "max_timestep_boundary"
    if high >= ratio if is_low_expert else low < ratio:
        logger.warning(
            "%s is trained at sigma %.3g to %.3g, but takes %s than %g in inference (boundary_ratio); set %s",
            *(files.folder.name, low, high, "less" if is_low_expert else "no less", ratio, flag),
        )


def _make_loop(
    config: RunConfig,
    family: ModelFamily,
    accelerator: Accelerator,
    model: LossModule,
    outputs: Sequence[Output],
    source: SampleSource,
    bank: SampleSource,
    plan: StagePlan,
    resume: ResumePoint | None,
    objective: Objective,
) -> Loop:
    """Put the saved weights, if any, into the models, and wrap them in the engine."""
    from diffsynth_pipe.training import engine as engines
    from diffsynth_pipe.training.loop import Loop
    from diffsynth_pipe.training.sampler import BucketSampler
    from diffsynth_pipe.training.state import WEIGHTS, load_weights

    assert isinstance(plan.path, Path)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if resume:
        load_weights(trainable, resume.checkpoint.state_folder / f"{WEIGHTS}.safetensors")
    num_micro_batches = accelerator.gradient_accumulation_steps * accelerator.num_processes
    micro_batch_sizes = _micro_batch_sizes(config, family, source)
    sampler = BucketSampler(
        source.bucket_sizes,
        {bucket: size * num_micro_batches for bucket, size in micro_batch_sizes.items()},
        config.seed,
        stratified=config.stratified_timesteps,
    )
    engines.set_find_unused_parameters(
        accelerator, model, lambda: _first_loss(config, accelerator, model, source, sampler, objective.turns[0])
    )
    return Loop(
        config,
        key=plan.key,
        engine=engines.start(accelerator, model, config, objective.learning_rates),
        source=source,
        bank=bank,
        sampler=sampler,
        objective=objective,
        trainable=trainable,
        outputs=outputs,
        run_dir=plan.path,
        resume=resume,
    )


def _micro_batch_sizes(config: RunConfig, family: ModelFamily, source: SampleSource) -> dict[str, int]:
    """Return how many samples of each bucket make up a micro-batch of one rank."""
    if config.max_batch_tokens is None:
        return dict.fromkeys(source.bucket_sizes, config.batch_size)
    num_tokens = {
        bucket: family.num_tokens(source.field_shape(bucket, family.latents_field)) for bucket in source.bucket_sizes
    }
    return {bucket: max(1, config.max_batch_tokens // tokens) for bucket, tokens in num_tokens.items()}


def _resume_point(run_dir: Path, key: str, accelerator: Accelerator) -> ResumePoint | None:
    """Return the newest checkpoint of the run that is whole; None if there is none. Every rank must take part."""
    from accelerate.utils import broadcast_object_list

    from diffsynth_pipe.training.loop import STATE_VERSION, ResumePoint

    # Read whole by one rank: a state may have hundreds of GB.
    (damaged,) = broadcast_object_list([damaged_states(run_dir) if accelerator.is_main_process else None])
    for checkpoint in reversed(resumable(run_dir)):
        if checkpoint.step in damaged:
            if accelerator.is_main_process:
                logger.warning("%s; going back to an older checkpoint", damaged[checkpoint.step])
            continue
        state = checkpoint.read_state()
        if state["key"] != key:
            raise ConfigError(f"{checkpoint.path} is a checkpoint of another run; move it out of {run_dir}")
        if state["version"] != STATE_VERSION:
            raise ConfigError(
                f"{checkpoint.path} was written by another version; finish the run with that, or move {run_dir} away"
            )
        return ResumePoint(checkpoint=checkpoint, state=state)
    return None


def _make_trainable(
    config: RunConfig,
    family: ModelFamily,
    components: Mapping[str, Any],
    files: Mapping[str, ComponentFiles],
    lineage: Mapping[str, object],
    resolution: str | None,
    objective: Objective,
    *,
    device: torch.device,
    writes: bool,
) -> tuple[list[Output], Mapping[str, Module]]:
    """Unfreeze what is to be trained, add the LoRA; return what a checkpoint holds of both, and the helpers.

    A preset LoRA is fused into the denoiser before, then its weights are quantised, and the LoRA starts from a file, as
    far as the run names them. Every rank must take part; ``device`` is where this one trains, and ``writes`` says
    whether it writes the checkpoints.
    """
    from diffsynth_pipe.modeling.quantization import quantize
    from diffsynth_pipe.training.engine import compute_dtype
    from diffsynth_pipe.training.fp8 import hold_in_fp8
    from diffsynth_pipe.training.lora import add_lora, fuse_lora, load_lora, lora_parameters, lora_settings
    from diffsynth_pipe.training.lora_file import check_layers, export_lora, file_layers, read_lora
    from diffsynth_pipe.training.outputs import LoraOutput, ModelOutput, frozen_weights

    outputs: list[Output] = []
    items = comma_list(config.trainable_models)
    for name in dict.fromkeys(map(model_of, items)):
        spec, module = family.components[name], module_of(components[name])
        parts = tuple(f"{item.removeprefix(f'{name}.')}." for item in items if item.startswith(f"{name}."))
        _unfreeze(module, (spec.trained_part,) if name in items else parts, name)
        module.train()
        outputs.append(
            ModelOutput(
                model=module,
                name=name,
                subfolder=spec.subfolder,
                files=files[name],
                frozen=frozen_weights(module, keep=writes),
                prefix="" if config.remove_prefix_in_ckpt else f"pipe.{name}.",
                lineage=lineage,
            )
        )
    dit, prefix, tables = components["dit"], family.lora_prefix, family.components["dit"].lora_layers
    read = partial(read_lora, model=dit, prefix=prefix, tables=tables.values())
    if config.preset_lora_path is not None:
        fuse_lora(dit, read(config.preset_lora_path, parameter="preset_lora_path"))
    if files["dit"].quantization is not None:
        quantize(dit, files["dit"].quantization, device)
    helpers = objective.helpers(dit)
    if config.lora_base_model:
        settings = lora_settings(config, family.lora_target_modules)
        add_lora(dit, settings, config.seed)
        layers = file_layers(dit, tables[config.lora_file_format])
        check_layers(lora_parameters(dit), layers, config.lora_file_format)
        if config.lora_checkpoint is not None:
            load_lora(dit, read(config.lora_checkpoint, parameter="lora_checkpoint"), settings)
        lora_names = {id(parameter): name for name, parameter in lora_parameters(dit).items()}
        outputs.append(
            LoraOutput(
                name="dit",
                lora_names={
                    f"models.dit.{name}": lora_names[id(parameter)]
                    for name, parameter in dit.named_parameters()
                    if id(parameter) in lora_names
                },
                export=partial(
                    export_lora,
                    settings=settings,
                    lora_format=config.lora_file_format,
                    prefix=prefix,
                    architecture=family.architecture,
                    resolution=resolution,
                    layers=layers,
                ),
                lineage={**lineage, "lora_rank": settings.rank, "lora_alpha": settings.alpha},
            )
        )
    dit.train()
    if files["dit"].fp8:
        for denoiser in (dit, *(helper for helper in helpers.values() if isinstance(helper, type(dit)))):
            hold_in_fp8(denoiser, compute_dtype())
    return outputs, helpers


def _unfreeze(module: Module, starts: tuple[str, ...], name: str) -> None:
    """Let the parameters be trained whose names start so, or are this without the dot at the end.

    Raises:
        ConfigError: There are none.
    """
    parameters = dict(module.named_parameters())
    chosen = {start: [key for key in parameters if f"{key}.".startswith(start)] for start in starts}
    if idle := [start for start, keys in chosen.items() if not keys]:
        raise ConfigError(f"trainable_models: the {name} has no parameters {idle[0]}*; correct the name")
    trained = {key for keys in chosen.values() for key in keys}
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in trained)


def _first_loss(
    config: RunConfig,
    accelerator: Accelerator,
    model: LossModule,
    source: SampleSource,
    sampler: BucketSampler,
    turn: Turn,
) -> Tensor:
    """Return the mean loss of this rank's first micro-batch."""
    from diffsynth_pipe.training.engine import compute_dtype
    from diffsynth_pipe.training.randomness import SampleDraws
    from diffsynth_pipe.training.sources import to_device

    world_size = accelerator.num_processes
    plan = sampler.plan(0)
    batch_size = len(plan.indices) // (accelerator.gradient_accumulation_steps * world_size)
    plans = plan.micro_batches(rank=accelerator.process_index, world_size=world_size, batch_size=batch_size)
    (raw,) = source.batches(plans[:1])
    batch = to_device(raw, accelerator.device, compute_dtype())
    draws = SampleDraws.of(batch, config.seed)
    loss: Tensor = model(batch, draws, turn)
    return loss.mean()


def _base_model(files: ComponentFiles) -> Mapping[str, str | None]:
    """Say which repository the denoiser is from, and which pipeline loads it; None if it lies alone."""
    repository = files.folder.parent
    index = repository / "model_index.json"
    pipeline = json.loads(index.read_text(encoding="utf-8"))["_class_name"] if index.is_file() else None
    return {"base_model": str(repository), "pipeline_class": pipeline}
