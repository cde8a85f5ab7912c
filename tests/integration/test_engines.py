"""Every engine and every way to save memory against plain torch, on the tiny denoiser."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from offloaded_weights import Watch
from small_trainings import free_port, launch, write_cache

from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import ComponentFiles, Quantization, load_family
from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.stages.train import train
from diffsynth_pipe.training.engine import _deepspeed_plugin, load_component, load_device, start_accelerator
from diffsynth_pipe.training.lora import LoraSettings, add_lora
from diffsynth_pipe.training.offload import offload_weights

ONE_SHAPE = {"64x64": ((8, 8), (5, 9, 3, 12))}
DEPLOY = Path(__file__).parents[2] / "deploy"
FAMILY = load_family("qwen_image")
NUM_RANKS = 2
NF4 = Quantization(method="bitsandbytes_nf4")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """A sealed cache of four random samples with prompts of different lengths."""
    return write_cache(tmp_path_factory.mktemp("cache"), ONE_SHAPE)


@pytest.fixture
def parameters(cache_dir, tiny_repo, tmp_path):
    return {
        "task": "sft:train",
        "dataset_base_path": str(cache_dir),
        "model_paths": json.dumps([str(tiny_repo / "transformer" / "diffusion_pytorch_model.safetensors")]),
        "lora_base_model": "dit",
        "lora_rank": 4,
        "learning_rate": 1e-3,
        "batch_size": 2,
        "dataset_repeat": 2,
        "num_validation_samples": 0,
        "output_path": str(tmp_path / "output"),
    }


def trained(parameters):
    """Return the losses, the LoRA's tensors and ``run.json`` of the one run below ``output_path``."""
    from safetensors.torch import load_file

    (run_dir,) = Path(parameters["output_path"]).glob("train-*")
    run = json.loads((run_dir / "run.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], load_file(run_dir / run["lora_path"]), run


@pytest.fixture
def plain(parameters, tmp_path):
    """Losses and LoRA of plain torch in one process."""
    own = parameters | {"output_path": str(tmp_path / "plain")}
    train(load_config(None, own))
    return trained(own)


def assert_same_training(found, expected):
    losses, lora, _ = found
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    assert lora.keys() == expected[1].keys()
    for name, tensor in lora.items():
        torch.testing.assert_close(tensor, expected[1][name], rtol=0, atol=1e-4)


def test_ddp_trains_as_plain_torch_with_parameters_that_get_no_gradient_on_a_base_in_fp8(parameters, tmp_path):
    """DDP itself ends at the last block's to_add_out, and gloo cannot send FP8."""
    (file,) = json.loads(parameters["model_paths"])
    parameters |= {"fp8_models": file}
    alone = parameters | {"output_path": str(tmp_path / "alone")}
    train(load_config(None, alone))
    done = launch(DEPLOY / "accelerate" / "ddp.yaml", parameters | {"batch_size": 1}, num_processes=2)
    assert done.returncode == 0, done.stderr
    found = trained(parameters)
    assert found[2]["engine"] == "engine DistributedDataParallel, world size 2, compute float32"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("find_unused_parameters: ")]
    assert "4 of 48 trained parameters" in line
    assert ".to_add_out." in line
    assert_same_training(found, trained(alone))


# The files of the reference's low-VRAM training, as its documentation prints them.
REFERENCE_YAML = """\
compute_environment: LOCAL_MACHINE
debug: true
deepspeed_config:
  deepspeed_config_file: examples/qwen_image/model_training/special/low_vram_training/ds_z3_cpuoffload.json
  zero3_init_flag: true
distributed_type: DEEPSPEED
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
num_machines: 1
num_processes: 1
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
REFERENCE_JSON = """\
{
  "fp16": {
    "enabled": "auto",
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1
  },
  "bf16": {
    "enabled": "auto"
  },
  "zero_optimization": {
    "stage": 3,
    "offload_optimizer": {
      "device": "cpu",
      "pin_memory": true
    },
    "offload_param": {
      "device": "cpu",
      "pin_memory": true
    },
    "overlap_comm": false,
    "contiguous_gradients": true,
    "sub_group_size": 1e9,
    "reduce_bucket_size": 5e7,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e8,
    "stage3_max_reuse_distance": 1e8,
    "stage3_gather_16bit_weights_on_model_save": true
  },
  "activation_checkpointing": {
    "partition_activations": false,
    "cpu_checkpointing": false,
    "contiguous_memory_optimization": false
  },
  "gradient_accumulation_steps": "auto",
  "gradient_clipping": "auto",
  "train_batch_size": "auto",
  "train_micro_batch_size_per_gpu": "auto",
  "wall_clock_breakdown": false
}
"""


def test_the_references_own_files_run_as_they_stand_with_deepspeeds_checkpointing(parameters, plain, tmp_path):
    folder = tmp_path / "examples" / "qwen_image" / "model_training" / "special" / "low_vram_training"
    folder.mkdir(parents=True)
    (folder / "deepspeed_zero3_cpuoffload.yaml").write_text(REFERENCE_YAML)
    (folder / "ds_z3_cpuoffload.json").write_text(REFERENCE_JSON)
    parameters |= {"use_gradient_checkpointing": True, "gradient_checkpointing_backend": "deepspeed"}
    parameters |= {"initialize_model_on_cpu": True, "find_unused_parameters": True}
    done = launch(folder / "deepspeed_zero3_cpuoffload.yaml", parameters, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = trained(parameters)
    assert "DeepSpeedEngine, ZeRO stage 3, offload optimizer=cpu param=cpu" in found[2]["engine"]
    assert_same_training(found, plain)


def test_nvme_offload_without_the_extension_it_needs_is_refused(parameters, monkeypatch):
    import deepspeed

    if deepspeed.ops.__compatible_ops__["async_io"]:
        pytest.skip("DeepSpeed can build async_io here")
    path = DEPLOY / "deepspeed" / "zero3_nvme_offload.json"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    with pytest.raises(ConfigError, match="offloads to nvme, but DeepSpeed cannot build its async_io") as error:
        train(load_config(None, parameters))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert not list(Path(parameters["output_path"]).glob("*"))


@pytest.mark.parametrize(
    ("written", "chosen", "found"),
    [
        ("auto", None, "output/nvme"),
        ("auto", "/fast", "/fast"),
        ("/other", None, "/other"),
        ("/fast", "/fast", "/fast"),
    ],
)
def test_nvme_path(parameters, tmp_path, monkeypatch, written, chosen, found):
    import deepspeed

    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "async_io", True)
    settings = filled_in(parameters, tmp_path, monkeypatch, {"device": "nvme", "nvme_path": written}, chosen)
    assert settings["zero_optimization"]["offload_param"]["nvme_path"] == str(tmp_path / found)


@pytest.mark.parametrize(
    ("offload", "message"),
    [
        ({"device": "nvme", "nvme_path": "/other"}, "nvme_path is '/other', but this run's is '/fast'; write \"auto\""),
        ({"device": "cpu"}, "nvme_path: .*zero3.json offloads nothing to nvme"),
    ],
)
def test_an_nvme_path_that_contradicts_the_file_is_refused(parameters, tmp_path, monkeypatch, offload, message):
    import deepspeed

    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "async_io", True)
    with pytest.raises(ConfigError, match=message):
        filled_in(parameters, tmp_path, monkeypatch, offload, "/fast")


def filled_in(parameters, tmp_path, monkeypatch, offload, nvme_path):
    """Return what DeepSpeed is given for a file that offloads parameters so."""
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": offload}}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    config = load_config(None, parameters | {"nvme_path": nvme_path})
    return _deepspeed_plugin(config).deepspeed_config


@pytest.fixture(scope="module")
def large_denoiser(tmp_path_factory):
    """A denoiser of 600 MB in shards of at most 100 MB."""
    from diffusers import QwenImageTransformer2DModel

    folder = tmp_path_factory.mktemp("large")
    model = QwenImageTransformer2DModel(
        num_layers=4, attention_head_dim=128, num_attention_heads=8, joint_attention_dim=512
    )
    model.save_pretrained(folder, max_shard_size="100MB")
    yield folder
    shutil.rmtree(folder)


def test_zero3_takes_weights_into_its_partitions_one_by_one(large_denoiser, tiny_repo, tmp_path):
    """The peak is this rank's partitions, one file's mapped pages on the rank that reads, and one tensor.

    60 MB are for what DeepSpeed and the C library keep beside that; loading whole before would take the model again.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", NUM_RANKS]
    command += ["--config_file", DEPLOY / "accelerate" / "zero3_cpu_offload.yaml", "--main_process_port", free_port()]
    command += [Path(__file__).with_name("zero3_worker.py"), large_denoiser, tiny_repo / "transformer", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(NUM_RANKS)]

    shards = [path.stat().st_size for path in large_denoiser.glob("*.safetensors")]
    assert sum(shards) > 500e6
    largest_tensor = 4 * 3072 * 1024 * 4
    for rank, report in enumerate(reports):
        assert report["partition_bytes"] == pytest.approx(sum(shards) / NUM_RANKS, rel=0.01)
        reading = max(shards) if rank == 0 else 0
        assert report["peak_bytes"] < report["partition_bytes"] + reading + largest_tensor + 60e6, report
        assert report["torch.bfloat16"]
        assert report["torch.float32"]
        assert report["runs_per_block"] == 2

    expected_loss, expected_norm = plain_step(tiny_repo)
    for report in reports:
        assert report["loss"] == pytest.approx(expected_loss, rel=1e-5)
        assert report["grad_norm"] == pytest.approx(expected_norm, rel=1e-5)


def plain_step(tiny_repo):
    """Return loss and norm of the gradients of the worker's step, by plain torch."""
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel.from_pretrained(tiny_repo / "transformer").requires_grad_(False)
    add_lora(model, LoraSettings(targets=FAMILY.lora_target_modules, rank=4, alpha=4.0), 0)
    generator = torch.Generator().manual_seed(0)
    velocity = model.train()(
        hidden_states=torch.randn(1, 16, 64, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 64, generator=generator),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 4, 4)]],
        return_dict=False,
    )[0]
    loss = velocity.square().mean()
    loss.backward()
    return loss.item(), float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def test_fp8_trains_close_to_full_precision_under_another_key(parameters, plain, tmp_path):
    (file,) = json.loads(parameters["model_paths"])
    held = parameters | {"fp8_models": file, "use_gradient_checkpointing": True}
    train(load_config(None, held))
    losses, lora, run = trained(held)
    assert run["key"] != plain[2]["key"]
    assert losses != plain[0]
    np.testing.assert_allclose(losses, plain[0], rtol=5e-3)
    assert {tensor.dtype for tensor in lora.values()} == {torch.float32}


def test_a_quantised_base_trains_close_to_full_precision_under_another_key(parameters, plain, tmp_path):
    (file,) = json.loads(parameters["model_paths"])
    runs = {}
    for excluded in ("", "/img_mod.1,txt_mod.1"):
        held = parameters | {"quant_options": f"{file}:bitsandbytes_nf4{excluded}", "use_gradient_checkpointing": True}
        held["output_path"] = str(tmp_path / f"held{len(excluded)}")
        train(load_config(None, held))
        losses, lora, _ = runs[excluded] = trained(held)
        assert losses != plain[0]
        np.testing.assert_allclose(losses, plain[0], rtol=5e-2)
        assert {tensor.dtype for tensor in lora.values()} == {torch.float32}
    assert len({run["key"] for _, _, run in (plain, *runs.values())}) == 3
    assert runs[""][0] != runs["/img_mod.1,txt_mod.1"][0]


def test_zero2_trains_as_plain_torch_on_a_quantised_base(parameters, tmp_path):
    (file,) = json.loads(parameters["model_paths"])
    parameters |= {"quant_options": f"{file}:bitsandbytes_nf4"}
    alone = parameters | {"output_path": str(tmp_path / "alone")}
    train(load_config(None, alone))
    done = launch(DEPLOY / "accelerate" / "zero2_cpu_offload.yaml", parameters)
    assert done.returncode == 0, done.stderr
    found = trained(parameters)
    offload = "offload optimizer=cpu param=none"
    assert found[2]["engine"] == f"engine DeepSpeedEngine, ZeRO stage 2, {offload}, world size 1, compute float32"
    assert_same_training(found, trained(alone))


@pytest.fixture
def watch(monkeypatch):
    """Sees what a training does with the weights that it offloads."""
    with Watch() as watch:

        def offload(model, device, **settings):
            offload_weights(model, device, **settings)
            watch.homes_of(model)

        monkeypatch.setattr("diffsynth_pipe.training.engine.offload_weights", offload)
        yield watch


MODEL = {"enable_model_cpu_offload": True}
OPTIMIZER = MODEL | {"enable_optimizer_cpu_offload": True}


@pytest.mark.parametrize(
    ("offload", "peaks", "moves_the_lora"),
    [
        (MODEL, (0.01, 0.1), False),  # one layer
        (MODEL | {"cpu_offload_split_threshold": 1}, (0.4, 0.6), False),  # one of two blocks
        (OPTIMIZER | {"num_validation_samples": 2}, (0.01, 0.1), True),
        (OPTIMIZER | {"use_gradient_checkpointing": True}, (0.2, 0.6), True),
    ],
)
def test_offloaded_weights_come_piece_by_piece_and_train_to_the_same_bytes(
    parameters, plain, watch, offload, peaks, moves_the_lora
):
    train(load_config(None, parameters | offload))
    losses, lora, run = trained(parameters)
    assert losses == plain[0]
    assert lora.keys() == plain[1].keys()
    assert all(torch.equal(tensor, plain[1][name]) for name, tensor in lora.items())
    assert run["key"] == plain[2]["key"]
    optimizer = "cpu" if moves_the_lora else "none"
    assert f"engine plain torch, offload optimizer={optimizer} param=cpu, world size 1" in run["engine"]
    (file,) = json.loads(parameters["model_paths"])
    share = watch.peak_bytes / Path(file).stat().st_size
    assert peaks[0] < share < peaks[1]
    assert not watch.frozen_used
    assert (watch.num_trained > len(lora)) is moves_the_lora  # a checkpoint copies each once


def test_a_whole_denoiser_trains_in_host_memory(parameters, tmp_path, watch):
    parameters |= {"trainable_models": "dit", "lora_base_model": None, "learning_rate": 1e-4}
    results = []
    for name, offload in (("plain", {}), ("offloaded", OPTIMIZER)):
        own = parameters | offload | {"output_path": str(tmp_path / name)}
        results.append(train(load_config(None, own)).path)
    files = [next(path.glob("step-*/transformer/*.safetensors")) for path in results]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert watch.num_trained


@pytest.mark.parametrize("environment", [{"ACCELERATE_USE_DEEPSPEED": "true"}, {"WORLD_SIZE": "2"}])
def test_offload_of_the_weights_is_for_one_process_without_deepspeed(parameters, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"^enable_model_cpu_offload: is for one process without DeepSpeed") as error:
        start_accelerator(load_config(None, parameters | MODEL))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nvme_path": "/nvme"}, "nvme_path: only DeepSpeed offloads to it"),
        (
            {"use_gradient_checkpointing": True, "gradient_checkpointing_backend": "deepspeed"},
            "gradient_checkpointing_backend: 'deepspeed' does not suit this run: it is without DeepSpeed",
        ),
    ],
)
def test_what_only_deepspeed_does_is_refused_without_it(parameters, values, message):
    with pytest.raises(ConfigError, match=message) as error:
        train(load_config(None, parameters | values))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ({"trainable_models": "dit"}, None, "fp8_models: names the dit, which trainable_models trains in full"),
        ({}, {"zero_optimization": {"stage": 3}}, "fp8_models: names the dit, but ZeRO-3 cannot partition weights"),
        ({"enable_model_cpu_offload": True}, None, "fp8_models: names the dit, but enable_model_cpu_offload cannot"),
        ({"enable_model_cpu_offload": True}, None, "quant_options: names the dit, but enable_model_cpu_offload cannot"),
        ({"trainable_models": "dit"}, None, "quant_options: names the dit, which trainable_models trains in full"),
        ({}, {"zero_optimization": {"stage": 3}}, "quant_options: names the dit, but ZeRO-3 cannot partition weights"),
    ],
)
def test_weights_that_cannot_be_held_so_are_refused(parameters, values, settings, message):
    config = load_config(None, parameters).model_copy(update=values)
    plugin = SimpleNamespace(deepspeed_config=settings) if settings else None
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    held = {"fp8": True} if message.startswith("fp8") else {"quantization": NF4}
    files = ComponentFiles(weights=(), folder=Path(), **held)
    with pytest.raises(ConfigError, match=message) as error:
        load_component(accelerator, "dit", FAMILY.components["dit"], files, config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("asked", [False, True])
def test_ddp_looks_for_unused_parameters_when_asked(parameters, asked):
    accelerator = start_accelerator(load_config(None, parameters | {"find_unused_parameters": asked}))
    assert accelerator.ddp_handler.find_unused_parameters is asked


def test_weights_go_to_the_cpu_first_where_they_must(parameters):
    config, files = load_config(None, parameters), ComponentFiles(weights=(), folder=Path())
    gpu = SimpleNamespace(device=torch.device("cuda", 1))
    on_cpu = config.model_copy(update={"initialize_model_on_cpu": True})
    assert load_device(gpu, files, config) == gpu.device
    assert load_device(gpu, files, on_cpu) == torch.device("cpu")
    offloaded = config.model_copy(update={"enable_model_cpu_offload": True})
    assert load_device(gpu, files, offloaded) == torch.device("cpu")
    assert load_device(gpu, dataclasses.replace(files, fp8=True), config) == torch.device("cpu")
    assert load_device(gpu, dataclasses.replace(files, quantization=NF4), config) == torch.device("cpu")


def test_ranks_wait_longer_for_rank_0_than_nccl_would_let_them():
    """It may digest or write tens of gigabytes meanwhile, and the others are in a collective."""
    script = """
import torch
from diffsynth_pipe.config import load_config
from diffsynth_pipe.training.engine import start_accelerator
start_accelerator(load_config(None, {"dataset_base_path": "data"}))
group = torch.distributed.distributed_c10d._get_default_group()
print(group._get_backend(torch.device("cpu")).options._timeout)
"""
    rank = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    engine = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(DEPLOY / "deepspeed" / "zero3_cpu_offload.json"),
    }
    started = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **rank, **engine},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert started.stdout.splitlines()[-1] == "2:00:00", started.stderr
