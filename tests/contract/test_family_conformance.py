"""What every model family must do, on its tiny repository. A new family is tested the moment its file exists."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from family_samples import PROMPTS, media_columns, sample_values, units_of
from offloaded_weights import Watch
from safetensors.torch import save_file

from diffsynth_pipe.contracts import Batch, ComponentFiles, Quantization, load_family, plugin_names
from diffsynth_pipe.errors import CacheMismatch, ModelError
from diffsynth_pipe.modeling.quantization import quantize
from diffsynth_pipe.training.discriminator import blocks, feature_maps, feature_width
from diffsynth_pipe.training.flow_match import sigma_grid
from diffsynth_pipe.training.lora import LoraSettings, add_lora, lora_parameters, target_layers
from diffsynth_pipe.training.lora_file import export_lora
from diffsynth_pipe.training.offload import offload_weights

if TYPE_CHECKING:
    from pathlib import Path

    from diffsynth_pipe.contracts import ComponentSpec, ModelFamily

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Tiny:
    """A family with its tiny repository, loaded by the family's own loaders."""

    family: ModelFamily
    repo: Path
    components: dict[str, Any]
    records: list[dict[str, torch.Tensor]]

    @property
    def dit_config(self) -> dict[str, Any]:
        return json.loads((self.repo / self.family.components["dit"].subfolder / "config.json").read_text())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        ragged = ragged_fields(self.family)
        return {name: tuple(value.shape)[name in ragged :] for name, value in self.records[0].items()}


def component_files(family: ModelFamily, repo: Path, name: str) -> ComponentFiles:
    spec = family.components[name]
    folder = repo / spec.subfolder
    return ComponentFiles(
        weights=tuple(sorted(folder.glob("*.safetensors"))),
        folder=folder,
        companions={companion: repo / companion for companion in spec.companions},
    )


def components_of(family: ModelFamily) -> dict[str, ComponentSpec]:
    """Return the components that a tiny repository holds: the denoiser, and those of units that nobody names."""
    names = {"dit", *(unit.component for unit in units_of(family.units) if unit.component)}
    return {name: spec for name, spec in family.components.items() if name in names}


def ragged_fields(family: ModelFamily) -> set[str]:
    return {spec.name for unit in units_of(family.units) for spec in unit.outputs if spec.ragged}


def encode(family: ModelFamily, components, seed: int) -> dict[str, torch.Tensor]:
    values = sample_values(units_of(family.units), PROMPTS[seed], seed, family.size_multiple)
    fields = {}
    for unit in units_of(family.units):
        fields |= unit.encode(components, {name: values[name] for name in unit.inputs})
        values |= fields
    return fields


def collate(family: ModelFamily, records, filler: float = 0.0) -> Batch:
    ragged = ragged_fields(family)
    fields, lengths = {}, {}
    for name in records[0]:
        items = [record[name] for record in records]
        if name in ragged:
            lengths[name] = torch.tensor([len(item) for item in items])
            items = [
                torch.nn.functional.pad(item, (0, 0, 0, int(lengths[name].max()) - len(item)), value=filler)
                for item in items
            ]
        fields[name] = torch.stack(items)
    count = len(records)
    return Batch(
        fields=fields, lengths=lengths, sample_ids=tuple(f"{i:032x}" for i in range(count)), visits=(0,) * count
    )


@pytest.fixture(scope="module", params=plugin_names("diffsynth_pipe.families"))
def tiny(request, tmp_path_factory) -> Tiny:
    family = load_family(request.param)
    repo = tmp_path_factory.mktemp(request.param) / "repo"
    family.write_tiny(repo)
    components = {
        name: spec.load(component_files(family, repo, name), torch.float32, CPU)
        for name, spec in components_of(family).items()
    }
    records = [encode(family, components, seed) for seed in range(len(PROMPTS))]
    return Tiny(family, repo, components, records)


def modules_of(component: Any) -> list[torch.nn.Module]:
    """Return the modules of a component: itself, or those in a family's bundle."""
    # Not by astuple, which copies them.
    is_bundle = dataclasses.is_dataclass(component)
    names = [field.name for field in dataclasses.fields(component)] if is_bundle else list(vars(component))
    parts = [getattr(component, name) for name in names]
    return [part for part in (component, *parts) if isinstance(part, torch.nn.Module)]


def predict(tiny: Tiny, batch: Batch, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tiny.family.predict_velocity({"dit": tiny.components["dit"]}, batch, noisy, sigma)


def test_tiny_repository_has_the_declared_layout(tiny):
    assert json.loads((tiny.repo / "model_index.json").read_text())["_class_name"] in tiny.family.pipelines
    for name, spec in components_of(tiny.family).items():
        files = component_files(tiny.family, tiny.repo, name)
        config = json.loads((files.folder / "config.json").read_text())
        assert spec.class_name in (config.get("_class_name"), *config.get("architectures", []))
        assert files.weights
        assert all(path.is_dir() for path in files.companions.values())


def test_tiny_repository_has_the_same_bytes_each_time_and_leaves_the_random_state_alone(tiny, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        state = torch.get_rng_state()
        tiny.family.write_tiny(tmp_path / "again")
        assert torch.equal(torch.get_rng_state(), state)
    written = {path.relative_to(tiny.repo) for path in tiny.repo.rglob("*") if path.is_file()}
    again = {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert written == again
    for path in written:
        assert (tiny.repo / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_write_tiny_touches_nothing_that_exists(tiny, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    tiny.family.write_tiny(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model_index.json"]
    (tmp_path / "model_index.json").rename(tmp_path / "notes.json")
    with pytest.raises(ModelError, match="not empty"):
        tiny.family.write_tiny(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.json"]


def test_components_load_frozen_in_eval_mode_and_in_the_asked_dtype(tiny):
    for name, spec in components_of(tiny.family).items():
        component = spec.load(component_files(tiny.family, tiny.repo, name), torch.bfloat16, CPU)
        modules = modules_of(component)
        assert modules, name
        for module in modules:
            assert not any(part.training for part in module.modules())
            kept = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())  # as their authors want it
            for path, parameter in module.named_parameters():
                assert parameter.dtype == torch.bfloat16 or any(part in path for part in kept), path
            assert not any(parameter.requires_grad for parameter in module.parameters())


def parameter_dtypes(module):
    """Return the dtypes of parameters by name; ones that are shared stand under each of theirs."""
    return {name: parameter.dtype for name, parameter in module.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoders_with_their_weights_on_the_disk_encode_to_the_same_bits(tiny, dtype):
    offloaded, plain = {}, {}
    for name in {unit.component for unit in units_of(tiny.family.units) if unit.component}:
        files, spec = component_files(tiny.family, tiny.repo, name), tiny.family.components[name]
        offloaded[name] = spec.load(dataclasses.replace(files, offload=True), dtype, CPU)
        plain[name] = tiny.components[name] if dtype is torch.float32 else spec.load(files, dtype, CPU)
    for seed in range(2):
        found, expected = (encode(tiny.family, parts, seed) for parts in (offloaded, plain))
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        for name, component in offloaded.items():
            for module, other in zip(modules_of(component), modules_of(plain[name]), strict=True):
                assert {parameter.device.type for parameter in module.parameters()} == {"meta"}, name
                assert not any(part.training for part in module.modules())
                assert parameter_dtypes(module) == parameter_dtypes(other), name
                assert not any(parameter.requires_grad for parameter in module.parameters())
                buffers = dict(other.named_buffers())
                assert all(torch.equal(buffer, buffers.pop(path)) for path, buffer in module.named_buffers()), name
                assert not buffers, name


def test_encoders_in_fp8_encode_as_weights_that_were_rounded(tiny):
    held, rounded = {}, {}
    for name in {unit.component for unit in units_of(tiny.family.units) if unit.component}:
        files, spec = component_files(tiny.family, tiny.repo, name), tiny.family.components[name]
        held[name] = spec.load(dataclasses.replace(files, fp8=True), torch.float32, CPU)
        rounded[name] = spec.load(files, torch.float32, CPU)
        stored = num_stored = 0
        for module, plain in zip(modules_of(held[name]), modules_of(rounded[name]), strict=True):
            for parameter, other in zip(module.parameters(), plain.parameters(), strict=True):
                num_stored += parameter.numel()
                if parameter.dtype == torch.float8_e4m3fn:
                    stored += parameter.numel()
                    other.data = other.data.to(torch.float8_e4m3fn).float()
        assert stored > num_stored / 2, name
    found, expected = (encode(tiny.family, parts, 1) for parts in (held, rounded))
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
        if not value.is_floating_point():
            continue
        assert not torch.equal(value, tiny.records[1][name]), name
        torch.testing.assert_close(value, tiny.records[1][name].reshape_as(value), rtol=0.2, atol=0.3)


def test_models_in_4_bits_compute_as_weights_that_were_rounded(tiny):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    quantization = Quantization(method="bitsandbytes_nf4")
    held, rounded = {}, {}
    for name, spec in components_of(tiny.family).items():
        files = component_files(tiny.family, tiny.repo, name)
        rounded[name] = spec.load(files, torch.float32, CPU)
        if name == "vae":  # nearly all of its layers are convolutions
            held[name] = rounded[name]
            continue
        held[name] = spec.load(dataclasses.replace(files, quantization=quantization), torch.float32, CPU)
        if name == "dit":
            quantize(held[name], quantization, CPU)
        for module, plain in zip(modules_of(held[name]), modules_of(rounded[name]), strict=True):
            layers = {path: part for path, part in module.named_modules() if isinstance(part, Linear4bit)}
            linear = [path for path, part in plain.named_modules() if isinstance(part, torch.nn.Linear)]
            assert len(layers) > len(linear) / 2, name
            for path, layer in layers.items():
                plain.get_submodule(path).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    found, expected = ([encode(tiny.family, parts, seed) for seed in range(len(PROMPTS))] for parts in (held, rounded))
    for seed, record in enumerate(found):
        for name, value in record.items():
            assert torch.equal(value, expected[seed][name]), name
    batch = collate(tiny.family, found)
    noisy = batch.fields[tiny.family.latents_field].float().requires_grad_()
    sigma = torch.full((len(PROMPTS),), 0.5)
    velocities = [tiny.family.predict_velocity({"dit": parts["dit"]}, batch, noisy, sigma) for parts in (held, rounded)]
    gradients = [torch.autograd.grad(velocity.square().mean(), noisy)[0] for velocity in velocities]
    assert torch.equal(*velocities)
    assert torch.equal(*gradients)


def test_units_form_a_graph_over_the_metadata_columns(tiny):
    known = {"prompt", *media_columns(units_of(tiny.family.units))}
    for unit in units_of(tiny.family.units):
        assert set(unit.inputs) <= known
        assert unit.component is None or unit.component in tiny.family.components
        assert json.loads(json.dumps(unit.recipe)) == unit.recipe
        written = {spec.name for spec in unit.outputs}
        assert not written & known, "field names are unique"
        known |= written
    assert tiny.family.latents_field in known


def test_units_yield_the_declared_fields(tiny):
    for record in tiny.records:
        specs = [spec for unit in units_of(tiny.family.units) for spec in unit.outputs]
        assert set(record) == {spec.name for spec in specs}
        for spec in specs:
            value = record[spec.name]
            assert value.ndim == len(spec.dims)
            assert not value.requires_grad
            assert bool(value.to(getattr(torch, spec.dtype)).isfinite().all())
    for name in ragged_fields(tiny.family):
        assert len({len(record[name]) for record in tiny.records}) > 1


def test_units_have_nothing_to_note_on_ordinary_samples(tiny):
    fields = tiny.records[1]
    values = {**sample_values(units_of(tiny.family.units), PROMPTS[1], 1, tiny.family.size_multiple), **fields}
    for unit in units_of(tiny.family.units):
        if unit.note is not None:
            assert unit.note(tiny.components, {name: values[name] for name in unit.inputs}) is None


def test_a_record_does_not_depend_on_what_was_encoded_before(tiny):
    for seed in (2, 0):
        again = encode(tiny.family, tiny.components, seed)
        for name, value in again.items():
            assert torch.equal(value, tiny.records[seed][name])


@pytest.mark.parametrize("filler", [0.0, 100.0])
def test_a_padded_batch_predicts_what_single_samples_predict(tiny, filler):
    generator = torch.Generator().manual_seed(0)
    batch = collate(tiny.family, tiny.records, filler)
    noisy = torch.randn(batch.fields[tiny.family.latents_field].shape, generator=generator)
    sigma = torch.tensor([0.1, 0.5, 1.0])
    velocity = predict(tiny, batch, noisy, sigma)
    assert velocity.shape == noisy.shape
    assert float(velocity.std()) > 0.01
    for i, record in enumerate(tiny.records):
        single = predict(tiny, collate(tiny.family, [record]), noisy[i : i + 1], sigma[i : i + 1])
        torch.testing.assert_close(velocity[i : i + 1], single, rtol=0, atol=2e-6)


def test_the_prediction_depends_on_every_input(tiny):
    noisy = torch.randn(tiny.records[0][tiny.family.latents_field].shape, generator=torch.Generator().manual_seed(0))[
        None
    ]
    sigma = torch.tensor([0.5])
    batch = collate(tiny.family, tiny.records[:1])
    base = predict(tiny, batch, noisy, sigma)
    assert not torch.equal(predict(tiny, batch, noisy, sigma + 0.1), base)
    assert not torch.equal(predict(tiny, batch, noisy * 1.1, sigma), base)
    numbers = {name for name, value in batch.fields.items() if value.is_floating_point()}
    for name in numbers - {tiny.family.latents_field}:
        changed = dataclasses.replace(batch, fields={**batch.fields, name: batch.fields[name] + 1})
        assert not torch.equal(predict(tiny, changed, noisy, sigma), base), name


def test_the_number_of_tokens_is_what_the_denoiser_sees(tiny):
    """Larger latents lengthen the sequences that run through its linear layers by as many tokens."""
    lengths = []
    hooks = [
        module.register_forward_hook(lambda _module, _args, output: lengths.append(output.shape[1]))
        for module in tiny.components["dit"].modules()
        if isinstance(module, torch.nn.Linear)
    ]
    batch = collate(tiny.family, tiny.records[1:2])
    counts, seen = [], []
    for size in ((16, 16), (16, 32)):  # their tokens are multiples of 32, to which Z-Image pads them
        noisy = torch.zeros(1, *tiny.records[1][tiny.family.latents_field].shape[:-2], *size)
        lengths.clear()
        predict(tiny, batch, noisy, torch.tensor([0.5]))
        seen.append(list(lengths))
        counts.append(tiny.family.num_tokens(noisy.shape))
        assert counts[-1] == tiny.family.num_tokens(noisy.shape[1:])
    for hook in hooks:
        hook.remove()
    growth = [longer - shorter for shorter, longer in zip(*seen, strict=True)]
    assert growth.count(counts[1] - counts[0]) > len(growth) / 4


def test_blocks_put_out_the_tokens_of_the_latents_as_maps(tiny):
    """After the last block each token is on its own: changed at one place of the map, the velocity is changed there."""
    family, dit = tiny.family, tiny.components["dit"]
    batch = collate(family, tiny.records)
    noisy = torch.randn(batch.fields[family.latents_field].shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((len(noisy),), 0.5)
    all_blocks = [block for block, _ in blocks(dit, family.blocks)]
    indices = range(len(all_blocks))
    with feature_maps(family, dit, indices, noisy) as maps:
        before = predict(tiny, batch, noisy, sigma)
    assert len(maps) == len(all_blocks)
    count, width, num_frames, rows, columns = maps[0].shape
    assert {tuple(features.shape) for features in maps} == {tuple(maps[0].shape)}
    assert (count, num_frames * rows * columns) == (len(noisy), family.num_tokens(noisy.shape))
    assert width == feature_width(dit, family)
    place = (num_frames - 1, rows - 1, columns // 2)
    with feature_maps(family, dit, indices, noisy) as maps, contextlib.ExitStack() as stack:

        def change(*_):
            maps[-1][:, 0, *place].add_(10)  # a map is a view of what the block puts out

        stack.callback(all_blocks[-1].register_forward_hook(change).remove)
        after = predict(tiny, batch, noisy, sigma)
    patches = (after - before).abs().reshape(count, -1, num_frames, rows, noisy.shape[-2] // rows, noisy.shape[-1])
    changed = patches.unflatten(-1, (columns, -1)).amax(dim=(0, 1, 4, 6)) > 0
    assert changed.nonzero().tolist() == [list(place)]


def test_gradients_reach_the_denoiser(tiny):
    dit = tiny.family.components["dit"].load(component_files(tiny.family, tiny.repo, "dit"), torch.float32, CPU)
    dit.requires_grad_(True)
    batch = collate(tiny.family, tiny.records)
    noisy = batch.fields[tiny.family.latents_field]
    tiny.family.predict_velocity(
        {"dit": dit}, batch, noisy, torch.full((len(PROMPTS),), 0.5)
    ).square().mean().backward()
    grads = [parameter.grad for parameter in dit.parameters() if parameter.grad is not None]
    assert any(float(grad.abs().max()) > 0 for grad in grads)
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_an_offloaded_denoiser_computes_with_copies_alone(tiny):
    batch = collate(tiny.family, tiny.records)
    noisy = batch.fields[tiny.family.latents_field].float()
    results = []
    for offloaded in (False, True):
        dit = tiny.family.components["dit"].load(component_files(tiny.family, tiny.repo, "dit"), torch.float32, CPU)
        dit.requires_grad_(True)
        dit.train().enable_gradient_checkpointing()
        if offloaded:
            offload_weights(dit, CPU, split_threshold=None, offload_trained=True)
        with Watch() as watch:
            watch.homes_of(dit)
            velocity = tiny.family.predict_velocity({"dit": dit}, batch, noisy, torch.full((len(PROMPTS),), 0.5))
            velocity.square().mean().backward()
        results.append((velocity, {name: parameter.grad for name, parameter in dit.named_parameters()}))
    assert watch.num_trained
    assert not watch.trained_used | watch.frozen_used
    (velocity, gradients), (other, others) = results
    assert torch.equal(velocity, other)
    for name, gradient in gradients.items():
        assert (gradient is None) is (others[name] is None), name
        assert gradient is None or torch.equal(gradient, others[name]), name


def test_the_default_lora_targets_are_linear_layers_of_the_blocks(tiny):
    layers = target_layers(tiny.components["dit"], tiny.family.lora_target_modules)
    assert len(layers) > 4
    assert all(re.search(r"\.\d+\.", layer) for layer in layers)


def test_a_trained_lora_gives_the_same_loss_in_a_fresh_pipeline(tiny, tmp_path):
    import diffusers

    batch = collate(tiny.family, tiny.records)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(batch.fields[tiny.family.latents_field].shape, generator=generator)
    settings = LoraSettings(targets=tiny.family.lora_target_modules, rank=2, alpha=4.0)

    def loss(dit):
        velocity = tiny.family.predict_velocity({"dit": dit}, batch, noisy, torch.tensor([0.1, 0.5, 1.0]))
        return (velocity - noisy).square().mean()

    trained, fresh = (
        tiny.family.components["dit"].load(component_files(tiny.family, tiny.repo, "dit"), torch.float32, CPU)
        for _ in range(2)
    )
    before = loss(fresh).item()
    add_lora(trained, settings, seed=0)
    parameters = lora_parameters(trained)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for _ in range(3):
        loss(trained).backward()
        optimizer.step()
        optimizer.zero_grad()
    family = tiny.family
    tensors, metadata = export_lora(
        {name: parameter.detach() for name, parameter in parameters.items()},
        settings,
        "diffusers",
        prefix=family.lora_prefix,
        architecture=family.architecture,
    )
    save_file(tensors, tmp_path / "lora.safetensors", metadata)

    class_name = json.loads((tiny.repo / "model_index.json").read_text())["_class_name"]
    if pipeline_class := getattr(diffusers, class_name, None):
        names = inspect.signature(pipeline_class).parameters.values()
        others = {name.name: None for name in names if name.default is inspect.Parameter.empty}
        pipeline_class(**{**others, "transformer": fresh}).load_lora_weights(tmp_path / "lora.safetensors")
    else:  # diffusers lacks the pipeline: by what its pipelines call
        fresh.load_lora_adapter(tmp_path / "lora.safetensors", prefix=family.lora_prefix, use_safetensors=True)
    with torch.no_grad():
        assert loss(fresh).item() == loss(trained).item() < before


def test_schedule_falls_from_one_to_its_declared_end(tiny):
    schedule = tiny.family.schedule
    sigmas = sigma_grid(schedule)
    assert len(sigmas) == schedule.num_steps
    assert sigmas[0] == 1
    assert bool((sigmas.diff() < 0).all())
    if schedule.terminal is None:
        assert 0 < float(sigmas[-1]) < 0.05
    else:
        assert float(sigmas[-1]) == pytest.approx(schedule.terminal, abs=1e-7)


def test_fields_of_this_denoiser_are_accepted(tiny):
    tiny.family.check_fields(tiny.dit_config, tiny.shapes)


def test_fields_of_another_model_are_refused_in_one_line(tiny):
    channel_axes = {
        spec.name: spec.dims[spec.ragged :].index("channel")
        for unit in units_of(tiny.family.units)
        for spec in unit.outputs
        if "channel" in spec.dims
    }
    assert tiny.family.latents_field in channel_axes
    for name, axis in channel_axes.items():
        shape = list(tiny.shapes[name])
        shape[axis] *= 2
        with pytest.raises(CacheMismatch, match=f"{name}.*{shape[axis]}") as caught:
            tiny.family.check_fields(tiny.dit_config, {**tiny.shapes, name: tuple(shape)})
        assert "\n" not in str(caught.value)
