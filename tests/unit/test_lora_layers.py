"""LoRA files whose layers are not diffusers': loaded by its own converters, and read back."""

import inspect
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import ComponentFiles, load_family
from diffsynth_pipe.errors import ConfigError, ModelError
from diffsynth_pipe.stages.plan import check_switches
from diffsynth_pipe.training.lora import (
    LoraSettings,
    add_lora,
    fuse_lora,
    linear_layers,
    load_lora,
    lora_parameters,
    target_layers,
)
from diffsynth_pipe.training.lora_file import check_layers, export_lora, file_layers, read_lora

FAMILIES = ["flux", "flux2", "wan", "wan_ti2v", "z_image"]
RANK, ALPHA = 2, 3.0
# diffusers splits linear1 of FLUX.1's single blocks at the width of the published model alone: a test of its own
TARGETS = {"flux": r"transformer_blocks\..*|single_transformer_blocks\.\d+\.(norm\.linear|proj_out)"}


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    """Return the folder of a family's tiny repository."""
    folder = tmp_path_factory.mktemp("models")

    def repo(name):
        if not (folder / name).exists():
            load_family(name).write_tiny(folder / name)
        return folder / name

    return repo


def load_dit(repo):
    folder = repo / "transformer"
    files = ComponentFiles(weights=tuple(folder.glob("*.safetensors")), folder=folder)
    return load_family(repo.name).components["dit"].load(files, torch.float32, torch.device("cpu"))


def trained(repo, targets=None):
    """Return a denoiser whose LoRA is far from zero, and its settings."""
    targets = targets or TARGETS.get(repo.name, load_family(repo.name).lora_target_modules)
    settings = LoraSettings(targets=targets, rank=RANK, alpha=ALPHA)
    dit = load_dit(repo)
    add_lora(dit, settings, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(dit).values():
            parameter.normal_(std=0.1, generator=generator)
    return dit, settings


def write(path, dit, settings, family, lora_format):
    layers = file_layers(dit, load_family(family).components["dit"].lora_layers[lora_format])
    check_layers(lora_parameters(dit), layers, lora_format)
    weights = {name: parameter.detach() for name, parameter in lora_parameters(dit).items()}
    tensors, metadata = export_lora(
        weights, settings, lora_format, prefix="transformer", architecture=family, layers=layers
    )
    save_file(tensors, path, metadata)
    return tensors


def deltas(dit):
    """Return what a LoRA adds to each weight: alpha / rank · B · A."""
    weights = lora_parameters(dit)
    names = [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]
    return {
        name: (ALPHA / RANK * weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]).detach()
        for name in names
    }


def pipeline_with(repo, dit):
    import diffusers

    pipeline_class = getattr(diffusers, json.loads((repo / "model_index.json").read_text())["_class_name"])
    parameters = inspect.signature(pipeline_class).parameters.values()
    others = {entry.name: None for entry in parameters if entry.default is inspect.Parameter.empty}
    return pipeline_class(**{**others, "transformer": dit})


def fused_by_diffusers(repo, path):
    pipeline = pipeline_with(repo, load_dit(repo))
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline.transformer.state_dict()


def assert_trained(weights, repo, dit):
    """Every weight is the base's and what the LoRA adds to it."""
    added = deltas(dit)
    assert len(added) > 4
    for name, weight in load_dit(repo).state_dict().items():
        expected = weight + added.pop(name.removesuffix(".weight"), 0)
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-6)
    assert not added


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_the_names_that_comfyui_knows(repos, tmp_path, family):
    repo = repos(family)
    dit, settings = trained(repo)
    tensors = write(tmp_path / "lora.safetensors", dit, settings, family, "comfyui")
    assert all(name.startswith("lora_unet_") for name in tensors)
    assert_trained(fused_by_diffusers(repo, tmp_path / "lora.safetensors"), repo, dit)


def test_flux_predicts_the_same_with_the_file_under_kohyas_names(repos, tmp_path):
    repo = repos("flux")
    dit, settings = trained(repo)
    write(tmp_path / "lora.safetensors", dit, settings, "flux", "comfyui")
    pipeline = pipeline_with(repo, load_dit(repo))

    @torch.no_grad()
    def prediction(dit):
        generator = torch.Generator().manual_seed(0)
        return dit(
            hidden_states=torch.randn(1, 6, 64, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, 64, generator=generator),
            pooled_projections=torch.randn(1, 32, generator=generator),
            timestep=torch.tensor([0.5]),
            guidance=torch.ones(1),
            img_ids=torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(3)),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]

    before = prediction(pipeline.transformer)
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    after = prediction(pipeline.transformer)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, prediction(dit), rtol=0, atol=1e-5)


def test_diffusers_splits_flux_at_its_published_width_into_the_trained_layers(tmp_path):
    """Its rule for linear1 needs 3072 channels, which a model without memory has."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    family = load_family("flux")
    with torch.device("meta"):
        dit = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    linear, weights = linear_layers(dit), {}
    for name in target_layers(dit, family.lora_target_modules):
        weights[f"{name}.lora_A.weight"] = torch.randn(RANK, linear[name].in_features)
        weights[f"{name}.lora_B.weight"] = torch.randn(linear[name].out_features, RANK)
    layers = file_layers(dit, family.components["dit"].lora_layers["comfyui"])
    settings = LoraSettings(targets=family.lora_target_modules, rank=RANK, alpha=ALPHA)
    tensors, _ = export_lora(weights, settings, "comfyui", prefix="transformer", architecture="flux", layers=layers)
    save_file(tensors, tmp_path / "lora.safetensors")
    loaded = FluxPipeline.lora_state_dict(tmp_path / "lora.safetensors")
    assert loaded.keys() == {f"transformer.{name}" for name in weights}
    for name, weight in weights.items():
        scale = ALPHA / RANK if "lora_A" in name else 1
        torch.testing.assert_close(loaded[f"transformer.{name}"], weight * scale)


@pytest.mark.parametrize("lora_format", ["comfyui", "diffsynth"])
def test_a_stacked_layer_adds_what_its_layers_add_and_nothing_elsewhere(repos, tmp_path, lora_format):
    """The rows of linear1 are q, k, v and the MLP's, as in the code of Black Forest Labs; here q and v have no LoRA."""
    dit, settings = trained(repos("flux"), (*("attn.to_k", "proj_mlp", "to_q"), "single_transformer_blocks.0.proj_out"))
    tensors = write(tmp_path / "lora.safetensors", dit, settings, "flux", lora_format)
    layer = {"comfyui": "lora_unet_single_blocks_1_linear1", "diffsynth": "single_blocks.1.to_qkv_mlp"}[lora_format]
    if lora_format == "comfyui":
        down, up, alpha = (tensors[f"{layer}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        delta = alpha / len(down) * up @ down
    else:
        down, up = (tensors[f"{layer}.lora_{part}.default.weight"] for part in "AB")
        delta = up @ down
    assert down.shape == (4 * RANK, 128)
    added, block = deltas(dit), "single_transformer_blocks.1"
    rows = [added[f"{block}.{name}"] for name in ("attn.to_q", "attn.to_k")]
    rows += [torch.zeros(128, 128), added[f"{block}.proj_mlp"]]
    torch.testing.assert_close(delta, torch.cat(rows), rtol=0, atol=1e-6)
    assert sum("linear2" in name or "proj_out" in name for name in tensors) in (2, 3)


def test_the_references_names_of_flux_are_those_that_it_renames_to_kohyas(repos, tmp_path):
    """By the table of its ``align_to_opensource_format``."""
    dit, settings = trained(repos("flux"), load_family("flux").lora_target_modules)
    mine, kohya = (write(tmp_path / name, dit, settings, "flux", name) for name in ("diffsynth", "comfyui"))
    table = {
        "norm.linear": "modulation_lin", "to_qkv_mlp": "linear1", "proj_out": "linear2",
        "norm1_a.linear": "img_mod_lin", "norm1_b.linear": "txt_mod_lin",
        "attn.a_to_qkv": "img_attn_qkv", "attn.b_to_qkv": "txt_attn_qkv",
        "attn.a_to_out": "img_attn_proj", "attn.b_to_out": "txt_attn_proj",
        "ff_a.0": "img_mlp_0", "ff_a.2": "img_mlp_2", "ff_b.0": "txt_mlp_0", "ff_b.2": "txt_mlp_2",
    }  # fmt: skip
    for name, tensor in mine.items():
        blocks, number, rest = name.removesuffix(".default.weight").split(".", 2)
        layer, part = rest.rsplit(".", 1)
        kind = "single" if blocks == "single_blocks" else "double"
        key = f"lora_unet_{kind}_blocks_{number}_{table[layer]}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"
        torch.testing.assert_close(tensor, kohya[key] * (ALPHA / RANK if part == "lora_B" else 1))
    assert len(mine) == len(kohya) * 2 // 3


def test_the_references_names_of_wan_are_the_original_ones(repos, tmp_path):
    """Those that diffusers knows behind ``diffusion_model.``."""
    repo = repos("wan")
    dit, settings = trained(repo)
    tensors = write(tmp_path / "lora.safetensors", dit, settings, "wan", "diffsynth")
    assert "blocks.0.self_attn.q.lora_A.default.weight" in tensors
    named = {f"diffusion_model.{name.replace('.default', '')}": tensor for name, tensor in tensors.items()}
    save_file(named, tmp_path / "named.safetensors")
    assert_trained(fused_by_diffusers(repo, tmp_path / "named.safetensors"), repo, dit)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora_format", ["comfyui", "diffsynth"])
def test_a_lora_starts_from_the_file(repos, tmp_path, family, lora_format):
    """Also where a stacked layer has a LoRA on one of its parts alone."""
    repo, path = repos(family), tmp_path / "lora.safetensors"
    tables = load_family(family).components["dit"].lora_layers.values()
    for targets in (load_family(family).lora_target_modules, ("to_v",)):
        dit, settings = trained(repo, targets)
        write(path, dit, settings, family, lora_format)
        other = load_dit(repo)
        add_lora(other, settings, 5)
        file = read_lora(path, other, prefix="transformer", parameter="lora_checkpoint", tables=tables)
        load_lora(other, file, settings)
        expected = deltas(dit)
        assert file.updates.keys() == expected.keys()
        for name, delta in deltas(other).items():
            torch.testing.assert_close(delta, expected[name], rtol=0, atol=1e-6)


def test_a_file_that_was_trained_on_stacked_layers_is_fused_by_rows(repos, tmp_path):
    """As kohya trains them: one A for q, k and v, and a B without zeros."""
    repo, generator = repos("flux2"), torch.Generator().manual_seed(2)
    down, up = (torch.randn(shape, generator=generator) for shape in ((6, 128), (384, 6)))
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "lora.safetensors")
    dit = load_dit(repo)
    tables = load_family("flux2").components["dit"].lora_layers.values()
    path = tmp_path / "lora.safetensors"
    fuse_lora(dit, read_lora(path, dit, prefix="transformer", parameter="preset_lora_path", tables=tables))
    expected = fused_by_diffusers(repo, path)
    base = load_dit(repo).state_dict()
    for name, weight in dit.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)
        assert torch.equal(weight, base[name]) != (
            "blocks.0.attn.to_" in name and name[-8] in "qkv" and "single" not in name
        )


def test_a_layer_without_a_name_is_refused_and_a_layer_named_twice_too(repos, tmp_path):
    dit, settings = trained(repos("flux"), ("norm_out.linear", "to_q"))
    message = (
        "^lora_target_modules: 'norm_out.linear' has no name in LoRA files of comfyui; leave it out, or set "
        "lora_format to diffusers$"
    )
    path = tmp_path / "lora.safetensors"
    with pytest.raises(ModelError, match=message):
        write(path, dit, settings, "flux", "comfyui")

    dit, settings = trained(repos("flux"), ("transformer_blocks.0.attn.to_q",))
    tensors = write(path, dit, settings, "flux", "comfyui") | write(path, dit, settings, "flux", "diffusers")
    save_file(tensors, path)
    tables = load_family("flux").components["dit"].lora_layers.values()
    with pytest.raises(ModelError, match=r"lora_checkpoint: .*to_q.* and .*img_attn_qkv.* are for the same layer"):
        read_lora(path, dit, prefix="transformer", parameter="lora_checkpoint", tables=tables)


def test_a_format_that_a_family_does_not_write_is_refused():
    family = load_family("flux")
    dit = replace(family.components["dit"], lora_layers={"diffusers": {}})
    run = {"dataset_base_path": "data", "family": "flux", "lora_base_model": "dit"}
    for changes in ({"lora_format": "diffsynth"}, {"lora_format": "comfyui"}, {"align_to_opensource_format": True}):
        check_switches(load_config(None, run | changes), family)
        name = changes.get("lora_format", "comfyui")
        message = f"^lora_format: '{name}' has other names .*; take diffusers$"
        with pytest.raises(ConfigError, match=message):
            check_switches(load_config(None, run | changes), SimpleNamespace(components={"dit": dit}, units=()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_but_one_of_flux_has_a_name(repos, family):
    dit = load_dit(repos(family))
    for lora_format, table in load_family(family).components["dit"].lora_layers.items():
        layers = file_layers(dit, table)
        parts = [part for names in layers.values() for part in names]
        assert len(parts) == len(set(parts))
        missing = set(linear_layers(dit)) - set(parts)
        if (family, lora_format) != ("flux", "diffsynth"):
            assert missing == ({"norm_out.linear"} if lora_format == "comfyui" and "flux" in family else set())
