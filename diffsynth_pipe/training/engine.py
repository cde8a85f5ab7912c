"""The engine of a rank: plain torch, or DeepSpeed with ZeRO and offload, as ``accelerate launch`` was told.

accelerate drops DeepSpeed without a word where it decides for the CPU, and takes two CPU ranks for two lone ones unless
gloo is named. So ``start`` says which engine it got, and refuses one that was not asked for.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from diffsynth_pipe.config import comma_list
from diffsynth_pipe.errors import ConfigError, LaunchError
from diffsynth_pipe.training.offload import offload_weights
from diffsynth_pipe.training.optim import make_optimizer
from diffsynth_pipe.training.partitioned import load_partitioned

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin
    from torch import Tensor
    from torch.nn import Module
    from torch.optim import Optimizer

    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.contracts import ComponentFiles, ComponentSpec
    from diffsynth_pipe.training.loss_module import LossModule

PLAIN_TORCH = "engine plain torch"
PROJECT_ROOT = Path(__file__).resolve().parents[2]

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""How long ranks wait for rank 0 while it digests the weights of a model or writes them. NCCL's 10 minutes are too few
for 40 GB on a slow disk; a rank that died is noticed without them, see ``StopSignals``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """The models of a step, ready to be trained.

    Attributes:
        model: The ``LossModule``, as the engine wraps it.
        optimizer: Steps on the trainable parameters; under DeepSpeed the engine steps by itself.
        compute_dtype: Dtype of the models' weights and inputs.
        description: One line for people and for ``run.json``.
    """

    accelerator: Accelerator
    model: Module
    optimizer: Optimizer
    compute_dtype: torch.dtype
    description: str


def start_accelerator(config: RunConfig) -> Accelerator:
    """Join the process group, and hand DeepSpeed its configuration if the launcher asked for it.

    Raises:
        ConfigError: The DeepSpeed file contradicts the run's parameters.
        LaunchError: The DeepSpeed file is missing, or the ranks do not see each other.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns on import that it looked for a GPU
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

    handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=config.find_unused_parameters)]
    deepspeed = _asked_for_deepspeed()
    if config.nvme_path is not None and not deepspeed:
        message = "nvme_path: only DeepSpeed offloads to it; leave it out, or set accelerate_config_file"
        raise ConfigError(message)
    if config.enable_model_cpu_offload and (deepspeed or _launched_world_size() > 1):
        message = (
            "enable_model_cpu_offload: is for one process without DeepSpeed, whose ZeRO offloads by itself; leave it"
            " out, or set accelerate_config_file to deploy/accelerate/single_process.yaml"
        )
        raise ConfigError(message)
    cpu_ranks = not torch.cuda.is_available() and _launched_world_size() > 1
    backend = "gloo" if not torch.cuda.is_available() and (deepspeed or cpu_ranks) else None
    handlers.append(InitProcessGroupKwargs(backend=backend, timeout=COLLECTIVE_TIMEOUT))
    accelerator = Accelerator(
        cpu=cpu_ranks and not deepspeed,  # without it the ranks are joined, but nothing averages their gradients
        deepspeed_plugin=_deepspeed_plugin(config) if deepspeed else None,
        mixed_precision="bf16" if deepspeed and compute_dtype() is torch.bfloat16 else "no",
        # Not the plain argument: the launcher's environment would override it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        kwargs_handlers=handlers,
    )
    if accelerator.num_processes != _launched_world_size():
        raise LaunchError(
            f"the launcher started {_launched_world_size()} ranks, but this one sees {accelerator.num_processes}; "
            "check use_cpu and distributed_type in the accelerate configuration"
        )
    return accelerator


def check_resume_step(accelerator: Accelerator, step: int, run_dir: Path) -> None:
    """Refuse to go on from different steps: ranks of several machines may not see the same files.

    Args:
        accelerator: Joined; every rank must take part.
        step: Where this rank would go on; 0 for the start.
        run_dir: Where it has looked.

    Raises:
        LaunchError: Another rank would go on elsewhere.
    """
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise LaunchError(
            f"{run_dir}: rank {accelerator.process_index} would go on after step {step}, others after "
            f"{', '.join(map(str, sorted(set(steps) - {step})))}; output_path must be one folder for all machines"
        )


def set_accumulation(accelerator: Accelerator, config: RunConfig, num_micro_batches: int | None) -> None:
    """Set the micro-steps per optimizer step, so that a run that goes on has the global batch it began with.

    Args:
        accelerator: Before it has prepared a model.
        config: The run.
        num_micro_batches: Micro-batches of an optimizer step over all ranks when the run began; None if it begins now.

    Raises:
        ConfigError: They do not divide among the ranks.
    """
    world_size = accelerator.num_processes
    if num_micro_batches is None:
        return
    if num_micro_batches % world_size:
        raise ConfigError(
            f"the run began with {num_micro_batches} micro-batches per optimizer step, which do not divide among "
            f"{world_size} ranks; go on with another number of ranks"
        )
    num_steps = num_micro_batches // world_size
    accelerator.gradient_accumulation_steps = num_steps
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config["gradient_accumulation_steps"] = num_steps
        plugin.deepspeed_config["train_batch_size"] = config.batch_size * num_micro_batches


def compute_dtype() -> torch.dtype:
    """Return bf16 on CUDA and fp32 on CPU, where bf16 is two orders of magnitude slower."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def deepspeed_settings(accelerator: Accelerator) -> dict[str, Any] | None:
    """Return the DeepSpeed file's contents, filled in; None in a run without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return None if plugin is None else plugin.deepspeed_config


def load_component(
    accelerator: Accelerator, name: str, spec: ComponentSpec, files: ComponentFiles, config: RunConfig
) -> Any:
    """Load a model of the training step, frozen; with DeepSpeed into host memory, from where it goes on.

    On CUDA DeepSpeed would move a whole model to each GPU before it partitions it, so ZeRO-3 gets one whose weights go
    into its partitions as they are read. On a CPU that only costs time.

    Raises:
        ConfigError: ``fp8_models`` or ``quant_options`` names it, but its weights cannot be held so.
        ModelError: The files are not the weights of the model that ``config.json`` describes.
    """
    settings = deepspeed_settings(accelerator) or {}
    is_zero3 = settings.get("zero_optimization", {}).get("stage") == 3
    if files.fp8 or files.quantization:
        flag, weights = ("fp8_models", "FP8") if files.fp8 else ("quant_options", "4 bits")
        if name in comma_list(config.trainable_models):
            raise ConfigError(
                f"{flag}: names the {name}, which trainable_models trains in full; "
                f"{weights} can only be trained by a LoRA"
            )
        if is_zero3:
            raise ConfigError(
                f"{flag}: names the {name}, but ZeRO-3 cannot partition weights in {weights}; take another engine"
            )
        if config.enable_model_cpu_offload:
            raise ConfigError(
                f"{flag}: names the {name}, but enable_model_cpu_offload cannot move weights in {weights}; take one"
            )
    if is_zero3 and torch.cuda.is_available() and spec.build is not None:
        return load_partitioned(spec.build, files, compute_dtype(), accelerator.device, settings)
    return spec.load(files, compute_dtype(), load_device(accelerator, files, config))


def load_device(accelerator: Accelerator, files: ComponentFiles, config: RunConfig) -> torch.device:
    """Return where a component's weights are loaded; those in FP8 or 4 bits shrink before they stay on the GPU."""
    shrinks = files.fp8 or files.quantization is not None
    stays = config.initialize_model_on_cpu or config.enable_model_cpu_offload or _asked_for_deepspeed()
    return torch.device("cpu") if shrinks or stays else accelerator.device


def set_find_unused_parameters(accelerator: Accelerator, model: Module, first_loss: Callable[[], Tensor]) -> None:
    """Let DDP look for parameters without a gradient if a first backward pass leaves any; call it before ``start``.

    DDP waits for the gradient of every parameter and ends with an error where none comes. To look for them costs a walk
    through the graph in every step, so it is done only where it is needed. Every rank must take part.

    Args:
        accelerator: Without DDP nothing is done.
        model: What ``start`` will wrap; it goes to the training device.
        first_loss: Computes the loss of this rank's first micro-batch, a scalar.
    """
    handler = accelerator.ddp_handler
    if _asked_for_deepspeed() or accelerator.num_processes == 1 or handler.find_unused_parameters:
        return
    model.to(accelerator.device)
    with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):
        torch.autograd.backward(first_loss())
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    unused = [name for name, parameter in trainable.items() if parameter.grad is None]
    for parameter in trainable.values():
        parameter.grad = None
    handler.find_unused_parameters = bool(
        accelerator.gather(torch.tensor([len(unused)], device=accelerator.device)).any()
    )
    if unused:
        accelerator.print(
            f"find_unused_parameters: {len(unused)} of {len(trainable)} trained parameters got no gradient from the "
            f"first batch, such as {unused[0]}"
        )


def refuse_turns(accelerator: Accelerator, config: RunConfig) -> None:
    """Refuse a task that takes turns under DeepSpeed, which steps on all parameters in every step.

    Raises:
        ConfigError: The launcher asked for DeepSpeed.
    """
    if deepspeed_settings(accelerator) is not None:
        raise ConfigError(
            f"task: {config.task!r} trains several models in turns, which DeepSpeed cannot; set accelerate_config_file "
            "to deploy/accelerate/ddp.yaml, or to single_process.yaml there"
        )


def start(
    accelerator: Accelerator, model: LossModule, config: RunConfig, learning_rates: Mapping[str, float] | None = None
) -> Engine:
    """Wrap the model and make its optimizer.

    Args:
        accelerator: Joined.
        model: The ``LossModule``.
        config: The run.
        learning_rates: Peak learning rates of models in it that have one of their own, by name.

    Raises:
        LaunchError: The engine is not the one that the launch configuration asks for.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        # DeepSpeed casts and moves a model that it partitions, but not what comes beside partitions that are there.
        for parameter in trainable:
            parameter.data = parameter.data.to(compute_dtype())
        for buffer in model.buffers():
            buffer.data = buffer.data.to(accelerator.device)
    if config.enable_model_cpu_offload:
        offload_weights(
            model.models["dit"],
            accelerator.device,
            split_threshold=config.cpu_offload_split_threshold,
            offload_trained=config.enable_optimizer_cpu_offload,
        )
    optimizer = make_optimizer(config, _groups(config, model, learning_rates) if learning_rates else trainable)
    if accelerator.num_processes > 1 and not _asked_for_deepspeed():
        # DDP would send the whole base from rank 0, which all ranks have read; and gloo cannot send FP8.
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, frozen)
    placement = [False, True] if config.enable_model_cpu_offload else None
    wrapped, optimizer = accelerator.prepare(model, optimizer, device_placement=placement)
    engine = _describe_engine(wrapped)
    if config.enable_model_cpu_offload:
        engine += f", offload optimizer={'cpu' if config.enable_optimizer_cpu_offload else 'none'} param=cpu"
    dtype = compute_dtype()
    description = f"{engine}, world size {accelerator.num_processes}, compute {str(dtype).removeprefix('torch.')}"
    accelerator.print(description)
    if _asked_for_deepspeed() and engine != (wanted := _wanted_engine()):
        raise LaunchError(f"asked for {wanted!r}, but got {engine!r}; unset ACCELERATE_USE_CPU")
    if accelerator.num_processes > 1 and engine == PLAIN_TORCH:
        raise LaunchError(f"got {description!r}: the ranks would train apart; check the accelerate configuration")
    return Engine(
        accelerator=accelerator, model=wrapped, optimizer=optimizer, compute_dtype=dtype, description=description
    )


def _groups(config: RunConfig, model: Module, learning_rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the optimizer's groups of parameters; ``lr_scale`` is what the loop multiplies the learning rate by."""
    own: dict[str, list[Any]] = {name: [] for name in ("", *learning_rates)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            helper = name.split(".")[1]
            own[helper if helper in own else ""].append(parameter)
    scales = {name: rate / config.learning_rate for name, rate in learning_rates.items()}
    return [{"params": parameters, "lr_scale": scales.get(name, 1.0)} for name, parameters in own.items()]


def _asked_for_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _launched_world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _describe_engine(model: Module) -> str:
    if not _asked_for_deepspeed():
        return "engine DistributedDataParallel" if hasattr(model, "no_sync") else PLAIN_TORCH
    from deepspeed import DeepSpeedEngine

    if not isinstance(model, DeepSpeedEngine):
        return f"engine {type(model).__name__}"
    offload = {"optimizer": model.zero_offload_optimizer(), "param": model.zero_offload_param()}
    devices = " ".join(f"{name}={entry.device if entry else 'none'}" for name, entry in offload.items())
    return f"engine DeepSpeedEngine, ZeRO stage {model.zero_optimization_stage()}, offload {devices}"


def _wanted_engine() -> str:
    """Describe the engine that the DeepSpeed file asks for, as ``_describe_engine`` describes the one that came."""
    _, settings = _read_deepspeed_file()
    zero = settings["zero_optimization"]
    offload = {name: zero.get(f"offload_{name}", {}).get("device", "none") for name in ("optimizer", "param")}
    devices = " ".join(f"{name}={device}" for name, device in offload.items())
    return f"engine DeepSpeedEngine, ZeRO stage {zero.get('stage', 0)}, offload {devices}"


def _deepspeed_plugin(config: RunConfig) -> DeepSpeedPlugin:
    from accelerate.utils import DeepSpeedPlugin

    path, settings = _read_deepspeed_file()
    parameters = {
        "train_micro_batch_size_per_gpu": config.batch_size,  # 1 under max_batch_tokens: DeepSpeed only logs it
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
        "train_batch_size": config.batch_size * config.gradient_accumulation_steps * _launched_world_size(),
    }
    _set_nvme_path(path, settings["zero_optimization"], config)
    for name, value in parameters.items():
        if settings.get(name, "auto") not in ("auto", value):
            raise ConfigError(f'{path}: {name} is {settings[name]!r}, but this run\'s is {value!r}; write "auto" there')
        settings[name] = value
    if not torch.cuda.is_available():
        _adapt_to_cpu(settings)
    # load_component partitions, where it must be: from_pretrained does not work under zero.Init.
    return DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)


def _set_nvme_path(path: Path, zero: dict[str, Any], config: RunConfig) -> None:
    """Fill in the folder that parameters or optimizer state are offloaded to, if any are."""
    offloads = [zero[name] for name in ("offload_optimizer", "offload_param") if name in zero]
    to_nvme = [offload for offload in offloads if offload.get("device") == "nvme"]
    if not to_nvme:
        if config.nvme_path is not None:
            raise ConfigError(f"nvme_path: {path} offloads nothing to nvme; leave it out, or name another file")
        return
    import deepspeed

    if not deepspeed.ops.__compatible_ops__["async_io"]:
        raise ConfigError(
            f"{path}: offloads to nvme, but DeepSpeed cannot build its async_io extension here; "
            "install libaio-dev (libaio-devel), or offload to cpu"
        )
    folder = config.nvme_path or str(Path(config.output_path).absolute() / "nvme")
    for offload in to_nvme:
        written = offload.get("nvme_path", "auto")
        if written == "auto":
            offload["nvme_path"] = folder
        elif config.nvme_path not in (None, written):
            raise ConfigError(f'{path}: nvme_path is {written!r}, but this run\'s is {folder!r}; write "auto" there')


def _read_deepspeed_file() -> tuple[Path, dict[str, Any]]:
    path = _deepspeed_config_file()
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise ConfigError(f"{path}: has no object 'zero_optimization'; add one with a stage")
    if settings["zero_optimization"].get("stage", 0) not in (1, 2, 3):
        raise ConfigError(f"{path}: its zero_optimization has no stage 1, 2 or 3; without one, launch by ddp.yaml")
    for name, field in (("optimizer", "customized_optimizer"), ("scheduler", "lr_scheduler")):
        if name in settings:
            raise ConfigError(f"{path}: has {name!r}, which a resumed run could not go on with; use {field} instead")
    return path, settings


def _deepspeed_config_file() -> Path:
    """Find the file that the accelerate configuration names, relative to the working folder or to the project."""
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if name == "none":
        message = "the accelerate configuration asks for DeepSpeed without a deepspeed_config_file; name one"
        raise LaunchError(message)
    for path in (Path(name), PROJECT_ROOT / name):
        if path.is_file():
            return path
    raise LaunchError(f"deepspeed_config_file {name!r} is neither in {Path.cwd()} nor in {PROJECT_ROOT}")


def _adapt_to_cpu(settings: dict[str, Any]) -> None:
    """Leave out what needs CUDA (pinned memory), or a compiler and minutes on first use (two DeepSpeed extensions)."""
    import deepspeed

    for name in ("offload_optimizer", "offload_param"):
        if name in settings["zero_optimization"]:
            settings["zero_optimization"][name]["pin_memory"] = False
    settings["zero_force_ds_cpu_optimizer"] = False
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
