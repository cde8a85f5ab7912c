"""Ascend's fused operators against the models' own; here they are their documented formulas in plain torch."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from family_samples import load_components
from small_trainings import write_cache

from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import Batch, load_family
from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.families.z_image import PLUGIN, encode_text
from diffsynth_pipe.stages.plan import check_switches
from diffsynth_pipe.stages.train import train

RUN = {"dataset_base_path": "photos", "family": "z_image", "enable_npu_patch": True, "trainable_models": "dit"}


def npu_rms_norm(self, gamma, epsilon=1e-6):
    """Normalise as https://www.hiascend.com/document/detail/zh/Pytorch has it; gamma must have the input's dtype."""
    assert self.dtype == gamma.dtype
    rstd = torch.rsqrt(self.float().square().mean(-1, keepdim=True) + epsilon)
    return (self.float() * rstd * gamma.float()).to(self.dtype), rstd


def npu_rotary_mul(input, r1, r2, rotary_mode="half"):
    """Rotate as the same pages have it: [B, S, N, D] by [B, S, 1, D]."""
    assert rotary_mode == "interleave"
    assert input.ndim == r1.ndim == r2.ndim == 4
    assert input.dtype == r1.dtype == r2.dtype
    assert r1.shape == r2.shape == (input.shape[0], input.shape[1], 1, input.shape[3])
    turned = torch.stack((-input[..., 1::2], input[..., ::2]), dim=-1).flatten(-2)
    return r1 * input + r2 * turned


@pytest.fixture
def calls(monkeypatch):
    """Installs ``torch_npu``; the names of the operators as they are called."""
    called = []
    module = ModuleType("torch_npu")
    module.__spec__ = ModuleSpec("torch_npu", None)
    for operator in (npu_rms_norm, npu_rotary_mul):

        def counted(*args, operator=operator, **kwargs):
            called.append(operator.__name__)
            return operator(*args, **kwargs)

        setattr(module, operator.__name__, counted)
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    return called


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "Z-Image"
    PLUGIN.write_tiny(folder)
    return folder


def velocity_and_gradients(dit, dtype):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 16, 8, 8, generator=generator).to(dtype)
    batch = Batch(
        fields={"latents": noisy, "prompt_emb": torch.randn(1, 7, 64, generator=generator).to(dtype)},
        lengths={"prompt_emb": torch.tensor([7])},
        sample_ids=("0" * 32,),
        visits=(0,),
    )
    dit.requires_grad_(True).zero_grad()
    velocity = PLUGIN.predict_velocity({"dit": dit}, batch, noisy, torch.tensor([0.5], dtype=dtype))
    velocity.float().square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in dit.named_parameters() if parameter.grad is not None}
    return velocity.detach(), gradients


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 1e-4, 1e-6), (torch.bfloat16, 0.05, 0.02)])
def test_the_denoiser_calls_the_operators_and_gives_the_same_values(repo, calls, monkeypatch, dtype, rtol, atol):
    dit = load_components(PLUGIN, repo, dtype)["dit"]
    velocity, gradients = velocity_and_gradients(dit, dtype)
    assert not calls
    # As where torch_npu is installed, which is found out when diffusers is imported.
    monkeypatch.setattr("diffusers.models.normalization.is_torch_npu_available", lambda: True)
    PLUGIN.components["dit"].switches["enable_npu_patch"](dit)
    patched, patched_gradients = velocity_and_gradients(dit, dtype)
    num_attentions = len(dit.layers) + len(dit.noise_refiner) + len(dit.context_refiner)
    assert calls.count("npu_rotary_mul") == 2 * num_attentions
    assert calls.count("npu_rms_norm") == 6 * num_attentions + 1
    torch.testing.assert_close(patched, velocity, rtol=rtol, atol=atol)
    assert patched_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(patched_gradients[name], gradient, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_text_encoder_calls_the_operator_and_gives_the_same_values(repo, calls, dtype):
    components = load_components(PLUGIN, repo, dtype)
    model = components["text_encoder"].model
    with torch.no_grad():
        expected = encode_text(components, {"prompt": "a red cat"})["prompt_emb"]
        assert not calls
        PLUGIN.components["text_encoder"].switches["enable_npu_patch"](model)
        found = encode_text(components, {"prompt": "a red cat"})["prompt_emb"]
    num_norms = sum(type(module).__name__ == "Qwen3RMSNorm" for module in model.modules())
    assert calls == ["npu_rms_norm"] * num_norms
    torch.testing.assert_close(found, expected, rtol=0.05 if dtype is torch.bfloat16 else 1e-5, atol=1e-2)


def test_the_train_stage_calls_the_operators(repo, calls, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.npu", SimpleNamespace(is_available=lambda: False), raising=False)  # for accelerate
    run = {
        "task": "sft:train",
        "family": "z_image",
        "dataset_base_path": str(write_cache(tmp_path / "cache", {"64x64": ((8, 8), (5, 9))}, "z_image")),
        "model_paths": [str(repo / "transformer" / "diffusion_pytorch_model.safetensors")],
        "lora_base_model": "dit",
        "lora_rank": 4,
        "num_validation_samples": 0,
    }
    losses = []
    for patched in (False, True):
        config = load_config(None, run | {"enable_npu_patch": patched, "output_path": str(tmp_path / str(patched))})
        lines = (train(config).path / "metrics.jsonl").read_text().splitlines()
        losses.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
        assert bool(calls) is patched
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_family_without_such_operators_is_refused(calls):
    check_switches(load_config(None, RUN), PLUGIN)
    with pytest.raises(ConfigError, match=r"^enable_npu_patch: family 'flux' has no such switch; leave it out"):
        check_switches(load_config(None, RUN | {"family": "flux"}), load_family("flux"))


def test_without_torch_npu_it_says_what_to_install():
    with pytest.raises(ConfigError) as error:
        check_switches(load_config(None, RUN), PLUGIN)
    assert str(error.value).startswith("enable_npu_patch: torch_npu is not installed")
    assert "\n" not in str(error.value)
