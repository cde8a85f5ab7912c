"""Wan2.2-S2V against numbers of DiffSynth-Studio 2.1.12: its WanS2VModel, FlowMatchSFTLoss and WanVideoUnit_S2V.

Weights and inputs are sines of squares, so that no random generator has a part in them. The denoiser's are written
under their published names, which the reference reads, and converted.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from family_samples import load_components, random_media
from safetensors.torch import load_file, save_file

from diffsynth_pipe.cli import main
from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import Batch, ComponentFiles, NoiseLevel, load_family, load_task
from diffsynth_pipe.errors import CacheMismatch, DataError, ModelError
from diffsynth_pipe.families import wan_s2v
from diffsynth_pipe.hub import resolve_components
from diffsynth_pipe.modeling import wan
from diffsynth_pipe.stages.plan import plan_cut
from diffsynth_pipe.training.flow_match import bell_weights, sigma_grid
from diffsynth_pipe.training.lora import LoraSettings, add_lora, lora_parameters
from diffsynth_pipe.training.lora_file import export_lora, file_layers

FAMILY = load_family("wan_s2v")
SHAPE = (1, 16, 4, 8, 10)
VELOCITIES = {
    "pose": [1.74665, 1.0245, 0.33605, -1.80356, 0.0869, 3.53993, 0.66042, 0.55123],
    "no pose": [1.03661, 0.15128, -0.98538, -1.34096, 0.10071, 2.75123, 0.50496, 0.48479],
}
LOSSES = {"pose": 1.164326548576355, "no pose": 1.1849805116653442}


def squares(shape, speed):
    return torch.sin(speed * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) ** 2).view(shape).float()


def layer(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def attention(name):
    norms = {f"{name}.norm_{part}.weight": (24,) for part in "qk"}
    return {key: shape for part in "qkvo" for key, shape in layer(f"{name}.{part}", 24, 24).items()} | norms


ORIGINAL_CONFIG = {
    "_class_name": "WanModel_S2V",
    "dim": 24,
    "num_heads": 2,
    "num_layers": 3,
    "in_dim": 16,
    "out_dim": 16,
    "ffn_dim": 48,
    "freq_dim": 32,
    "text_dim": 12,
    "cond_dim": 16,
    "audio_dim": 8,
    "num_audio_token": 4,
    "audio_inject_layers": [0, 2],
    "eps": 1e-6,
    "enable_adain": True,
    "zero_timestep": True,
}
ORIGINAL_SHAPES = {
    **layer("patch_embedding", 24, 16, 1, 2, 2),
    **layer("text_embedding.0", 24, 12),
    **layer("text_embedding.2", 24, 24),
    **layer("time_embedding.0", 24, 32),
    **layer("time_embedding.2", 24, 24),
    **layer("time_projection.1", 144, 24),
    **{
        name: shape
        for block in ("blocks.0", "blocks.1", "blocks.2")
        for name, shape in {
            f"{block}.modulation": (1, 6, 24),
            **attention(f"{block}.self_attn"),
            **attention(f"{block}.cross_attn"),
            **layer(f"{block}.norm3", 24),
            **layer(f"{block}.ffn.0", 48, 24),
            **layer(f"{block}.ffn.2", 24, 48),
        }.items()
    },
    "head.modulation": (1, 2, 24),
    **layer("head.head", 64, 24),
    **layer("cond_encoder", 24, 16, 1, 2, 2),
    "casual_audio_encoder.weights": (1, 25, 1, 1),
    "casual_audio_encoder.encoder.padding_tokens": (1, 1, 1, 24),
    **layer("casual_audio_encoder.encoder.conv1_local.conv", 24, 8, 3),
    **layer("casual_audio_encoder.encoder.conv1_global.conv", 6, 8, 3),
    **layer("casual_audio_encoder.encoder.conv2.conv", 12, 6, 3),
    **layer("casual_audio_encoder.encoder.conv3.conv", 24, 12, 3),
    **layer("casual_audio_encoder.encoder.final_linear", 24, 24),
    **attention("audio_injector.injector.0"),
    **attention("audio_injector.injector.1"),
    **layer("audio_injector.injector_adain_layers.0.linear", 48, 24),
    **layer("audio_injector.injector_adain_layers.1.linear", 48, 24),
    "trainable_cond_mask.weight": (3, 24),
    **layer("frame_packer.proj", 24, 16, 1, 2, 2),
    **layer("frame_packer.proj_2x", 24, 16, 2, 4, 4),
    **layer("frame_packer.proj_4x", 24, 16, 4, 8, 8),
}
"""The weights of the reference's WanS2VModel at this size, by its names, which are those of the published files."""


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder of two files as the model was published."""
    folder = tmp_path_factory.mktemp("Wan2.2-S2V")
    (folder / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    weights = {
        name: 0.3 * squares(shape, 0.37 + zlib.crc32(name.encode()) % 1000 / 1000)
        for name, shape in ORIGINAL_SHAPES.items()
    }
    names = list(weights)
    for number, part in enumerate((names[:50], names[50:]), start=1):
        path = folder / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, path)
    return folder


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "transformer"
    assert main(["convert-wan-s2v", str(original), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def dit(converted):
    files = ComponentFiles(weights=tuple(sorted(converted.glob("*.safetensors"))), folder=converted)
    return FAMILY.components["dit"].load(files, torch.float32, torch.device("cpu"))


def test_what_is_no_published_model_is_refused(original, converted, tmp_path, capsys):
    shutil.copytree(original, tmp_path / "half")
    (tmp_path / "half" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    shutil.copytree(original, tmp_path / "narrow")
    (tmp_path / "narrow" / "config.json").write_text(json.dumps({**ORIGINAL_CONFIG, "ffn_dim": 64}))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps({**ORIGINAL_CONFIG, "zero_timestep": False}))
    shutil.copytree(original, tmp_path / "cut")
    (tmp_path / "cut" / "diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(bytes(9))
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    for name, target, message in (
        ("half", "new", "lacks 91 weights, such as audio_injector.injector.0.norm_k.weight; download it again"),
        ("narrow", "new", "blocks.0.ffn.net.0.proj.bias has shape [48], which config.json does not say"),
        ("old", "new", "without zero_timestep or enable_adain, which is not implemented"),
        (converted, "new", "holds a 'WanS2VTransformer3DModel', expected a 'WanModel_S2V'"),
        ("nowhere", "new", "config.json: cannot be read"),
        ("cut", "new", "diffusion_pytorch_model-00001-of-00002.safetensors: is damaged ("),
        ("list", "new", "list: holds a None, expected a 'WanModel_S2V'"),
        (original, "old/config.json/new", "old/config.json/new: [Errno 17] File exists"),
        (original, "half", "half: exists; name a new folder"),
    ):
        assert main(["convert-wan-s2v", str(tmp_path / name), str(tmp_path / target)]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "half", "list", "narrow", "old"]


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny" / "S2V"
    FAMILY.write_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def components(repo):
    return load_components(FAMILY, repo, torch.float32)


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_weights_of_other_names_are_refused(repo, tmp_path, kind):
    shutil.copytree(repo / "transformer", tmp_path / "transformer")
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = "blocks.1.attn1.to_q.weight"
    if kind == "missing":
        del weights[name]
    else:
        name = "blocks.1.attn1.q.weight"
        weights[name] = torch.zeros(1)
    save_file(weights, path)
    with pytest.raises(ModelError, match=rf"transformer: 1 {kind} weights, such as {name}; convert the published ones"):
        FAMILY.components["dit"].load(
            ComponentFiles(weights=(path,), folder=path.parent), torch.float32, torch.device("cpu")
        )


@pytest.fixture
def batch(request):
    latents = squares(SHAPE, 1.3)
    fields = {
        "latents": latents[:, :, 1:],
        "reference_latents": latents[:, :, :1],
        "prompt_emb": squares((1, 7, 12), 0.7),
        "audio_embeds": squares((1, 25, 8, 12), 0.9),
        "pose_latents": squares((1, 16, 3, 8, 10), 1.1),
    }
    if request.param == "no pose":
        del fields["pose_latents"]
    return Batch(fields=fields, lengths={"prompt_emb": torch.tensor([7])}, sample_ids=("0" * 32,), visits=(0,))


@pytest.mark.parametrize(("batch", "expected"), VELOCITIES.items(), indirect=["batch"])
@torch.no_grad()
def test_the_velocity_is_the_references(dit, batch, expected):
    found = FAMILY.predict_velocity({"dit": dit}, batch, batch.fields["latents"], torch.tensor([0.431]))
    assert found.shape == batch.fields["latents"].shape
    torch.testing.assert_close(found.flatten()[::131][:8], torch.tensor(expected), rtol=0, atol=5e-5)


@pytest.mark.parametrize(("batch", "expected"), LOSSES.items(), indirect=["batch"])
@torch.no_grad()
def test_the_loss_is_the_references(dit, batch, expected):
    """At the 301st level of the grid; the reference's noise has a frame more, the first, which its loss leaves out."""
    grid = sigma_grid(FAMILY.schedule)
    sigma = grid[300:301]
    levels = SimpleNamespace(draw=lambda *_: NoiseLevel(sigma, sigma, bell_weights(grid, grid)[300:301]))
    draws = SimpleNamespace(uniform=lambda: None, noise=lambda _: squares(SHAPE, 1.7)[:, :, 1:])
    found = load_task("sft").loss(FAMILY, {"dit": dit}, batch, draws, levels)
    assert float(found) == pytest.approx(expected, rel=1e-5)


AUDIO = [
    (4800, 9, [0.21783, 0.21887, 0.23455, 0.22043, 0, 0, 0, 0], "the audio ends after 4 of 8 frames"),
    (
        16000,
        17,
        [
            *(0.21784, 0.22113, 0.22951, 0.22797, 0.22713, 0.22904, 0.22819, 0.22522),
            *(0.22371, 0.2276, 0.22551, 0.22807, 0.22648, 0.22685, 0.222, 0.22669),
        ],
        None,
    ),
]


@pytest.mark.parametrize(("num_samples", "num_frames", "expected", "note"), AUDIO)
@torch.no_grad()
def test_audio_features_are_the_references(repo, num_samples, num_frames, expected, note):
    """A chirp that ends before the clip, and one of its length: channel 3 of the first hidden state."""
    encoder = load_components(FAMILY, repo, torch.float32)["audio_encoder"]
    for parameter in encoder.model.parameters():
        parameter.copy_(0.3 * squares(parameter.shape, 0.37 + sum(parameter.shape) % 7 / 10))
    chirp = np.sin(np.arange(num_samples) ** 2 * 2e-4).astype(np.float32)
    inputs = {"input_audio": chirp, "video": np.zeros((num_frames, 16, 16, 3), np.uint8)}
    found = wan_s2v.encode_audio({"audio_encoder": encoder}, inputs)["audio_embeds"]
    assert found.shape == (3, 32, num_frames - 1)
    torch.testing.assert_close(found[0, 3], torch.tensor(expected), rtol=0, atol=2e-5)
    assert wan_s2v.note_on_audio({}, inputs) == note


def clip(num_frames, seed=0):
    return np.concatenate([random_media("video", seed + n, 32, 48) for n in range(3)])[:num_frames]


@torch.no_grad()
def test_the_clip_falls_into_reference_picture_and_what_is_generated(components):
    inputs = {"video": clip(9), "seed": 3, "rand_device": "cpu"}
    first = wan_s2v.encode_reference(components, inputs)["reference_latents"]
    others = wan_s2v.encode_latents(components, inputs)["latents"]
    assert torch.equal(torch.cat([first, others], dim=1), wan.video_latents(components["vae"], wan.to_video(clip(9))))
    noise = FAMILY.noise_unit.encode({}, inputs)["noise"]
    assert torch.equal(noise, torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(3))[:, 1:])
    with pytest.raises(DataError, match=r"^video: has one frame, .*; a clip needs 5 at least$"):
        wan_s2v.encode_latents(components, {"video": clip(1)})


@pytest.mark.parametrize("num_poses", [5, 9])
@torch.no_grad()
def test_poses_are_those_of_the_frames_that_are_generated(components, num_poses):
    """The first stands twice, as a causal VAE makes a latent frame of it alone; too short a video ends in black."""
    pose = clip(num_poses, seed=7)
    frames = [pose[0], *pose[:8], *[np.zeros_like(pose[0])] * (8 - num_poses)]
    expected = wan.video_latents(components["vae"], wan.to_video(np.stack(frames)))[:, 1:]
    found = wan_s2v.encode_pose(components, {"video": clip(9), "s2v_pose_video": pose})["pose_latents"]
    assert torch.equal(found, expected)
    with pytest.raises(DataError, match="s2v_pose_video: is 32x32 px where the video is 32x48; set height and width"):
        wan_s2v.encode_pose(components, {"video": clip(9), "s2v_pose_video": pose[:, :, :32]})


def test_the_references_extra_inputs_choose_the_units():
    options = {"dataset_base_path": "data", "family": "wan_s2v", "lora_base_model": "dit"}
    units = {}
    for extra in ("input_audio", "input_image,input_audio,s2v_pose_video"):
        units[extra] = [
            unit.name for unit in plan_cut(load_config(None, {**options, "extra_inputs": extra}), FAMILY).cached
        ]
    assert list(units.values()) == [
        ["text", "latents", "reference", "audio"],
        ["text", "latents", "first_frame", "audio", "pose"],
    ]


def test_audio_processor_path_names_what_prepares_the_audio(repo, components, tmp_path, monkeypatch):
    """One that does not normalise lets the encoder hear how loud the audio is."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(repo.parents[1]))
    settings = json.loads((repo / "audio_processor" / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "do_normalize": False}))
    options = {
        "dataset_base_path": "data",
        "family": "wan_s2v",
        "model_id_with_origin_paths": "tiny/S2V:audio_encoder/model.safetensors",
    }
    found = []
    for change in ({}, {"audio_processor_path": str(tmp_path)}):
        files = resolve_components(load_config(None, {**options, **change}), FAMILY, ["audio_encoder"])
        encoder = FAMILY.components["audio_encoder"].load(files["audio_encoder"], torch.float32, torch.device("cpu"))
        audio = random_media("audio", 0)
        with torch.no_grad():
            loud, quiet = (
                wan_s2v.encode_audio({"audio_encoder": encoder}, {"input_audio": volume * audio, "video": clip(5)})
                for volume in (1, 0.1)
            )
        found.append(float((loud["audio_embeds"] - quiet["audio_embeds"]).abs().max()))
    assert found[0] < 1e-3 < found[1]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "sampling_rate": 8000}))
    with pytest.raises(ModelError, match=r"hears 8000 samples a second, not 16000; name another$"):
        FAMILY.components["audio_encoder"].load(files["audio_encoder"], torch.float32, torch.device("cpu"))


def test_a_lora_has_the_published_names_on_request(converted):
    files = ComponentFiles(weights=tuple(sorted(converted.glob("*.safetensors"))), folder=converted)
    model = FAMILY.components["dit"].load(files, torch.float32, torch.device("cpu"))
    settings = LoraSettings(targets=FAMILY.lora_target_modules, rank=2, alpha=2.0)
    add_lora(model, settings, seed=0)
    weights = {name: parameter.detach() for name, parameter in lora_parameters(model).items()}
    layers = file_layers(model, FAMILY.components["dit"].lora_layers["diffsynth"])
    tensors, _ = export_lora(weights, settings, "diffsynth", prefix="transformer", architecture="x", layers=layers)
    targets = re.compile(r"(.*_attn\.[qkvo]|.*\.injector\.\d\.[qkvo]|.*\.ffn\.[02])\.weight")
    expected = {match[1] for match in map(targets.fullmatch, ORIGINAL_SHAPES) if match}
    assert {name.split(".lora_")[0] for name in tensors} == expected


def test_a_cache_of_another_encoder_is_refused(dit):
    with pytest.raises(CacheMismatch, match="audio_embeds with 768 channels, but the denoiser takes 8"):
        FAMILY.check_fields(dict(dit.config), {"audio_embeds": (13, 768, 80)})
