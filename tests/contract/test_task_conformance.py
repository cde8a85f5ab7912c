"""What every training task must do with every model family, on the tiny repositories."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from family_samples import CELLS, media_columns, sample_values, units_of, write_media

from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import Batch, ComponentFiles, load_family, load_task, plugin_names
from diffsynth_pipe.errors import CacheMismatch, ConfigError, DataError
from diffsynth_pipe.graph import cut
from diffsynth_pipe.stages.data_process import data_process
from diffsynth_pipe.stages.plan import caption_fields, plan_cut
from diffsynth_pipe.stages.train import train
from diffsynth_pipe.training.flow_match import SigmaDistribution
from diffsynth_pipe.training.randomness import SampleDraws
from diffsynth_pipe.training.sources import collate

if TYPE_CHECKING:
    from diffsynth_pipe.contracts import EncodeUnit, ModelFamily, TrainingTask

CPU = torch.device("cpu")
SHORT_TURNS = {
    "num_epochs": 1,
    "num_validation_samples": 1,
    "dmd2_student_sample_steps": 2,
    "dmd2_student_update_freq": 2,
}
"""A run of few steps for a task of several models."""
PROMPTS = ("a red circle", "three blue squares on a white table, 在 soft light", "two dots", "")


@dataclass(frozen=True)
class Case:
    """A task with a family, the family's tiny denoiser, and the records of a few rows."""

    family: ModelFamily
    task: TrainingTask
    repo: Path
    records: list[dict[str, torch.Tensor]]

    @property
    def units(self) -> tuple[EncodeUnit, ...]:
        return units_of(self.task.units(self.family))

    @property
    def fields(self) -> set[str]:
        return {spec.name for unit in self.units for spec in unit.outputs}

    @property
    def extra_inputs(self) -> list[str]:
        return list(dict.fromkeys(column for unit in self.units for column in unit.extra_columns))

    def batch(self, numbers) -> Batch:
        specs = [spec for unit in self.units for spec in unit.outputs]
        fields, lengths = collate(specs, [self.records[number] for number in numbers])
        return Batch(
            fields=fields,
            lengths=lengths,
            sample_ids=tuple(f"{number:032x}" for number in numbers),
            visits=(0,) * len(numbers),
        )

    def load(self, name: str) -> Any:
        spec = self.family.components[name]
        folder = self.repo / spec.subfolder
        companions = {companion: self.repo / companion for companion in spec.companions}
        weights = tuple(sorted(folder.glob("*.safetensors")))
        return spec.load(ComponentFiles(weights=weights, folder=folder, companions=companions), torch.float32, CPU)

    def losses(self, dit, batch: Batch) -> torch.Tensor:
        """Return the losses of the first turn; a helper's weights are what the seed says."""
        draws = SampleDraws.of(batch, seed=0)
        if self.task.takes_turns:
            config = load_config(None, {"dataset_base_path": "data", "task": self.name, "trainable_models": "dit"})
            objective = self.task.objective(config, self.family)
            return objective.loss({"dit": dit, **objective.helpers(dit)}, batch, draws, objective.turns[0])
        levels = SigmaDistribution(self.family.schedule, load_config(None, {"dataset_base_path": "data"}))
        return self.task.loss(self.family, {"dit": dit}, batch, draws, levels)

    @property
    def name(self) -> str:
        return next(name for name in plugin_names("diffsynth_pipe.training.tasks") if load_task(name) is self.task)


@pytest.fixture(scope="module", params=plugin_names("diffsynth_pipe.families"))
def repo(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "tiny" / "Repo"
    load_family(request.param).write_tiny(folder)
    return request.param, folder


@pytest.fixture(scope="module", params=plugin_names("diffsynth_pipe.training.tasks"))
def case(request, repo) -> Case:
    name, folder = repo
    family, task = load_family(name), load_task(request.param)
    empty = Case(family, task, folder, [])
    components = {unit.component: empty.load(unit.component) for unit in empty.units if unit.component}
    records = []
    for number, prompt in enumerate(PROMPTS):
        values = sample_values(empty.units, prompt, number, family.size_multiple)
        record = {}
        with torch.no_grad():
            for unit in empty.units:
                inputs = {name: record.get(name, values.get(name)) for name in unit.inputs}
                record |= unit.encode(components, inputs)
        records.append(record)
    return dataclasses.replace(empty, records=records)


def test_units_begin_with_the_familys_and_all_their_fields_cross_the_cut(case):
    names = [unit.name for unit in case.units]
    assert len(set(names)) == len(names)
    family_names = [unit.name for unit in units_of(case.family.units)]
    assert names[: len(family_names)] == family_names
    for unit in case.units:
        assert set(unit.bucket_by) <= set(unit.parse) <= set(unit.inputs)
        assert set(unit.parse) <= CELLS.keys()
    split = cut(case.units, frozenset({"dit"}), tuple(case.fields))
    assert not split.live
    assert set(split.crossing) == case.fields


def test_noise_of_a_row_has_the_shape_of_its_latents(case):
    for record in case.records:
        if "noise" in record:
            assert record["noise"].shape == record[case.family.latents_field].shape


def test_cells_that_cannot_be_read_are_refused_with_what_they_must_be(case):
    for unit in case.units:
        for column, parse in unit.parse.items():
            assert parse(CELLS[column]) == parse(str(CELLS[column])) == CELLS[column]
            for wrong in ("", "x", None, -1, 1.5, True):
                with pytest.raises(ValueError, match=r"^(a whole number|cpu, cuda|1: )"):
                    parse(wrong)


def test_a_loss_per_sample_and_gradients_for_the_denoiser(case):
    dit = case.load("dit").requires_grad_(True)
    losses = case.losses(dit, case.batch([0, 1, 2]))
    assert losses.shape == (3,)
    assert losses.dtype == torch.float32
    losses.mean().backward()
    gradients = [parameter.grad for parameter in dit.parameters() if parameter.grad is not None]
    assert max(float(gradient.abs().max()) for gradient in gradients) > 0
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_a_batch_is_the_accumulation_of_its_samples(case):
    """Texts of four lengths, padded as the family does: losses and gradients are those of single samples."""
    together, apart = (case.load("dit").requires_grad_(True) for _ in range(2))
    numbers = range(len(PROMPTS))
    losses = case.losses(together, case.batch(numbers))
    losses.mean().backward()
    singly = []
    for number in numbers:
        loss = case.losses(apart, case.batch([number]))
        (loss.mean() / len(PROMPTS)).backward()
        singly.append(loss.detach())
    for spec in (spec for unit in case.units for spec in unit.outputs if spec.ragged):
        assert len({len(case.records[number][spec.name]) for number in numbers}) > 2
    torch.testing.assert_close(losses.detach(), torch.cat(singly), rtol=1e-6, atol=1e-6)
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        if one.grad is not None or other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-6)


def test_the_loss_depends_on_its_sample_and_nothing_else(case):
    dit = case.load("dit")
    with torch.no_grad():
        before = torch.get_rng_state()
        first = case.losses(dit, case.batch([0]))
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        assert torch.equal(case.losses(dit, case.batch([0])), first)
        assert not torch.equal(case.losses(dit, case.batch([1])), first)


# stages


@pytest.fixture
def settings(case, tmp_path, monkeypatch):
    """Parameters of a run on six rows with all columns of the task; two numbers of steps."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(case.repo.parents[1]))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    data = tmp_path / "data"
    data.mkdir()
    media = media_columns(case.units)
    rows = []
    for number in range(6):
        files = {column: write_media(data, kind, number) for column, kind in media.items()}
        cells = {column: CELLS[column] for column in case.extra_inputs if column in CELLS}
        changes = {"seed": number, "num_inference_steps": 2 + number % 2}
        cells |= {column: value for column, value in changes.items() if column in cells}
        rows.append({"prompt": PROMPTS[number % len(PROMPTS)], **files, **cells})
    (data / "metadata.json").write_text(json.dumps(rows), "utf-8")
    model = f"{case.repo.parent.name}/{case.repo.name}"
    return {
        "family": next(name for name in plugin_names("diffsynth_pipe.families") if load_family(name) is case.family),
        "task": case.name,
        "dataset_base_path": str(data),
        "dataset_metadata_path": str(data / "metadata.json"),
        "data_file_keys": ",".join(media),
        "extra_inputs": ",".join(case.extra_inputs) or None,
        "height": 32,
        "width": 64,
        "encode_dtype": "float32",
        "model_id_with_origin_paths": ",".join(
            f"{model}:{spec.subfolder}/*.safetensors" for spec in case.family.components.values()
        ),
        "output_path": str(tmp_path / "output"),
        "cache_path": str(tmp_path / "cache"),
        "cache_backend": "zarr" if case.task.draws_noise_levels else "webdataset",  # each family on both
        "lora_base_model": "dit",
        "lora_rank": 4,
        "learning_rate": 1e-3,
        "batch_size": 2,
        "num_epochs": 2,
        "num_validation_samples": 2,
        **(SHORT_TURNS if case.task.takes_turns else {}),
    }


def losses_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], [
        line["validation_loss"] for line in lines if "validation_loss" in line
    ]


def test_one_process_and_two_stages_train_the_same_bits(case, settings):
    if case.task.takes_turns:  # against the empty caption, where a record of it can be
        guided = load_config(None, {**settings, "dmd2_teacher_cfg_scale": 2})
        if caption_fields(plan_cut(guided, case.family)):
            settings["dmd2_teacher_cfg_scale"] = 2
        else:
            with pytest.raises(ConfigError, match=r"^dmd2_teacher_cfg_scale: no cached field is made .* leave it out$"):
                train(guided)
    whole = train(load_config(None, {**settings, "output_path": f"{settings['output_path']}-whole"}))
    task = settings["task"]
    data_process(load_config(None, {**settings, "task": f"{task}:data_process"}))
    shutil.rmtree(settings["dataset_base_path"])  # the second stage has the cache alone
    split = train(load_config(None, {**settings, "task": f"{task}:train", "dataset_metadata_path": None}))
    assert split.key == whole.key
    assert split.summary["digests"] == whole.summary["digests"]
    assert losses_of(split.path) == losses_of(whole.path)
    assert len(losses_of(split.path)[0]) >= 3 * settings["num_epochs"]
    has_levels = case.task.draws_noise_levels or case.task.takes_turns
    assert len(split.summary["validation"]["loss_by_level"]) == (4 if has_levels else 1)
    assert ("loss_by_noise_decile" in (split.path / "metrics.jsonl").read_text()) == has_levels


def test_a_column_that_nothing_reads_is_named(case, settings):
    with pytest.raises(ConfigError, match=r"^extra_inputs: task .* reads no column xyzzy, only ") as caught:
        data_process(load_config(None, {**settings, "extra_inputs": "xyzzy"}))
    assert "\n" not in str(caught.value)


def test_missing_columns_are_named(case, settings):
    if not case.extra_inputs:
        return
    with pytest.raises(ConfigError, match=rf"^extra_inputs: .* also name {case.extra_inputs[-1]}$"):
        data_process(load_config(None, {**settings, "extra_inputs": ",".join(case.extra_inputs[:-1]) or None}))
    path = Path(settings["dataset_metadata_path"])
    rows = json.loads(path.read_text("utf-8"))
    for row in rows:
        del row[case.extra_inputs[0]]
    path.write_text(json.dumps(rows), "utf-8")
    with pytest.raises(DataError, match=rf"metadata\.json: no column '{case.extra_inputs[0]}', found prompt, "):
        data_process(load_config(None, settings))


def test_a_wrong_cell_names_its_row(case, settings):
    path = Path(settings["dataset_metadata_path"])
    rows = json.loads(path.read_text("utf-8"))
    for column in [column for unit in case.units for column in unit.parse]:
        path.write_text(json.dumps([*rows[:3], {**rows[3], column: "x"}, *rows[4:]]), "utf-8")
        with pytest.raises(DataError, match=rf"^metadata\.json row 4 \(.*\): '{column}' is 'x', must be .") as caught:
            data_process(load_config(None, settings))
        assert "\n" not in str(caught.value)
    assert not Path(settings["cache_path"]).exists()


def test_the_cache_of_another_task_is_refused_if_it_lacks_a_field(case, settings):
    for other in plugin_names("diffsynth_pipe.training.tasks"):
        other_case = dataclasses.replace(case, task=load_task(other))
        lacking = case.fields - other_case.fields
        if not lacking:
            continue
        data_process(
            load_config(
                None,
                {
                    **settings,
                    "task": f"{other}:data_process",
                    "extra_inputs": ",".join(other_case.extra_inputs) or None,
                },
            )
        )
        with pytest.raises(CacheMismatch, match=r"also needs .*; run data-process with this run's task") as caught:
            train(load_config(None, {**settings, "task": f"{settings['task']}:train"}))
        assert all(name in str(caught.value) for name in lacking)
