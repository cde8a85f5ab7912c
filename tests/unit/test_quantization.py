"""Linear layers in 4 bits against the formula of their papers, and what comes out against weights rounded by hand."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from tiny_denoisers import load_denoiser, loss_and_gradients, with_lora

from diffsynth_pipe.contracts import Quantization
from diffsynth_pipe.errors import ModelError
from diffsynth_pipe.modeling.quantization import quantize
from diffsynth_pipe.training.lora import LoraSettings, add_lora

CPU = torch.device("cpu")
# QLoRA, arXiv 2305.14314, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
# E2M1 without its second zero, over its largest value; the smallest one is subnormal.
FP4 = (0.0, *(sign * value / 12 for value in (0.0625, 2, 3, 4, 6, 8, 12) for sign in (-1, 1)))


def held_in_4_bits(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@pytest.mark.parametrize(("method", "levels"), [("bitsandbytes_nf4", NF4), ("bitsandbytes_fp4", FP4)])
def test_weights_are_the_nearest_levels_of_their_blocks_of_64(tiny_repo, method, levels):
    model, plain = load_denoiser(tiny_repo), load_denoiser(tiny_repo)
    quantize(model, Quantization(method=method), CPU)
    layer = model.transformer_blocks[0].attn.to_q
    weight = plain.transformer_blocks[0].attn.to_q.weight
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    table = torch.tensor(levels)
    nearest = table[(blocks[..., None] / scales[..., None] - table).abs().argmin(-1)] * scales
    found = dequantize_4bit(layer.weight.data, layer.weight.quant_state).reshape(-1, 64)
    # The scales are rounded to 8 bits themselves.
    torch.testing.assert_close(found, nearest, rtol=0, atol=float(0.02 * scales.max()))
    assert not torch.equal(found, blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_computes_as_weights_that_were_rounded_to_4_bits_and_back(tiny_repo, dtype, checkpointing):
    model, rounded, plain = (load_denoiser(tiny_repo, dtype) for _ in range(3))
    quantize(model, Quantization(method="bitsandbytes_nf4"), CPU)
    held = held_in_4_bits(model)
    assert held.keys() == {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, layer in held.items():
        rounded.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    lora, start = with_lora(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    loss, gradients = loss_and_gradients(model, lora, dtype)
    oracle = loss_and_gradients(rounded, with_lora(rounded)[0], dtype)
    assert loss == oracle[0]
    assert gradients.keys() == oracle[1].keys()
    assert all(torch.equal(gradients[name], oracle[1][name]) for name in gradients)

    lora, plain_start = with_lora(plain)
    full = loss_and_gradients(plain, lora, dtype)[0]
    assert loss != full
    assert loss == pytest.approx(full, rel=5e-2)
    assert all(torch.equal(start[name], plain_start[name]) for name in start)


def test_dora_takes_the_norms_of_the_quantised_weights(tiny_repo):
    model = load_denoiser(tiny_repo)
    quantize(model, Quantization(method="bitsandbytes_nf4"), CPU)
    layer = model.transformer_blocks[0].attn.to_q
    norms = dequantize_4bit(layer.weight.data, layer.weight.quant_state).norm(dim=1)
    add_lora(model, LoraSettings(targets=("attn.to_q",), rank=4, alpha=4.0, use_dora=True), 0)
    magnitude = model.transformer_blocks[0].attn.to_q.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.detach(), norms)


@pytest.mark.parametrize("excluded", [("proj_out", "img_mod.1"), ()])
def test_weights_shrink_to_4_bits_but_for_excluded_layers(tiny_repo, excluded):
    model = load_denoiser(tiny_repo, torch.bfloat16)
    linear = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    quantize(model, Quantization(method="bitsandbytes_nf4", excluded=excluded), CPU)
    held = held_in_4_bits(model)
    assert linear.keys() - held.keys() == {
        name for name in linear if any(name == item or name.endswith(f".{item}") for item in excluded)
    }
    assert all(held[name].weight.untyped_storage().nbytes() * 4 == linear[name].nbytes for name in held)


@pytest.mark.parametrize(
    ("excluded", "message"),
    [
        (("mod.1",), "quant_options: 'mod.1' is no linear layer of QwenImageTransformer2DModel, which has such as"),
        (None, "quant_options: no linear layer of QwenImageTransformer2DModel is left to quantise"),
    ],
)
def test_layers_that_lead_nowhere_are_refused(tiny_repo, excluded, message):
    model = load_denoiser(tiny_repo)
    if excluded is None:
        excluded = tuple(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    with pytest.raises(ModelError, match=message) as error:
        quantize(model, Quantization(method="bitsandbytes_nf4", excluded=excluded), CPU)
    assert "\n" not in str(error.value)
