"""Stage 2 on the tiny denoiser, against a training loop of its own and against diffusers' own LoRA loading."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cache_store.reader import BatchReader
from cache_store.store import Cache
from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import load_family, load_task
from diffsynth_pipe.errors import LaunchError, ModelError
from diffsynth_pipe.stages.data_process import data_process
from diffsynth_pipe.stages.plan import plan_train
from diffsynth_pipe.stages.train import train
from diffsynth_pipe.train import main
from diffsynth_pipe.training.flow_match import SigmaDistribution
from diffsynth_pipe.training.loss_module import LossModule, OneLoss
from diffsynth_pipe.training.randomness import SampleDraws
from diffsynth_pipe.training.run_dir import list_checkpoints
from diffsynth_pipe.training.sampler import BucketSampler
from diffsynth_pipe.training.sources import CachedSource
from diffsynth_pipe.training.validation import Validator
from diffsynth_pipe.training.weights import checkpoint_digest

ZERO3 = Path(__file__).parents[2] / "deploy" / "accelerate" / "zero3_cpu_offload.yaml"
FAMILY = load_family("qwen_image")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj"]
MAX_GRAD_NORM = 2e-3  # low enough to clip most steps of the tiny model


def flags(parameters):
    return [argument for name, value in parameters.items() for argument in (f"--{name}", str(value))]


def metrics(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "validation_loss" in line]


def only_run_dir(parameters):
    (run_dir,) = Path(parameters["output_path"]).glob("train-*")
    return run_dir


def train_by_hand(cache_dir, repository, parameters, batch_sizes=2, num_steps=9):
    """Train in the plainest way that torch, diffusers and peft allow; return losses and norms of the gradients."""
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
    from peft import LoraConfig

    u = 1 - np.arange(1000) / 1000
    sigmas = np.exp(0.8) / (np.exp(0.8) + 1 / u - 1)
    sigmas = 1 - (1 - sigmas) * 0.98 / (1 - sigmas[-1])
    weights = np.exp(-2 * (sigmas - 0.5) ** 2)
    weights = (weights - weights.min()) / (weights - weights.min()).sum() * 1000

    model = QwenImageTransformer2DModel.from_pretrained(repository / "transformer").requires_grad_(False)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=parameters["learning_rate"], weight_decay=0.01)

    snapshot = Cache.open(cache_dir).latest()
    reader = BatchReader(snapshot, ["latents", "prompt_emb"])
    sampler = BucketSampler({name: len(members) for name, members in snapshot.bucket_members.items()}, batch_sizes, 0)
    losses, norms = [], []
    for step in range(num_steps):
        plan = sampler.plan(step)
        total = 0.0
        for index, visit in zip(plan.indices, plan.visits, strict=True):
            raw = reader.read([snapshot.bucket_members[plan.bucket][index]])
            latents, text = (
                torch.from_numpy(raw.fields[f]).view(torch.bfloat16).float() for f in ("latents", "prompt_emb")
            )
            draws = SampleDraws(0, raw.sample_ids, [visit])
            noise, place = draws.noise(latents), int(draws.uniform() * 1000)
            noisy = ((1 - sigmas[place]) * latents + sigmas[place] * noise).float()
            _, channels, _, height, width = latents.shape
            pack = lambda x: QwenImagePipeline._pack_latents(x, 1, channels, height, width)  # noqa: B023, E731
            velocity = model(
                hidden_states=pack(noisy),
                encoder_hidden_states=text,
                timestep=torch.tensor([sigmas[place]], dtype=torch.float32),
                img_shapes=[[(1, height // 2, width // 2)]],
                return_dict=False,
            )[0]
            loss = torch.nn.functional.mse_loss(velocity, pack(noise - latents)) * weights[place]
            loss = loss / len(plan.indices)
            loss.backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms


@pytest.fixture(scope="module")
def by_hand(cache_dir, dit_only):
    return train_by_hand(cache_dir, dit_only, {"learning_rate": 3e-2})


def assert_follows(lines, by_hand):
    losses, norms = by_hand
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], norms, rtol=1e-3)


@pytest.mark.parametrize(
    "changed",
    [{}, {"batch_size": 1, "gradient_accumulation_steps": 2}, {"use_gradient_checkpointing": True}],
    ids=["batch", "accumulation", "checkpointing"],
)
def test_losses_are_those_of_a_plain_torch_loop(parameters, by_hand, changed):
    result = train(load_config(None, parameters | changed))
    lines, _ = metrics(result.path)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["epoch"] for line in lines] == [0] * 9
    assert_follows(lines, by_hand)
    assert result.summary["engine"] == "engine plain torch, world size 1, compute float32"


@pytest.mark.parametrize(
    "changed",
    [{"max_batch_tokens": 39}, {"max_batch_tokens": 16, "gradient_accumulation_steps": 2}],
    ids=["batch", "accumulation"],
)
def test_a_token_budget_fills_the_batches_of_each_bucket(parameters, cache_dir, dit_only, changed):
    """Latents of 8x8 are 16 tokens, of 8x4 are 8: two or four samples fit, whole or in two micro-steps."""
    by_hand = train_by_hand(cache_dir, dit_only, parameters, {"64x64": 2, "64x32": 4}, num_steps=8)
    lines, _ = metrics(train(load_config(None, {**parameters, "batch_size": 1, **changed})).path)
    assert len(lines) == 8
    assert_follows(lines, by_hand)


def test_strata_reach_the_loss_and_do_not_depend_on_the_accumulation(parameters):
    settings = {"timestep_sampling": "logit_normal", "timestep_shift": "resolution", "max_steps": 4}
    runs = [{"batch_size": 4}, {"batch_size": 1, "gradient_accumulation_steps": 4}]
    stratified = [
        train(load_config(None, parameters | settings | {"stratified_timesteps": True} | run)) for run in runs
    ]
    one, other, plain = (
        [line["loss"] for line in metrics(result.path)[0]]
        for result in (*stratified, train(load_config(None, parameters | settings | runs[0])))
    )
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert not np.isclose(one, plain, rtol=1e-3).any()


def test_a_sample_beyond_the_token_budget_is_a_batch_of_its_own(parameters):
    lines, _ = metrics(train(load_config(None, {**parameters, "batch_size": 1, "max_batch_tokens": 3})).path)
    assert len(lines) == 18


def test_training_starts_from_a_checkpoint(parameters, cache_dir, tiny_repo, tmp_path):
    """It trains as on a repository with those weights; its key and its LoRA name the checkpoint."""
    from diffusers import QwenImageTransformer2DModel

    from flows.report import closing_lines

    model = QwenImageTransformer2DModel.from_pretrained(tiny_repo / "transformer")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "other" / "transformer")
    checkpoint = tmp_path / "step-9.safetensors"
    names = {f"pipe.dit.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(names, checkpoint)

    resumed = train(load_config(None, parameters | {"resume_from_checkpoint": str(checkpoint)}))
    file = tmp_path / "other" / "transformer" / "diffusion_pytorch_model.safetensors"
    expected = train(load_config(None, parameters | {"model_paths": json.dumps([str(file)])}))
    assert metrics(resumed.path)[0][0]["loss"] == metrics(expected.path)[0][0]["loss"]
    assert resumed.summary["loss_after"] == expected.summary["loss_after"]
    assert f"  # with the denoiser's weights from {checkpoint}" in "\n".join(closing_lines([resumed]))
    assert resumed.key not in (expected.key, plan_train(load_config(None, parameters)).key)
    with safe_open(resumed.path / resumed.summary["lora_path"], framework="pt") as lora:
        assert json.loads(lora.metadata()["diffsynth_pipe"])["initial_weights_digest"] == checkpoint_digest(checkpoint)

    names["pipe.dit.img_in.bias"] = names["pipe.dit.img_in.bias"][1:]
    save_file(names, checkpoint)
    with pytest.raises(ModelError, match=r"img_in\.bias has shape \[127\], expected \[128\]"):
        train(load_config(None, parameters | {"resume_from_checkpoint": str(checkpoint)}))


def test_diffusers_loads_the_lora_and_gives_the_loss_that_training_ended_with(parameters, cache_dir, tiny_repo):
    from accelerate import Accelerator
    from diffusers import QwenImagePipeline

    result = train(load_config(None, parameters))
    run = json.loads((result.path / "run.json").read_text())
    _, validations = metrics(result.path)
    assert [line["validation_loss"] for line in validations] == [run["loss_before"], run["loss_after"]]
    assert run["loss_after"] < run["loss_before"]

    pipe = QwenImagePipeline.from_pretrained(tiny_repo, vae=None, text_encoder=None, dtype=torch.float32)
    source = CachedSource(Cache.open(cache_dir).latest(), ["latents", "prompt_emb"])

    def loss():
        levels = SigmaDistribution(FAMILY.schedule, load_config(None, parameters))
        model = LossModule(OneLoss(FAMILY, load_task("sft"), levels, 1.0), {"dit": pipe.transformer})
        return Validator(model, source, Accelerator(), torch.float32, num_samples=3, held_out=False).measure(0).loss

    assert loss() == pytest.approx(run["loss_before"], rel=1e-7)
    pipe.load_lora_weights(result.path / run["lora_path"])
    assert loss() == pytest.approx(run["loss_after"], rel=1e-7)
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 4


def test_two_ranks_of_zero3_follow_the_plain_torch_loop(parameters, by_hand, tmp_path):
    """Two ranks with one sample each are one rank with two."""
    parameters |= {"batch_size": 1}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ZERO3]
    command += ["--num_processes", 2, "--main_process_port", port, "-m", "diffsynth_pipe.train"]
    done = subprocess.run(
        list(map(str, [*command, *flags(parameters)])), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    offload = "offload optimizer=cpu param=cpu"
    engine = f"engine DeepSpeedEngine, ZeRO stage 3, {offload}, world size 2, compute float32"
    assert [line for line in done.stdout.splitlines() if line.startswith("engine")] == [engine]
    run_dir = only_run_dir(parameters)
    run = json.loads((run_dir / "run.json").read_text())
    lines, _ = metrics(run_dir)
    assert_follows(lines, by_hand)
    assert (run["engine"], run["world_size"], run["num_steps"]) == (engine, 2, 9)

    parameters |= {"batch_size": 2, "output_path": str(tmp_path / "plain")}
    plain = train(load_config(None, parameters)).summary
    assert run["loss_after"] == pytest.approx(plain["loss_after"], rel=1e-5)


def test_each_epoch_ends_in_a_checkpoint(parameters):
    """Buckets of 4 and 2 samples in batches of 4: a pass takes 2 steps, and two passes 3."""
    result = train(load_config(None, parameters | {"batch_size": 4, "dataset_repeat": 1, "num_epochs": 3}))
    assert [checkpoint.step for checkpoint in list_checkpoints(result.path)] == [2, 3, 5]


def test_save_steps_counts_optimizer_steps(parameters):
    changes = {"batch_size": 1, "gradient_accumulation_steps": 2, "save_steps": 4}
    result = train(load_config(None, parameters | changes))
    assert [checkpoint.step for checkpoint in list_checkpoints(result.path)] == [4, 8, 9]


def test_the_optimizer_steps_by_the_rate_of_the_schedule(parameters):
    """Warm-up begins at 0: after the first step the LoRA is as it was, its B all zeros."""
    changes = {"lr_scheduler": "linear", "lr_warmup_steps": 3, "save_steps": 1, "max_steps": 9}
    result = train(load_config(None, parameters | changes))
    factors = [0, 1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    lines, _ = metrics(result.path)
    assert [line["lr"] for line in lines] == pytest.approx([parameters["learning_rate"] * factor for factor in factors])
    first, second = (load_file(result.path / f"step-00000{step}" / "dit_lora.safetensors") for step in (1, 2))
    assert not any(tensor.any() for name, tensor in first.items() if ".lora_B." in name)
    assert any(tensor.any() for name, tensor in second.items() if ".lora_B." in name)


def test_the_saved_average_is_that_of_the_saved_weights(parameters):
    """At a decay of 0.05, below that of diffusers' first steps, which would rule so short a run."""
    from diffusers.training_utils import EMAModel

    changes = {"use_ema": True, "ema_decay": 0.05, "save_steps": 1}
    result = train(load_config(None, parameters | changes))
    average = None
    for checkpoint in list_checkpoints(result.path):
        weights = [
            torch.nn.Parameter(tensor) for tensor in load_file(checkpoint.path / "dit_lora.safetensors").values()
        ]
        average = average or EMAModel(weights, decay=0.05)
        average.step(weights)
        saved = load_file(checkpoint.path / "dit_lora_ema.safetensors")
        for tensor, expected in zip(saved.values(), average.shadow_params, strict=True):
            torch.testing.assert_close(tensor, expected)
    assert checkpoint.step == 9


def test_another_seed_trains_on_other_draws(parameters, tmp_path):
    def first_losses(seed, folder):
        changes = {"seed": seed, "max_steps": 2, "num_validation_samples": 0, "output_path": str(tmp_path / folder)}
        return [line["loss"] for line in metrics(train(load_config(None, parameters | changes)).path)[0]]

    first = first_losses(1, "first")
    assert first_losses(1, "again") == first
    assert not set(first_losses(2, "other")) & set(first)


def test_lora_file_says_what_it_was_made_from(parameters, cache_dir):
    from safetensors import safe_open

    result = train(load_config(None, parameters | {"seed": 3}))
    with safe_open(result.path / result.summary["lora_path"], framework="pt") as file:
        lineage = json.loads(file.metadata()["diffsynth_pipe"])
    assert lineage["samples_digest"] == Cache.open(cache_dir).latest().digest
    assert (lineage["step"], lineage["seed"], lineage["lora_rank"], lineage["lora_alpha"]) == (9, 3, 4, 4)


@pytest.mark.parametrize(("changed", "num_steps"), [({}, 6), ({"max_batch_tokens": 8}, 3)], ids=["samples", "tokens"])
def test_live_encoding_trains_the_same_weights_as_the_cache(run_config, changed, num_steps):
    config = run_config(max_pixels=1024, num_validation_samples=1, **changed)
    data_process(config)
    cached = train(config.model_copy(update={"task": "sft:train"}))
    live = train(config.model_copy(update={"output_path": f"{config.output_path}-live"}))
    assert live.key == cached.key
    assert live.summary["digests"] == cached.summary["digests"]
    (live_lines, _), (cached_lines, _) = metrics(live.path), metrics(cached.path)
    assert len(cached_lines) == num_steps
    np.testing.assert_allclose(*([line["loss"] for line in lines] for lines in (live_lines, cached_lines)), rtol=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run(parameters):
    with pytest.raises(
        LaunchError, match=r"^step \d: (the loss is NaN or Inf for sample [0-9a-f]{32}|the norm)"
    ) as error:
        train(load_config(None, parameters | {"learning_rate": 1e30}))
    assert "\n" not in str(error.value)
    assert not (only_run_dir(parameters) / "run.json").exists()
    assert not list(only_run_dir(parameters).glob("step-*"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"lora_target_modules": "to_q,to_z"},
            "lora_target_modules: 'to_z' matches no module of QwenImageTransformer2D",
        ),
        ({"dataset_base_path": "/no/such/cache"}, "/no/such/cache"),
        ({"lora_base_model": "vae"}, "lora_base_model: only 'dit'"),
    ],
    ids=["target", "cache", "model"],
)
def test_user_errors_are_one_line_and_exit_code_2(parameters, changed, message, capfd):
    assert main(flags(parameters | changed)) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has no object 'zero_optimization'"),
        ('{"zero_optimization": 3}', "has no object 'zero_optimization'"),
        ('{"zero_optimization": {"stage": 0}}', "its zero_optimization has no stage 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 2}, "scheduler": {}}', "has 'scheduler', which a resumed run could not"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_used_is_named(parameters, monkeypatch, tmp_path, capfd, text, message):
    path = tmp_path / "zero3.json"
    path.write_text(text)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", os.fspath(path))
    assert main(flags(parameters)) == 2
    assert f"error: {path}: {message}" in capfd.readouterr().err


def test_an_engine_that_was_not_asked_for_ends_the_run(parameters):
    """accelerate drops DeepSpeed without a word where ``ACCELERATE_USE_CPU`` is set."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ZERO3)]
    done = subprocess.run(
        [*command, "-m", "diffsynth_pipe.train", *flags(parameters)],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        timeout=300,
    )
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "asked for 'engine DeepSpeedEngine, ZeRO stage 3, offload optimizer=cpu param=cpu'" in line
    assert not (only_run_dir(parameters) / "run.json").exists()


def test_deepspeed_settings_that_contradict_the_run_are_refused(parameters, monkeypatch, tmp_path, capfd):
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"gradient_clipping": 0.5, "zero_optimization": {"stage": 3}}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", os.fspath(path))
    assert main(flags(parameters)) == 2
    assert (
        f'error: {path}: gradient_clipping is 0.5, but this run\'s is {MAX_GRAD_NORM}; write "auto" there'
        in capfd.readouterr().err
    )
