"""Validation, held-out samples, early stopping and the logs of whole runs on the tiny denoiser."""

import csv
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_store.reader import BatchReader
from cache_store.store import Cache, SealedSample
from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import load_family, load_task
from diffsynth_pipe.stages.data_process import data_process
from diffsynth_pipe.stages.train import train
from diffsynth_pipe.train import main
from diffsynth_pipe.training.flow_match import SigmaDistribution
from diffsynth_pipe.training.lora import LoraSettings, add_lora
from diffsynth_pipe.training.loss_module import LossModule, OneLoss
from diffsynth_pipe.training.randomness import SampleDraws
from diffsynth_pipe.training.run_dir import list_checkpoints
from diffsynth_pipe.training.sources import CachedSource
from diffsynth_pipe.training.validation import Validator

FAMILY = load_family("qwen_image")
SIZES = {"64x64": ((8, 8), 6), "64x32": ((8, 4), 3)}
T95_OF_TWO_DEGREES = 4.302652729911275  # scipy.stats.t.ppf(0.975, 2)
LEVELS = (125, 375, 625, 875)
HELD_OUT = [f"{number:032x}" for number in (92, 93, 95)]  # the smallest ids; 94 must stay, the last of its bucket


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """A sealed cache of random fields in two buckets; the ids descend from sample to sample."""
    root = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    specs = {unit.name: unit.outputs for unit in FAMILY.units}
    cache, samples = Cache.open_or_new(root), []
    with cache.writer() as writer:
        for bucket, (size, count) in SIZES.items():
            for _ in range(count):
                key = f"{100 - len(samples):032x}"
                for unit, field, shape in (("latents", "latents", (16, 1, *size)), ("text", "prompt_emb", (5, 64))):
                    values = torch.from_numpy(rng.standard_normal(shape)).to(torch.bfloat16)
                    writer.add(unit, key, {field: values.view(torch.uint16).numpy()}, specs[unit])
                keys = {"latents": key, "text": key}
                samples.append(SealedSample(sample_id=key, bucket=bucket, source=f"row {len(samples)}", keys=keys))
    cache.seal(samples, {"family": "qwen_image"})
    return root


@pytest.fixture
def parameters(cache_dir, tiny_repo, tmp_path):
    return {
        "task": "sft:train",
        "dataset_base_path": str(cache_dir),
        "model_paths": json.dumps([str(tiny_repo / "transformer" / "diffusion_pytorch_model.safetensors")]),
        "lora_base_model": "dit",
        "lora_target_modules": "to_q,to_v",
        "lora_rank": 4,
        "learning_rate": 3e-2,
        "num_held_out_samples": 3,
        "output_path": str(tmp_path / "output"),
    }


def lines_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def validations_of(run_dir):
    return [line for line in lines_of(run_dir) if "validation_loss" in line]


def losses_by_hand(transformer, cache_dir, sample_ids):
    """Return one loss per sample and noise level, by diffusers' own forward and formulas written out."""
    from diffusers import QwenImagePipeline

    u = 1 - np.arange(1000) / 1000
    sigmas = np.exp(0.8) / (np.exp(0.8) + 1 / u - 1)
    sigmas = 1 - (1 - sigmas) * 0.98 / (1 - sigmas[-1])
    weights = np.exp(-2 * (sigmas - 0.5) ** 2)
    weights = (weights - weights.min()) / (weights - weights.min()).sum() * 1000
    snapshot = Cache.open(cache_dir).latest()
    reader = BatchReader(snapshot, ["latents", "prompt_emb"])
    ids = [snapshot.sample_id(position) for position in range(len(snapshot))]
    losses = []
    for sample_id in sample_ids:
        raw = reader.read([ids.index(sample_id)])
        latents, text = (
            torch.from_numpy(raw.fields[f]).view(torch.bfloat16).float() for f in ("latents", "prompt_emb")
        )
        _, channels, _, height, width = latents.shape
        row = []
        for level, place in enumerate(LEVELS):
            noise = SampleDraws(0, [sample_id], [level], stream="validation").noise(latents)
            pack = lambda x: QwenImagePipeline._pack_latents(x, 1, channels, height, width)  # noqa: B023, E731
            with torch.no_grad():
                velocity = transformer(
                    hidden_states=pack(((1 - sigmas[place]) * latents + sigmas[place] * noise).float()),
                    encoder_hidden_states=text,
                    timestep=torch.tensor([sigmas[place]], dtype=torch.float32),
                    img_shapes=[[(1, height // 2, width // 2)]],
                    return_dict=False,
                )[0]
            row.append(float(torch.nn.functional.mse_loss(velocity, pack(noise - latents)) * weights[place]))
        losses.append(row)
    return np.array(losses)


def test_the_validation_is_that_of_diffusers_own_forward_with_and_without_the_lora(parameters, cache_dir, tiny_repo):
    from diffusers import QwenImagePipeline

    result = train(load_config(None, parameters | {"num_epochs": 3}))
    run = json.loads((result.path / "run.json").read_text())
    pipe = QwenImagePipeline.from_pretrained(tiny_repo, vae=None, text_encoder=None, dtype=torch.float32)
    base = losses_by_hand(pipe.transformer, cache_dir, HELD_OUT)
    pipe.load_lora_weights(result.path / run["lora_path"])
    trained = losses_by_hand(pipe.transformer, cache_dir, HELD_OUT)

    def margin(values):
        return T95_OF_TWO_DEGREES * statistics.stdev(values) / 3**0.5

    gains = base.mean(1) - trained.mean(1)
    validation = run["validation"]
    assert (validation["step"], validation["num_samples"], validation["held_out"]) == (run["num_steps"], 3, True)
    expected = {
        "loss": trained.mean(),
        "loss_margin": margin(trained.mean(1)),
        "loss_by_level": trained.mean(0),
        "base_loss": base.mean(),
        "base_loss_by_level": base.mean(0),
        "improvement": gains.mean(),
        "improvement_margin": margin(gains),
    }
    for name, value in expected.items():
        assert validation[name] == pytest.approx(value, rel=1e-5), name
    assert run["loss_before"] == pytest.approx(base.mean(), rel=1e-6)
    assert run["loss_after"] == validation["loss"]
    assert validations_of(result.path)[-1]["validation_improvement"] == validation["improvement"]


def test_the_base_is_the_model_without_its_lora_and_measuring_changes_nothing(cache_dir, tiny_repo, parameters):
    from accelerate import Accelerator
    from diffusers import QwenImageTransformer2DModel

    dit = QwenImageTransformer2DModel.from_pretrained(tiny_repo / "transformer").requires_grad_(False)
    source = CachedSource(Cache.open(cache_dir).latest(), ["latents", "prompt_emb"])

    def validator():
        levels = SigmaDistribution(FAMILY.schedule, load_config(None, parameters))
        model = LossModule(OneLoss(FAMILY, load_task("sft"), levels, 1.0), {"dit": dit})
        return Validator(model, source, Accelerator(), torch.float32, num_samples=4, held_out=False)

    first = validator()
    plain = first.measure(0)
    assert (plain.improvement, plain.improvement_margin, plain.base_loss) == (0.0, 0.0, plain.loss)

    add_lora(dit.train(), LoraSettings(targets=("to_q", "to_v"), rank=4, alpha=4.0), 0)
    for name, parameter in dit.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    dit.norm_out.eval()
    trainable = [name for name, parameter in dit.named_parameters() if parameter.requires_grad]
    modes = [module.training for module in dit.modules()]
    with_lora = validator().measure(0)
    resumed = validator()
    resumed.base = json.loads(json.dumps(first.base))
    assert resumed.measure(0) == first.measure(0) == with_lora
    assert (with_lora.base_loss, with_lora.base_loss_by_level) == (plain.loss, plain.loss_by_level)
    assert with_lora.loss != pytest.approx(plain.loss, rel=1e-4)
    assert [name for name, parameter in dit.named_parameters() if parameter.requires_grad] == trainable
    assert [module.training for module in dit.modules()] == modes


def test_held_out_samples_are_never_trained_on(parameters, cache_dir, monkeypatch):
    seen = {"train": set(), "validation": set()}
    forward = LossModule.forward

    def watch(self, batch, draws, *turn):
        seen["train" if isinstance(draws, SampleDraws) else "validation"].update(batch.sample_ids)
        return forward(self, batch, draws, *turn)

    monkeypatch.setattr(LossModule, "forward", watch)
    result = train(load_config(None, parameters | {"num_epochs": 2, "num_validation_samples": 2}))
    assert result.summary["num_steps"] == 2 * 6
    assert seen["train"] == {f"{number:032x}" for number in range(92, 101)} - set(HELD_OUT)
    assert len(seen["validation"]) == 2
    assert seen["validation"] < set(HELD_OUT)


def test_live_encoding_holds_out_the_same_samples_as_the_cache(run_config):
    config = run_config(max_pixels=1024, num_held_out_samples=2)
    data_process(config)
    cached = train(config.model_copy(update={"task": "sft:train"}))
    live = train(config.model_copy(update={"output_path": f"{config.output_path}-live"}))
    assert cached.summary["num_steps"] == 4
    for name in ("key", "digests", "validation", "best"):
        assert live.summary[name] == cached.summary[name]


def test_a_run_ends_when_its_patience_is_over_and_says_which_step_was_best(parameters, capfd):
    """A learning rate this high makes the held-out loss rise."""
    changes = {"num_epochs": 20, "validation_steps": 2, "early_stopping_patience": 2, "save_steps": 1000}
    result = train(load_config(None, parameters | changes))
    run = result.summary
    validations = [(line["step"], line["validation_loss"]) for line in validations_of(result.path)]
    losses = [loss for _, loss in validations[1:]]
    assert [step for step, _ in validations] == list(range(0, run["num_steps"] + 1, 2))
    assert 6 <= run["num_steps"] < 120
    assert run["best"] == {"step": 2 * losses.index(min(losses)) + 2, "loss": min(losses)}
    assert run["num_steps"] == run["best"]["step"] + 2 * 2
    best_so_far = [
        2 * number + 2 for number, loss in enumerate(losses) if loss < min(losses[:number], default=math.inf)
    ]
    assert len(best_so_far) > 1
    checkpoints = list_checkpoints(result.path)
    assert [checkpoint.step for checkpoint in checkpoints] == [*best_so_far, run["num_steps"]]
    assert all((checkpoint.path / "dit_lora.safetensors").exists() for checkpoint in checkpoints)
    out = capfd.readouterr().out
    assert f"stopped at step {run['num_steps']} of 120: no better validation since {run['best']['step']}" in out


def test_ranks_share_the_bank_and_measure_the_same_bits(parameters):
    """Three samples on two ranks: one of them has nothing to do in the second round, and takes part all the same."""
    parameters |= {"max_steps": 1}
    alone = train(load_config(None, parameters | {"batch_size": 2})).path
    parameters["output_path"] += "-2"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = [word for name, value in parameters.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([*command, "-m", "diffsynth_pipe.train", *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (together,) = Path(parameters["output_path"]).glob("train-*")
    assert json.loads((together / "run.json").read_text())["world_size"] == 2
    for one, two in zip(validations_of(alone), validations_of(together), strict=True):
        assert one.keys() == two.keys()
        names = ["validation_base_loss_by_level"] if one["step"] else one.keys() - {"time"}
        assert {name: one[name] for name in names} == {name: two[name] for name in names}
        assert one["validation_loss"] == pytest.approx(two["validation_loss"], rel=1e-6)
    assert done.stdout.count("validation loss") == 2


@pytest.mark.parametrize(("max_steps", "num_steps"), [(4, 4), (100, 6)])
def test_max_steps_ends_a_run_before_its_epochs(parameters, max_steps, num_steps):
    full = train(load_config(None, parameters))
    short = train(load_config(None, parameters | {"max_steps": max_steps}))
    assert (full.summary["num_steps"], short.summary["num_steps"]) == (6, num_steps)
    assert full.key != short.key
    losses = [[line["loss"] for line in lines_of(result.path) if "loss" in line] for result in (full, short)]
    assert losses[1] == losses[0][:num_steps]


def test_logs_hold_the_same_numbers_and_change_neither_key_nor_weights(parameters):
    plain = train(load_config(None, parameters))
    changes = {"enable_csv_log": True, "enable_tensorboard_log": True, "output_path": parameters["output_path"] + "-2"}
    logged = train(load_config(None, parameters | changes))
    assert (logged.key, logged.summary["digests"]) == (plain.key, plain.summary["digests"])
    with (logged.path / "metrics.csv").open(newline="") as file:
        table = {(int(row["step"]), row["key"]): float(row["value"]) for row in csv.DictReader(file)}
    for line in lines_of(logged.path):
        for name in ("loss", "lr", "grad_norm", "validation_loss", "validation_improvement_margin"):
            if name in line:
                assert table[line["step"], name] == line[name]
    assert list((logged.path / "tensorboard_log").glob("events.out.tfevents.*"))


def test_the_loss_by_noise_decile_adds_up_to_the_loss(parameters):
    """One sample per step: within a window of one step exactly one decile holds the loss."""
    result = train(load_config(None, parameters | {"save_steps": 1, "num_validation_samples": 0}))
    lines = lines_of(result.path)
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    for line in lines:
        if "loss_by_noise_decile" in line:
            assert [loss for loss in line["loss_by_noise_decile"] if loss is not None] == [losses[line["step"]]]
    assert result.summary["loss_before"] is result.summary["validation"] is result.summary["best"] is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"num_held_out_samples": 8},
            "num_held_out_samples: 8 are more than 7: of 9 samples, one in each of 2 buckets",
        ),
        (
            {"enable_swanlab_log": True},
            "enable_swanlab_log: needs a package that is not installed; pip install swanlab",
        ),
    ],
    ids=["held out", "package"],
)
def test_user_errors_are_one_line_and_exit_code_2(parameters, changed, message, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "swanlab", None)
    assert main([word for name, value in (parameters | changed).items() for word in (f"--{name}", str(value))]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert line.startswith(f"error: {message}")
