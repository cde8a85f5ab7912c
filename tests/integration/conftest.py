"""A small cache of random fields, and the parameters of a training on it."""

import json
import shutil

import pytest
from small_trainings import LAUNCH_FILES, write_cache

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj"]
MAX_GRAD_NORM = 2e-3  # low enough to clip most steps of the tiny model


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch):
    """Forget the process-wide state that accelerate keeps, as a new process would."""
    from accelerate.state import AcceleratorState, GradientState

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """A sealed cache of random fields, two shapes and prompts of six lengths."""
    return write_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def dit_only(tiny_repo, tmp_path_factory):
    """A repository with the denoiser and nothing else, so that training cannot open another model."""
    repository = tmp_path_factory.mktemp("dit-only")
    shutil.copytree(tiny_repo / "transformer", repository / "transformer")
    return repository


@pytest.fixture
def parameters(cache_dir, dit_only, tmp_path):
    return {
        "task": "sft:train",
        "dataset_base_path": str(cache_dir),
        "model_paths": json.dumps([str(dit_only / "transformer" / "diffusion_pytorch_model.safetensors")]),
        "lora_base_model": "dit",
        "lora_target_modules": ",".join(TARGETS),
        "lora_rank": 4,
        "learning_rate": 3e-2,
        "max_grad_norm": MAX_GRAD_NORM,
        "batch_size": 2,
        "dataset_repeat": 3,
        "num_validation_samples": 3,
        "output_path": str(tmp_path / "output"),
    }


@pytest.fixture
def zero3(tmp_path):
    """The launch file of ZeRO-3; it partitions weights of any size, as it does those of a large model."""
    deepspeed = LAUNCH_FILES.parent / "deepspeed" / "zero3_cpu_offload.json"
    settings = json.loads(deepspeed.read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    own = tmp_path / deepspeed.name
    own.write_text(json.dumps(settings))
    launch_file = tmp_path / "zero3.yaml"
    text = (LAUNCH_FILES / "zero3_cpu_offload.yaml").read_text()
    launch_file.write_text(text.replace("deploy/deepspeed/zero3_cpu_offload.json", str(own)))
    return launch_file
