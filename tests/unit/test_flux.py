"""FLUX.1's units and denoiser call against diffusers' own pipelines, bit for bit."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from family_samples import batch_of_one, first_call, load_components, random_media

from diffsynth_pipe.families.flux import PLUGIN, encode_pooled_text, encode_text, note_on_pooled_text, note_on_text
from diffsynth_pipe.modeling.autoencoder_kl import encode_latents
from diffsynth_pipe.training.flow_match import resolution_shift, sigma_grid
from diffsynth_pipe.training.lora import target_layers

PROMPTS = ["", "a red cat", "braces {} {0}, <|im_end|> </s> and ünïcödé 在\n\nlines", "word " * 200]


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "FLUX.1-dev"
    PLUGIN.write_tiny(folder)
    return folder


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def components(request, repo):
    return load_components(PLUGIN, repo, request.param)


@pytest.fixture(scope="module")
def pipeline(repo, components):
    from diffusers import FluxPipeline

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(repo / "scheduler")
    clip, t5 = components["text_encoder"], components["text_encoder_2"]
    pipeline = FluxPipeline(
        scheduler=scheduler,
        vae=components["vae"],
        text_encoder=clip.model,
        tokenizer=clip.tokenizer,
        text_encoder_2=t5.model,
        tokenizer_2=t5.tokenizer,
        transformer=components["dit"],
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_embeddings_equal_the_pipeline(components, pipeline, prompt):
    with torch.no_grad():
        expected, expected_pooled, _ = pipeline.encode_prompt(prompt)
        assert torch.equal(encode_text(components, {"prompt": prompt})["prompt_emb"], expected[0])
        assert torch.equal(encode_pooled_text(components, {"prompt": prompt})["pooled_prompt_emb"], expected_pooled[0])
    assert expected.shape == (1, 512, 64)


def test_padding_is_a_part_of_what_the_denoiser_reads(components):
    """T5 yields another padding for each prompt: a cache without it could not give it back."""
    with torch.no_grad():
        one, other = (encode_text(components, {"prompt": prompt})["prompt_emb"] for prompt in ("a", "b"))
    assert not torch.equal(one[100:], other[100:])
    assert len(one[100:].unique(dim=0)) > 1


def test_notes_tell_how_many_tokens_were_cut(components):
    # one token for each character, one for the space before them, one for the end; CLIP has no space, but a start
    assert note_on_text(components, {"prompt": "x" * 510}) is None
    assert note_on_text(components, {"prompt": "x" * 512}) == "truncated, 2 of 514 tokens were cut off"
    assert note_on_pooled_text(components, {"prompt": "x" * 75}) is None
    assert note_on_pooled_text(components, {"prompt": "x" * 78}) == "truncated, 3 of 80 tokens were cut off"


def test_latents_equal_the_pipeline(components, pipeline):
    from diffusers import FluxKontextPipeline

    image, vae = random_media("image", 0, height_px=48, width_px=80), components["vae"]
    pixels = pipeline.image_processor.preprocess(image).to(vae.dtype)
    with torch.no_grad():
        expected = FluxKontextPipeline._encode_vae_image(SimpleNamespace(vae=vae), pixels, generator=None)
        found = encode_latents(components, {"image": image})["latents"]
    assert found.shape == (16, 6, 10)
    assert torch.equal(found, expected[0])


def test_velocity_equals_the_call_that_the_pipeline_makes(components, pipeline):
    generator = torch.Generator().manual_seed(0)
    _, kwargs, output = first_call(
        components["dit"],
        lambda: pipeline(
            "a red cat", height=32, width=48, num_inference_steps=2, guidance_scale=1.0, generator=generator
        ),
    )
    batch = batch_of_one(PLUGIN, components, {"prompt": "a red cat", "image": random_media("image", 0)})
    noisy = pipeline._unpack_latents(kwargs["hidden_states"], 32, 48, pipeline.vae_scale_factor)
    with torch.no_grad():
        found = PLUGIN.predict_velocity({"dit": components["dit"]}, batch, noisy, kwargs["timestep"].float())
    assert torch.equal(found, pipeline._unpack_latents(output[0], 32, 48, pipeline.vae_scale_factor))


def test_a_denoiser_without_guidance_is_told_none():
    """As FLUX.1-schnell."""
    from diffusers import FluxTransformer2DModel

    dit = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=1,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    fields = {"prompt_emb": torch.zeros(1, 512, 64), "pooled_prompt_emb": torch.zeros(1, 32)}
    batch = SimpleNamespace(fields=fields)
    with torch.no_grad():
        velocity = PLUGIN.predict_velocity({"dit": dit}, batch, torch.zeros(1, 16, 4, 4), torch.ones(1))
    assert velocity.isfinite().all()


def test_the_schedule_is_the_references():
    sigmas = sigma_grid(PLUGIN.schedule)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.003 / 1.002, 1000).tolist())
    torch.testing.assert_close(sigmas, scheduler.sigmas[:-1], rtol=0, atol=1e-6)
    # the table of the reference
    assert [round(float(value), 6) for value in (sigmas[0], sigmas[999])] == [1.0, 0.008929]
    assert round(float(sigmas.median()), 3) == pytest.approx(0.7515, abs=1e-3)
    assert round(float(sigmas.mean()), 3) == 0.678


def test_the_shift_by_resolution_is_the_pipelines():
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for num_tokens in (256, 1000, 4096):
        expected = calculate_shift(num_tokens, 256, 4096, 0.5, 1.15)
        assert math.log(resolution_shift(PLUGIN.schedule.resolution_shift, num_tokens)) == pytest.approx(expected)


def test_lora_targets_are_those_of_the_references_example(components):
    layers = target_layers(components["dit"], PLUGIN.lora_target_modules)
    double, single = (
        {name.split(".", 2)[2] for name in layers if name.startswith(prefix)}
        for prefix in ("transformer_blocks.", "single_transformer_blocks.")
    )
    attention = {"attn.to_q", "attn.to_k", "attn.to_v"}
    assert single == attention | {"norm.linear", "proj_mlp", "proj_out"}
    assert double == attention | {
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("norm1.linear", "norm1_context.linear"),
    }
    assert len(layers) == 2 * (len(double) + len(single))


def test_a_record_of_the_reference_becomes_fields():
    latents, text, pooled = torch.randn(1, 16, 4, 6), torch.randn(1, 512, 64), torch.randn(1, 32)
    positive = {"prompt_emb": text, "pooled_prompt_emb": pooled, "text_ids": torch.zeros(1, 512, 3)}
    fields = PLUGIN.fields_of_diffsynth_record({"input_latents": latents}, positive)
    expected = {"latents": latents[0], "prompt_emb": text[0], "pooled_prompt_emb": pooled[0]}
    assert fields.keys() == expected.keys()
    assert all(torch.equal(fields[name], expected[name]) for name in fields)
