"""Template models: side models of a denoiser, given as code, that turn a row's ``template_inputs`` into its inputs.

A template model is a folder in the reference's format. Its ``model.py`` defines ``TEMPLATE_MODEL``, a module whose
``process_inputs`` prepares without gradients what its ``forward`` takes, and may define ``TEMPLATE_MODEL_PATH`` (its
weights), ``TEMPLATE_MODEL_CONFIG`` (arguments of the class) and ``TEMPLATE_DATA_PROCESSOR`` (makes the arguments of
``process_inputs`` from the metadata). ``process_inputs`` runs before the cut, ``forward`` in every training step.

No config describes such a model without its code, so it takes ``trust_remote_code`` to use one.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_store.contract import FieldSpec
from diffsynth_pipe.contracts import TEMPLATE_COLUMN, TEMPLATE_MODEL, TEMPLATE_PROCESSOR, ComponentSpec, EncodeUnit
from diffsynth_pipe.errors import DataError, ModelError, PipeError
from diffsynth_pipe.fingerprint import file_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, device, dtype
    from torch.nn import Module

    from diffsynth_pipe.contracts import ComponentFiles, Components

    KVCache = Mapping[str, tuple[Tensor, Tensor]]

CODE_FILE = "model.py"


class Pipe:
    """What a template model gets as ``pipe``: where and in which dtype it is to compute."""

    def __init__(self, torch_dtype: dtype, device: device) -> None:
        self.torch_dtype = torch_dtype
        self.device = device

    def __getattr__(self, name: str) -> Any:
        raise _Missing(
            f"template_model_id_or_path: its {CODE_FILE} asks for pipe.{name}, but only pipe.device and "
            "pipe.torch_dtype are there; let its class load what it needs"
        )


class _Missing(ModelError, AttributeError):
    """An attribute that ``hasattr`` may still ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A loaded template model.

    Attributes:
        model: Its module.
        data_processor: Maps a row's ``template_inputs`` to arguments of ``process_inputs``; None: they are those.
        pipe: Handed to ``process_inputs``.
        put_kv_cache: Makes a denoiser attend to keys and values too, see ``component``; None: the family has no place.
    """

    model: Module
    data_processor: Callable[..., Mapping[str, Any]] | None
    pipe: Pipe
    put_kv_cache: Callable[[Module, KVCache], None] | None

    def outputs(self, packed: bytes, device: device, **arguments: Any) -> dict[str, Any]:
        """Return what the model makes of one sample, with gradients: ``kv_cache``, ``lora`` or both.

        Args:
            packed: What ``pack`` made of the arguments of ``forward``.
            device: Where the model is by now.
            arguments: Further arguments.

        Raises:
            ModelError: It yields something else.
        """
        pipe = Pipe(self.pipe.torch_dtype, device)
        outputs = self.model(pipe=pipe, **unpack(packed, device, pipe.torch_dtype), **arguments)
        known = ["lora"] if self.put_kv_cache is None else ["kv_cache", "lora"]
        if not isinstance(outputs, dict) or not set(outputs) <= set(known):
            found = ", ".join(map(str, outputs)) if isinstance(outputs, dict) else f"a {type(outputs).__name__}"
            raise ModelError(
                f"template_model_id_or_path: the model yields {found}, but this family takes a dict of "
                f"{' and '.join(known)} alone; take a template model of this family"
            )
        return outputs


def component(put_kv_cache: Callable[[Module, KVCache], None] | None = None) -> dict[str, ComponentSpec]:
    """Return the template model as components of a family: the one that is trained, and the one that stage 1 runs.

    Args:
        put_kv_cache: Makes the family's denoiser attend, from then on, to these keys and values beside its own:
            ``[batch, token, head, channel]`` by the reference's names of its blocks; none for no block.
    """
    spec = ComponentSpec(
        subfolder=TEMPLATE_MODEL, class_name="TEMPLATE_MODEL", load=partial(load_template, put_kv_cache=put_kv_cache)
    )
    return {TEMPLATE_MODEL: spec, TEMPLATE_PROCESSOR: spec}


def load_template(
    files: ComponentFiles,
    dtype: dtype,
    device: device,
    put_kv_cache: Callable[[Module, KVCache], None] | None = None,
) -> Template:
    """Run ``model.py`` and load its model in eval mode, frozen. Weights that it does not name are drawn from seed 0.

    Raises:
        ModelError: The code is no template model, or the weights are not its.
    """
    import torch

    code = _run(files.folder / CODE_FILE)
    where = f"template_model_id_or_path: {files.folder / CODE_FILE}"
    build = getattr(code, "TEMPLATE_MODEL", None)
    if build is None:
        raise ModelError(f"{where} defines no TEMPLATE_MODEL; name its class so")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            model = build(**(getattr(code, "TEMPLATE_MODEL_CONFIG", None) or {}))
        except TypeError as error:
            raise ModelError(f"{where}: TEMPLATE_MODEL does not take its TEMPLATE_MODEL_CONFIG ({error})") from error
    if not isinstance(model, torch.nn.Module) or not callable(getattr(model, "process_inputs", None)):
        raise ModelError(f"{where}: TEMPLATE_MODEL must be a torch module with a method process_inputs")
    if paths := getattr(code, "TEMPLATE_MODEL_PATH", None):
        _load_weights(model, [files.folder / path for path in ([paths] if isinstance(paths, str) else paths)], where)
    processor = getattr(code, "TEMPLATE_DATA_PROCESSOR", None)
    return Template(
        model=model.to(device, dtype).eval().requires_grad_(False),
        data_processor=processor() if processor else None,
        pipe=Pipe(dtype, device),
        put_kv_cache=put_kv_cache,
    )


def _run(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("template_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ModelError(f"template_model_id_or_path: {path} is no Python ({error}); copy it again") from error
    except ImportError as error:
        raise ModelError(
            f"template_model_id_or_path: {path} imports what is not here ({error}); install it, or take it out"
        ) from error
    return module


def _load_weights(model: Module, paths: list[Path], where: str) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors |= safetensors.torch.load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{where}: its weights {path} cannot be read ({error}); copy them again") from error
    prefix = f"pipe.{TEMPLATE_MODEL}."  # kept by ``remove_prefix_in_ckpt: ""``
    try:
        model.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise ModelError(f"{where}: {' '.join(str(error).split())}; name the weights of this model") from error


def parse_template_inputs(cell: Any) -> dict[str, Any]:
    """Read a cell: a JSON object. The digests of the files that it names are a part of what is returned.

    Raises:
        ValueError: It is something else.
    """
    try:
        value = json.loads(cell) if isinstance(cell, str) else cell
    except ValueError:
        value = None
    if not isinstance(value, dict):
        message = 'a JSON object, such as {"scale": 0.8}'
        raise ValueError(message)
    return {"inputs": value, "files": {text: file_digest(Path(text)) for text in _texts(value) if _is_file(text)}}


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in values for text in _texts(item)]


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long, or with a zero
        return False


def encode_template_inputs(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Prepare one row's inputs: ``template_inputs`` [byte, 1], what the model's ``forward`` takes, packed.

    Raises:
        DataError: A file that they name cannot be read, or what is made of them cannot be stored.
    """
    import numpy as np
    import torch

    template: Template = components[TEMPLATE_PROCESSOR]
    values = inputs[TEMPLATE_COLUMN]["inputs"]
    try:
        if template.data_processor is not None:
            values = template.data_processor(**values)
        with torch.no_grad():
            packed = pack(template.model.process_inputs(pipe=template.pipe, **values))  # type: ignore[operator]
    except PipeError:
        raise
    except OSError as error:
        raise DataError(f"{TEMPLATE_COLUMN}: {error}; name files as from the working directory") from error
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(
            f"{TEMPLATE_COLUMN}: the model does not take the cell ({type(error).__name__}: {error}); correct it"
        ) from error
    return {TEMPLATE_COLUMN: torch.from_numpy(np.frombuffer(packed, np.uint8).copy())[:, None]}


UNIT = EncodeUnit(
    name=TEMPLATE_COLUMN,
    inputs=(TEMPLATE_COLUMN,),
    outputs=(FieldSpec(name=TEMPLATE_COLUMN, dtype="uint8", dims=("byte", "value"), ragged=True),),
    component=TEMPLATE_PROCESSOR,
    encode=encode_template_inputs,
    parse={TEMPLATE_COLUMN: parse_template_inputs},
    enabled_by=TEMPLATE_COLUMN,
    recipe={"stored": "safetensors"},
)
"""Runs the data processor and ``process_inputs``, whose results may be any values: they are stored as bytes."""


def pack(values: Mapping[str, Any]) -> bytes:
    """Return nested dicts and lists of tensors and JSON values as the bytes of a safetensors file, the same each time.

    Raises:
        DataError: A value is of another kind, or NaN or Inf.
    """
    import safetensors.torch
    import torch

    tensors: dict[str, Tensor] = {}

    def describe(value: Any) -> dict[str, Any]:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() and not value.isfinite().all():
                raise DataError(f"{TEMPLATE_COLUMN}: process_inputs returned a NaN or Inf")
            tensors[name := str(len(tensors))] = value.detach().cpu().contiguous().clone()
            return {"tensor": name}
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{TEMPLATE_COLUMN}: process_inputs returned a NaN or Inf")
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {"dict": {key: describe(item) for key, item in value.items()}}
        if isinstance(value, (list, tuple)):
            return {"list": [describe(item) for item in value]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise DataError(
            f"{TEMPLATE_COLUMN}: process_inputs returned a {type(value).__name__}, which cannot be stored; "
            "let it return tensors, numbers and texts"
        )

    described = describe(dict(values))
    return safetensors.torch.save(tensors, metadata={"values": json.dumps(described, sort_keys=True)})


def unpack(packed: bytes, device: device, dtype: dtype) -> dict[str, Any]:
    """Return the values that ``pack`` was given, float tensors in this dtype; tuples come back as lists."""
    import safetensors.torch

    tensors = safetensors.torch.load(packed)
    length = int.from_bytes(packed[:8], "little")
    metadata = json.loads(packed[8 : 8 + length])["__metadata__"]

    def restore(described: dict[str, Any]) -> Any:
        ((kind, value),) = described.items()
        if kind == "tensor":
            tensor = tensors[value]
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        if kind == "dict":
            return {key: restore(item) for key, item in value.items()}
        return [restore(item) for item in value] if kind == "list" else value

    values: dict[str, Any] = restore(json.loads(metadata["values"]))
    return values
