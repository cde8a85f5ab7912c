"""DMD2 on the tiny denoiser, against a plain torch loop, an uninterrupted run, and what diffusers makes of the LoRA."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from plain_dmd2 import PlainDMD2
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_trainings import LAUNCH_FILES, launch, write_cache

from cache_store.reader import BatchReader
from cache_store.store import Cache
from diffsynth_pipe.config import load_config
from diffsynth_pipe.errors import CacheMismatch, TrainingStopped
from diffsynth_pipe.stages.train import train
from diffsynth_pipe.training.distribution_matching import DistributionMatching
from diffsynth_pipe.training.loop import Loop
from diffsynth_pipe.training.randomness import SampleDraws
from diffsynth_pipe.training.run_dir import resumable
from diffsynth_pipe.training.sampler import BucketSampler
from diffsynth_pipe.training.validation import ValidationDraws

NUM_STEPS = 6
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj"]
RATES = {"student": 1e-2, "fake_score": 3e-3, "discriminator": 1e-3}
CLIPS = {"student": 5e-5, "critic": 0.5}  # low enough to clip most steps of the tiny model
SIGMAS = (0.999, 0.4995, 0.0)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("cache"), empty_caption=True)


@pytest.fixture
def distillation(parameters):
    return {
        **parameters,
        "task": "dmd2:train",
        "dataset_repeat": 2,
        "num_validation_samples": 1,
        "learning_rate": RATES["student"],
        "max_grad_norm": CLIPS["critic"],
        "dmd2_student_update_freq": 3,
        "dmd2_student_sample_steps": 2,
        "dmd2_teacher_cfg_scale": 3,
        "dmd2_gan_loss_weight": 0.5,
        "dmd2_student_grad_clip_norm": CLIPS["student"],
        "dmd2_fake_score_learning_rate": RATES["fake_score"],
        "dmd2_discriminator_learning_rate": RATES["discriminator"],
    }


def metrics(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def read(reader, index):
    raw = reader.read([index])
    return raw, *(torch.from_numpy(raw.fields[name]).view(torch.bfloat16).float() for name in ("latents", "prompt_emb"))


def distill_by_hand(cache_dir, repository, *, full):
    """Train three models in turns, each with an optimizer of its own; return losses, norms and the student."""
    from diffusers import QwenImageTransformer2DModel
    from peft import LoraConfig

    student, teacher, fake_score = (
        QwenImageTransformer2DModel.from_pretrained(repository / "transformer").requires_grad_(False) for _ in range(3)
    )
    for model in (student, fake_score):
        if full:
            model.requires_grad_(True)
        else:
            torch.manual_seed(0)
            model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    torch.manual_seed(0)
    head = torch.nn.Sequential(
        torch.nn.Conv2d(128, 64, 4, stride=2, padding=1),
        torch.nn.GroupNorm(32, 64),
        torch.nn.Identity(),
        torch.nn.Conv2d(64, 1, 1),
    )
    trained = {
        name: [parameter for parameter in model.parameters() if parameter.requires_grad]
        for name, model in {"student": student, "fake_score": fake_score, "discriminator": head}.items()
    }
    optimizers = {
        name: torch.optim.AdamW(parameters, lr=RATES[name], weight_decay=0.01) for name, parameters in trained.items()
    }
    snapshot = Cache.open(cache_dir).latest()
    reader = BatchReader(snapshot, ["latents", "prompt_emb"])
    _, _, empty = read(reader, snapshot.reserved["0" * 32])
    sampler = BucketSampler({name: len(members) for name, members in snapshot.bucket_members.items()}, 2, 0)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        plan, total = sampler.plan(step), 0.0
        is_student = step % 3 == 0
        names = ["student"] if is_student else ["fake_score", "discriminator"]
        for index, visit in zip(plan.indices, plan.visits, strict=True):
            raw, latents, text = read(reader, snapshot.bucket_members[plan.bucket][index])
            draws = SampleDraws(0, raw.sample_ids, [visit])
            weights = {f"heads.0.{name}": weight for name, weight in head.named_parameters()}
            if is_student:
                weights = {name: weight.detach() for name, weight in weights.items()}
            plain = PlainDMD2(student, teacher, fake_score, weights, sigmas=SIGMAS, gan=0.5, guidance=3, empty=empty)
            drawn = {name: draws.noise(latents, name) for name in ("student", "matching", "r1")}
            drawn |= {"u": float(draws.uniform()), "step": float(draws.uniform("student_step"))}
            loss = (plain.student_loss if is_student else plain.critic_loss)(latents, text, drawn) / len(plan.indices)
            loss.backward()
            total += loss.item()
        parameters = [parameter for name in names for parameter in trained[name]]
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIPS["student" if is_student else "critic"])))
        for name in names:
            optimizers[name].step()
            optimizers[name].zero_grad()
        losses.append(total)
    return losses, norms, student


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_steps_are_those_of_a_plain_torch_loop(distillation, cache_dir, dit_only, full):
    losses, norms, student = distill_by_hand(cache_dir, dit_only, full=full)
    assert sum(norm > CLIPS["student"] for norm in norms[::3]) == 2
    if full:
        distillation = {name: value for name, value in distillation.items() if not name.startswith("lora_")}
        distillation["trainable_models"] = "dit"
    result = train(load_config(None, distillation))
    lines = metrics(result.path)
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=1e-3)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], norms, rtol=2e-3)
    assert ["student_loss" in line for line in lines] == [True, False, False] * 2
    assert ["critic_loss" in line for line in lines] == [False, True, True] * 2
    (file,) = result.summary["files"]
    saved = load_file(result.path / file)
    expected = {name: weight for name, weight in student.state_dict().items() if full or "lora" in name}
    if not full:
        expected = {f"transformer.{name.replace('.default', '')}": weight for name, weight in expected.items()}
    assert set(saved) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight, rtol=1e-2, atol=2e-4)


def stopped_at(parameters, step, monkeypatch):
    take_step = Loop._step

    def take_step_and_stop(self, number, batches):
        values = take_step(self, number, batches)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", take_step_and_stop)
        with pytest.raises(TrainingStopped):
            train(load_config(None, parameters))


@pytest.mark.parametrize(
    ("step", "changes"),
    [(1, {}), (2, {"use_ema": True, "lora_dropout": 0.2, "gradient_accumulation_steps": 2, "batch_size": 1})],
    ids=["after the student", "amid the critic's steps"],
)
def test_a_stopped_run_ends_with_the_bytes_of_an_uninterrupted_one(distillation, tmp_path, monkeypatch, step, changes):
    distillation |= {**changes, "save_steps": 1}
    whole = train(load_config(None, {**distillation, "output_path": str(tmp_path / "uninterrupted")}))
    stopped_at(distillation, step, monkeypatch)
    run_dir = next((tmp_path / "output").glob("train-*"))
    state = load_file(resumable(run_dir)[-1].state_folder / "weights.safetensors")
    assert {name.split(".")[1] for name in state} == {"dit", "dit_fake_score", "discriminator"}
    resumed = train(load_config(None, distillation))
    assert resumed.state == "Resumed"
    assert resumed.summary["digests"] == whole.summary["digests"]
    assert metrics(resumed.path)[-1]["loss"] == metrics(whole.path)[-1]["loss"]
    assert resumed.summary["loss_after"] == whole.summary["loss_after"]
    files = {path.name for path in (resumed.path / "step-000006").iterdir()}
    assert files == {"dit_lora.safetensors", *(["dit_lora_ema.safetensors"] if "use_ema" in changes else [])}


def test_the_average_is_of_the_student_and_its_own_steps(distillation):
    from diffusers.training_utils import EMAModel

    distillation |= {"use_ema": True, "ema_decay": 0.9, "save_steps": 1}
    run_dir = train(load_config(None, distillation)).path
    by_step = [load_file(run_dir / f"step-{step:06d}" / "dit_lora.safetensors") for step in range(1, NUM_STEPS + 1)]
    names = list(by_step[0])
    assert all(torch.equal(by_step[0][name], by_step[2][name]) for name in names)  # the critic's steps
    average = EMAModel([torch.nn.Parameter(by_step[0][name].clone()) for name in names], decay=0.9)
    average.optimization_step = 1
    average.step([torch.nn.Parameter(by_step[3][name]) for name in names])  # the student's second step
    saved = load_file(run_dir / f"step-{NUM_STEPS:06d}" / "dit_lora_ema.safetensors")
    assert set(saved) == set(names)
    for name, expected in zip(names, average.shadow_params, strict=True):
        torch.testing.assert_close(saved[name], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("sample_type", ["sde", "ode"])
def test_diffusers_samples_from_the_lora_as_validation_did(distillation, cache_dir, tiny_repo, sample_type):
    """The scheduler is diffusers' own; for sde it is told the noise that validation draws."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
    from diffusers.schedulers import scheduling_flow_match_euler_discrete as scheduling

    distillation |= {"dmd2_student_sample_type": sample_type, "learning_rate": 0.1, "dmd2_student_grad_clip_norm": 0}
    result = train(load_config(None, distillation))
    pipe = QwenImagePipeline.from_pretrained(tiny_repo, vae=None, text_encoder=None)
    pipe.load_lora_weights(str(result.path / result.summary["lora_path"]))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=sample_type == "sde")
    reader = BatchReader(Cache.open(cache_dir).latest(), ["latents", "prompt_emb"])
    raw, latents, text = read(reader, 0)
    _, channels, _, height, width = latents.shape
    pack = lambda x: QwenImagePipeline._pack_latents(x, 1, channels, height, width)  # noqa: E731
    samples = []
    for level in range(4):
        draws = ValidationDraws(raw.sample_ids, [level])
        noises = [pack(draws.noise(latents, f"sampling/{number}")) for number in range(2)]
        scheduler.set_timesteps(sigmas=list(SIGMAS[:-1]))
        x = pack(SIGMAS[0] * draws.noise(latents))
        for timestep, noise in zip(scheduler.timesteps, noises, strict=True):
            with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                patch.setattr(scheduling, "randn_tensor", lambda *_, noise=noise, **__: noise)
                velocity = pipe.transformer(
                    hidden_states=x,
                    encoder_hidden_states=text,
                    timestep=timestep[None] / 1000,
                    img_shapes=[[(1, height // 2, width // 2)]],
                    return_dict=False,
                )[0]
                x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        samples.append(x)
    rms = lambda x: float(x.square().mean().sqrt())  # noqa: E731
    error = np.mean([rms(x - pack(latents)) for x in samples])
    spread = np.mean([rms(x - other) for x in samples for other in samples if x is not other])
    assert result.summary["loss_after"] == pytest.approx(error - spread / 2, rel=1e-5)
    with safe_open(result.path / result.summary["lora_path"], framework="pt") as lora:
        lineage = json.loads(lora.metadata()["diffsynth_pipe"])
    assert lineage["student_sample_type"] == sample_type
    assert lineage["student_sigmas"] == pytest.approx(SIGMAS)


def test_recomputed_blocks_give_the_same_bytes(distillation, tmp_path):
    plain = train(load_config(None, distillation))
    other = {"use_gradient_checkpointing": True, "output_path": str(tmp_path / "recomputed")}
    assert train(load_config(None, distillation | other)).summary["digests"] == plain.summary["digests"]


def test_two_ranks_take_the_steps_of_one(distillation, tmp_path):
    distillation |= {"max_steps": 4, "num_validation_samples": 0}  # the student's turn comes again with the last
    one = train(load_config(None, distillation))
    two = {**distillation, "batch_size": 1, "output_path": str(tmp_path / "two")}
    done = launch(LAUNCH_FILES / "ddp.yaml", two, num_processes=2)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "two").glob("train-*")
    expected = [(line["loss"], line["grad_norm"]) for line in metrics(one.path)]
    np.testing.assert_allclose([(line["loss"], line["grad_norm"]) for line in metrics(run_dir)], expected, rtol=2e-3)


def test_deepspeed_is_refused_in_one_line(distillation):
    done = launch(LAUNCH_FILES / "zero2_cpu_offload.yaml", distillation)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "DeepSpeed cannot" in line]
    assert (
        "task: 'dmd2:train' trains several models in turns, which DeepSpeed cannot; set accelerate_config_file" in line
    )


def test_the_command_trains_in_one_process_and_the_state_is_gone_in_the_end(distillation, tmp_path):
    flags = [word for name, value in distillation.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "diffsynth_pipe.cli", "train", *flags, "--max_steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (run_file,) = (tmp_path / "output").glob("train-*/run.json")
    assert json.loads(run_file.read_text())["engine"] == "engine plain torch, world size 1, compute float32"
    assert not list(run_file.parent.glob("step-*/training_state"))


def test_fp8_trains_close_to_full_precision(distillation):
    fp8 = {"fp8_models": distillation["model_paths"]}
    full, held = (
        [line["loss"] for line in metrics(train(load_config(None, distillation | changes)).path)]
        for changes in ({}, fp8)
    )
    np.testing.assert_allclose(held, full, rtol=0.05)
    assert held != full


def test_guidance_needs_the_empty_caption(distillation, tmp_path):
    cache = write_cache(tmp_path / "without")
    with pytest.raises(CacheMismatch, match=r"no record of the empty caption, which dmd2_teacher_cfg_scale needs; run"):
        train(load_config(None, {**distillation, "dataset_base_path": str(cache)}))


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_student_that_is_trained_in_full_starts_from_a_checkpoint_alone(
    distillation, dit_only, tmp_path, monkeypatch, full
):
    """As in the reference; beside LoRAs it takes the place of the base that all three share."""
    base = load_file(dit_only / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in base.items()}, tmp_path / "step-9.safetensors")
    if full:
        distillation = {name: value for name, value in distillation.items() if not name.startswith("lora_")}
        distillation["trainable_models"] = "dit"
    loss, found = DistributionMatching.loss, {}

    def spy(self, models, *arguments):
        if not found:
            for name in ("dit", "dit_teacher", "dit_fake_score"):
                weights = {
                    part.replace(".base_layer", ""): tensor for part, tensor in models[name].state_dict().items()
                }
                found[name] = float(weights["transformer_blocks.0.attn.to_q.weight"].sum())
        return loss(self, models, *arguments)

    monkeypatch.setattr(DistributionMatching, "loss", spy)
    start = {"resume_from_checkpoint": str(tmp_path / "step-9.safetensors"), "max_steps": 1}
    train(load_config(None, distillation | start))
    plain = float(base["transformer_blocks.0.attn.to_q.weight"].sum())
    helpers = plain if full else 2 * plain
    assert found == pytest.approx({"dit": 2 * plain, "dit_teacher": helpers, "dit_fake_score": helpers}, rel=1e-5)
