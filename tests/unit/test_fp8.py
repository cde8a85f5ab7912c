"""Weights held in FP8: their size, and the numbers that come out, against weights that were rounded by hand."""

import pytest
import torch
from tiny_denoisers import load_denoiser, loss_and_gradients, with_lora

from diffsynth_pipe.training.fp8 import hold_in_fp8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_computes_as_weights_that_were_rounded_to_fp8_and_back(tiny_repo, dtype, checkpointing):
    model, rounded, plain = (load_denoiser(tiny_repo, dtype) for _ in range(3))
    lora, start = with_lora(model)
    hold_in_fp8(model, dtype)
    if checkpointing:
        model.enable_gradient_checkpointing()
    loss, gradients = loss_and_gradients(model, lora, dtype)

    linear = [name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)]
    kept = {"proj_out", "norm_out.linear"}
    for name in set(linear) - kept:
        for parameter in rounded.get_submodule(name).parameters():
            parameter.data = parameter.data.to(torch.float8_e4m3fn).to(dtype)
    oracle = loss_and_gradients(rounded, with_lora(rounded)[0], dtype)
    assert loss == oracle[0]
    assert gradients.keys() == oracle[1].keys()
    assert all(torch.equal(gradients[name], oracle[1][name]) for name in gradients)

    lora, plain_start = with_lora(plain)
    unquantised = loss_and_gradients(plain, lora, dtype)[0]
    assert loss != unquantised
    assert loss == pytest.approx(unquantised, rel=1e-2)
    assert all(torch.equal(start[name], plain_start[name]) for name in start)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1 / 4), (torch.bfloat16, 1 / 2)])
def test_stored_weights_shrink_and_the_lora_stays(tiny_repo, dtype, share):
    model = load_denoiser(tiny_repo, dtype)
    lora, _ = with_lora(model)

    def num_bytes():
        # A layer's name without peft's part of it, as in a plain model.
        sizes = {name: parameter.untyped_storage().nbytes() for name, parameter in model.named_parameters()}
        frozen = {name: size for name, size in sizes.items() if name not in lora}
        kept = [name for name in frozen if "norm" in name or name.startswith("proj_out")]
        return sum(frozen.values()), sum(frozen[name] for name in kept)

    before, kept = num_bytes()
    hold_in_fp8(model, dtype)
    after, kept_after = num_bytes()
    assert kept_after == kept < 0.04 * before
    assert after - kept == (before - kept) * share
    assert {parameter.dtype for parameter in lora.values()} == {torch.float32}
