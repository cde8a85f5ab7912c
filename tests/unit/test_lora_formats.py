"""Every format of a LoRA file, loaded by diffusers, by peft and by ComfyUI's rule, against the trained object."""

import json
import math

import pytest
import torch
from safetensors import safe_open

from diffsynth_pipe.contracts import ComponentFiles
from diffsynth_pipe.families.qwen_image import PLUGIN
from diffsynth_pipe.training.checkpoints import write_lora
from diffsynth_pipe.training.lora import LoraSettings, add_lora, fuse_lora, load_lora, lora_parameters
from diffsynth_pipe.training.lora_file import export_lora, read_lora

TARGETS = PLUGIN.lora_target_modules
PLAIN = {"targets": TARGETS, "rank": 4, "alpha": 4.0}
KINDS = {
    "plain": {},
    "alpha": {"alpha": 6.0, "dropout": 0.5},
    "rslora": {"alpha": 3.0, "use_rslora": True},
    "pattern": {"targets": r"transformer_blocks\.1\..*(to_q|to_out\.0|mlp\.net\.2)", "alpha": 2.0},
    "dora": {"alpha": 6.0, "use_dora": True},
}
FORMATS = ("diffusers", "diffsynth", "comfyui")
COMBINATIONS = [(kind, name) for kind in KINDS for name in FORMATS if kind != "dora" or name == "diffusers"]


def load_dit(tiny_repo):
    folder = tiny_repo / "transformer"
    files = ComponentFiles(weights=tuple(folder.glob("*.safetensors")), folder=folder)
    return PLUGIN.components["dit"].load(files, torch.float32, torch.device("cpu"))


@torch.no_grad()
def output(dit):
    generator = torch.Generator().manual_seed(0)
    return dit.eval()(
        hidden_states=torch.randn(1, 16, 64, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 64, generator=generator),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 4, 4)]],
        return_dict=False,
    )[0]


def trained(tiny_repo, settings):
    """Return a denoiser with a LoRA that changes its output by about a tenth."""
    dit = load_dit(tiny_repo)
    add_lora(dit, settings, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora_parameters(dit).items():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise * (parameter if "magnitude" in name else 1))
    return dit


def export(dit, settings, lora_format):
    tensors = {name: parameter.detach() for name, parameter in lora_parameters(dit).items()}
    return export_lora(tensors, settings, lora_format, prefix="transformer", architecture="Qwen-Image")


@pytest.fixture(scope="module")
def saved(tiny_repo, tmp_path_factory):
    """Return path, settings and output of the trained object for a kind of LoRA and a format."""
    folder, made = tmp_path_factory.mktemp("loras"), {}

    def save(kind, lora_format):
        if (kind, lora_format) not in made:
            settings = LoraSettings(**PLAIN | KINDS[kind])
            dit = trained(tiny_repo, settings)
            path = folder / f"{kind}-{lora_format}.safetensors"
            write_lora(path, *export(dit, settings, lora_format), {"step": 1})
            made[kind, lora_format] = path, settings, output(dit)
        return made[kind, lora_format]

    return save


@pytest.fixture(scope="module")
def base_output(tiny_repo):
    return output(load_dit(tiny_repo))


def load_pipeline(tiny_repo):
    from diffusers import QwenImagePipeline

    return QwenImagePipeline.from_pretrained(tiny_repo, vae=None, text_encoder=None, dtype=torch.float32)


def assert_same(mine, expected, base_output):
    """Compare with a tolerance that is far below what the LoRA changes."""
    assert (expected - base_output).abs().max() > 0.02
    torch.testing.assert_close(mine, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("kind", "lora_format"), COMBINATIONS)
def test_diffusers_loads_it_as_it_is(tiny_repo, saved, base_output, kind, lora_format):
    path, settings, expected = saved(kind, lora_format)
    pipeline = load_pipeline(tiny_repo)
    pipeline.load_lora_weights(path)
    assert_same(output(pipeline.transformer), expected, base_output)
    config = pipeline.transformer.peft_config["default_0"]
    if lora_format == "diffusers":
        assert (config.r, config.lora_alpha) == (settings.rank, settings.alpha)
        assert (config.use_rslora, config.use_dora) == (settings.use_rslora, settings.use_dora)


@pytest.mark.parametrize("kind", ["plain", "alpha", "rslora", "pattern"])
def test_the_references_way_of_loading_its_format(tiny_repo, saved, base_output, kind):
    """It adds a LoRA with alpha = rank through peft and loads the keys as they are, or adds B·A to the weights."""
    from peft import LoraConfig, inject_adapter_in_model

    path, settings, expected = saved(kind, "diffsynth")
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert any(key.startswith("transformer_blocks.1.attn.to_q.lora_A.default.weight") for key in tensors)
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    dit = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=targets), load_dit(tiny_repo))
    result = dit.load_state_dict(tensors, strict=False)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    assert_same(output(dit), expected, base_output)

    fused = load_dit(tiny_repo)
    with torch.no_grad():
        for key, down in tensors.items():
            layer, is_down, _ = key.partition(".lora_A.")
            if is_down:
                fused.get_submodule(layer).weight += tensors[key.replace("lora_A", "lora_B")] @ down
    assert_same(output(fused), expected, base_output)


@pytest.mark.parametrize("kind", ["plain", "alpha", "rslora", "pattern"])
def test_comfyuis_way_of_loading_its_format(tiny_repo, saved, base_output, kind):
    """Its map has ``lora_unet_`` and the layer's name with underscores; an alpha is divided by the rank."""
    path, _, expected = saved(kind, "comfyui")
    dit = load_dit(tiny_repo)
    with safe_open(path, framework="pt") as file, torch.no_grad():
        left = set(file.keys())
        for name, module in dit.named_modules():
            key = f"lora_unet_{name.replace('.', '_')}"
            if f"{key}.lora_up.weight" in left:
                up, down, alpha = map(
                    file.get_tensor, names := (f"{key}.lora_up.weight", f"{key}.lora_down.weight", f"{key}.alpha")
                )
                module.weight += alpha.item() / down.shape[0] * up @ down
                left -= set(names)
    assert not left
    assert_same(output(dit), expected, base_output)


def test_diffusers_finds_every_linear_layer_of_the_model_under_comfyuis_name(tiny_repo, tmp_path, base_output):
    settings = LoraSettings(targets=".*", rank=2, alpha=2.0)
    dit = trained(tiny_repo, settings)
    tensors, metadata = export(dit, settings, "comfyui")
    assert len(tensors) == 3 * sum(isinstance(module, torch.nn.Linear) for module in load_dit(tiny_repo).modules())
    write_lora(tmp_path / "all.safetensors", tensors, metadata, {})
    pipeline = load_pipeline(tiny_repo)
    pipeline.load_lora_weights(tmp_path / "all.safetensors")
    assert_same(output(pipeline.transformer), output(dit), base_output)


@pytest.mark.parametrize(("kind", "lora_format"), COMBINATIONS)
def test_a_lora_starts_from_the_file(tiny_repo, saved, base_output, kind, lora_format):
    path, settings, expected = saved(kind, lora_format)
    dit = load_dit(tiny_repo)
    add_lora(dit, settings, 5)
    load_lora(dit, read_lora(path, dit, prefix="transformer", parameter="lora_checkpoint"), settings)
    assert_same(output(dit), expected, base_output)


def test_a_lora_of_another_scale_starts_as_the_same_function(tiny_repo, saved, base_output):
    path, _, expected = saved("rslora", "diffusers")
    settings = LoraSettings(**PLAIN | {"alpha": 1.0})
    dit = load_dit(tiny_repo)
    file = read_lora(path, dit, prefix="transformer", parameter="lora_checkpoint")
    add_lora(dit, settings, 5)
    load_lora(dit, file, settings)
    assert_same(output(dit), expected, base_output)


def test_the_own_format_keeps_every_bit(tiny_repo, saved):
    path, settings, _ = saved("alpha", "diffusers")
    dit = load_dit(tiny_repo)
    add_lora(dit, settings, 5)
    load_lora(dit, read_lora(path, dit, prefix="transformer", parameter="lora_checkpoint"), settings)
    tensors, _ = export(dit, settings, "diffusers")
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        for key, tensor in tensors.items():
            assert torch.equal(file.get_tensor(key), tensor)


@pytest.mark.parametrize(("kind", "lora_format"), COMBINATIONS)
def test_fused_weights_are_those_of_diffusers(tiny_repo, saved, kind, lora_format):
    path, _, _ = saved(kind, lora_format)
    dit = load_dit(tiny_repo)
    fuse_lora(dit, read_lora(path, dit, prefix="transformer", parameter="preset_lora_path"))
    pipeline = load_pipeline(tiny_repo)
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    expected = pipeline.transformer.state_dict()
    changed = 0
    for name, weight in dit.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
        changed += not torch.equal(weight, load_dit_state(tiny_repo)[name])
    assert changed >= 4


_STATE = {}


def load_dit_state(tiny_repo):
    if not _STATE:
        _STATE.update(load_dit(tiny_repo).state_dict())
    return _STATE


@pytest.mark.parametrize("start", ["", "diffusion_model.", "transformer."])
def test_other_tools_prefixes_are_read(tiny_repo, tmp_path, start):
    """Files in the wild have peft's or kohya's part names below any of these."""
    dit = load_dit(tiny_repo)
    layer = "transformer_blocks.0.attn.to_q"
    tensors = {
        f"{start}{layer}.lora_down.weight": torch.full((2, 128), 0.5),
        f"{start}{layer}.lora_up.weight": torch.ones(128, 2),
        f"{start}{layer}.alpha": torch.tensor(8.0),
    }
    write_lora(tmp_path / "file.safetensors", tensors, {}, {})
    file = read_lora(tmp_path / "file.safetensors", dit, prefix="transformer", parameter="preset_lora_path")
    before = dit.get_submodule(layer).weight.detach().clone()
    fuse_lora(dit, file)
    torch.testing.assert_close(dit.get_submodule(layer).weight - before, torch.full((128, 128), 4.0))


def test_pefts_patterns_of_ranks_and_alphas_are_honoured(tiny_repo, tmp_path):
    """diffusers saves them for a LoRA whose layers differ."""
    from diffusers import QwenImagePipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    dit = load_dit(tiny_repo)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_k"], rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 3},
        init_lora_weights=False,
    )  # fmt: skip
    dit.add_adapter(config)
    QwenImagePipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(dit), **_collate_lora_metadata({"transformer": dit})
    )
    file = read_lora(
        tmp_path / "pytorch_lora_weights.safetensors", dit, prefix="transformer", parameter="preset_lora_path"
    )
    assert {update.scale for name, update in file.updates.items() if name.endswith("to_q")} == {2.0}
    assert {update.scale for name, update in file.updates.items() if name.endswith("to_k")} == {1.5}
    fused = load_dit(tiny_repo)
    fuse_lora(fused, file)
    torch.testing.assert_close(output(fused), output(dit), rtol=0, atol=2e-5)


def test_metadata(saved):
    path, _, _ = saved("rslora", "diffusers")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["lora_adapter_metadata"]) == {
        "transformer.r": 4,
        "transformer.lora_alpha": 3.0,
        "transformer.target_modules": sorted(TARGETS),
        "transformer.use_rslora": True,
    }
    assert json.loads(metadata["diffsynth_pipe"]) == {"step": 1}
    assert {key: value for key, value in metadata.items() if key.startswith("modelspec.")} == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "Qwen-Image/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "Qwen-Image LoRA of rank 4",
    }


@pytest.mark.parametrize("lora_format", ["diffsynth", "comfyui"])
def test_no_format_tells_the_scale_twice(saved, lora_format):
    """diffusers applies alpha of the metadata on top of what it finds in the tensors."""
    path, settings, _ = saved("rslora", lora_format)
    with safe_open(path, framework="pt") as file:
        assert "lora_adapter_metadata" not in file.metadata()
        alphas = [file.get_tensor(key).item() for key in file.keys() if key.endswith(".alpha")]  # noqa: SIM118
    assert len(alphas) == (24 if lora_format == "comfyui" else 0)
    for alpha in alphas:
        assert math.isclose(alpha / settings.rank, 3 / 2, rel_tol=1e-6)
