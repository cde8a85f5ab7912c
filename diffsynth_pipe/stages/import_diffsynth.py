"""Turn a cache of DiffSynth-Studio, one pickle per sample, into a cache of ours."""

from __future__ import annotations

import pickle  # noqa: TID251 - for the name of the error alone
from collections import Counter
from typing import TYPE_CHECKING, Any

from diffsynth_pipe.contracts import load_family
from diffsynth_pipe.errors import DataError
from diffsynth_pipe.fingerprint import bytes_digest, json_digest, record_key, unit_recipe
from diffsynth_pipe.stages.plan import StageResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from cache_store.object_path import Root
    from diffsynth_pipe.contracts import EncodeUnit, ModelFamily


class _ImageSize:
    """What is kept of a pickled PIL image."""

    def __setstate__(self, state: list[Any]) -> None:
        self.size = state[2]


def import_diffsynth(source: Path, cache_dir: Root, family_name: str) -> StageResult:
    """Store the fields that training reads of every ``.pth`` below a folder, and seal them.

    The records are keyed by their content, since they do not say which weights made them; equal ones are stored once.
    The source is only read.

    Args:
        source: ``output_path`` of the reference's ``sft:data_process``.
        cache_dir: The cache to write; may be one that an earlier import filled in part.
        family_name: The family of the model that the records were made for.

    Raises:
        DataError: A file is not such a record, has other fields than the first one, or holds anything but tensors,
            numbers, text and PIL images.
        RecordRefused: A tensor holds NaN or Inf.
    """
    from tqdm import tqdm

    from cache_store.store import Cache, SealedSample
    from diffsynth_pipe.stages.encode import storage_arrays

    paths = sorted(source.rglob("*.pth"))
    if not paths:
        raise DataError(f"{source}: holds no .pth file; name the output_path of the reference's sft:data_process")
    family = load_family(family_name)
    known = _read_record(paths[0], family)[1].keys()
    units = _units_of(family, known)
    cache = Cache.open_or_new(cache_dir)
    recipes = {unit.name: unit_recipe(unit, "imported from DiffSynth-Studio", "bfloat16") for unit in units}
    recipe_ids = {name: json_digest(recipe) for name, recipe in recipes.items()}
    committed = cache.committed_keys()
    samples: list[SealedSample] = []
    occurrences: Counter[str] = Counter()
    with cache.writer() as writer:
        for path in tqdm(paths, desc="import", unit="record"):
            label = path.relative_to(source).as_posix()
            shared, fields = _read_record(path, family)
            if differing := sorted(fields.keys() ^ known):
                raise DataError(f"{path}: has {differing[0]} where {paths[0].name} has not, or the other way round")
            keys: dict[str, str] = {}
            for unit in units:
                arrays = storage_arrays({spec.name: fields[spec.name] for spec in unit.outputs})
                contents = [bytes_digest(array.tobytes()) for array in arrays.values()]
                keys[unit.name] = record_key(recipe_ids[unit.name], contents)
                if keys[unit.name] not in committed.get(unit.name, ()):
                    writer.add(unit.name, keys[unit.name], arrays, unit.outputs, label=label)
            content = json_digest(keys)
            samples.append(
                SealedSample(
                    sample_id=json_digest([content, occurrences[content]]),
                    bucket="x".join(str(shared[name]) for name in ("height", "width", "num_frames") if name in shared),
                    source=label,
                    keys=keys,
                )
            )
            occurrences[content] += 1
    for recipe in recipes.values():
        cache.put_recipe(recipe)
    snapshot = cache.seal(samples, {"family": family_name, "units": recipe_ids})
    summary = {"num_samples": len(snapshot), "num_records": sum(snapshot.num_records.values())}
    return StageResult(
        stage="import-diffsynth", state="Completed", key=snapshot.digest, path=cache.root, summary=summary
    )


def _units_of(family: ModelFamily, fields: Iterable[str]) -> list[EncodeUnit]:
    """Return the units that yield these fields, of those that yield the same the first."""
    units, wanted = [], set(fields)
    for unit in family.units:
        names = {spec.name for spec in unit.outputs}
        if names <= wanted:
            units.append(unit)
            wanted -= names
    return units


def _read_record(path: Path, family: ModelFamily) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Return the shared inputs of a record, and the family's fields in storage dtype."""
    import torch

    try:
        with torch.serialization.safe_globals([(_ImageSize, "PIL.Image.Image")]):
            # weights_only unpickles tensors and plain values, and refuses every other name before it is called.
            record = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error).splitlines()[0])
        raise DataError(f"{path}: is not a record of tensors and plain values: {reason.strip()}") from error
    if not (isinstance(record, tuple) and len(record) == 3 and all(isinstance(part, dict) for part in record)):
        raise DataError(f"{path}: holds a {type(record).__name__}, not (inputs_shared, inputs_posi, inputs_nega)")
    shared, positive, _ = record
    try:
        fields = family.fields_of_diffsynth_record(shared, positive)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{path}: lacks what {type(family).__name__} trains on: {error!r}; set --family") from error
    specs = {spec.name: spec for unit in family.units for spec in unit.outputs}
    return shared, {name: tensor.to(getattr(torch, specs[name].dtype)).contiguous() for name, tensor in fields.items()}
