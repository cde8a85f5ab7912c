"""What each stage would do, and why: decided from the disk alone, without torch.

The cache's journal and snapshots, and ``run.json`` of a training run, are the only truth. Nothing here writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cache_store.contract import CacheCorrupt, CacheNotFound
from cache_store.durable import file_sizes
from diffsynth_pipe.config import comma_list
from diffsynth_pipe.contracts import (
    CAPTION_COLUMN,
    TEMPLATE_COLUMN,
    TEMPLATE_MODEL,
    TEMPLATE_PROCESSOR,
    column_unit,
    load_family,
    load_task,
)
from diffsynth_pipe.errors import ConfigError, ModelFileMissing
from diffsynth_pipe.fingerprint import component_digest, file_digest, json_digest, record_key, unit_recipe
from diffsynth_pipe.graph import Cut, cut
from diffsynth_pipe.hub import resolve_components
from diffsynth_pipe.training.run_dir import resumable
from diffsynth_pipe.training.weights import checkpoint_digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cache_store.object_path import Root
    from cache_store.snapshot import Snapshot
    from cache_store.store import Cache
    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.contracts import ComponentFiles, EncodeUnit, ModelFamily, Sample

Verdict = Literal["hit", "resume", "build"]
State = Literal["Cached", "Resumed", "Completed"]

STATE_OF_VERDICT: Mapping[Verdict, State] = {"hit": "Cached", "resume": "Resumed", "build": "Completed"}

SWITCHES = ("zero_cond_t", "framewise_decoding", "enable_npu_patch", "embedded_guidance")
"""The RunConfig fields that ``switches`` and ``settings`` of a ``ComponentSpec`` or an ``EncodeUnit`` may name."""

TRAIN_VERSION = 1
"""Part of a training run's key; bumped by hand when the code changes the trained weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """What one stage would do.

    Attributes:
        verdict: ``hit``: nothing is left to do; ``resume``: part of the work is on disk; ``build``: none is.
        key: Digest of all that decides the stage's result.
        path: The cache, or the run directory.
        why: One line for people.
    """

    stage: str
    verdict: Verdict
    key: str
    path: Root
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """What one stage did."""

    stage: str
    state: State
    key: str
    path: Root
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodePlan:
    """The samples of a run, and the record that each unit before the cut must yield for each of them.

    Attributes:
        samples: The rows, then the reserved sample with the empty caption, if a record can be made of a caption alone.
        files: The components that the cached units run.
        recipes: One recipe per cached unit.
        keys: For each sample, unit name to record key.
        digest: Digest of the ordered samples and their keys; equals the digest of the sealed snapshot.
    """

    family: ModelFamily
    cut: Cut
    files: Mapping[str, ComponentFiles]
    recipes: Mapping[str, dict[str, Any]]
    samples: list[Sample]
    keys: list[dict[str, str]]
    digest: str

    def records(self) -> dict[str, dict[str, int]]:
        """Return, per unit, the key of each record and the index of the first sample that needs it."""
        first: dict[str, dict[str, int]] = {unit.name: {} for unit in self.cut.cached}
        for index, keys in enumerate(self.keys):
            for unit, key in keys.items():
                first[unit].setdefault(key, index)
        return first

    def missing(self, cache: Cache) -> dict[str, dict[str, int]]:
        """Return the part of ``records`` that no journal of the cache has."""
        committed = cache.committed_keys()
        return {
            unit: {key: index for key, index in first.items() if key not in committed.get(unit, ())}
            for unit, first in self.records().items()
        }


def trainable_models(config: RunConfig) -> frozenset[str]:
    """Return the components that receive gradients, as a whole or through a LoRA.

    Raises:
        ConfigError: There are none, one is unknown or cannot be trained, or one is named twice.
    """
    family = load_family(config.family)
    full = [model_of(name) for name in comma_list(config.trainable_models)]
    known = [name for name in family.components if name != TEMPLATE_PROCESSOR]
    for name in full:
        if name not in known:
            raise ConfigError(f"trainable_models: {config.family} has no {name!r}, only {', '.join(known)}")
        if name == TEMPLATE_MODEL and config.template_model_id_or_path is None:
            raise ConfigError(f"trainable_models: names the {name}; set template_model_id_or_path too")
        if name == "vae":
            message = "trainable_models: training the vae is not supported; train dit or text_encoder"
            raise ConfigError(message)
    lora = config.lora_base_model
    if lora and lora != "dit":
        raise ConfigError(f"lora_base_model: only 'dit' can get a LoRA, got {lora!r}; name others in trainable_models")
    if lora and lora in full:
        message = f"lora_base_model, trainable_models: both name {lora!r}; train it in full or by a LoRA"
        raise ConfigError(message)
    names = frozenset({*full, *([lora] if lora else [])})
    if not names:
        message = "nothing to train: set --lora_base_model, for example --lora_base_model dit, or --trainable_models"
        raise ConfigError(message)
    return names


def model_of(name: str) -> str:
    """Return the component that an item of ``trainable_models`` names; of a template model it may name a part."""
    return TEMPLATE_MODEL if name.startswith(f"{TEMPLATE_MODEL}.") else name


def plan_cut(config: RunConfig, family: ModelFamily) -> Cut:
    """Cut the family's graph for the models that this run trains; texts of the metadata that cross are stored too.

    Raises:
        ConfigError: A unit that would run in every training step reads other columns than texts.
    """
    units = _enabled_units(config, load_task(config.task_name).units(family))
    split = cut(units, trainable_models(config), tuple(spec.name for unit in units for spec in unit.outputs))
    other_columns = {column for unit in split.live for column in (*unit.media, *unit.parse)}
    for column in split.columns:
        if column in other_columns:
            names = ", ".join(sorted(trainable_models(config) - {"dit"}))
            raise ConfigError(
                f"trainable_models: a trained {names} of family {config.family!r} would read the column {column!r} in"
                " every step, but only texts are kept for that; leave it out"
            )
    return replace(split, cached=(*split.cached, *map(column_unit, split.columns)))


def _enabled_units(config: RunConfig, units: Sequence[EncodeUnit]) -> list[EncodeUnit]:
    """Return the units that take part in this run, as its switches have them.

    Raises:
        ConfigError: ``extra_inputs`` names what no unit knows, or what a template model reads that is not named.
    """
    units = [next((new for name, new in unit.switches.items() if getattr(config, name)), unit) for unit in units]
    named = comma_list(config.extra_inputs)
    known = dict.fromkeys(name for unit in units for name in (*unit.extra_columns, unit.enabled_by) if name)
    if unknown := [name for name in named if name not in known]:
        raise ConfigError(
            f"extra_inputs: task {config.task!r} of family {config.family!r} reads no column {', '.join(unknown)}, only"
            f" {', '.join(known) or 'none'}"
        )
    if TEMPLATE_COLUMN in named and config.template_model_id_or_path is None:
        raise ConfigError(f"extra_inputs: names {TEMPLATE_COLUMN}; set template_model_id_or_path, which reads them")
    return [unit for unit in units if unit.enabled_by is None or unit.enabled_by in named]


def files_after_cut(config: RunConfig, family: ModelFamily) -> dict[str, ComponentFiles]:
    """Find the components that a training step runs: the denoiser, its template model, and those of live units.

    Raises:
        ModelError, ConfigError: As ``resolve_components``; or ``offload_models`` names one of them.
    """
    live = {unit.component for unit in plan_cut(config, family).live if unit.component}
    template = set() if config.template_model_id_or_path is None else {TEMPLATE_MODEL}
    files = resolve_components(config, family, sorted({"dit"} | template | live))
    if offloaded := [name for name, component in files.items() if component.offload]:
        raise ConfigError(
            f"offload_models: names the {offloaded[0]}, whose weights training needs in its backward pass too; leave it"
            " out (deploy/accelerate/zero3_nvme_offload.yaml trains with weights on a disk)"
        )
    return files


def check_switches(config: RunConfig, family: ModelFamily) -> None:
    """Refuse a switch that nothing of the family has, and a LoRA format that is not written for its layers.

    Raises:
        ConfigError: One is set.
    """
    formats = family.components["dit"].lora_layers
    if config.lora_base_model and config.lora_file_format not in formats:
        raise ConfigError(
            f"lora_format: {config.lora_file_format!r} has other names for the layers of family {config.family!r}, "
            f"which are not written yet; take {' or '.join(formats)}"
        )
    _check_known(config, family, SWITCHES)
    if config.enable_npu_patch and find_spec("torch_npu") is None:
        raise ConfigError(
            "enable_npu_patch: torch_npu is not installed; install the one of your CANN and torch, or leave it out"
        )


def _check_known(config: RunConfig, family: ModelFamily, switches: Sequence[str]) -> None:
    known = {name for spec in family.components.values() for name in (*spec.switches, *spec.settings)}
    known |= {name for unit in family.units for name in unit.switches}
    for name in switches:
        if getattr(config, name) != type(config).model_fields[name].default and name not in known:
            raise ConfigError(f"{name}: family {config.family!r} has no such switch; leave it out")


def caption_fields(split: Cut) -> tuple[str, ...]:
    """Return the cached fields that are made of the caption alone, so that one record serves wherever it is dropped."""
    made_of: dict[str, frozenset[str]] = {}
    for unit in split.cached:
        columns = frozenset().union(*(made_of.get(name, {name}) for name in unit.inputs))
        made_of |= {spec.name: columns for spec in unit.outputs}
    return tuple(name for name, columns in made_of.items() if columns == {CAPTION_COLUMN})


def reads_empty_caption(config: RunConfig) -> str | None:
    """Return the parameter for whose sake a run reads the record of the empty caption; None if it does not."""
    if config.caption_dropout:
        return "caption_dropout"
    return "dmd2_teacher_cfg_scale" if config.dmd2_teacher_cfg_scale != 1 else None


def check_empty_caption(config: RunConfig, split: Cut) -> None:
    """Refuse to take the empty caption where no cached field holds captions, or holds more than them.

    Raises:
        ConfigError: The run drops captions or guides a teacher, but cannot.
    """
    if (reader := reads_empty_caption(config)) and not caption_fields(split):
        raise ConfigError(
            f"{reader}: no cached field is made of the column {CAPTION_COLUMN!r} alone; "
            f"{'set it to 0' if reader == 'caption_dropout' else 'leave it out'}"
        )


def plan_encoding(config: RunConfig) -> EncodePlan:
    """Read the metadata and say which records the cache must hold.

    Raises:
        DataError, ModelError, ConfigError: As their messages say.
    """
    from cache_store.snapshot import SealedSample, samples_digest
    from diffsynth_pipe.data.samples import empty_caption, list_samples

    family = load_family(config.family)
    _check_known(config, family, ("framewise_decoding",))
    split = plan_cut(config, family)
    files = resolve_components(config, family, [unit.component for unit in split.cached if unit.component])
    digests = {name: component_digest(component) for name, component in files.items()}
    recipes = {
        unit.name: unit_recipe(unit, digests[unit.component] if unit.component else None, config.encode_dtype)
        for unit in split.cached
    }
    recipe_ids = {name: json_digest(recipe) for name, recipe in recipes.items()}
    samples = list_samples(config, (*split.cached, *split.live), family.size_multiple)
    if caption_fields(split):
        samples.append(empty_caption(samples[0]))
    all_keys: list[dict[str, str]] = []
    for sample in samples:
        keys: dict[str, str] = {}
        digests = {name: value.digest for name, value in sample.inputs.items()}
        for unit in split.cached:
            keys[unit.name] = record_key(recipe_ids[unit.name], [digests[name] for name in unit.inputs])
            digests |= dict.fromkeys((output.name for output in unit.outputs), keys[unit.name])
        all_keys.append(keys)
    return EncodePlan(
        family=family,
        cut=split,
        files=files,
        recipes=recipes,
        samples=samples,
        keys=all_keys,
        digest=samples_digest(
            SealedSample(sample_id=sample.sample_id, bucket=sample.bucket, source=sample.source, keys=keys)
            for sample, keys in zip(samples, all_keys, strict=True)
        ),
    )


def plan_data_process(config: RunConfig, encoding: EncodePlan | None = None) -> StagePlan:
    """Say whether the cache holds all that this run needs."""
    from cache_store.store import Cache

    encoding = encoding or plan_encoding(config)
    cache = Cache.open_or_new(config.cache_dir, config.cache_backend)
    missing = encoding.missing(cache)
    total = {unit: len(records) for unit, records in encoding.records().items()}
    counts = ", ".join(f"{name} {total[name] - len(missing[name])}/{total[name]}" for name in total)
    verdict: Verdict
    if any(missing.values()):
        verdict = "build" if all(len(missing[name]) == total[name] for name in total) else "resume"
        why = f"records on disk: {counts}"
    else:
        verdict, why = _verdict_of_snapshot(cache, encoding.digest, counts)
    return StagePlan(stage="data_process", verdict=verdict, key=encoding.digest, path=config.cache_dir, why=why)


def _verdict_of_snapshot(cache: Cache, digest: str, counts: str) -> tuple[Verdict, str]:
    from cache_store.snapshot import read_seal

    try:
        snapshot = cache.latest()
        if snapshot is None or snapshot.header["digest"] != digest:
            return "resume", f"all records on disk ({counts}), to be sealed"
        if read_seal(cache.root, snapshot.number) is None:
            return "resume", f"snapshot {snapshot.number} lacks its seal"
        snapshot.check_files()
    except (CacheCorrupt, CacheNotFound) as error:
        return "resume", str(error)
    return "hit", f"snapshot {snapshot.number}: {len(snapshot)} samples, {counts}"


def latest_snapshot(config: RunConfig) -> Snapshot:
    """Open the newest sealed snapshot of the run's cache.

    Raises:
        CacheNotFound: There is no cache, or none that is sealed.
    """
    from cache_store.store import Cache

    snapshot = Cache.open(config.cache_dir).latest()
    if snapshot is None:
        message = f"no sealed snapshot in {config.cache_dir}: run `diffsynth-pipe data-process` to its end first"
        raise CacheNotFound(message)
    return snapshot


def plan_train(config: RunConfig, data_digest: str | None = None) -> StagePlan:
    """Say whether this run is trained already.

    Args:
        config: The run.
        data_digest: Digest of the samples, if the cache is yet to be made; otherwise the newest snapshot's.
    """
    family = load_family(config.family)
    check_switches(config, family)
    if data_digest is None:
        data_digest = latest_snapshot(config).header["digest"]
    base = files_after_cut(config, family)
    key = json_digest(
        {
            "version": TRAIN_VERSION,
            "parameters": config.keyed("weights"),
            "samples": data_digest,
            "fields": sorted(plan_cut(config, family).crossing),
            "base_models": {name: component_digest(files) for name, files in base.items()},
            "lora_files": lora_file_digests(config),
            **initial_weights(config),
        }
    )
    run_dir = Path(config.output_path) / f"train-{key[:12]}"
    run = read_run(run_dir)
    if run is not None and run["key"] == key:
        return StagePlan(stage="train", verdict="hit", key=key, path=run_dir, why=f"trained: {run['num_steps']} steps")
    states = resumable(run_dir)
    if states:
        why = f"stopped after step {states[-1].step}"
        return StagePlan(stage="train", verdict="resume", key=key, path=run_dir, why=why)
    why = "stopped before its first checkpoint" if run_dir.exists() else "not trained yet"
    return StagePlan(stage="train", verdict="build", key=key, path=run_dir, why=why)


def lora_file_digests(config: RunConfig) -> dict[str, str]:
    """Return the digests of the LoRA files that training starts from, by the fields that name them.

    Raises:
        ConfigError: One is named without what it is for.
        ModelFileMissing: One is not there.
    """
    if (config.preset_lora_path is None) != (config.preset_lora_model is None):
        raise ConfigError(
            "preset_lora_path, preset_lora_model: set both or neither, "
            f"got preset_lora_path={config.preset_lora_path}, preset_lora_model={config.preset_lora_model}"
        )
    if config.lora_checkpoint is not None and not config.lora_base_model:
        message = "lora_checkpoint: set without lora_base_model, so there is no LoRA to start; set both or neither"
        raise ConfigError(message)
    paths = {"lora_checkpoint": config.lora_checkpoint, "preset_lora_path": config.preset_lora_path}
    digests: dict[str, str] = {}
    for name, path in paths.items():
        if path is not None:
            if not Path(path).is_file():
                raise ModelFileMissing(f"{name}: {path} is not a file; check the path")
            digests[name] = file_digest(Path(path))
    return digests


def initial_weights(config: RunConfig) -> dict[str, str]:
    """Return the digest of ``resume_from_checkpoint``, by the name it has in a training's key and lineage, if any."""
    path = config.resume_from_checkpoint
    return {} if path is None else {"initial_weights_digest": checkpoint_digest(Path(path))}


def read_run(run_dir: Path) -> dict[str, Any] | None:
    """Return ``run.json`` of a finished run whose last checkpoint is there; None otherwise."""
    try:
        run: dict[str, Any] = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return run if all((run_dir / file).is_file() for file in run["files"]) else None


def summarize(plan: StagePlan) -> dict[str, Any]:
    """Return the figures of a stage that is done, from what it left on the disk.

    For ``data_process``: num_samples, num_records, payload_bytes, disk_bytes and buckets (samples per bucket).
    For ``train``: the contents of ``run.json``.
    """
    if plan.stage == "train":
        assert isinstance(plan.path, Path)
        return read_run(plan.path) or {}
    from cache_store.store import Cache

    snapshot = Cache.open(plan.path).latest()
    assert snapshot is not None, "the stage is done"
    return {
        "num_samples": len(snapshot),
        "num_records": sum(snapshot.num_records.values()),
        "payload_bytes": snapshot.payload_bytes,
        "disk_bytes": sum(file_sizes(plan.path).values()),
        "buckets": {name: len(members) for name, members in snapshot.bucket_members.items()},
    }


def plan(config: RunConfig) -> list[StagePlan]:
    """Plan the stages that ``config.task`` names."""
    if config.stage == "train":
        return [plan_train(config)]
    encoding = plan_encoding(config)
    data = plan_data_process(config, encoding)
    return [data] if config.stage == "data_process" else [data, plan_train(config, encoding.digest)]
