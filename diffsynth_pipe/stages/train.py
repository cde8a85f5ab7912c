"""Stage 2: train a LoRA of the denoiser from a sealed snapshot, or from live encoders. Runs in every rank."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_store.durable import replace_file
from cache_store.local_copies import LocalCopies
from cache_store.object_path import ObjectPath
from diffsynth_pipe.config import comma_list
from diffsynth_pipe.contracts import load_family, load_task
from diffsynth_pipe.errors import CacheMismatch, ConfigError
from diffsynth_pipe.fingerprint import component_digest, json_digest
from diffsynth_pipe.hub import resolve_components
from diffsynth_pipe.stages.plan import (
    StageResult,
    latest_snapshot,
    plan_cut,
    plan_encoding,
    plan_train,
    summarize,
    trainable_models,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.contracts import ComponentFiles, ModelFamily
    from diffsynth_pipe.training.sources import SampleSource


def train(config: RunConfig) -> StageResult:
    """Train, and write ``run.json`` at the very end; a run that has one is left as it is.

    With ``sft:train`` the samples are the newest snapshot's, and of the models only the denoiser's files are opened.
    With ``sft`` they are encoded in this process, to the same bits, and the run has the same key. An unfinished earlier
    attempt in the run directory is started over: its metrics are moved aside, its checkpoints get the same bytes again.

    Raises:
        CacheNotFound: There is no sealed snapshot.
        CacheMismatch: The cache was made for another denoiser.
        ModelError, ConfigError, LaunchError: As their messages say.
    """
    family = load_family(config.family)
    if trainable_models(config) != {"dit"}:
        raise ConfigError(f"lora_base_model: only 'dit' can be trained yet, got {config.lora_base_model!r}")
    files = resolve_components(config, family, ["dit"])["dit"]
    source = _cached_source(config, family, files) if config.stage == "train" else _live_source(config)
    return _train_lora(config, family, files, source)


def _cached_source(config: RunConfig, family: ModelFamily, files: ComponentFiles) -> SampleSource:
    """Open the newest snapshot and check that its fields fit the denoiser."""
    from diffsynth_pipe.training.sources import CachedSource

    split = plan_cut(config, family)
    assert not split.live, "no unit runs the denoiser"
    snapshot = latest_snapshot(config)
    if snapshot.header["family"] != config.family:
        raise CacheMismatch(
            f"cache {snapshot.root} is of family {snapshot.header['family']!r}, not {config.family!r}; "
            "set family, or run data-process into another cache_path"
        )
    shapes = {name: min(shapes) for name, shapes in snapshot.field_shapes().items()}
    family.check_fields(json.loads((files.folder / "config.json").read_text(encoding="utf-8")), shapes)
    copies = None
    if isinstance(snapshot.root, ObjectPath) and config.cache_copies_gb > 0:
        num_bytes = int(config.cache_copies_gb * 1e9)
        copies = LocalCopies(snapshot.root, config.cache_copies_dir, num_bytes, snapshot.segments)
    num_threads = max(1, config.dataset_num_workers)
    return CachedSource(snapshot, split.crossing, num_threads=num_threads, copies=copies)


def _live_source(config: RunConfig) -> SampleSource:
    from diffsynth_pipe.stages.live import LiveSource

    return LiveSource(config, plan_encoding(config))


def _train_lora(config: RunConfig, family: ModelFamily, files: ComponentFiles, source: SampleSource) -> StageResult:
    from diffsynth_pipe.training import engine as engines
    from diffsynth_pipe.training.loop import Loop, Lora
    from diffsynth_pipe.training.lora import adapter_metadata, add_lora, lora_parameters
    from diffsynth_pipe.training.loss_module import LossModule

    accelerator = engines.start_accelerator(config)
    with accelerator.main_process_first():
        # The first rank digests the weights; the others find the digests it stored.
        plan = plan_train(config, source.digest)
        base_model_digest = component_digest(files)
    run_dir = plan.path
    assert isinstance(run_dir, Path)
    if plan.verdict == "hit":
        accelerator.end_training()
        return StageResult(stage="train", state="Cached", key=plan.key, path=run_dir, summary=summarize(plan))
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        config.save(run_dir / "config.yaml")
    device = engines.load_device(accelerator, initialize_model_on_cpu=config.initialize_model_on_cpu)
    dit = family.components["dit"].load(files, engines.compute_dtype(), device)
    targets = comma_list(config.lora_target_modules) or family.lora_target_modules
    add_lora(dit, targets, config.lora_rank, config.seed)
    if config.use_gradient_checkpointing:
        dit.enable_gradient_checkpointing()
    lora = Lora(
        parameters=lora_parameters(dit, family.lora_prefix),
        adapter=adapter_metadata(targets, config.lora_rank, family.lora_prefix),
        lineage={
            "version": version("diffsynth-pipe"),
            "config_digest": json_digest(config.keyed("weights")),
            "samples_digest": source.digest,
            "base_model_digest": base_model_digest,
            "seed": config.seed,
            "lora_rank": config.lora_rank,
            "lora_alpha": config.lora_rank,
        },
    )
    begin = time.perf_counter()
    model = LossModule(family, load_task(config.task_name), {"dit": dit.train()})
    engine = engines.start(accelerator, model, config)
    result = Loop(
        config,
        engine=engine,
        source=source,
        lora=lora,
        run_dir=run_dir,
    ).run()
    run: dict[str, Any] = {
        "key": plan.key,
        "num_steps": result.num_steps,
        "loss_before": result.loss_before,
        "loss_after": result.loss_after,
        "lora_path": result.lora_path.name,
        "lora_digest": result.lora_digest,
        **_base_model(files),
        "engine": engine.description,
        "world_size": accelerator.num_processes,
        "elapsed_s": round(time.perf_counter() - begin, 3),
    }
    if accelerator.is_main_process:
        replace_file(run_dir / "run.json", (json.dumps(run, indent=2) + "\n").encode(), run_dir)
    accelerator.end_training()
    return StageResult(stage="train", state="Completed", key=plan.key, path=run_dir, summary=run)


def _base_model(files: ComponentFiles) -> Mapping[str, str | None]:
    """Say which repository the denoiser is from, and which pipeline loads it; None if it lies alone."""
    repository = files.folder.parent
    index = repository / "model_index.json"
    pipeline = json.loads(index.read_text(encoding="utf-8"))["_class_name"] if index.is_file() else None
    return {"base_model": str(repository), "pipeline_class": pipeline}
