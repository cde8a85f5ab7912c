"""Weights that come module by module: no bit changes, none is used from its home, and only one module's are there."""

import pytest
import torch
from offloaded_weights import Watch
from tiny_denoisers import load_denoiser, loss_and_gradients, with_lora

from diffsynth_pipe.training.lora import LoraSettings, add_lora
from diffsynth_pipe.training.offload import offload_weights

CPU = torch.device("cpu")
LARGE = 2  # times 1024² parameters: more than the tiny denoiser has


def run(model, lora, **settings):
    """Return the loss, the gradients and what was seen of the weights."""
    with Watch() as watch:
        if settings:
            offload_weights(model, CPU, **{"split_threshold": None, "offload_trained": False} | settings)
        watch.homes_of(model)
        return *loss_and_gradients(model, lora, torch.float32), watch


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in found[1].items())


@pytest.mark.parametrize("offload_trained", [False, True])
@pytest.mark.parametrize("split_threshold", [None, LARGE])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_changes_no_bit_and_computes_with_copies_alone(tiny_repo, offload_trained, split_threshold, checkpointing):
    plain, model = load_denoiser(tiny_repo), load_denoiser(tiny_repo)
    expected = run(plain, with_lora(plain)[0])
    lora, _ = with_lora(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    parameters = dict(model.named_parameters())
    found = run(model, lora, split_threshold=split_threshold, offload_trained=offload_trained)
    assert_same(found, expected)
    watch = found[2]
    assert watch.peak_bytes
    assert not watch.frozen_used
    assert bool(watch.num_trained) is offload_trained
    assert bool(watch.trained_used) is not offload_trained
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())


def frozen_bytes(model):
    return [parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad]


def test_one_layer_at_a_time_is_on_the_device(tiny_repo):
    model = load_denoiser(tiny_repo)
    largest = max(frozen_bytes(model))
    watch = run(model, with_lora(model)[0], split_threshold=None)[2]
    assert largest <= watch.peak_bytes < 1.1 * largest  # with its bias


def test_under_gradient_checkpointing_one_block_at_a_time_is(tiny_repo):
    model = load_denoiser(tiny_repo)
    sizes = frozen_bytes(model)
    model.enable_gradient_checkpointing()
    watch = run(model, with_lora(model)[0], split_threshold=None)[2]
    assert max(sizes) < watch.peak_bytes < 0.6 * sum(sizes)  # of two blocks


def test_a_module_below_the_threshold_comes_as_a_whole(tiny_repo):
    model = load_denoiser(tiny_repo)
    watch = run(model, with_lora(model)[0], split_threshold=LARGE)[2]
    assert watch.peak_bytes >= sum(frozen_bytes(model))


def test_dora_finds_the_weights_that_it_reads(tiny_repo):
    results = []
    for settings in ({}, {"split_threshold": None}):
        model = load_denoiser(tiny_repo)
        add_lora(model, LoraSettings(targets=("attn.to_q",), rank=4, alpha=4.0, use_dora=True), 0)
        lora = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        results.append(run(model, lora, **settings))
    assert_same(*results)
    assert not results[1][2].frozen_used


def test_weights_are_at_home_again_after_an_error(tiny_repo):
    model = load_denoiser(tiny_repo)
    homes = dict(model.named_parameters())
    offload_weights(model, CPU, split_threshold=None, offload_trained=True)
    with pytest.raises(RuntimeError):
        model(hidden_states=torch.zeros(1, 16, 3), encoder_hidden_states=None, timestep=torch.tensor([0.5]))
    assert all(parameter is homes[name] for name, parameter in model.named_parameters())
