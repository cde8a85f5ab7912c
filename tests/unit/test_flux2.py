"""FLUX.2's units and denoiser call against diffusers' own pipelines, bit for bit."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from family_samples import batch_of_one, first_call, load_components, random_media
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from diffsynth_pipe.contracts import Batch, ComponentFiles
from diffsynth_pipe.families.flux2 import PLUGIN, encode_latents, encode_text
from diffsynth_pipe.training.flow_match import sigma_grid
from diffsynth_pipe.training.lora import target_layers

PROMPTS = ["", "a red cat", "braces {} {0}, <|im_end|> </s> and ünïcödé 在\n\nlines", "word " * 200]


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "FLUX.2-klein"
    PLUGIN.write_tiny(folder)
    return folder


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def components(request, repo):
    return load_components(PLUGIN, repo, request.param)


@pytest.fixture(scope="module")
def pipeline(repo, components):
    from diffusers import Flux2KleinPipeline

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(repo / "scheduler")
    pipeline = Flux2KleinPipeline(
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
        expected, _ = pipeline.encode_prompt(prompt)
        found = encode_text(components, {"prompt": prompt})["prompt_emb"]
    assert expected.shape == (1, 512, 96)
    assert torch.equal(found, expected[0])


class TextProcessor(ProcessorMixin):
    """FLUX.2-dev's processor without the part for images, which needs torchvision."""

    def __init__(self, tokenizer, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)


@pytest.fixture(scope="module")
def dev_folder(tmp_path_factory):
    """A tiny text encoder of FLUX.2-dev and its tokenizer, which pads on the left."""
    words = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]
    vocab = {word: number for number, word in enumerate([*words, *sorted(ByteLevel.alphabet())])}
    bytes_as_words = Tokenizer(BPE(vocab=vocab, merges=[]))
    bytes_as_words.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_as_words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": words[3:]})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content[0].text }}"
        "[/SYSTEM_PROMPT]{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = Mistral3Config(
        text_config={
            **sizes,
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 31,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        vision_config={**sizes, "model_type": "pixtral", "num_hidden_layers": 1, "image_size": 64, "patch_size": 16},
        image_token_index=7,
    )
    folder = tmp_path_factory.mktemp("FLUX.2-dev")
    torch.manual_seed(0)
    Mistral3ForConditionalGeneration(config).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("prompt", [*PROMPTS, "an [IMG] is no image"])
def test_prompt_embeddings_of_dev_equal_the_pipeline(dev_folder, prompt):
    from diffusers import Flux2Pipeline

    files = ComponentFiles(
        weights=(), folder=dev_folder / "text_encoder", companions={"tokenizer": dev_folder / "tokenizer"}
    )
    encoder = PLUGIN.components["text_encoder"].load(files, torch.float32, torch.device("cpu"))
    assert type(encoder.model).__name__ in PLUGIN.components["text_encoder"].class_names
    processor = TextProcessor(encoder.tokenizer, encoder.tokenizer.chat_template)
    with torch.no_grad():
        expected = Flux2Pipeline._get_mistral_3_small_prompt_embeds(encoder.model, processor, prompt)
        found = encode_text({"text_encoder": encoder}, {"prompt": prompt})["prompt_emb"]
    assert expected.shape == (1, 512, 96)
    assert torch.equal(found, expected[0])


def test_padding_is_a_part_of_what_the_denoiser_reads(components):
    """The language model yields another padding for each prompt: a cache without it could not give it back."""
    with torch.no_grad():
        one, other = (encode_text(components, {"prompt": prompt})["prompt_emb"] for prompt in ("a", "b"))
    assert not torch.equal(one[100:], other[100:])


def test_latents_equal_the_pipeline(components, pipeline):
    image, vae = random_media("image", 0, height_px=48, width_px=80), components["vae"]
    with torch.no_grad():
        pixels = pipeline.image_processor.preprocess(image).to(vae.dtype)
        expected = pipeline._encode_vae_image(pixels, generator=None)
        found = encode_latents(components, {"image": image})["latents"]
    assert found.shape == (128, 3, 5)
    assert torch.equal(found, expected[0])


def test_velocity_equals_the_call_that_the_pipeline_makes(components, pipeline):
    generator = torch.Generator().manual_seed(0)
    _, kwargs, output = first_call(
        components["dit"],
        lambda: pipeline(
            prompt="a red cat", height=32, width=48, num_inference_steps=2, guidance_scale=1.0, generator=generator
        ),
    )
    batch = batch_of_one(PLUGIN, components, {"prompt": "a red cat", "image": random_media("image", 0)})
    noisy = kwargs["hidden_states"].transpose(1, 2).reshape(1, 128, 2, 3)
    with torch.no_grad():
        found = PLUGIN.predict_velocity({"dit": components["dit"]}, batch, noisy, kwargs["timestep"].float())
    assert torch.equal(found, pipeline._unpack_latents_with_ids(output[0], kwargs["img_ids"]))


def test_a_denoiser_with_guidance_is_told_one():
    """As FLUX.2-dev."""
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    dit = Flux2Transformer2DModel(
        in_channels=128, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=1,
        joint_attention_dim=96, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=True,
    )  # fmt: skip
    batch = Batch(fields={"prompt_emb": torch.zeros(1, 512, 96)}, lengths={}, sample_ids=("0" * 32,), visits=(0,))
    _, kwargs, _ = first_call(
        dit, lambda: PLUGIN.predict_velocity({"dit": dit}, batch, torch.zeros(1, 128, 2, 2), torch.ones(1))
    )
    assert kwargs["guidance"].tolist() == [1.0]


@pytest.mark.parametrize("num_steps", [1000, 8])
def test_the_schedule_is_the_references_for_any_number_of_steps(num_steps):
    sigmas = sigma_grid(dataclasses.replace(PLUGIN.schedule, num_steps=num_steps))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist(), mu=0.8)
    torch.testing.assert_close(sigmas, scheduler.sigmas[:-1], rtol=0, atol=1e-6)


def test_the_schedule_has_the_values_of_the_references_table():
    sigmas = sigma_grid(PLUGIN.schedule)
    assert [round(float(value), 6) for value in (sigmas[0], sigmas[999])] == [1.0, 0.002223]
    assert float(sigmas.median()) == pytest.approx(0.6908, abs=1e-3)
    assert round(float(sigmas.mean()), 3) == 0.631


def test_lora_targets_are_those_of_the_references_example(components):
    layers = target_layers(components["dit"], PLUGIN.lora_target_modules)
    double, single = (
        {name.split(".", 2)[2] for name in layers if name.startswith(prefix)}
        for prefix in ("transformer_blocks.", "single_transformer_blocks.")
    )
    assert single == {"attn.to_qkv_mlp_proj", "attn.to_out"}
    assert double == {
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
    }
    assert len(layers) == len(double) + 2 * len(single)


def test_a_record_of_the_reference_becomes_fields():
    """Its latents are a sequence of tokens, row after row."""
    latents, text = torch.randn(1, 128, 2, 3), torch.randn(1, 512, 96)
    shared = {"input_latents": latents.flatten(2).transpose(1, 2), "height": 32, "width": 48}
    fields = PLUGIN.fields_of_diffsynth_record(shared, {"prompt_embeds": text})
    assert torch.equal(fields["latents"], latents[0])
    assert torch.equal(fields["prompt_emb"], text[0])
