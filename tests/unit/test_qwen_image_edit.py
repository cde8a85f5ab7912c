"""Qwen-Image-Edit's units and denoiser call against diffusers' own pipelines, bit for bit."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import Batch, ComponentFiles
from diffsynth_pipe.errors import ConfigError, DataError
from diffsynth_pipe.families import qwen_image_edit
from diffsynth_pipe.families.qwen_image_edit import PLUGIN, encode_edit_latents, encode_text, use_zero_cond_t
from diffsynth_pipe.stages.plan import plan_cut

CPU = torch.device("cpu")
IMAGES = [Image.effect_noise((72, 48), 40).convert("RGB"), Image.effect_noise((32, 64), 60).convert("RGB")]


class ImageOnlyProcessor(Qwen2VLProcessor):
    """``Qwen2VLProcessor`` without its video processor, which needs torchvision."""

    def __init__(self, image_processor, tokenizer):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = map(
            tokenizer.convert_tokens_to_ids, (self.image_token, self.video_token)
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer)


@pytest.fixture(scope="module", autouse=True)
def _small_images():
    """See images at a thousandth of their area, here and in the pipelines: the rule is the same."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen_image_edit, "LATENTS_AREA_PX", 96 * 96)
        patch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 96 * 96)
        patch.setattr(qwen_image_edit, "PICTURE_AREA_PX", 64 * 64)
        patch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 64 * 64)
        yield


@pytest.fixture(scope="module")
def edit_repo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "Qwen-Image-Edit"
    PLUGIN.write_tiny(folder)
    return folder


def load(repo, name, dtype=torch.float32):
    spec = PLUGIN.components[name]
    folder = repo / spec.subfolder
    companions = {companion: repo / companion for companion in spec.companions}
    files = ComponentFiles(weights=tuple(folder.glob("*.safetensors")), folder=folder, companions=companions)
    return spec.load(files, dtype, CPU)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def components(request, edit_repo):
    return {name: load(edit_repo, name, request.param) for name in PLUGIN.components}


def pipeline_of(pipeline_class, components):
    encoder = components["text_encoder"]
    return pipeline_class(
        scheduler=None,
        vae=components["vae"],
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        processor=ImageOnlyProcessor(encoder.image_processor, encoder.tokenizer),
        transformer=components["dit"],
    )


@pytest.fixture(scope="module")
def edit_plus(components):
    from diffusers import QwenImageEditPlusPipeline

    return pipeline_of(QwenImageEditPlusPipeline, components)


@pytest.fixture(scope="module")
def edit(components):
    from diffusers import QwenImageEditPipeline

    return pipeline_of(QwenImageEditPipeline, components)


def expected_embeddings(pipeline, prompt, images):
    """Return what the pipeline encodes once it hands on ``mm_token_type_ids``, which diffusers 0.42 forgets."""
    encoder, image_id = pipeline.text_encoder, pipeline.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def add_types(_module, args, kwargs):
        return args, {**kwargs, "mm_token_type_ids": (kwargs["input_ids"] == image_id).int()}

    hook = encoder.register_forward_pre_hook(add_types, with_kwargs=True)
    with hook, torch.no_grad():
        embeddings, mask = pipeline.encode_prompt(prompt, image=images)
    assert mask is None
    return embeddings[0]


@pytest.mark.parametrize("prompt", ["", "make it red", "braces {} {0}, <|im_end|> and ünïcödé 在\n\nlines"])
@pytest.mark.parametrize("count", [1, 2])
def test_embeddings_of_a_list_equal_edit_plus(components, edit_plus, prompt, count):
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    sizes = [calculate_dimensions(64 * 64, image.width / image.height) for image in IMAGES[:count]]
    pictures = [
        edit_plus.image_processor.resize(image, height, width)
        for image, (width, height) in zip(IMAGES, sizes, strict=False)
    ]
    found = encode_text(components, {"prompt": prompt, "edit_image": IMAGES[:count]})["prompt_emb"]
    assert found.dtype == components["text_encoder"].model.dtype
    assert torch.equal(found, expected_embeddings(edit_plus, prompt, pictures))


def test_embeddings_of_one_image_equal_edit(components, edit):
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions

    width, height, _ = calculate_dimensions(96 * 96, IMAGES[0].width / IMAGES[0].height)
    picture = edit.image_processor.resize(IMAGES[0], height, width)
    found = encode_text(components, {"prompt": "make it red", "edit_image": IMAGES[0]})["prompt_emb"]
    assert torch.equal(found, expected_embeddings(edit, "make it red", picture))


def test_the_places_of_image_tokens_make_a_difference(components, edit_plus):
    """So a pipeline that forgets them, as diffusers 0.42 does, is no oracle."""
    with torch.no_grad():
        forgetful, _ = edit_plus.encode_prompt("make it red", image=[IMAGES[0].resize((96, 64))])
    found = expected_embeddings(edit_plus, "make it red", [IMAGES[0].resize((96, 64))])
    assert not torch.equal(found, forgetful[0])


def test_an_image_token_in_the_prompt_is_refused(components):
    with pytest.raises(DataError, match=r"'<\|image_pad\|>', which stands for an image; remove it"):
        encode_text(components, {"prompt": "a <|image_pad|>", "edit_image": IMAGES})


def test_latents_equal_the_pipeline(components, edit_plus):
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    preprocessed = []
    for image in IMAGES:
        width, height = calculate_dimensions(96 * 96, image.width / image.height)
        preprocessed.append(edit_plus.image_processor.preprocess(image, height, width).unsqueeze(2))
    dtype = components["vae"].dtype
    noise = torch.zeros(1)
    with torch.no_grad():
        _, expected = edit_plus.prepare_latents(preprocessed, 1, 16, 48, 48, dtype, CPU, None, noise)
        found = encode_edit_latents(components, {"edit_image": IMAGES})
    assert torch.equal(found["edit_latents"], expected[0])
    assert found["edit_shapes"].tolist() == [[item.shape[-2] // 16, item.shape[-1] // 16] for item in preprocessed]


def test_velocity_equals_the_transformer_call_of_the_pipeline(components, edit_plus):
    dit = components["dit"]
    generator = torch.Generator().manual_seed(0)
    noisy, embedding, edit_tokens = (
        torch.randn(shape, generator=generator).to(dit.dtype) for shape in [(1, 16, 1, 4, 6), (1, 7, 64), (1, 10, 64)]
    )
    fields = {"prompt_emb": embedding, "edit_latents": edit_tokens, "edit_shapes": torch.tensor([[[2, 3], [4, 1]]])}
    batch = Batch(fields=fields, lengths={"prompt_emb": torch.tensor([7])}, sample_ids=("0" * 32,), visits=(0,))
    timestep = torch.tensor([500.0])
    with torch.no_grad():
        found = PLUGIN.predict_velocity({"dit": dit}, batch, noisy, timestep / 1000)
        tokens = dit(
            hidden_states=torch.cat([edit_plus._pack_latents(noisy, 1, 16, 4, 6), edit_tokens], dim=1),
            timestep=timestep.to(dit.dtype) / 1000,
            guidance=None,
            encoder_hidden_states_mask=None,
            encoder_hidden_states=embedding,
            img_shapes=[[(1, 2, 3), (1, 2, 3), (1, 4, 1)]],
            attention_kwargs={},
            return_dict=False,
        )[0]
    assert torch.equal(found, edit_plus._unpack_latents(tokens[:, :6], 32, 48, edit_plus.vae_scale_factor))


def test_zero_cond_t_does_what_the_config_of_2511_does(edit_repo):
    from diffusers import QwenImageTransformer2DModel

    folder = edit_repo / "transformer"
    switched = load(edit_repo, "dit")
    use_zero_cond_t(switched)
    by_config = QwenImageTransformer2DModel.from_pretrained(folder, zero_cond_t=True)
    generator = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, 12, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 64, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 2, 3), (1, 3, 2)]],
        "return_dict": False,
    }
    with torch.no_grad():
        assert torch.equal(switched(**call)[0], by_config(**call)[0])
        assert not torch.equal(switched(**call)[0], load(edit_repo, "dit")(**call)[0])


def test_a_record_of_the_reference_holds_the_same_fields(components):
    with torch.no_grad():
        found = encode_edit_latents(components, {"edit_image": IMAGES})
    unpacked = []
    for tokens, (rows, columns) in zip(
        found["edit_latents"].split([rows * columns for rows, columns in found["edit_shapes"].tolist()]),
        found["edit_shapes"].tolist(),
        strict=True,
    ):
        patches = tokens.reshape(rows, columns, 16, 2, 2).permute(2, 0, 3, 1, 4)
        unpacked.append(patches.reshape(1, 16, rows * 2, columns * 2))
    shared = {"input_latents": torch.zeros(1, 16, 4, 6), "edit_latents": unpacked}
    positive = {"prompt_emb": torch.zeros(1, 9, 64), "prompt_emb_mask": torch.ones(1, 9, dtype=torch.int64)}
    record = PLUGIN.fields_of_diffsynth_record(shared, positive)
    assert record.keys() == {spec.name for unit in PLUGIN.units for spec in unit.outputs}
    for name, value in found.items():
        assert torch.equal(record[name], value)


def test_an_encoder_that_would_read_images_in_every_step_is_not_trained():
    parameters = {"dataset_base_path": "data", "family": "qwen_image_edit", "trainable_models": "text_encoder"}
    config = load_config(None, parameters | {"extra_inputs": "edit_image"})
    with pytest.raises(
        ConfigError, match=r"^trainable_models: a trained text_encoder .* read the column 'edit_image' in"
    ):
        plan_cut(config, PLUGIN)
