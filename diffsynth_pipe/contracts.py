"""What a model family, an encode unit and a training task are. Read this first.

A run is a graph of encode units in front of a denoiser. ``graph.cut`` splits it where gradients begin: the units before
the cut run once and fill the cache, the units after it run in every training step.

A plugin is a module in ``families/`` or ``training/tasks/`` that ends in ``PLUGIN = ...``; its name is its file name.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from cache_store.contract import FieldSpec
from diffsynth_pipe.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, device, dtype
    from torch.nn import Module

CAPTION_COLUMN = "prompt"
"""The metadata column that ``caption_dropout`` empties."""

EMPTY_CAPTION_ID = "0" * 32
"""Id of the reserved sample whose caption is empty; all else of it is the first sample's."""

FIRST_FRAME_FIELD = "first_frame_latents"
"""A field of this name holds a first latent frame that is given, not generated: a loss leaves that frame out."""

TEMPLATE_COLUMN = "template_inputs"
"""The metadata column, and the field made of it, that a template model reads."""

TEMPLATE_MODEL = "template_model"
"""The component that a template model is in a training step."""

TEMPLATE_PROCESSOR = "template_processor"
"""The same model as the component that stage 1 runs; it is never trained, so its unit is never live."""

Media = Literal["image", "images", "video", "audio"]
"""How a cell is loaded: an RGB ``PIL.Image``; a list of them; uint8 frames ``[frame, height, width, 3]``; float32
samples ``[sample]`` of one channel, ``AUDIO_SAMPLE_RATE`` a second."""

AUDIO_SAMPLE_RATE = 16_000
"""What wav2vec 2.0 hears."""

LoraLayers = Mapping[str, tuple[str, ...]]
"""The layers of a denoiser as a format of LoRA files has them: by their names there, each with diffusers' layers whose
rows it stacks, all of them with ``{}`` for the number of a block. Empty: they are diffusers' own."""

Components = Mapping[str, Any]
"""Loaded components by name. A value is a module, or the family's own bundle of it (as ``model``) and what it needs."""


class Input(Protocol):
    """One metadata value of one sample, not loaded yet."""

    @property
    def digest(self) -> str:
        """Hex digest of all that decides what ``load`` returns."""

    def load(self) -> Any:
        """Return what an encode unit takes.

        A ``str`` for text, pixels of the final size for a file as the unit's ``media`` says, what ``parse`` made of
        another cell.

        Raises:
            DataError: The file cannot be decoded.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row of the metadata, ready to be encoded.

    Attributes:
        sample_id: 32 hex digits from the digests of the inputs, so that a renamed file keeps its id.
        source: Where the row comes from, for messages: ``metadata.csv row 12 (cat.jpg)``.
        bucket: Samples of one bucket have the same media shape and can share a batch: ``512x384``.
        inputs: The columns that the encode units read.
    """

    sample_id: str
    source: str
    bucket: str
    inputs: Mapping[str, Input]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeUnit:
    """One step in front of the denoiser.

    ``encode`` takes one sample, never a batch: the bytes it yields must not depend on what else was encoded beside it,
    or a resumed cache would differ from an uninterrupted one.

    Attributes:
        name: Unique in its family: ``text``, ``latents``.
        inputs: Metadata columns, or fields of earlier units.
        outputs: What it yields, in storage dtype and shape.
        component: The component it runs; None if it needs no model. Its weights are part of the unit's recipe.
        encode: Maps the components and the loaded inputs to one tensor per output. Outputs may have any float dtype;
            they are cast to the storage dtype.
        recipe: All else that decides the output: template, dropped tokens, posterior mode. JSON values only.
        version: Bumped by hand when the code changes the output.
        parse: How the cells of columns are read that are neither text nor files: each returns a JSON value, or raises
            ``ValueError`` with what a cell must be. ``extra_inputs`` must name these columns.
        bucket_by: Those of them whose values must be equal within a batch.
        media: How the cells of its columns of files are loaded, where not as one image. ``extra_inputs`` must name such
            columns too, but for ``video``.
        enabled_by: What ``extra_inputs`` must name for the unit to take part; None: it always does.
        note: Returns what a person should know of the record of these inputs, such as that a caption was cut; mostly
            None. Stored beside the record, and no part of the recipe.
        switches: What takes its place where the boolean RunConfig fields of these names are set, with a recipe of its
            own.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[FieldSpec, ...]
    component: str | None
    encode: Callable[[Components, Mapping[str, Any]], Mapping[str, Tensor]]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    version: int = 1
    parse: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    bucket_by: tuple[str, ...] = ()
    media: Mapping[str, Media] = field(default_factory=dict)
    enabled_by: str | None = None
    note: Callable[[Components, Mapping[str, Any]], str | None] | None = None
    switches: Mapping[str, EncodeUnit] = field(default_factory=dict)

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """The columns that ``extra_inputs`` must name."""
        return (*self.parse, *(column for column in self.media if column != "video"))


def column_unit(column: str) -> EncodeUnit:
    """Return the unit that stores a text column for units that read it in every training step.

    It is stored as UTF-8 bytes and a zero, since no item of a record may be empty, as a text may.
    """

    def encode(_: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        import torch

        return {column: torch.tensor([*inputs[column].encode(), 0], dtype=torch.uint8)[:, None]}

    stored = FieldSpec(name=column, dtype="uint8", dims=("byte", "value"), ragged=True)
    return EncodeUnit(name=column, inputs=(column,), outputs=(stored,), component=None, encode=encode)


def module_of(component: Any) -> Module:
    """Return the module of a loaded component: itself, or what its family's bundle calls ``model``."""
    module: Module = getattr(component, "model", component) if not hasattr(component, "parameters") else component
    return module


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the linear layers of a frozen model are held.

    Attributes:
        method: One of ``config.QUANT_METHODS``.
        excluded: Layers that stay as they are, by their names as a whole or from a dot onwards.
    """

    method: str
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentFiles:
    """Where one component lies on this machine.

    Attributes:
        weights: The safetensors files, in order.
        folder: Holds ``config.json`` of the component.
        companions: Sibling folders that the component needs, by name: ``{"tokenizer": ...}``.
        fp8: Its weights are to be held in float8_e4m3fn: ``fp8_models`` names it.
        quantization: How its weights are to be held if ``quant_options`` names it.
        offload: Its weights are to stay in their files until a layer runs: ``offload_models`` names it.
        code: What describes it in place of ``config.json``, below ``folder``: all other files of a template.
    """

    weights: tuple[Path, ...]
    folder: Path
    companions: Mapping[str, Path] = field(default_factory=dict)
    fp8: bool = False
    quantization: Quantization | None = None
    offload: bool = False
    code: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentSpec:
    """One model of a family.

    Attributes:
        subfolder: Its folder in a repository: ``transformer``.
        other_subfolders: Folders of others like it, one of which may be trained in its place: ``transformer_2``.
        class_name: What ``config.json`` calls it (``_class_name`` or the first of ``architectures``).
        companions: Sibling folders it cannot do without.
        load: Loads it in eval mode, frozen, in the given dtype, on the given device.
        trained_part: What the names of the parameters start with that full training reaches; the others, such as the
            vision tower of a text encoder, would only decay.
        build: Builds it from the ``config.json`` of its folder with new weights, in the current default dtype; for
            components that are trained, which ZeRO-3 fills shard by shard.
        switches: What the boolean RunConfig fields of these names do to the loaded model, when they are set.
        settings: RunConfig fields whose values the loaded model gets as attributes, for ``predict_velocity``.
        other_class_names: What else ``config.json`` may call it; ``load`` tells them apart.
        lora_layers: The values of ``lora_format`` that are written, each with its layers.
    """

    subfolder: str
    class_name: str
    load: Callable[[ComponentFiles, dtype, device], Any]
    companions: tuple[str, ...] = ()
    trained_part: str = ""
    other_subfolders: tuple[str, ...] = ()
    build: Callable[[Path], Module] | None = None
    switches: Mapping[str, Callable[[Module], None]] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    other_class_names: tuple[str, ...] = ()
    lora_layers: Mapping[str, LoraLayers] = field(default_factory=lambda: {"diffusers": {}})

    @property
    def class_names(self) -> tuple[str, ...]:
        """All that ``config.json`` may call it."""
        return (self.class_name, *self.other_class_names)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolutionShift:
    """How inference shifts noise levels with the image size: μ of the exponential shift, linear in the latent tokens.

    The names are those of diffusers' ``calculate_shift``: μ is ``base_shift`` at ``base_seq_len`` tokens and
    ``max_shift`` at ``max_seq_len``.
    """

    base_seq_len: int
    max_seq_len: int
    base_shift: float
    max_shift: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowMatchSchedule:
    """The training sigma grid of a family, as parameters; ``training.flow_match`` computes it.

    The grid starts from ``num_steps`` values u, evenly spaced from 1 down to ``u_end`` (which is on the grid only if
    ``include_end``). ``linear`` maps u to s·u/(1+(s-1)·u) with s = ``shift``; ``exponential`` maps u to
    e^μ/(e^μ+1/u-1) with μ = ``shift``. ``terminal`` then stretches the grid so that its last sigma is that value.
    ``resolution_shift`` is no part of the grid; it is what ``timestep_shift: resolution`` takes instead of it.
    """

    shift_type: Literal["linear", "exponential"]
    shift: float
    u_end: float = 0.0
    include_end: bool = False
    terminal: float | None = None
    num_steps: int = 1000
    resolution_shift: ResolutionShift | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockList:
    """A list of blocks in a denoiser, for what reads their outputs.

    A block returns tokens ``[batch, token, channel]``, of the text and the image in one tensor, or as a pair in this
    order. The tokens of the noised latents come row by row, before those of other images.

    Attributes:
        name: ``transformer_blocks``.
        text_first: In one tensor the text stands before the image.
    """

    name: str
    text_first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples of one bucket, on the training device.

    Attributes:
        fields: One tensor per field, ``[batch, *shape]``. A ragged field is padded with zeros at its end to the longest
            item of the batch.
        lengths: For each ragged field, the true length of each item, int64 ``[batch]``.
        sample_ids: One id per sample.
        visits: How often each sample was seen before, counted from 0.
        slots: The stratum of each sample's noise level, one of ``num_slots``; empty if there are none.
        num_slots: How many strata the global batch has.
    """

    fields: Mapping[str, Tensor]
    lengths: Mapping[str, Tensor]
    sample_ids: tuple[str, ...]
    visits: tuple[int, ...]
    slots: tuple[int, ...] = ()
    num_slots: int = 1


class ModelFamily(Protocol):
    """A model family: its components, the units in front of its denoiser, and how the denoiser is called.

    Attributes:
        components: By the reference's names: ``text_encoder``, ``vae``, ``dit``.
        units: In the order in which they run.
        noise_unit: Draws the noise that a row's ``seed`` and ``rand_device`` stand for, shaped as the latents, into the
            field ``noise``; for tasks that start from it.
        schedule: The sigma grid of training.
        blocks: The lists of the denoiser's blocks, in the order in which they run.
        size_multiple: Height and width in pixels are multiples of it.
        latents_field: The field that is noised.
        lora_target_modules: Default LoRA targets: names of layers, each of which must match, or a regular expression.
        lora_prefix: What diffusers puts before the denoiser's names in a LoRA file: ``transformer``.
        architecture: What the metadata of a LoRA file calls the family's models: ``Qwen-Image``.
        pipelines: The diffusers pipelines that ``model_index.json`` of its repositories may name.
    """

    components: Mapping[str, ComponentSpec]
    units: tuple[EncodeUnit, ...]
    noise_unit: EncodeUnit
    schedule: FlowMatchSchedule
    blocks: tuple[BlockList, ...]
    size_multiple: int
    latents_field: str
    lora_target_modules: str | tuple[str, ...]
    lora_prefix: str
    architecture: str
    pipelines: tuple[str, ...]

    def check_fields(self, dit_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse cached fields that this denoiser cannot take.

        Args:
            dit_config: ``config.json`` of the denoiser.
            shapes: One stored shape per cached field; a ragged field without its first dimension. What live units
                yield is not among them.

        Raises:
            CacheMismatch: The cache was made for another model.
        """

    def num_tokens(self, latents_shape: Sequence[int]) -> int:
        """Return how many tokens the denoiser makes of latents of this shape, with or without a batch dimension."""

    def predict_velocity(self, models: Mapping[str, Module], batch: Batch, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoiser's velocity (noise minus latents).

        Args:
            models: The components after the cut; ``dit`` among them.
            batch: The conditioning fields.
            noisy: Noised latents in the compute dtype, shaped as the latents field.
            sigma: Noise level of each sample in [0, 1], fp32 ``[batch]``.

        Returns:
            Velocity of the shape of ``noisy``.
        """

    def fields_of_diffsynth_record(
        self, shared: Mapping[str, Any], positive: Mapping[str, Any]
    ) -> Mapping[str, Tensor]:
        """Return all fields of this family from a cached record of DiffSynth-Studio.

        Args:
            shared: ``inputs_shared`` of the record.
            positive: ``inputs_posi`` of the record.

        Raises:
            KeyError: The record lacks one.
        """

    def write_tiny(self, folder: Path) -> None:
        """Write a tiny repository with random weights, the real classes and the real folder layout."""


@dataclass(frozen=True, slots=True)
class NoiseLevel:
    """The noise level of each sample of a batch, fp32 ``[batch]`` each, on CPU.

    Attributes:
        sigma: In [0, 1]; what the latents are noised to.
        model_sigma: What the denoiser is told; differs from ``sigma`` only where the reference's rounding is copied.
        weight: Factor of the loss.
    """

    sigma: Tensor
    model_sigma: Tensor
    weight: Tensor


class NoiseLevels(Protocol):
    """The distribution of noise levels, and the weight of each."""

    def draw(self, u: Tensor, num_tokens: int) -> NoiseLevel:
        """Map uniform numbers to noise levels through the inverse of their distribution, from σ = 1 downwards.

        Args:
            u: In [0, 1), fp64 ``[batch]``, on CPU.
            num_tokens: Latent tokens of one sample.
        """


class Draws(Protocol):
    """The random numbers of one batch: pure functions of (seed, sample id, visit), and of the slot if there is one.

    Draws for different purposes are independent.
    """

    def noise(self, like: Tensor, purpose: str = "noise") -> Tensor:
        """Return standard normal noise, fp32, of the shape and on the device of ``like``."""

    def uniform(self, purpose: str = "timestep") -> Tensor:
        """Return numbers uniform over [0, 1), fp64 ``[batch]``, on CPU; by default those that decide noise levels."""


class TrainingTask(Protocol):
    """What is minimised.

    Attributes:
        draws_noise_levels: Whether the loss asks ``levels`` for noise levels; if not, their settings are refused.
        takes_turns: False. A task that trains models of its own in turns with the run's is a ``TurnTakingTask``.
    """

    draws_noise_levels: bool
    takes_turns: bool

    def units(self, family: ModelFamily) -> tuple[EncodeUnit, ...]:
        """Return the units that yield what the loss reads, which is all their fields: the family's, and its own."""

    def loss(
        self, family: ModelFamily, models: Mapping[str, Module], batch: Batch, draws: Draws, levels: NoiseLevels
    ) -> Tensor:
        """Return one loss per sample, fp32 ``[batch]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one optimizer step is for.

    Attributes:
        name: Told in the metrics: ``student``.
        max_grad_norm: Gradients above this global norm are scaled.
        of_helpers: It trains models that only serve to train the run's; the run's own stay as they are.
    """

    name: str
    max_grad_norm: float
    of_helpers: bool = False


class Objective(Protocol):
    """What the training loop minimises: a task, set up for one run.

    Attributes:
        turns: What the optimizer steps are for, in a cycle.
        learning_rates: Peak learning rates of the models that only serve to train the run's, by name.
        empty_caption: What the fields made of the caption are for the empty one, a batch of one on the training device;
            the loss reads it if ``needs_empty_caption``.
        lineage: What the metadata of the trained files say of it, JSON values.
    """

    turns: tuple[Turn, ...]
    learning_rates: Mapping[str, float]
    needs_empty_caption: bool
    empty_caption: Batch | None
    lineage: Mapping[str, object]

    def helpers(self, dit: Module) -> Mapping[str, Module]:
        """Return the models that the loss runs beside the run's own, made from the denoiser before it got its LoRA."""

    def loss(self, models: Mapping[str, Module], batch: Batch, draws: Draws, turn: Turn | None) -> Tensor:
        """Return one loss per sample, fp32 ``[batch]``.

        Args:
            models: The models after the cut and the helpers by name.
            batch: The samples; in a validation, one sample several times.
            draws: Their random numbers.
            turn: One of ``turns``; None: a validation.
        """


class TurnTakingTask(Protocol):
    """A task that trains models of its own in turns with the run's."""

    draws_noise_levels: bool
    takes_turns: bool

    def units(self, family: ModelFamily) -> tuple[EncodeUnit, ...]:
        """Return the units that yield what the loss reads, which is all their fields: the family's, and its own."""

    def objective(self, config: Any, family: ModelFamily) -> Objective:
        """Set the task up for a run.

        Args:
            config: The ``RunConfig``.
            family: The family of its models.

        Raises:
            ConfigError: The run cannot be trained so.
        """


def plugin_names(package: str) -> list[str]:
    """Return the names of the plugins in a package, without importing any."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return sorted(module.name for module in pkgutil.iter_modules(spec.submodule_search_locations))


def load_plugin(package: str, name: str, parameter: str) -> Any:
    """Import one plugin.

    Args:
        package: Its package: ``diffsynth_pipe.families``.
        name: Its file name.
        parameter: The RunConfig field that named it, for the message.

    Raises:
        ConfigError: No such plugin.
    """
    names = plugin_names(package)
    if name not in names:
        raise ConfigError(f"{parameter}: {name!r} is not one of {', '.join(names)}")
    return importlib.import_module(f"{package}.{name}").PLUGIN


def load_family(name: str) -> ModelFamily:
    """Import the family of this name; its heavy imports wait until a component is loaded."""
    family: ModelFamily = load_plugin("diffsynth_pipe.families", name, "family")
    return family


def families_of(class_name: str) -> list[str]:
    """Return the families that train models of this class, or repositories of this pipeline."""
    names = plugin_names("diffsynth_pipe.families")
    families = {name: load_family(name) for name in names}
    return [
        name
        for name, family in families.items()
        if class_name in family.pipelines or any(class_name in spec.class_names for spec in family.components.values())
    ]


def load_task(name: str) -> Any:
    """Import the training task of this name, a ``TrainingTask`` or a ``TurnTakingTask``."""
    task: TrainingTask | TurnTakingTask = load_plugin("diffsynth_pipe.training.tasks", name, "task")
    return task
