"""Z-Image's units and denoiser call against diffusers' own pipelines, bit for bit."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from family_samples import batch_of_one, first_call, load_components, random_media

from diffsynth_pipe.contracts import ComponentFiles
from diffsynth_pipe.families.z_image import PLUGIN, encode_text
from diffsynth_pipe.modeling import qwen3
from diffsynth_pipe.modeling.autoencoder_kl import encode_latents
from diffsynth_pipe.training.flow_match import sigma_grid

PROMPTS = ["", "a red cat", "braces {} {0}, <|im_end|> </s> and ünïcödé 在\n\nlines", "word " * 200]


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "Z-Image"
    PLUGIN.write_tiny(folder)
    return folder


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def components(request, repo):
    return load_components(PLUGIN, repo, request.param)


@pytest.fixture(scope="module")
def pipeline(repo, components):
    from diffusers import ZImagePipeline

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(repo / "scheduler")
    pipeline = ZImagePipeline(
        scheduler=scheduler,
        vae=components["vae"],
        text_encoder=components["text_encoder"].model,
        tokenizer=components["text_encoder"].tokenizer,
        transformer=components["dit"],
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_embeddings_equal_the_pipeline(components, pipeline, prompt):
    with torch.no_grad():
        (expected,), _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        found = encode_text(components, {"prompt": prompt})["prompt_emb"]
    assert torch.equal(found, expected)


def test_a_text_encoder_without_its_head_is_the_same(repo, components, tmp_path):
    """``model_index.json`` of Z-Image names the headless class."""
    spec = PLUGIN.components["text_encoder"]
    components["text_encoder"].model.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"][0] in spec.class_names
    files = ComponentFiles(weights=(), folder=tmp_path, companions={"tokenizer": repo / "tokenizer"})
    headless = {"text_encoder": spec.load(files, components["dit"].dtype, torch.device("cpu"))}
    with torch.no_grad():
        expected, found = (encode_text(parts, {"prompt": "a cat"})["prompt_emb"] for parts in (components, headless))
    assert torch.equal(found, expected)


def test_a_note_tells_how_many_tokens_were_cut(components):
    text = PLUGIN.units[0]
    template = len(qwen3.conversation(components["text_encoder"].tokenizer, "", enable_thinking=True))
    assert text.note(components, {"prompt": "0" * (512 - template)}) is None
    note = text.note(components, {"prompt": "0" * 600})
    assert note.startswith("truncated, ")
    assert len(encode_text(components, {"prompt": "0" * 600})["prompt_emb"]) == 512


def test_latents_equal_the_pipeline(components, pipeline):
    """FLUX.1's pipeline: the VAE is the same, and Z-Image's own ones sample or always compute in bfloat16."""
    from diffusers import FluxKontextPipeline

    image, vae = random_media("image", 0, height_px=48, width_px=80), components["vae"]
    pixels = pipeline.image_processor.preprocess(image).to(vae.dtype)
    with torch.no_grad():
        expected = FluxKontextPipeline._encode_vae_image(SimpleNamespace(vae=vae), pixels, generator=None)
        found = encode_latents(components, {"image": image})["latents"]
    assert torch.equal(found, expected[0])


def test_velocity_equals_the_call_that_the_pipeline_makes(components, pipeline):
    latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    steps = []

    def keep(_pipeline, _step, _timestep, tensors):
        steps.append(tensors["latents"])
        return tensors

    args, _, output = first_call(
        components["dit"],
        lambda: pipeline(
            "a red cat",
            height=32,
            width=48,
            num_inference_steps=2,
            guidance_scale=0.0,
            latents=latents,
            callback_on_step_end=keep,
        ),
    )
    (noisy,), time, _ = args
    batch = batch_of_one(PLUGIN, components, {"prompt": "a red cat", "image": random_media("image", 0)})
    with torch.no_grad():
        found = PLUGIN.predict_velocity({"dit": components["dit"]}, batch, noisy[None, :, 0], 1 - time.float())
    assert torch.equal(found, -output[0][0][None, :, 0])
    # The sign is the scheduler's: one Euler step with our velocity is the step that the pipeline took.
    sigma, next_sigma = pipeline.scheduler.sigmas[:2]
    assert sigma == 1
    torch.testing.assert_close(steps[0], latents + (next_sigma - sigma) * found.float(), rtol=0, atol=1e-5)


def test_the_schedule_is_the_references():
    sigmas = sigma_grid(PLUGIN.schedule)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 1001)[:-1].tolist())
    torch.testing.assert_close(sigmas, scheduler.sigmas[:-1], rtol=0, atol=1e-6)
    # the table of the reference
    assert [round(float(value), 6) for value in (sigmas[0], sigmas[999])] == [1.0, 0.002994]
    assert float(sigmas.median()) == pytest.approx(0.7508, abs=1e-3)
    assert round(float(sigmas.mean()), 3) == 0.677


def test_a_record_of_the_reference_becomes_fields():
    """Its texts are a list of one prompt without padding."""
    latents, text = torch.randn(1, 16, 4, 6), torch.randn(7, 64)
    fields = PLUGIN.fields_of_diffsynth_record({"input_latents": latents}, {"prompt_embeds": [text]})
    assert torch.equal(fields["latents"], latents[0])
    assert torch.equal(fields["prompt_emb"], text)
