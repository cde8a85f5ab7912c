"""Model ids and paths -> local files of the components that a stage needs (ModelScope, Hugging Face, local).

A component whose files are all here and whole is used without a request; the reference asks the hub each time. Whole
means: JSON parses, and each safetensors file is as long as its header says. What is downloaded is compared with the
hub's sha256; a bit that flips on the disk later is not noticed here.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any

from diffsynth_pipe.config import parse_quant_options
from diffsynth_pipe.contracts import TEMPLATE_MODEL, TEMPLATE_PROCESSOR, ComponentFiles, families_of
from diffsynth_pipe.errors import ConfigError, ModelError, ModelFileMissing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.contracts import ComponentSpec, ModelFamily, Quantization

WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call a component's weights; ``from_pretrained`` reads no others from its folder."""
COMPANION_PARAMETERS = {
    "tokenizer_path": "tokenizer",
    "tokenizer_1_path": "tokenizer",
    "tokenizer_2_path": "tokenizer_2",
    "processor_path": "processor",
    "audio_processor_path": "audio_processor",
}
"""The RunConfig fields that name another folder than the one beside a component, and that folder's name there."""
SHARD_STEM = re.compile(r"-\d+-of-\d+$")
UNFINISHED = ".unfinished_download"
"""Lies beside the weights while a download runs: what was cut off may lack files that nothing else would miss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One model as the user named it: a list of files, or else the text ``model_id:file_pattern``."""

    text: str
    files: tuple[Path, ...] = ()

    @property
    def folder_name(self) -> str:
        """The name of the weights' folder, told without a look at the disk."""
        return (self.files[0] if self.files else PurePath(self.text.rpartition(":")[2])).parent.name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where an entry's weights lie: ``files``, or what matches ``pattern`` in ``folder`` and can be downloaded."""

    text: str
    folder: Path
    files: tuple[Path, ...] = ()
    model_id: str = ""
    pattern: PurePosixPath = field(default_factory=PurePosixPath)

    def weights(self) -> tuple[Path, ...]:
        """Return the safetensors files that are here, in order of their names."""
        found = sorted(self.files or self.folder.glob(self.pattern.name))
        return tuple(file for file in found if file.suffix == ".safetensors" and file.is_file())


def resolve_components(config: RunConfig, family: ModelFamily, names: Iterable[str]) -> dict[str, ComponentFiles]:
    """Find the files of components; download what is missing.

    An entry belongs to the component whose subfolder its folder is named like, or else to the one that its
    ``config.json`` names. No file of another component is looked at.

    Args:
        config: ``model_paths``, ``model_id_with_origin_paths`` and ``COMPANION_PARAMETERS`` name the files. Models by
            id lie in ``$DIFFSYNTH_MODEL_BASE_PATH/<model id>``, by default below ``./models``.
        family: The family of the components.
        names: The components to find.

    Raises:
        ConfigError: An entry is malformed, or a companion is named that the family does not have.
        ModelFileMissing: A component is named nowhere, or is not here and was not downloaded.
        ModelError: The files are not one whole model of the right class.
    """
    known = {companion for spec in family.components.values() for companion in spec.companions}
    for parameter, companion in COMPANION_PARAMETERS.items():
        # The reference's other trainings of Wan load an audio processor too, and leave it alone.
        if getattr(config, parameter) and companion not in known and parameter != "audio_processor_path":
            raise ConfigError(f"{parameter}: no component of the family takes a {companion}; leave it out")
    all_entries = _entries(config)
    fp8_entries = _repeated("fp8_models", config.fp8_models, all_entries)
    quantizations = _quantizations(config, all_entries, fp8_entries)
    offload_entries = _repeated("offload_models", config.offload_models, all_entries)
    for entry in offload_entries:
        if entry in fp8_entries or entry.text in quantizations:
            other = "fp8_models" if entry in fp8_entries else "quant_options"
            raise ConfigError(f"offload_models: {entry.text!r} is named by {other} already; name it once")
    audio_processor = config.audio_processor_path
    if audio_processor is not None and ":" not in audio_processor:
        _audio_processor(audio_processor)
    subfolders = {
        folder: name for name, spec in family.components.items() for folder in (spec.subfolder, *spec.other_subfolders)
    }
    named: dict[str, list[_Entry]] = {name: [] for name in family.components}
    strays: list[_Entry] = []
    for entry in all_entries:
        name = subfolders.get(entry.folder_name)
        (named[name] if name else strays).append(entry)

    found = {}
    for name in dict.fromkeys(names):
        if name in (TEMPLATE_MODEL, TEMPLATE_PROCESSOR):
            found[name] = _template_files(config)
            continue
        spec = family.components[name]
        entries = named[name] or [stray for stray in strays if _class_of(stray) in spec.class_names]
        if not entries:
            others = "".join(f"; {stray.text!r} is a {_class_of(stray)!r}" for stray in strays)
            raise ModelFileMissing(
                f"no model entry names the {name} ({spec.class_name}): add 'MODEL_ID:{spec.subfolder}/*.safetensors' "
                f"to model_id_with_origin_paths, or its files to model_paths{others}"
            )
        if len(entries) > 1:
            texts = " and ".join(repr(entry.text) for entry in entries)
            raise ModelError(f"{len(entries)} model entries name the {name}: {texts}; keep one, its shards in one list")
        files = _component_files(_locate(entries[0]), spec, config)
        found[name] = replace(
            files,
            fp8=entries[0] in fp8_entries,
            quantization=quantizations.get(entries[0].text),
            offload=entries[0] in offload_entries,
        )
    if "dit" in found:
        _check_pipeline(found["dit"].folder.parent / "model_index.json", family, config)
    return found


def _template_files(config: RunConfig) -> ComponentFiles:
    """Find the folder of the template model; download it, if it is named by its id and not here."""
    folder = _named_folder("template_model_id_or_path", config.template_model_id_or_path or "", "model.py")
    if not (folder / "model.py").is_file():
        raise ModelFileMissing(f"template_model_id_or_path: {folder / 'model.py'} does not exist; correct the path")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    files = [
        file
        for file in files
        if not any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(folder).parts)
    ]
    return ComponentFiles(
        weights=tuple(file for file in files if file.suffix == ".safetensors"),
        folder=folder,
        code=tuple(file for file in files if file.suffix != ".safetensors"),
    )


def _audio_processor(text: str) -> Path:
    """Find the folder of a wav2vec 2.0 processor; the weights may lie there too."""
    file = "preprocessor_config.json"
    folder = _named_folder("audio_processor_path", text, file, pattern="*.json")
    if not (folder / file).is_file():
        raise ConfigError(
            f"audio_processor_path: {text} has no {file}; name the folder of a wav2vec 2.0 processor, or leave it out"
        )
    return folder


def _named_folder(parameter: str, text: str, file: str = "", *, pattern: str = "*") -> Path:
    """Find a folder that is named by its path or as ``MODEL_ID:FOLDER/``; download these files, if it lacks this one.

    Raises:
        ConfigError: It is neither.
        ModelFileMissing: It is not here and was not downloaded.
    """
    folder = Path(text).absolute()
    if folder.is_dir():
        return folder
    model_id, _, rest = text.partition(":")
    subfolder = PurePosixPath(rest)
    if ":" not in text or any(path.is_absolute() or ".." in path.parts for path in (PurePosixPath(text), subfolder)):
        raise ConfigError(f"{parameter}: {text!r} is neither a folder nor 'MODEL_ID:' nor 'MODEL_ID:FOLDER/'")
    folder = _models_folder() / model_id / subfolder
    if not (folder / file).exists() or (folder / UNFINISHED).exists():
        _download(f"{parameter}: {text}", model_id, folder, [str(subfolder / pattern)])
    return folder


def _check_pipeline(index: Path, family: ModelFamily, config: RunConfig) -> None:
    """Refuse the denoiser of a repository that another family trains: classes alone do not tell them apart.

    Encoders may come from anywhere.
    """
    pipeline = _read_json(index).get("_class_name") if index.is_file() else None
    if pipeline and pipeline not in family.pipelines and families_of(pipeline):
        raise ModelError(
            f"{index.parent}: is a {pipeline}, but family {config.family!r} trains {' and '.join(family.pipelines)}; "
            f"{_cure(pipeline, config.family)}"
        )


def _cure(class_name: str, family: str) -> str:
    others = [name for name in families_of(class_name) if name != family]
    return f"set family to {' or '.join(others)}, or name another model" if others else "name another model"


def _entries(config: RunConfig) -> list[_Entry]:
    listed = [[item] if isinstance(item, str) else item for item in config.model_paths or []]
    if [] in listed:
        raise ConfigError(f"model_paths: an entry of {config.model_paths!r} lists no file; remove it")
    entries = [_Entry(text=files[0], files=tuple(Path(file).absolute() for file in files)) for files in listed]
    texts = (text.strip() for text in (config.model_id_with_origin_paths or "").split(","))
    return entries + [_Entry(text=text) for text in texts if text]


def _repeated(name: str, items: list[str | list[str]] | None, entries: list[_Entry]) -> list[_Entry]:
    """Return the entries that a parameter repeats."""
    found = []
    for item in items or []:
        texts = [item] if isinstance(item, str) else item
        files = tuple(Path(text).absolute() for text in texts)
        same = [entry for entry in entries if (entry.files == files if entry.files else [entry.text] == texts)]
        if not same:
            known = ", ".join(repr(entry.text) for entry in entries)
            raise ConfigError(f"{name}: {item!r} is no entry of the models; they are {known}")
        found += same
    return found


def _quantizations(config: RunConfig, entries: list[_Entry], fp8_entries: list[_Entry]) -> dict[str, Quantization]:
    """Return how the entries that ``quant_options`` repeats are held, by their texts."""
    found: dict[str, Quantization] = {}
    for item, quantization in parse_quant_options(config.quant_options):
        for entry in _repeated("quant_options", [item], entries):
            if entry.text in found or entry in fp8_entries:
                other = "quant_options" if entry.text in found else "fp8_models"
                raise ConfigError(f"quant_options: {entry.text!r} is named by {other} already; name it once")
            found[entry.text] = quantization
    if found and find_spec("bitsandbytes") is None:
        message = "quant_options: the extra quant is not installed; pip install 'diffsynth-pipe[quant]'"
        raise ConfigError(message)
    return found


def _locate(entry: _Entry) -> _Source:
    files = entry.files or ((Path(entry.text).absolute(),) if Path(entry.text).exists() else ())
    if files:
        if len({file.parent for file in files}) > 1:
            raise ModelError(f"model_paths: the list that starts with {entry.text!r} spans several folders; split it")
        return _Source(text=entry.text, folder=files[0].parent, files=files)
    model_id, _, text = entry.text.rpartition(":")
    pattern = PurePosixPath(text)
    if (
        not model_id
        or not text
        or pattern.is_absolute()
        or ".." in pattern.parts
        or set("*?[") & set(str(pattern.parent))
    ):
        raise ConfigError(
            f"model_id_with_origin_paths: {entry.text!r} is neither an existing file nor 'MODEL_ID:FOLDER/PATTERN', "
            f"where only the file name holds a '*'"
        )
    folder = _models_folder() / model_id / pattern.parent
    return _Source(text=entry.text, folder=folder, model_id=model_id, pattern=pattern)


def _models_folder() -> Path:
    return Path(os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or "models").absolute()


def _class_of(entry: _Entry) -> str:
    """Return the class of an entry whose folder has a name of its own."""
    source = _locate(entry)
    _fetch(source, companions={})
    return _class_name(source.folder)


def _component_files(source: _Source, spec: ComponentSpec, config: RunConfig) -> ComponentFiles:
    companions = {name: source.folder.parent / name for name in spec.companions}
    for parameter, name in COMPANION_PARAMETERS.items():
        if name in companions and (path := getattr(config, parameter)):
            is_audio = parameter == "audio_processor_path"
            companions[name] = _audio_processor(path) if is_audio else _named_folder(parameter, path)
    _fetch(source, companions)
    weights = source.weights()
    shards = _indexed_shards(weights)
    if shards and shards != {file.name for file in weights}:
        raise ModelError(
            f"{source.text}: names {len(weights)} files, but the index of {source.folder} lists {len(shards)} shards, "
            f"and all of them are loaded; name exactly those"
        )
    if not shards and weights[0].stem not in WEIGHT_STEMS:
        raise ModelError(
            f"{source.text}: {weights[0].name!r} would not be read, because weights are called "
            f"{' or '.join(stem + '.safetensors' for stem in WEIGHT_STEMS)}; rename it"
        )
    if (class_name := _class_name(source.folder)) not in spec.class_names:
        cure = _cure(class_name, config.family)
        expected = " or a ".join(map(repr, spec.class_names))
        raise ModelError(f"{source.folder}: holds a {class_name!r}, expected a {expected}; {cure}")
    return ComponentFiles(weights=weights, folder=source.folder, companions=companions)


def _fetch(source: _Source, companions: Mapping[str, Path]) -> None:
    """Download a source unless it is here and whole.

    Raises:
        ModelFileMissing: It still is not.
    """
    problem = _problem(source, companions)
    if problem and source.model_id:
        beside = source.pattern.parent.parent
        patterns = [str(source.pattern), str(source.pattern.parent / "*.json"), str(beside / "model_index.json")]
        patterns += [f"{beside / name}/*" for name, path in companions.items() if path == source.folder.parent / name]
        _download(source.text, source.model_id, source.folder, patterns, problem)
        problem = _problem(source, companions)
    if problem:
        raise ModelFileMissing(f"{source.text}: {problem}; correct the path or the pattern, or copy the file again")


def _problem(source: _Source, companions: Mapping[str, Path]) -> str | None:
    """Say what a source lacks or which of its files is damaged, or return None if it is whole."""
    absent = [file for file in source.files if not file.is_file()]
    if absent:
        return f"{absent[0]} does not exist"
    weights = source.weights()
    if not weights:
        return f"no .safetensors file matches {source.pattern.name or source.text!r} in {source.folder}"
    if not (source.folder / "config.json").is_file():
        return f"{source.folder / 'config.json'} does not exist"
    absent = [folder for folder in companions.values() if not folder.is_dir()]
    if absent:
        return f"{absent[0]} does not exist"
    if source.model_id and (source.folder / UNFINISHED).exists():
        marker = source.folder / UNFINISHED
        return f"an earlier download was cut off (if you completed it by hand, delete {marker})"
    texts = [file for folder in (source.folder, *companions.values()) for file in sorted(folder.glob("*.json"))]
    if broken := next(filter(None, map(_damage, texts)), None):
        return broken
    shards = _indexed_shards(weights)
    if not shards and (len(weights) > 1 or SHARD_STEM.search(weights[0].stem)):
        return f"{len(weights)} files match in {source.folder}, but no *.safetensors.index.json ties them together"
    absent = [source.folder / shard for shard in sorted(shards) if not (source.folder / shard).is_file()]
    if absent:
        return f"{absent[0]} does not exist"
    return next(filter(None, map(_damage, weights)), None)


def _damage(file: Path) -> str | None:
    """Say what is wrong with a JSON file, or with the length or header of a safetensors file; None if nothing is."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".json":
            json.loads(file.read_bytes())
        else:
            with safe_open(file, framework="numpy"):
                pass
    except (ValueError, SafetensorError) as error:
        return f"{file} is damaged ({' '.join(str(error).split())})"
    return None


def _indexed_shards(weights: tuple[Path, ...]) -> set[str]:
    """Return the names of all shards of the model to which the weights belong; empty if they are not sharded."""
    names = {file.name for file in weights}
    for stem in WEIGHT_STEMS:
        index = weights[0].parent / f"{stem}.safetensors.index.json"
        if index.is_file():
            shards = set(_read_json(index).get("weight_map", {}).values())
            if shards & names:
                return shards
    return set()


def _class_name(folder: Path) -> str:
    config = _read_json(folder / "config.json")
    return str(config.get("_class_name") or (config.get("architectures") or [""])[0])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__}, expected an object; download it again")
    return value


def _download(text: str, model_id: str, folder: Path, patterns: list[str], problem: str = "is not here") -> None:
    """Download the files of a repository that match patterns.

    Both clients go on with a file that was cut off. A file on the disk that differs from ModelScope's is replaced.

    Args:
        text: What the user named.
        model_id: The repository.
        folder: Is marked until all files are here.
        patterns: Of files.
        problem: Why they are downloaded.

    Raises:
        ModelFileMissing: Downloads are switched off, or the hub cannot be reached, has no such repository, or sends
            other bytes than it lists.
    """
    if os.environ.get("DIFFSYNTH_SKIP_DOWNLOAD", "").lower() in {"1", "true", "yes", "on"}:
        raise ModelFileMissing(f"{text}: {problem}; put it there, or unset DIFFSYNTH_SKIP_DOWNLOAD to download it")
    hub = os.environ.get("DIFFSYNTH_DOWNLOAD_SOURCE", "modelscope").lower()
    if hub not in {"modelscope", "huggingface"}:
        raise ConfigError(f"DIFFSYNTH_DOWNLOAD_SOURCE: {hub!r} is not one of modelscope, huggingface")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    fetch = _from_modelscope if hub == "modelscope" else _from_huggingface
    try:
        fetch(model_id, _models_folder() / model_id, patterns)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelFileMissing(f"{text}: download from {hub} failed: {reason}") from error
    (folder / UNFINISHED).unlink(missing_ok=True)


def _from_modelscope(model_id: str, folder: Path, patterns: list[str]) -> None:
    """Download with ModelScope's client, which compares every file with the sha256 of the hub's list."""
    from modelscope.hub.snapshot_download import snapshot_download
    from modelscope_hub.errors import FileDownloadError, HubError

    try:
        snapshot_download(model_id, local_dir=str(folder), allow_patterns=patterns)
    except FileDownloadError as error:
        path, cause = next(iter(error.failed_files.items()))
        while cause.__cause__:
            cause = cause.__cause__
        message = f"{len(error.failed_files)} of {error.total} files, {path}: {cause}"
        raise OSError(message) from error
    except HubError as error:
        raise OSError(str(error)) from error


def _from_huggingface(model_id: str, folder: Path, patterns: list[str]) -> None:
    """Download with Hugging Face's client, then compare with the hub's digests, which the client alone does not."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's, by version

    try:
        snapshot_download(model_id, local_dir=folder, allow_patterns=patterns)
        mismatches = HfApi().verify_repo_checksums(model_id, local_dir=folder).mismatches
    except HTTPError as error:
        raise OSError(str(error)) from error
    for wrong in mismatches:
        if any(fnmatch(wrong["path"], pattern) for pattern in patterns):
            message = f"{folder / wrong['path']} has another {wrong['algorithm']} than on the hub; delete it, run again"
            raise ValueError(message)
