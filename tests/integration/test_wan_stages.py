"""One cache of clips trains both experts of Wan2.2; image to video from real files, through the cache and back."""

from __future__ import annotations

import json
import logging
import shutil
import wave
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cache_store.store import Cache
from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import load_family, load_task
from diffsynth_pipe.errors import CacheMismatch, ConfigError, ModelError
from diffsynth_pipe.families.wan import write_tiny_variant
from diffsynth_pipe.stages.data_process import data_process
from diffsynth_pipe.stages.plan import check_switches, plan_train
from diffsynth_pipe.stages.train import train
from diffsynth_pipe.training.flow_match import SigmaDistribution
from diffsynth_pipe.training.loss_module import LossModule, OneLoss
from diffsynth_pipe.training.sources import CachedSource
from diffsynth_pipe.training.validation import Validator

DEMO = Path(__file__).parents[2] / "deploy" / "demo"


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Parameters of a run on two clips, without the name of a repository."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    rows = json.loads((DEMO / "clips.json").read_text("utf-8"))[:2]
    for row in rows:
        shutil.copy(DEMO / row["video"], tmp_path)
        row["video"] = Path(row["video"]).name
    (tmp_path / "clips.json").write_text(json.dumps(rows))

    def make(variant, **changes):
        write_tiny_variant(tmp_path / "models" / "tiny" / variant, variant)
        models = ("text_encoder", "vae", *changes.pop("models", ("transformer",)))
        return {
            "family": "wan",
            "dataset_base_path": str(tmp_path),
            "dataset_metadata_path": str(tmp_path / "clips.json"),
            "height": 32,
            "width": 48,
            "num_frames": 9,
            "encode_dtype": "float32",
            "model_id_with_origin_paths": ",".join(f"tiny/{variant}:{name}/*.safetensors" for name in models),
            "output_path": str(tmp_path / "output"),
            "cache_path": str(tmp_path / f"cache-{variant}"),
            "lora_base_model": "dit",
            "lora_rank": 4,
            "learning_rate": 1e-3,
            "num_validation_samples": 0,
            **changes,
        }

    return make


def stages(parameters, task="sft", **changes):
    """Run both stages; ``changes`` are of the second one alone."""
    data_process(load_config(None, {**parameters, "task": f"{task}:data_process"}))
    return train(load_config(None, {**parameters, **changes, "task": f"{task}:train"}))


def test_one_cache_trains_both_experts_each_in_its_part_of_the_grid(settings, caplog):
    high = settings("t2v-a14b", max_timestep_boundary=0.417)
    low = settings("t2v-a14b", min_timestep_boundary=0.417, models=("transformer_2",))
    with caplog.at_level(logging.WARNING):
        first, second = stages(high), train(load_config(None, {**low, "task": "sft:train"}))
    assert "boundary_ratio" not in caplog.text
    assert len(list((Path(high["cache_path"]) / "snapshots").glob("*.npz"))) == 1
    assert first.key != second.key
    base = [result.summary["base_model"] for result in (first, second)]
    assert base[0] == base[1]
    loras = [load_file(result.path / result.summary["lora_path"]) for result in (first, second)]
    assert loras[0].keys() == loras[1].keys()
    assert any(not torch.equal(loras[0][name], loras[1][name]) for name in loras[0])

    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(base[0], dtype=torch.float32)
    pipeline.load_lora_weights(first.path / first.summary["lora_path"])
    pipeline.load_lora_weights(second.path / second.summary["lora_path"], load_into_transformer_2=True)
    for expert, lora in zip((pipeline.transformer, pipeline.transformer_2), loras, strict=True):
        loaded = {name: value for name, value in expert.named_parameters() if "lora_" in name}
        assert len(loaded) == len(lora)
        for name, value in loaded.items():
            key = "transformer." + ".".join(part for part in name.split(".") if not part.startswith("default"))
            assert torch.equal(value, lora[key].to(value.dtype))


DMD2 = {"task": "dmd2", "dmd2_matching_t_min": 0.8, "dmd2_matching_t_max": 0.9}


@pytest.mark.parametrize(
    ("model", "boundary", "message"),
    [
        ("transformer", {}, "transformer is trained at sigma 0.00498 to 1, but takes no less than 0.875"),
        ("transformer_2", {}, "transformer_2 is trained at sigma 0.00498 to 1, but takes less than 0.875"),
        ("transformer_2", {"max_timestep_boundary": 0.417}, "transformer_2 is trained at sigma 0.875 to 1"),
        ("transformer", DMD2, "transformer is trained at sigma 0.8 to 0.9, but takes no less than 0.875"),
        ("transformer_2", DMD2, "less than 0.875 in inference (boundary_ratio); set dmd2_matching_t_max"),
    ],
)
def test_an_expert_that_is_trained_beyond_its_boundary_is_told(model, boundary, message, settings, caplog):
    with caplog.at_level(logging.WARNING):
        stages(settings("t2v-a14b", models=(model,), max_steps=1), **boundary)
    assert message in caplog.text


def test_both_experts_at_once_are_refused(settings):
    parameters = settings("t2v-a14b", models=("transformer", "transformer_2"))
    with pytest.raises(ModelError, match=r"2 model entries name the dit: .*; keep one"):
        stages(parameters)


def test_first_and_last_frame_go_through_the_cache(settings):
    """The condition is that of both frames, though a unit for the first alone is enabled too; no more is stored."""
    models = ("transformer", "image_encoder")
    parameters = settings("flf2v", extra_inputs="input_image,end_image,clip_feature", models=models, max_steps=2)
    result = stages(parameters)
    assert result.summary["num_steps"] == 2
    snapshot = Cache.open(Path(parameters["cache_path"])).latest()
    assert set(snapshot.header["units"]) == {"text", "latents", "first_and_last_frame", "clip"}
    shapes = {name: min(shapes) for name, shapes in snapshot.field_shapes().items()}
    assert shapes["y"] == (20, 3, 4, 6)
    assert shapes["clip_feature"] == (2, 5, 32)
    assert list(snapshot.bucket_members) == ["32x48x9"]
    without = settings("flf2v", extra_inputs=None, models=("transformer",), cache_path=f"{parameters['cache_path']}-2")
    with pytest.raises(CacheMismatch, match="lacks y, which this denoiser needs"):
        stages(without)


def test_framewise_decoding_trains_on_a_latent_frame_of_each_frame(settings):
    parameters = settings("i2v-a14b", extra_inputs="input_image", max_steps=1, num_frames=6)
    with pytest.raises(ConfigError, match=r"^num_frames: 6 is not a multiple of 4 plus 1"):
        stages(parameters)
    result = stages({**parameters, "framewise_decoding": True})
    assert result.summary["num_steps"] == 1
    snapshot = Cache.open(Path(parameters["cache_path"])).latest()
    shapes = {name: min(shapes) for name, shapes in snapshot.field_shapes().items()}
    assert shapes["latents"] == (16, 6, 4, 6)
    assert shapes["y"] == (20, 6, 4, 6)

    run = load_config(None, {"dataset_base_path": "data", "family": "qwen_image", "framewise_decoding": True})
    with pytest.raises(ConfigError, match=r"^framewise_decoding: family 'qwen_image' has no such switch; leave it out"):
        check_switches(run, load_family("qwen_image"))


def test_speech_to_video_takes_the_columns_of_the_references_command(settings, tmp_path):
    """As its script names them; sound of half a second, and as poses the clips the other way round."""
    rows = json.loads((tmp_path / "clips.json").read_text())
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 8000, "NONE", ""))
        file.writeframes(bytes(range(250)) * 64)
    for row, other in zip(rows, [row["video"] for row in reversed(rows)], strict=True):
        row |= {"input_audio": "tone.wav", "s2v_pose_video": other}
    (tmp_path / "clips.json").write_text(json.dumps(rows))
    load_family("wan_s2v").write_tiny(tmp_path / "models" / "tiny" / "s2v")
    models = ("transformer", "text_encoder", "vae", "audio_encoder")
    parameters = {
        **settings("t2v"),
        "family": "wan_s2v",
        "data_file_keys": "video,input_audio,s2v_pose_video",
        "extra_inputs": "input_image,input_audio,s2v_pose_video",
        "model_id_with_origin_paths": ",".join(f"tiny/s2v:{name}/*.safetensors" for name in models),
        "audio_processor_path": "tiny/s2v:audio_processor/",
        "cache_path": str(tmp_path / "cache"),
        "num_epochs": 2,
    }
    with pytest.raises(ConfigError, match=r"^framewise_decoding: family 'wan_s2v' has no such switch; leave it out"):
        stages({**parameters, "framewise_decoding": True})
    result = stages(parameters)
    assert result.summary["num_steps"] == 4
    without_poses = {"extra_inputs": "input_image,input_audio"}
    run = load_config(None, {**parameters, **without_poses, "task": "sft:train"})
    assert plan_train(run).verdict == "build"
    with pytest.raises(
        CacheMismatch, match=r"holds pose_latents, .* extra_inputs lacks s2v_pose_video; name it, or run"
    ):
        stages(parameters, **without_poses)
    snapshot = Cache.open(Path(parameters["cache_path"])).latest()
    assert snapshot.num_records["audio"] == 2  # of the same sound, beside another clip
    assert list(snapshot.bucket_members) == ["32x48x9+32x48x9"]
    assert {name: min(shapes) for name, shapes in snapshot.field_shapes().items()} == {
        "prompt_emb": (64,),
        "latents": (16, 2, 4, 6),
        "reference_latents": (16, 1, 4, 6),
        "audio_embeds": (3, 32, 8),
        "pose_latents": (16, 2, 4, 6),
    }


@pytest.mark.parametrize(("variant", "model"), [("t2v", "transformer"), ("t2v-a14b", "transformer_2")])
def test_a_fresh_pipeline_with_the_lora_gives_the_loss_that_training_ended_with(variant, model, settings):
    from accelerate import Accelerator
    from diffusers import WanPipeline

    parameters = settings(variant, models=(model,), num_epochs=4, num_validation_samples=2)
    result = stages(parameters)
    run = result.summary
    assert run["loss_after"] < run["loss_before"]
    pipeline = WanPipeline.from_pretrained(run["base_model"], vae=None, text_encoder=None, dtype=torch.float32)
    family = load_family("wan")
    source = CachedSource(Cache.open(Path(parameters["cache_path"])).latest(), ["latents", "prompt_emb"])

    def loss():
        levels = SigmaDistribution(family.schedule, load_config(None, parameters))
        module = LossModule(OneLoss(family, load_task("sft"), levels, 1.0), {"dit": getattr(pipeline, model)})
        return Validator(module, source, Accelerator(), torch.float32, num_samples=2, held_out=False).measure(0).loss

    assert loss() == pytest.approx(run["loss_before"], rel=1e-7)
    pipeline.load_lora_weights(result.path / run["lora_path"], load_into_transformer_2=model == "transformer_2")
    assert loss() == pytest.approx(run["loss_after"], rel=1e-7)
