"""Wan's units and denoiser calls against diffusers' own pipelines, on the same tiny weights in fp32."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from family_samples import random_media
from PIL import Image

from diffsynth_pipe.contracts import FIRST_FRAME_FIELD, Batch, ComponentFiles, load_family
from diffsynth_pipe.errors import CacheMismatch, ModelError
from diffsynth_pipe.families.wan import write_tiny_variant
from diffsynth_pipe.modeling import wan
from diffsynth_pipe.training.flow_match import bell_weights, sigma_grid

CPU = torch.device("cpu")
VARIANTS = {
    "t2v": ("wan", ()),
    "t2v-a14b": ("wan", ()),
    "i2v": ("wan", ("input_image", "clip_feature")),
    "flf2v": ("wan", ("input_image", "end_image", "clip_feature")),
    "i2v-a14b": ("wan", ("input_image",)),
    "ti2v": ("wan_ti2v", ()),
    "ti2v-image": ("wan_ti2v", ("input_image",)),
}
TEXTS = ("", "a red circle", "  three <b>blue</b> squares &amp;amp; on\n a white table, 在  ", "word " * 600)


class Model:
    """A variant: its family, its tiny repository, the diffusers pipeline on it, and its loaded components."""

    def __init__(self, name, folder):
        import diffusers

        family, enabled = VARIANTS[name]
        self.family = load_family(family)
        if family == "wan":
            write_tiny_variant(folder, name)
        else:
            self.family.write_tiny(folder)
        index = json.loads((folder / "model_index.json").read_text())
        if name == "ti2v-image":
            self.pipeline = diffusers.WanImageToVideoPipeline.from_pretrained(
                folder, image_encoder=None, image_processor=None, dtype=torch.float32
            )
        else:
            self.pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(folder, dtype=torch.float32)
        self.folder = folder
        self.units = [unit for unit in self.family.units if unit.enabled_by is None or unit.enabled_by in enabled]
        self.components = {
            component: self.load(component)
            for component in ("dit", *(unit.component for unit in self.units if unit.component))
        }
        multiple = self.family.size_multiple
        self.height, self.width = 2 * multiple, 3 * multiple

    def load(self, name, subfolder=None):
        spec = self.family.components[name]
        folder = self.folder / (subfolder or spec.subfolder)
        companions = {companion: self.folder / companion for companion in spec.companions}
        weights = tuple(folder.glob("*.safetensors"))
        return spec.load(ComponentFiles(weights=weights, folder=folder, companions=companions), torch.float32, CPU)

    def video(self, seed=0, num_frames=9):
        return np.concatenate(
            [random_media("video", seed + n, self.height, self.width) for n in range(num_frames // 5 + 1)]
        )[:num_frames]

    def encode(self, prompt="a red circle", video=None):
        """Return the fields of a record; a later unit writes over an earlier one's."""
        inputs = {"prompt": prompt, "video": self.video() if video is None else video}
        fields = {}
        with torch.no_grad():
            for unit in self.units:
                fields |= unit.encode(self.components, inputs)
        return fields

    def batch(self, *records):
        fields = {
            name: torch.nn.utils.rnn.pad_sequence([record[name] for record in records], batch_first=True)
            for name in records[0]
        }
        return Batch(
            fields=fields,
            lengths={"prompt_emb": torch.tensor([len(record["prompt_emb"]) for record in records])},
            sample_ids=tuple(f"{number:032x}" for number in range(len(records))),
            visits=(0,) * len(records),
        )

    def predict(self, batch, noisy, sigma, dit=None):
        with torch.no_grad():
            return self.family.predict_velocity({"dit": dit or self.components["dit"]}, batch, noisy, sigma)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def model(name):
        if name not in made:
            made[name] = Model(name, tmp_path_factory.mktemp(name) / "repo")
        return made[name]

    return model


@pytest.mark.parametrize("text", TEXTS, ids=["empty", "short", "html", "long"])
def test_prompt_embeddings_equal_the_pipeline(models, text):
    model = models("t2v")
    found = wan.encode_text(model.components, {"prompt": text})["prompt_emb"]
    with torch.no_grad():
        expected = model.pipeline.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    padded = torch.nn.functional.pad(found, (0, 0, 0, 512 - len(found)))
    assert torch.equal(padded[None], expected)
    assert len(found) < 512 or text == TEXTS[-1]
    note = wan.note_on_text(model.components, {"prompt": text})
    assert (note is not None) == (text == TEXTS[-1])
    assert torch.equal(wan.unpadded(padded), found)


@pytest.mark.parametrize("name", ["t2v", "ti2v"])
@pytest.mark.parametrize("num_frames", [1, 9])
def test_latents_equal_the_pipeline(models, name, num_frames):
    from diffusers import WanVideoToVideoPipeline

    model = models(name)
    frames = model.video(num_frames=num_frames)
    found = model.encode(video=frames)["latents"]
    pipeline = WanVideoToVideoPipeline(
        tokenizer=None, text_encoder=None, transformer=None, vae=model.pipeline.vae, scheduler=model.pipeline.scheduler
    )
    pixels = pipeline.video_processor.preprocess_video([Image.fromarray(frame) for frame in frames])
    with torch.no_grad():
        zero = torch.zeros(1)  # the timestep at which the pipeline adds no noise
        pipeline.scheduler.add_noise = lambda latents, *_: latents
        expected = pipeline.prepare_latents(
            pixels, num_channels_latents=found.shape[0], timestep=zero, dtype=torch.float32
        )
    assert found.shape[1] == (num_frames - 1) // 4 + 1
    assert torch.equal(found[None], expected)


@pytest.mark.parametrize("name", ["i2v", "i2v-a14b", "flf2v", "ti2v-image"])
def test_the_condition_equals_the_pipelines_prepare_latents(models, name):
    model = models(name)
    frames = model.video()
    record = model.encode(video=frames)
    processor = model.pipeline.video_processor
    first, last = (processor.preprocess(Image.fromarray(frames[index])) for index in (0, -1))
    with torch.no_grad():
        prepared = model.pipeline.prepare_latents(
            first,
            batch_size=1,
            num_channels_latents=model.pipeline.vae.config.z_dim,
            height=model.height,
            width=model.width,
            num_frames=len(frames),
            dtype=torch.float32,
            last_image=last if name == "flf2v" else None,
        )
    found = record[FIRST_FRAME_FIELD if name == "ti2v-image" else "y"]
    assert torch.equal(found[None], prepared[1])
    if name == "ti2v-image":  # the VAE is causal: the first latent frame of a clip is that of its first frame
        assert torch.equal(found, record["latents"][:, :1])


def framewise(model):
    """Return the units that take part under ``framewise_decoding``."""
    return [unit.switches.get("framewise_decoding", unit) for unit in model.units]


@pytest.mark.parametrize("name", ["t2v", "ti2v"])
def test_a_framewise_latent_frame_is_that_of_its_frame_as_an_image(models, name):
    """Six frames, which are no clip: each as the pipeline encodes a video of this one frame."""
    model = models(name)
    frames = model.video(num_frames=6)
    unit = framewise(model)[1]
    with torch.no_grad():
        found = unit.encode(model.components, {"video": frames})["latents"]
        expected = [model.encode(video=frames[number : number + 1])["latents"] for number in range(6)]
    assert torch.equal(found, torch.cat(expected, dim=1))
    assert not torch.equal(found[:, 1:2], model.encode(video=frames[:5])["latents"][:, 1:2])
    noise = model.family.noise_unit.switches["framewise_decoding"]
    inputs = {"video": frames, "seed": 1, "rand_device": "cpu"}
    assert noise.encode({}, inputs)["noise"].shape == found.shape
    for plain in (model.units[1], model.family.noise_unit):  # or a cache would mix them up
        assert plain.recipe != plain.switches["framewise_decoding"].recipe


@pytest.mark.parametrize("name", ["i2v-a14b", "flf2v"])
def test_a_framewise_condition_is_that_of_a_clip_with_as_many_latent_frames(models, name):
    model = models(name)
    frames = model.video(num_frames=6)
    record = {}
    with torch.no_grad():
        for unit in framewise(model):
            record |= unit.encode(model.components, {"prompt": "a", "video": frames})
        first, last = (model.pipeline.video_processor.preprocess(Image.fromarray(frames[index])) for index in (0, -1))
        prepared = model.pipeline.prepare_latents(
            first, 1, 16, model.height, model.width, num_frames=21, dtype=torch.float32,
            last_image=last if name == "flf2v" else None,
        )  # fmt: skip
    assert torch.equal(record["y"][None], prepared[1])
    noisy = torch.randn(1, *record["latents"].shape)
    assert model.predict(model.batch(record), noisy, torch.ones(1)).shape == noisy.shape


@pytest.mark.parametrize("name", ["i2v", "flf2v"])
def test_clip_embeddings_equal_the_pipeline(models, name):
    model = models(name)
    frames = model.video()
    with torch.no_grad():
        expected = model.pipeline.encode_image([Image.fromarray(frames[index]) for index in (0, -1)])
    # one image after the other, where the pipeline has both in a batch
    torch.testing.assert_close(model.encode(video=frames)["clip_feature"], expected, rtol=0, atol=2e-6)
    with torch.no_grad():
        first = model.pipeline.encode_image(Image.fromarray(frames[0]))
    assert torch.equal(model.encode(video=frames)["clip_feature"][:1], first)


@pytest.mark.parametrize("name", VARIANTS)
def test_velocity_equals_the_transformer_call_of_the_pipeline(models, name):
    """The call is what the pipeline itself makes in its first step: it is caught there."""
    model = models(name)
    frames = model.video()
    record = model.encode(video=frames)
    noisy = torch.randn(record["latents"].shape, generator=torch.Generator().manual_seed(1))[None]
    text = torch.nn.functional.pad(record["prompt_emb"], (0, 0, 0, 512 - len(record["prompt_emb"])))[None]
    calls = []
    hook = model.pipeline.transformer.register_forward_hook(
        lambda _module, _args, kwargs, output: calls.append((kwargs, output)), with_kwargs=True
    )
    images = {}
    if "image" in name or name in ("i2v", "flf2v", "i2v-a14b"):
        images["image"] = Image.fromarray(frames[0])
    if name == "flf2v":
        images["last_image"] = Image.fromarray(frames[-1])
    with hook:
        model.pipeline(
            prompt_embeds=text,
            negative_prompt_embeds=text,
            latents=noisy.clone(),
            height=model.height,
            width=model.width,
            num_frames=len(frames),
            num_inference_steps=1,
            guidance_scale=1.0,
            output_type="latent",
            **images,
        )
    kwargs, (expected,) = calls[0]
    timestep = kwargs["timestep"].flatten()[-1:].float()
    found = model.predict(model.batch(record), noisy, timestep / 1000)
    if name in ("i2v", "flf2v", "ti2v", "ti2v-image"):
        # CLIP in a batch of two; and where the pipeline tells each token the same timestep, here each sample is told
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_of_mixed_text_lengths_equals_single_samples(models, name):
    model = models(name)
    records = [model.encode(text, model.video(number)) for number, text in enumerate(TEXTS[:3])]
    batch = model.batch(*records)
    noisy = torch.randn(batch.fields["latents"].shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.5, 1.0])
    together = model.predict(batch, noisy, sigma)
    for number, record in enumerate(records):
        single = model.predict(model.batch(record), noisy[number : number + 1], sigma[number : number + 1])
        torch.testing.assert_close(together[number : number + 1], single, rtol=0, atol=2e-6)


def test_a_given_first_frame_is_clean_and_no_part_of_the_loss(models):
    from diffsynth_pipe.config import load_config
    from diffsynth_pipe.contracts import load_task
    from diffsynth_pipe.training.flow_match import SigmaDistribution, add_noise
    from diffsynth_pipe.training.randomness import SampleDraws

    model = models("ti2v-image")
    batch = model.batch(model.encode())
    levels = SigmaDistribution(model.family.schedule, load_config(None, {"dataset_base_path": "data"}))
    draws = SampleDraws.of(batch, seed=0)
    with torch.no_grad():
        loss = load_task("sft").loss(model.family, {"dit": model.components["dit"]}, batch, draws, levels)
    latents = batch.fields["latents"]
    level, noise = levels.draw(draws.uniform(), 1), draws.noise(latents)
    noisy = add_noise(latents, noise, level.sigma)
    error = model.predict(batch, noisy, level.model_sigma) - (noise - latents)
    assert float(loss) == pytest.approx(float(error[:, :, 1:].square().mean() * level.weight), rel=1e-6)
    noisy[:, :, 0] = 1e3  # what stands there is not seen
    assert torch.equal(model.predict(batch, noisy, level.model_sigma) - (noise - latents), error)


def test_the_schedule_and_its_weights_are_the_references():
    """Sigmas 5u/(1+4u) of linspace(1, 0, 1001)[:-1], and the bell of 1000 of them that sums to 1000."""
    u = np.linspace(1, 0, 1001)[:-1]
    sigmas = 5 * u / (1 + 4 * u)
    for name in ("wan", "wan_ti2v"):
        grid = sigma_grid(load_family(name).schedule)
        np.testing.assert_allclose(grid.numpy(), sigmas, rtol=0, atol=1e-6)
        bell = np.exp(-2 * ((1000 * sigmas - 500) / 1000) ** 2)
        weights = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
        np.testing.assert_allclose(bell_weights(grid, grid).numpy(), weights, rtol=0, atol=1e-6)
    assert (round(float(sigmas[499]), 4), round(float(sigmas[-1]), 6)) == (0.8339, 0.00498)


def test_the_lora_of_an_expert_loads_into_its_place(models, tmp_path):
    """Other weights in ``transformer_2`` than in ``transformer``, so that a mistake would show."""
    import diffusers
    from safetensors.torch import save_file

    from diffsynth_pipe.training.lora import LoraSettings, add_lora, lora_parameters
    from diffsynth_pipe.training.lora_file import export_lora

    model = models("t2v-a14b")
    dit = model.load("dit", "transformer_2")
    settings = LoraSettings(targets=model.family.lora_target_modules, rank=4, alpha=4.0)
    add_lora(dit, settings, seed=0)
    with torch.no_grad():
        for parameter in lora_parameters(dit).values():
            parameter.add_(0.05)
    tensors = {name: parameter.detach() for name, parameter in lora_parameters(dit).items()}
    exported, metadata = export_lora(tensors, settings, "diffusers", prefix="transformer", architecture="Wan")
    save_file(exported, tmp_path / "lora.safetensors", metadata)
    fresh = diffusers.WanPipeline.from_pretrained(model.folder, dtype=torch.float32)
    fresh.load_lora_weights(tmp_path / "lora.safetensors", load_into_transformer_2=True)
    batch = model.batch(model.encode())
    noisy, sigma = torch.randn(batch.fields["latents"].shape), torch.tensor([0.5])
    expected = model.predict(batch, noisy, sigma, dit)
    assert torch.equal(model.predict(batch, noisy, sigma, fresh.transformer_2), expected)
    assert not torch.equal(model.predict(batch, noisy, sigma, fresh.transformer), expected)
    assert not torch.equal(model.predict(batch, noisy, sigma, model.load("dit", "transformer_2")), expected)


@pytest.mark.parametrize(
    ("cached", "denoiser", "message"),
    [
        ("t2v", "i2v-a14b", "lacks y, which this denoiser needs; run data_process with input_image in extra_inputs"),
        ("i2v-a14b", "t2v", "holds y, which this denoiser does not take"),
        ("i2v-a14b", "i2v", "lacks clip_feature, which this denoiser needs; run data_process with clip_feature"),
        ("i2v", "i2v-a14b", "holds clip_feature, which this denoiser does not take"),
    ],
)
def test_a_cache_for_another_denoiser_is_refused(models, cached, denoiser, message):
    fields = models(cached).encode()
    shapes = {name: tuple(value.shape)[name == "prompt_emb" :] for name, value in fields.items()}
    models(cached).family.check_fields(dict(models(cached).components["dit"].config), shapes)
    with pytest.raises(CacheMismatch, match=message):
        models(denoiser).family.check_fields(dict(models(denoiser).components["dit"].config), shapes)


@pytest.mark.parametrize(("name", "other"), [("wan", "ti2v"), ("wan_s2v", "ti2v"), ("wan_ti2v", "t2v")])
def test_the_vae_of_another_family_is_refused(models, name, other):
    folder = models(other).folder / "vae"
    files = ComponentFiles(weights=tuple(folder.glob("*.safetensors")), folder=folder)
    with pytest.raises(ModelError, match=r"makes latents of 1/(8|16) of the size, not 1/(8|16); name another VAE"):
        load_family(name).components["vae"].load(files, torch.float32, CPU)
