"""Qwen-Image's units and denoiser call against diffusers' own pipelines, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth_pipe.contracts import Batch, ComponentFiles
from diffsynth_pipe.errors import ModelError
from diffsynth_pipe.families.qwen_image import PLUGIN, encode_text, load_text_encoder, note_on_text
from diffsynth_pipe.modeling.qwen import encode_latents
from diffsynth_pipe.training.flow_match import sigma_grid

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def components(request, tiny_repo):
    return {name: spec.load(files(tiny_repo, name), request.param, CPU) for name, spec in PLUGIN.components.items()}


@pytest.fixture(scope="module")
def pipeline(components):
    from diffusers import QwenImagePipeline

    encoder = components["text_encoder"]
    return QwenImagePipeline(
        scheduler=None,
        vae=components["vae"],
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        transformer=components["dit"],
    )


def files(repo, name):
    spec = PLUGIN.components[name]
    folder = repo / spec.subfolder
    companions = {companion: repo / companion for companion in spec.companions}
    return ComponentFiles(weights=tuple(folder.glob("*.safetensors")), folder=folder, companions=companions)


def test_the_template_is_the_one_of_the_pipeline(pipeline):
    from diffsynth_pipe.families import qwen_image

    assert pipeline.prompt_template_encode == qwen_image.TEMPLATE
    assert pipeline.prompt_template_encode_start_idx == qwen_image.NUM_PREFIX_TOKENS


@pytest.mark.parametrize(
    "prompt", ["", "a red cat", "braces {} {0} {x}, <|im_end|> and ünïcödé 在\n\nlines", "word " * 60]
)
def test_prompt_embeddings_equal_the_pipeline(components, pipeline, prompt):
    with torch.no_grad():
        expected, mask = pipeline.encode_prompt(prompt)
    found = encode_text(components, {"prompt": prompt})["prompt_emb"]
    assert mask is None
    assert found.dtype == components["text_encoder"].model.dtype
    assert torch.equal(found, expected[0])


def test_a_prompt_is_cut_at_4096_tokens(tiny_repo):
    encoder = load_text_encoder(files(tiny_repo, "text_encoder"), torch.float32, CPU)
    embedding = encode_text({"text_encoder": encoder}, {"prompt": "0" * 5000})["prompt_emb"]
    assert embedding.shape == (4096, 64)


@pytest.mark.parametrize("num_digits", [0, 4091, 4092, 5000])
def test_a_note_tells_how_many_tokens_were_cut(num_digits, tiny_repo):
    encoder = load_text_encoder(files(tiny_repo, "text_encoder"), torch.float32, CPU)
    note = note_on_text({"text_encoder": encoder}, {"prompt": "0" * num_digits})
    # one token for each digit, and five for the template's end: <|im_end|> \n <|im_start|> assistant \n
    num_cut = num_digits + 5 - 4096
    assert note == (f"truncated, {num_cut} of {num_digits + 5} tokens were cut off" if num_cut > 0 else None)


@pytest.mark.parametrize(("height_px", "width_px"), [(32, 32), (48, 80)])
def test_latents_equal_the_pipeline(components, pipeline, height_px, width_px):
    from diffusers import QwenImageEditPipeline

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8))
    vae = components["vae"]
    pixels = pipeline.image_processor.preprocess(image)
    with torch.no_grad():
        expected = QwenImageEditPipeline._encode_vae_image(
            SimpleNamespace(vae=vae, latent_channels=vae.config.z_dim), pixels[:, :, None].to(vae.dtype), generator=None
        )
    found = encode_latents(components, {"image": image})["latents"]
    assert found.shape == (16, 1, height_px // 8, width_px // 8)
    assert torch.equal(found, expected[0])


def test_velocity_equals_the_transformer_call_of_the_pipeline(components, pipeline):
    dit = components["dit"]
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 16, 1, 4, 6, generator=generator).to(dit.dtype)
    embedding = torch.randn(1, 7, 64, generator=generator).to(dit.dtype)
    timestep = torch.tensor([500.0])
    batch = Batch(
        fields={"prompt_emb": embedding}, lengths={"prompt_emb": torch.tensor([7])}, sample_ids=("0" * 32,), visits=(0,)
    )
    with torch.no_grad():
        found = PLUGIN.predict_velocity({"dit": dit}, batch, noisy, timestep / 1000)
        tokens = dit(
            hidden_states=pipeline._pack_latents(noisy, 1, 16, 4, 6),
            timestep=timestep.to(dit.dtype) / 1000,
            guidance=None,
            encoder_hidden_states_mask=None,
            encoder_hidden_states=embedding,
            img_shapes=[[(1, 2, 3)]],
            attention_kwargs={},
            return_dict=False,
        )[0]
    assert torch.equal(found, pipeline._unpack_latents(tokens, 32, 48, pipeline.vae_scale_factor))


@pytest.mark.parametrize(("lengths", "masked"), [((5, 7), True), ((7, 7), False), ((7,), False)])
def test_the_denoiser_gets_a_mask_only_where_texts_differ_in_length(components, lengths, masked):
    dit, count = components["dit"], len(lengths)
    batch = Batch(
        fields={"prompt_emb": torch.zeros(count, 7, 64)},
        lengths={"prompt_emb": torch.tensor(lengths)},
        sample_ids=("0" * 32,) * count,
        visits=(0,) * count,
    )
    calls = []
    hook = dit.register_forward_pre_hook(lambda _module, _args, kwargs: calls.append(kwargs), with_kwargs=True)
    with hook, torch.no_grad():
        PLUGIN.predict_velocity(
            {"dit": dit}, batch, torch.zeros(count, 16, 1, 4, 4, dtype=dit.dtype), torch.ones(count)
        )
    mask = calls[0]["encoder_hidden_states_mask"]
    assert (mask is not None) == masked
    if masked:
        assert mask.tolist() == [[True] * 5 + [False] * 2, [True] * 7]


def test_the_schedule_is_the_one_of_the_repository_at_mu_0_8(tiny_repo):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_repo / "scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.001, 1000).tolist(), mu=0.8)
    torch.testing.assert_close(sigma_grid(PLUGIN.schedule), scheduler.sigmas[:-1], rtol=0, atol=3e-7)


def test_a_tokenizer_that_does_not_fit_the_template_is_refused(tiny_repo, tmp_path):
    from transformers import Qwen2Tokenizer

    byte_level = Qwen2Tokenizer().train_new_from_iterator(["a"], vocab_size=300, show_progress=False)
    byte_level.save_pretrained(tmp_path)
    encoder = files(tiny_repo, "text_encoder")
    with pytest.raises(ModelError, match=r"tokens instead of 34") as caught:
        load_text_encoder(
            ComponentFiles(weights=encoder.weights, folder=encoder.folder, companions={"tokenizer": tmp_path}),
            torch.float32,
            CPU,
        )
    assert "\n" not in str(caught.value)


def test_the_module_imports_no_heavy_library():
    code = (
        "import sys, diffsynth_pipe.families.qwen_image\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'numpy') if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
