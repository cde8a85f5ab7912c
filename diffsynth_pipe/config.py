"""Everything a run can be told: one flat model whose field names are flags, YAML keys and flow parameters.

A field's ``affects`` says what it decides, and so which stage must run again when it changes:

- ``cache``: the bytes of a cache record;
- ``weights``: the trained weights, but no cache byte;
- ``nothing``: where things lie, how fast a run is, what it logs. Paths are here: the digest of what they hold decides.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cache_store.durable import replace_file
from cache_store.object_path import SCHEME, root_of
from diffsynth_pipe.contracts import TEMPLATE_COLUMN, Quantization, load_task, plugin_names
from diffsynth_pipe.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_core import ErrorDetails

    from cache_store.object_path import Root

Affects = Literal["cache", "weights", "nothing"]
Stage = Literal["data_process", "train"]
LoraFormat = Literal["diffusers", "diffsynth", "comfyui"]

QUANT_METHODS = ("bitsandbytes_nf4", "bitsandbytes_fp4")
"""What ``quant_options`` can do, by the reference's names."""

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _setting(group: str, affects: Affects, default: Any, description: str) -> Any:
    """Declare a field: its heading in ``--help``, what it decides, its default, what it means."""
    extra: dict[str, Any] = {"group": group, "affects": affects}
    return Field(default, description=description, json_schema_extra=extra)


_dmd2 = partial(_setting, "DMD2 distillation", "weights")


_ACTS_WITH = {
    "audio_processor_path": ("family", ("wan", "wan_s2v", "wan_ti2v")),
    "logit_mean": ("timestep_sampling", ("logit_normal",)),
    "logit_std": ("timestep_sampling", ("logit_normal",)),
    "timestep_shift": ("timestep_sampling", ("uniform", "logit_normal")),
    "min_timestep_boundary": ("timestep_sampling", ("grid",)),
    "max_timestep_boundary": ("timestep_sampling", ("grid",)),
    "snap_timesteps_to_bf16": ("timestep_sampling", ("grid",)),
    "min_snr_gamma": ("loss_weighting", ("min_snr",)),
    "lr_warmup_steps": (
        "lr_scheduler",
        ("constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    ),
    "lr_num_cycles": ("lr_scheduler", ("cosine_with_restarts",)),
    "lr_power": ("lr_scheduler", ("polynomial",)),
    "ema_decay": ("use_ema", (True,)),
    "frame_rate": ("fix_frame_rate", (True,)),
    "enable_optimizer_cpu_offload": ("enable_model_cpu_offload", (True,)),
    "cpu_offload_split_threshold": ("enable_model_cpu_offload", (True,)),
    "dmd2_matching_t_mean": ("dmd2_matching_t_sampling", ("logitnormal",)),
    "dmd2_matching_t_std": ("dmd2_matching_t_sampling", ("logitnormal",)),
    "dmd2_student_schedule": ("dmd2_student_t_list", (None,)),
}
"""Fields that act only while another has one of these values, and are refused otherwise."""

_OF_DISCRIMINATOR = (
    *("dmd2_gan_r1_reg_weight", "dmd2_gan_r1_reg_alpha", "dmd2_gan_logit_reg_weight", "dmd2_feature_indices"),
    *("dmd2_discriminator_learning_rate", "dmd2_discriminator_hidden_dim", "dmd2_discriminator_num_blocks"),
)
"""Fields that act only where DMD2 has a discriminator."""

_NOISE_LEVELS = (
    *("timestep_sampling", "loss_weighting", "min_timestep_boundary", "max_timestep_boundary"),
    *("min_sigma", "max_sigma", "stratified_timesteps", "snap_timesteps_to_bf16"),
)
"""Fields that act only with a task that draws noise levels."""


def _say_what_validators_know(schema: dict[str, Any]) -> None:
    """Complete the JSON Schema, so that a Prefect server refuses what ``RunConfig`` would refuse later."""
    properties = schema["properties"]
    properties["family"]["enum"] = plugin_names("diffsynth_pipe.families")
    properties["task"]["enum"] = _task_names()


_PATHS = (
    *("dataset_base_path", "dataset_metadata_path", "model_paths"),
    *("resume_from_checkpoint", "lora_checkpoint", "preset_lora_path", "output_path", "cache_path"),
    *("cache_copies_path", "nvme_path", "accelerate_config_file", "fp8_models", "offload_models"),
)
"""Fields that hold a path, or a list of paths; the last two may also name a model by its id."""

_FOLDERS = (
    *("tokenizer_path", "tokenizer_1_path", "tokenizer_2_path", "processor_path"),
    *("audio_processor_path", "template_model_id_or_path"),
)
"""Fields that hold the path of a folder, or name one as ``MODEL_ID:FOLDER/``."""


class RunConfig(BaseModel):
    """The parameters of a run, checked. ``load_config`` builds one from a YAML file and flags."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        json_schema_extra=_say_what_validators_know,
    )

    dataset_base_path: str = _setting(
        "dataset",
        "nothing",
        ...,
        "Folder that the media paths in the metadata are relative to; for sft:train without cache_path, the cache.",
    )
    dataset_metadata_path: str | None = _setting(
        "dataset", "nothing", None, "Metadata file: .csv, .json or .jsonl, one sample per row. Not read by sft:train."
    )
    dataset_repeat: Count = _setting(
        "dataset", "weights", 1, "Passes over the dataset per epoch. Raise it for small datasets."
    )
    dataset_num_workers: Annotated[int, Field(ge=0)] = _setting(
        "dataset", "nothing", 0, "Threads that decode media or read the cache ahead. 0 is 1: there is always one."
    )
    data_file_keys: str = _setting(
        "dataset", "cache", "image,video", "Metadata columns that hold media files, comma-separated."
    )

    model_paths: list[str | list[str]] | None = _setting(
        "model loading", "nothing", None, "Local weight files, JSON: one entry per model; a sharded model is a list."
    )
    model_id_with_origin_paths: str | None = _setting(
        "model loading", "nothing", None, "Models by repository and file pattern, id:pattern, comma-separated."
    )
    extra_inputs: str | None = _setting(
        "model loading",
        "cache",
        None,
        "More metadata columns that the task or the model reads, comma-separated; for direct_distill"
        " seed,rand_device,num_inference_steps,cfg_scale. For Wan what of the video is given: input_image, end_image,"
        " clip_feature; for Wan2.2-S2V also input_audio and s2v_pose_video.",
    )
    fp8_models: list[str | list[str]] | None = _setting(
        "model loading",
        "nothing",
        None,
        "Entries of the two parameters above, comma-separated or JSON: frozen models whose weights are held in"
        " float8_e4m3fn, half of bfloat16, and cast layer by layer to compute. Training needs"
        " use_gradient_checkpointing to keep that gain.",
    )
    offload_models: list[str | list[str]] | None = _setting(
        "model loading",
        "nothing",
        None,
        "Entries of these two parameters, as for fp8_models: encoders whose weights stay in their files and are read"
        " layer by layer for every sample. Slow: for those that memory does not hold. Without effect in a stage that"
        " does not run them; models of the training step are refused.",
    )
    resume_from_checkpoint: str | None = _setting(
        "model loading",
        "nothing",
        None,
        "Denoiser to start from, as full training saves it: a .safetensors file or a folder of shards with their index."
        " Weights only; the step counts from 0.",
    )
    quant_options: str | None = _setting(
        "model loading",
        "nothing",
        None,
        "Frozen models whose linear layers are held in 4 bits: entry:method or entry:method/excluded,layers, separated"
        " by semicolons. An entry is one of the parameters above; methods are bitsandbytes_nf4 and bitsandbytes_fp4."
        " Needs the extra quant; training needs use_gradient_checkpointing to keep the gain.",
    )

    learning_rate: Positive = _setting(
        "training", "weights", 1e-4, "Peak learning rate. 1e-4 suits a LoRA, 1e-5 full training."
    )
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "diffsynth",
    ] = _setting(
        "training",
        "weights",
        "constant",
        "Course of the learning rate, by diffusers' names. diffsynth: constant, but a third in the first 5 steps.",
    )
    lr_warmup_steps: Annotated[int, Field(ge=0)] = _setting(
        "training", "weights", 0, "Optimizer steps in which the learning rate rises from 0."
    )
    lr_num_cycles: Count = _setting("training", "weights", 1, "Restarts of cosine_with_restarts.")
    lr_power: Positive = _setting("training", "weights", 1.0, "Power of polynomial.")
    num_epochs: Count = _setting("training", "weights", 1, "Epochs, each of dataset_repeat passes.")
    trainable_models: str | None = _setting(
        "training",
        "weights",
        None,
        "Models to train in full, comma-separated: dit, text_encoder, template_model, or a part template_model.NAME.",
    )
    find_unused_parameters: bool = _setting(
        "training",
        "nothing",
        False,
        "Let DDP look for parameters without a gradient in every step. Default: only if the first batch leaves some."
        " No effect under DeepSpeed.",
    )
    weight_decay: NonNegative = _setting("training", "weights", 0.01, "Weight decay of the optimizer.")
    task: str = _setting(
        "training", "weights", "sft", "What is minimised; :data_process or :train after it runs that stage alone."
    )
    customized_optimizer: str | None = _setting(
        "training",
        "weights",
        None,
        "Dotted path of an optimizer class, called with (params, lr, weight_decay). Default: torch's AdamW.",
    )
    use_ema: bool = _setting(
        "training", "weights", False, "Also keep and save an exponential moving average of what is trained."
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = _setting(
        "training", "weights", 0.9999, "Decay of the moving average; lower in the first steps."
    )

    output_path: str = _setting(
        "output",
        "nothing",
        "./models",
        "Folder of the results; for sft:data_process without cache_path, the cache itself.",
    )
    remove_prefix_in_ckpt: Literal["pipe.dit.", "pipe.template_model.", ""] = _setting(
        "output",
        "nothing",
        "pipe.dit.",
        "Empty: names in files of fully trained models start with pipe.<model>., and diffusers cannot load them.",
    )
    save_steps: Count | None = _setting(
        "output", "nothing", None, "Optimizer steps between checkpoints. Default: one checkpoint per epoch."
    )
    save_minutes: NonNegative = _setting(
        "output",
        "nothing",
        10.0,
        "Minutes between checkpoints that only serve to resume; the next one takes the place of the last.",
    )
    checkpoints_total_limit: Count | None = _setting(
        "output", "nothing", None, "Checkpoints to keep: the newest, and the best. Default: all of them."
    )

    lora_base_model: str | None = _setting("LoRA", "weights", None, "Model that gets the LoRA: dit.")
    lora_target_modules: str | None = _setting(
        "LoRA",
        "weights",
        None,
        "Layers that get a LoRA, comma-separated, as a whole or from a dot onwards. One item that is no plain name is a"
        ' regular expression on whole names; "" takes all with at least 512 inputs and outputs inside the blocks.'
        " Default: what the family recommends.",
    )
    lora_rank: Count = _setting("LoRA", "weights", 32, "Rank of the LoRA.")
    lora_alpha: Positive | None = _setting(
        "LoRA", "weights", None, "The update is scaled by lora_alpha / lora_rank. Default: lora_rank."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = _setting(
        "LoRA", "weights", 0.0, "Share of a LoRA's inputs that are zeroed in training."
    )
    lora_use_dora: bool = _setting(
        "LoRA",
        "weights",
        False,
        "Train the norms of the weight's rows too (DoRA): slower, and diffusers' format alone.",
    )
    lora_use_rslora: bool = _setting(
        "LoRA", "weights", False, "Scale by lora_alpha / sqrt(lora_rank) instead (rsLoRA)."
    )
    lora_checkpoint: str | None = _setting(
        "LoRA", "nothing", None, "LoRA file to start from, in any lora_format. It must have the same layers and rank."
    )
    preset_lora_path: str | None = _setting(
        "LoRA", "nothing", None, "LoRA file to fuse into the base model first, together with preset_lora_model."
    )
    preset_lora_model: Literal["dit"] | None = _setting(
        "LoRA", "weights", None, "Model that the preset LoRA is fused into, together with preset_lora_path: dit."
    )
    lora_format: LoraFormat = _setting(
        "LoRA",
        "weights",
        "diffusers",
        "Names in the LoRA file: diffusers, diffsynth (the reference's) or comfyui (kohya's, with an alpha per layer).",
    )

    use_gradient_checkpointing: bool = _setting(
        "gradient", "nothing", False, "Recompute activations in the backward pass: less memory, about a third slower."
    )
    use_gradient_checkpointing_offload: bool = _setting(
        "gradient",
        "nothing",
        False,
        "Gradient checkpointing that keeps the inputs of the blocks in host memory: least GPU memory, slowest.",
    )
    gradient_accumulation_steps: Count = _setting(
        "gradient", "weights", 1, "Micro-steps per optimizer step. Raise it for a larger batch in the same memory."
    )

    height: Count | None = _setting(
        "image size", "cache", None, "Height in pixels, together with width. Default: each image keeps its own size."
    )
    width: Count | None = _setting(
        "image size", "cache", None, "Width in pixels, together with height. Default: each image keeps its own size."
    )
    max_pixels: Annotated[int, Field(ge=256)] = _setting(
        "image size", "cache", 1024 * 1024, "Without height and width: larger images are shrunk to this area in pixels."
    )
    num_frames: Count = _setting(
        "image size",
        "cache",
        81,
        "Frames of a clip: the first of its video, or of a shorter one as many as are a multiple of 4 plus 1.",
    )

    tokenizer_path: str | None = _setting(
        "model-specific", "nothing", None, "Tokenizer folder, or id:folder. Default: the one beside the text encoder."
    )
    processor_path: str | None = _setting(
        "model-specific",
        "nothing",
        None,
        "Image processor folder, or id:folder. Default: the one beside the text encoder.",
    )
    zero_cond_t: bool = _setting(
        "model-specific",
        "weights",
        False,
        "Qwen-Image-Edit-2511: timestep 0 for the images to be edited. Weights whose config.json says so do it anyway.",
    )
    embedded_guidance: NonNegative = _setting(
        "model-specific",
        "weights",
        1.0,
        "FLUX.1, FLUX.2: the guidance that a denoiser with an embedding of it is told. FLUX.2-klein has none.",
    )
    initialize_model_on_cpu: bool = _setting(
        "model-specific", "nothing", False, "Load the weights on the CPU, then move them. DeepSpeed always does."
    )
    audio_processor_path: str | None = _setting(
        "model-specific",
        "nothing",
        None,
        "Wan2.2-S2V: folder of the wav2vec 2.0 processor, or id:folder. Default: the one beside the audio encoder. The"
        " other families of Wan do not hear: there a folder is checked, and no more.",
    )
    max_timestep_boundary: Fraction = _setting(
        "model-specific",
        "weights",
        1.0,
        "End of the trained part of the family's grid, as a fraction of its steps; 0 is pure noise.",
    )
    min_timestep_boundary: Fraction = _setting(
        "model-specific", "weights", 0.0, "Begin of the trained part of the family's grid, as a fraction of its steps."
    )
    framewise_decoding: bool = _setting(
        "model-specific",
        "cache",
        False,
        "Wan, but for S2V: make a latent frame of each frame, encoded alone, of any num_frames; for key frames.",
    )
    tokenizer_1_path: str | None = _setting(
        "model-specific", "nothing", None, "FLUX.1: folder of CLIP's tokenizer; another name of tokenizer_path."
    )
    tokenizer_2_path: str | None = _setting(
        "model-specific",
        "nothing",
        None,
        "FLUX.1: folder of T5's tokenizer. Default: the one beside the second text encoder.",
    )
    align_to_opensource_format: bool = _setting(
        "model-specific",
        "weights",
        False,
        "FLUX.1: kohya's names in the LoRA file; another name of lora_format comfyui.",
    )
    enable_npu_patch: bool = _setting(
        "model-specific",
        "nothing",
        False,
        "Z-Image: fused operators of Ascend NPUs in the train stage. Needs torch_npu.",
    )
    template_model_id_or_path: str | None = _setting(
        "model-specific",
        "nothing",
        None,
        "FLUX.2, Z-Image: folder of a template model, or id:folder. Its model.py is run; needs trust_remote_code and"
        " template_inputs in extra_inputs.",
    )
    enable_lora_hot_loading: bool = _setting(
        "model-specific", "weights", False, "Put the LoRA that a template model yields for a sample into the denoiser."
    )

    enable_tensorboard_log: bool = _setting(
        "logging", "nothing", False, "Write TensorBoard's event files to tensorboard_log in the run's folder."
    )
    enable_swanlab_log: bool = _setting(
        "logging", "nothing", False, "Log to SwanLab. Needs the package swanlab and its login, or SWANLAB_MODE=offline."
    )
    swanlab_project: str = _setting(
        "logging", "nothing", "DiffSynth-Studio", "SwanLab project. The variable SWANLAB_PROJECT overrides it."
    )
    enable_wandb_log: bool = _setting(
        "logging",
        "nothing",
        False,
        "Log to Weights & Biases. Needs the package wandb and its login, or WANDB_MODE=offline.",
    )
    wandb_project: str = _setting(
        "logging", "nothing", "DiffSynth-Studio", "Weights & Biases project. The variable WANDB_PROJECT overrides it."
    )
    enable_csv_log: bool = _setting(
        "logging", "nothing", False, "Write metrics.csv (step, key, value) to the run's folder."
    )

    num_held_out_samples: Annotated[int, Field(ge=0)] = _setting(
        "validation",
        "weights",
        0,
        "Samples that are never trained on; validation uses them. 0: it uses training samples, and cannot see"
        " overfitting.",
    )
    num_validation_samples: Annotated[int, Field(ge=0)] = _setting(
        "validation",
        "nothing",
        8,
        "Samples, at most, whose loss is measured before, during and after training. 0: none.",
    )
    validation_steps: Count | None = _setting(
        "validation", "nothing", None, "Optimizer steps between validations. Default: one with each checkpoint."
    )
    early_stopping_patience: Count | None = _setting(
        "validation",
        "weights",
        None,
        "Stop after this many validations without a new smallest loss. What decides when they take place then decides"
        " the weights too.",
    )

    enable_model_cpu_offload: bool = _setting(
        "offload",
        "nothing",
        False,
        "Keep the denoiser's frozen weights in host memory and bring them to the GPU layer by layer, forward and"
        " backward. For one process without DeepSpeed; slow.",
    )
    enable_optimizer_cpu_offload: bool = _setting(
        "offload",
        "nothing",
        False,
        "With enable_model_cpu_offload: trained weights come layer by layer too, and the optimizer steps on the CPU.",
    )
    cpu_offload_split_threshold: Count | None = _setting(
        "offload",
        "nothing",
        None,
        "With enable_model_cpu_offload: modules come as a whole that have at most so many times 1024² parameters."
        " Default: every layer comes by itself.",
    )

    dmd2_student_update_freq: Annotated[int, Field(ge=2)] = _dmd2(
        5, "Optimizer steps of a cycle: the first trains the student, the others the fake score and the discriminator."
    )
    dmd2_student_sample_steps: Count = _dmd2(4, "Steps in which the student samples.")
    dmd2_student_sample_type: Literal["sde", "ode"] = _dmd2(
        "sde", "How validation samples from the student: with new noise in each step (sde), or Euler's way (ode)."
    )
    dmd2_student_schedule: Literal["uniform", "family"] = _dmd2(
        "uniform", "Noise levels of the student's steps: evenly from dmd2_matching_t_max down, or the family's grid."
    )
    dmd2_student_t_list: str | None = _dmd2(
        None, "These levels instead, comma-separated, falling, with a 0 at the end: 0.999,0.75,0.5,0.25,0."
    )
    dmd2_matching_t_min: Fraction = _dmd2(0.001, "Lowest noise level at which distributions are compared.")
    dmd2_matching_t_max: Fraction = _dmd2(0.999, "Highest noise level at which distributions are compared.")
    dmd2_matching_t_sampling: Literal["uniform", "logitnormal"] = _dmd2(
        "uniform", "Distribution of that level between the two."
    )
    dmd2_matching_t_mean: float = _dmd2(0.0, "Mean of its logit under logitnormal.")
    dmd2_matching_t_std: Positive = _dmd2(1.0, "Deviation of its logit under logitnormal.")
    dmd2_gan_loss_weight: NonNegative = _dmd2(
        0.03, "Weight of the student's GAN loss beside the matching loss. 0: there is no discriminator."
    )
    dmd2_gan_r1_reg_weight: NonNegative = _dmd2(0.0, "Weight of the discriminator's approximate R1 penalty.")
    dmd2_gan_r1_reg_alpha: Positive = _dmd2(0.1, "Scale of the noise that this penalty adds to real latents.")
    dmd2_gan_logit_reg_weight: NonNegative = _dmd2(0.0, "Weight of the penalty on the squares of the logits.")
    dmd2_fake_score_learning_rate: Positive | None = _dmd2(
        None, "Peak learning rate of the fake score. Default: learning_rate."
    )
    dmd2_discriminator_learning_rate: Positive | None = _dmd2(
        None, "Peak learning rate of the discriminator. Default: learning_rate."
    )
    dmd2_feature_indices: str | None = _dmd2(
        None,
        "Blocks of the teacher whose outputs the discriminator sees, comma-separated, from 0. Default: the middle one.",
    )
    dmd2_discriminator_hidden_dim: Annotated[int, Field(ge=2)] | None = _dmd2(
        None, "Twice the channels within the discriminator's heads. Default: the width of the denoiser."
    )
    dmd2_discriminator_num_blocks: Count | None = _dmd2(
        None, "The discriminator sees only the first so many blocks; the middle is theirs. Default: all."
    )
    dmd2_teacher_cfg_scale: Annotated[float, Field(ge=1)] = _dmd2(
        1.0, "Guidance scale of the teacher, against the empty caption. 1: none."
    )
    dmd2_student_grad_clip_norm: NonNegative = _dmd2(
        10.0, "In place of max_grad_norm in the student's steps. 0: no limit."
    )

    family: str = _setting(
        "this project", "cache", "qwen_image", "Model family: the name of a module in diffsynth_pipe/families."
    )
    apply_exif_orientation: bool = _setting(
        "this project", "cache", True, "Turn photos upright by EXIF. The reference does not: false gives its bytes."
    )
    fix_frame_rate: bool = _setting(
        "this project",
        "cache",
        False,
        "Take frame_rate frames a second of each video, those shown nearest to each moment. Default: every frame.",
    )
    frame_rate: Positive = _setting("this project", "cache", 24.0, "Frames per second, with fix_frame_rate.")
    encode_dtype: Literal["bfloat16", "float32"] = _setting(
        "this project", "cache", "bfloat16", "Compute dtype of the encoders. On a CPU take float32: bfloat16 crawls."
    )
    cache_path: str | None = _setting(
        "this project",
        "nothing",
        None,
        "Folder of the cache, or s3://bucket/prefix. Default: output_path/cache; for a stage alone, where the"
        " reference's command puts it.",
    )
    cache_copies_path: str | None = _setting(
        "this project",
        "nothing",
        None,
        "Where train keeps what it read from a cache on s3://. Default: diffsynth-pipe/copies below the XDG cache"
        " folder.",
    )
    cache_copies_gb: NonNegative = _setting(
        "this project",
        "nothing",
        50.0,
        "Gigabytes (10^9 bytes) of disk that these copies may take. 0 keeps none: each epoch reads all from s3://.",
    )
    cache_backend: Literal["zarr", "webdataset"] = _setting(
        "this project",
        "nothing",
        "zarr",
        "Format of a new cache: zarr, or webdataset, tar files that other tools stream. Readers see what it is.",
    )
    cache_commit_seconds: NonNegative = _setting(
        "this project",
        "nothing",
        30.0,
        "Seconds of encoding between commits: what a crash can cost. 0 commits each record.",
    )
    data_process_num_processes: Count = _setting(
        "this project",
        "nothing",
        1,
        "Processes that encode on this machine, one per GPU. Under torchrun or accelerate launch, it says how many.",
    )
    batch_size: Count = _setting("this project", "weights", 1, "Samples per micro-step and rank.")
    max_batch_tokens: Count | None = _setting(
        "this project",
        "weights",
        None,
        "Instead of batch_size: as many samples per micro-step and rank as have this many latent tokens together, but"
        " at least one. A token of Qwen-Image is 16x16 pixels, so 1024x1024 has 4096.",
    )
    max_steps: Count | None = _setting(
        "this project", "weights", None, "Stop after this many optimizer steps, though num_epochs are not over."
    )
    max_grad_norm: Positive = _setting("this project", "weights", 1.0, "Gradients above this global norm are scaled.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = _setting(
        "this project", "weights", 0, "Decides order, noise, timesteps and the LoRA's first weights."
    )
    timestep_sampling: Literal["grid", "uniform", "logit_normal"] = _setting(
        "this project",
        "weights",
        "grid",
        "Distribution of the noise levels: the reference's grid of the family, uniform over sigma, or logit_normal.",
    )
    logit_mean: float = _setting(
        "this project", "weights", 0.0, "Mean of logit(sigma) under logit_normal. Above 0: more noise."
    )
    logit_std: Positive = _setting("this project", "weights", 1.0, "Deviation of logit(sigma) under logit_normal.")
    timestep_shift: Positive | Literal["resolution"] | None = _setting(
        "this project",
        "weights",
        None,
        "Shift s of the levels that are drawn off the grid, s*sigma/(1+(s-1)*sigma); resolution: as inference shifts"
        " for the image's size.",
    )
    min_sigma: Fraction = _setting("this project", "weights", 0.0, "Lowest noise level that is trained.")
    max_sigma: Fraction = _setting("this project", "weights", 1.0, "Highest noise level that is trained.")
    stratified_timesteps: bool = _setting(
        "this project",
        "weights",
        False,
        "Draw one noise level from each of as many equal parts of their distribution as a global batch has samples.",
    )
    snap_timesteps_to_bf16: bool = _setting(
        "this project", "weights", False, "Round timesteps as the reference does. For comparison with it alone."
    )
    loss_weighting: Literal["bell", "none", "min_snr"] = _setting(
        "this project",
        "weights",
        "bell",
        "Weight of a noise level: the reference's bell, none, or min_snr, which is min((1-sigma)^2, gamma*sigma^2).",
    )
    min_snr_gamma: Positive = _setting("this project", "weights", 5.0, "Gamma of min_snr.")
    caption_dropout: Fraction = _setting(
        "this project",
        "weights",
        0.0,
        "Probability that a sample is trained with the empty caption, which classifier-free guidance needs; often 0.1.",
    )
    gradient_checkpointing_backend: Literal["torch", "deepspeed"] = _setting(
        "this project",
        "nothing",
        "torch",
        "What recomputes activations. deepspeed: as activation_checkpointing of the DeepSpeed file says.",
    )
    trust_remote_code: bool = _setting(
        "this project", "nothing", False, "Run the model.py of template_model_id_or_path. It can do all that you can."
    )
    nvme_path: str | None = _setting(
        "this project",
        "nothing",
        None,
        "Folder on an NVMe disk for a DeepSpeed file that offloads to nvme_path auto. What is in it may be deleted"
        " after the run. Default: output_path/nvme.",
    )
    accelerate_config_file: str | None = _setting(
        "this project",
        "nothing",
        None,
        "YAML for accelerate launch. Default: ZeRO-3 with CPU offload, deploy/accelerate/zero3_cpu_offload.yaml; for"
        " dmd2 one process.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            message = "must not be true or false"
            raise ValueError(message)
        return value

    @field_validator("model_paths", mode="before")
    @classmethod
    def _parse_json(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise PydanticCustomError("malformed_json", "{message}", {"message": _json_fault(error)}) from error

    @field_validator("fp8_models", "offload_models", mode="before")
    @classmethod
    def _parse_entries(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.lstrip().startswith("["):
            return list(comma_list(value))
        return cls._parse_json(value)

    @field_validator("quant_options")
    @classmethod
    def _quant_options(cls, value: str | None) -> str | None:
        parse_quant_options(value)
        return value

    @field_validator("family")
    @classmethod
    def _known_family(cls, value: str) -> str:
        return _one_of(value, plugin_names("diffsynth_pipe.families"))

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        return _one_of(value, _task_names())

    @field_validator("dmd2_student_t_list")
    @classmethod
    def _falling_levels(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                levels = [float(item) for item in comma_list(value)]
            except ValueError:
                levels = []
            is_falling = all(level > following for level, following in itertools.pairwise(levels))
            if len(levels) < 2 or not is_falling or levels[0] > 1 or levels[-1] != 0:
                message = "must be noise levels that fall from at most 1 to a final 0, such as 0.999,0.75,0.5,0.25,0"
                raise ValueError(message)
        return value

    @field_validator("dmd2_feature_indices")
    @classmethod
    def _block_numbers(cls, value: str | None) -> str | None:
        items = comma_list(value)
        if value is not None and not (items and all(item.isdecimal() for item in items)):
            message = "must be numbers of blocks, from 0, such as 12,24"
            raise ValueError(message)
        return value

    @field_validator("lora_target_modules")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            message = f"is not a regular expression ({error})"
            raise ValueError(message) from error
        return value

    @field_validator("dataset_base_path", "output_path")
    @classmethod
    def _folder(cls, value: str) -> str:
        if value.startswith(SCHEME):
            message = "must be a folder on this machine; only cache_path may be on s3://"
            raise ValueError(message)
        return value

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.height is None) != (self.width is None):
            message = f"height, width: set both or neither, got height={self.height}, width={self.width}"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _one_way_of_checkpointing(self) -> Self:
        if self.gradient_checkpointing_backend == "deepspeed":
            if not self.use_gradient_checkpointing:
                message = "gradient_checkpointing_backend: 'deepspeed' does nothing without use_gradient_checkpointing"
                raise ValueError(message)
            if self.use_gradient_checkpointing_offload:
                message = (
                    "use_gradient_checkpointing_offload: is torch's, but gradient_checkpointing_backend is "
                    "'deepspeed'; set cpu_checkpointing in the DeepSpeed file's activation_checkpointing instead"
                )
                raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _offload_of_the_denoiser(self) -> Self:
        others = [name for name in comma_list(self.trainable_models) if name != "dit"]
        if self.enable_model_cpu_offload and others:
            message = (
                f"enable_model_cpu_offload: is for the denoiser, but trainable_models names {others[0]}; leave it out"
            )
            raise ValueError(message)
        if self.enable_model_cpu_offload and self.task_name == "dmd2":
            message = "enable_model_cpu_offload: moves one denoiser, but task dmd2 runs three; leave it out"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _one_name_of_the_tokenizer(self) -> Self:
        if self.tokenizer_path is not None and self.tokenizer_1_path is not None:
            message = "tokenizer_path, tokenizer_1_path: are two names of the same folder; set one"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _one_batch_size(self) -> Self:
        if self.max_batch_tokens is not None and self.batch_size != 1:
            message = f"batch_size, max_batch_tokens: set one, got {self.batch_size} and {self.max_batch_tokens}"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        for name, (other, values) in _ACTS_WITH.items():
            found = getattr(self, other)
            if found not in values and getattr(self, name) != type(self).model_fields[name].default:
                accepted = " or ".join(map(str, values))
                message = f"{name}: has no effect with {other} {found!r}; set {other} to {accepted}"
                raise ValueError(message)
        idle = [
            f"{name}: has no effect without {switch}"
            for name, switch in (("swanlab_project", "enable_swanlab_log"), ("wandb_project", "enable_wandb_log"))
            if getattr(self, name) != type(self).model_fields[name].default and not getattr(self, switch)
        ]
        idle += [
            f"{name}: has no effect with num_validation_samples 0"
            for name in ("validation_steps", "early_stopping_patience")
            if getattr(self, name) is not None and not self.num_validation_samples
        ]
        if idle:
            raise ValueError("; ".join(idle))
        return self

    @model_validator(mode="after")
    def _one_lora_format(self) -> Self:
        if self.align_to_opensource_format and not self.lora_base_model:
            message = "align_to_opensource_format: has no effect without a LoRA; set lora_base_model, or leave it out"
            raise ValueError(message)
        if self.align_to_opensource_format and self.lora_format == "diffsynth":
            message = (
                "align_to_opensource_format, lora_format: kohya's names are those of comfyui, not of diffsynth; set one"
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _template_model(self) -> Self:
        path, message = self.template_model_id_or_path, None
        if path is None:
            idle = [name for name in ("enable_lora_hot_loading", "trust_remote_code") if getattr(self, name)]
            message = f"{idle[0]}: has no effect without template_model_id_or_path; set it too" if idle else None
        elif not self.trust_remote_code:
            message = (
                f"template_model_id_or_path: the model.py of {path!r} would be run with all your rights; read it, then "
                "set trust_remote_code"
            )
        elif TEMPLATE_COLUMN not in comma_list(self.extra_inputs):
            message = f"template_model_id_or_path: reads the column {TEMPLATE_COLUMN}; name it in extra_inputs"
        elif self.gradient_checkpointing_backend == "deepspeed":
            message = "gradient_checkpointing_backend: 'deepspeed' gives a template model no gradient; take torch"
        elif self.task_name == "dmd2":
            message = "template_model_id_or_path: acts on one denoiser, but task dmd2 runs three; leave it out"
        elif self.enable_model_cpu_offload:
            message = "enable_model_cpu_offload: is for the denoiser, and a template model runs beside it; leave it out"
        if message:
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _dora_in_its_only_format(self) -> Self:
        if self.lora_use_dora and (name := self.lora_file_format) != "diffusers":
            field = "align_to_opensource_format" if self.align_to_opensource_format else "lora_format"
            message = f"lora_use_dora, {field}: {name} cannot hold DoRA's norms; set lora_format to diffusers alone"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _dmd2(self) -> Self:
        changed = [
            name
            for name, field in type(self).model_fields.items()
            if name.startswith("dmd2_") and getattr(self, name) != field.default
        ]
        if changed and self.task_name != "dmd2":
            message = f"{changed[0]}: has no effect with task {self.task!r}; leave it out, or set task to dmd2"
            raise ValueError(message)
        if self.task_name == "dmd2" and (others := set(comma_list(self.trainable_models)) - {"dit"}):
            message = f"trainable_models: task dmd2 trains the dit alone, in full or by a LoRA; leave out {min(others)}"
            raise ValueError(message)
        idle = [name for name in changed if name in _OF_DISCRIMINATOR] if not self.dmd2_gan_loss_weight else []
        if idle:
            message = (
                f"{idle[0]}: has no effect with dmd2_gan_loss_weight 0, as there is no discriminator; leave it out"
            )
            raise ValueError(message)
        if "dmd2_gan_r1_reg_alpha" in changed and not self.dmd2_gan_r1_reg_weight:
            message = "dmd2_gan_r1_reg_alpha: has no effect with dmd2_gan_r1_reg_weight 0; leave it out"
            raise ValueError(message)
        if self.dmd2_matching_t_min >= self.dmd2_matching_t_max:
            message = (
                "dmd2_matching_t_min, dmd2_matching_t_max: the range from "
                f"{self.dmd2_matching_t_min:g} to {self.dmd2_matching_t_max:g} is empty"
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _noise_levels(self) -> Self:
        if not load_task(self.task_name).draws_noise_levels:
            for name in _NOISE_LEVELS:
                if getattr(self, name) != type(self).model_fields[name].default:
                    message = f"{name}: has no effect with task {self.task!r}, which draws no levels; leave it out"
                    raise ValueError(message)
        boundaries = (self.min_timestep_boundary, self.max_timestep_boundary)
        sigmas = (self.min_sigma, self.max_sigma)
        if boundaries != (0, 1) and sigmas != (0, 1):
            message = (
                "min_timestep_boundary, max_timestep_boundary, min_sigma, max_sigma: set a range of timesteps or one of"
                " sigmas, not both"
            )
            raise ValueError(message)
        for kind, (low, high) in (("timestep_boundary", boundaries), ("sigma", sigmas)):
            if low >= high:
                message = f"min_{kind}, max_{kind}: the range from {low:g} to {high:g} is empty"
                raise ValueError(message)
        return self

    @property
    def lora_file_format(self) -> LoraFormat:
        """``lora_format``, or what ``align_to_opensource_format`` is another name of."""
        return "comfyui" if self.align_to_opensource_format else self.lora_format

    @property
    def task_name(self) -> str:
        """The task without its stage: ``sft``."""
        return self.task.partition(":")[0]

    @property
    def stage(self) -> Stage | None:
        """The one stage that ``task`` names; None for both."""
        stage: Any = self.task.partition(":")[2]
        return stage or None

    @property
    def cache_dir(self) -> Root:
        """Where the cache lies.

        Without ``cache_path`` the reference's two commands hand it over by ``output_path`` and ``dataset_base_path``.
        """
        if self.cache_path is not None:
            return root_of(self.cache_path)
        if self.stage == "data_process":
            return Path(self.output_path)
        return Path(self.dataset_base_path) if self.stage == "train" else Path(self.output_path) / "cache"

    @property
    def cache_copies_dir(self) -> Path:
        """Where the copies of caches in object stores lie."""
        return Path(self.cache_copies_path) if self.cache_copies_path is not None else user_cache_dir() / "copies"

    def keyed(self, affects: Affects) -> dict[str, Any]:
        """Return the JSON values of the fields that decide this.

        ``task`` comes without its stage: both stages in one command train the same weights as two commands. Of two
        parameters that mean the same, ``lora_format`` tells. With
        ``early_stopping_patience`` the weights also depend on when and on what validation takes place.
        """
        names = set(fields_that_affect(affects))
        if affects == "weights" and self.early_stopping_patience is not None:
            names |= {"num_validation_samples", "validation_steps", "save_steps"}
        values = self.model_dump(mode="json", include=names)
        if "lora_format" in values:
            values |= {"lora_format": self.lora_file_format, "align_to_opensource_format": False}
        return values | {"task": self.task_name} if "task" in values else values

    def with_absolute_paths(self) -> Self:
        """Return the same run for a process that works in another folder.

        The models that ``model_id_with_origin_paths`` names stay where that process looks for models.
        """
        ids = comma_list(self.model_id_with_origin_paths)

        def absolute(value: Any) -> Any:
            if isinstance(value, list):
                return [absolute(item) for item in value]
            return value if value is None or value in ids or value.startswith(SCHEME) else str(Path(value).absolute())

        changes = {name: absolute(getattr(self, name)) for name in _PATHS}
        options = [(absolute(entry), held) for entry, held in parse_quant_options(self.quant_options)]
        if options:
            changes["quant_options"] = ";".join(
                f"{json.dumps(entry) if isinstance(entry, list) else entry}:{held.method}/{','.join(held.excluded)}"
                for entry, held in options
            )
        for name in _FOLDERS:
            folder = getattr(self, name)
            if folder and (":" not in folder or Path(folder).is_dir()):
                changes[name] = absolute(folder)
        return self.model_copy(update=changes)

    def save(self, path: Path) -> None:
        """Write all values as YAML that ``load_config`` reads; atomically."""
        text = yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode(), path.parent)


def overrides_schema() -> dict[str, Any]:
    """Return the JSON Schema of some of the parameters: none is required, and none is filled in by a form."""
    schema = RunConfig.model_json_schema()
    del schema["required"]
    for field in schema["properties"].values():
        field.pop("default", None)
    return schema


def field_metadata(name: str) -> Mapping[str, Any]:
    """Return ``group`` and ``affects`` of a field."""
    extra = RunConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return extra


def user_cache_dir() -> Path:
    """Return where the project keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffsynth-pipe"


def fields_that_affect(affects: Affects) -> list[str]:
    """Return the names of the fields that decide this, in the order of their declaration."""
    return [name for name in RunConfig.model_fields if field_metadata(name)["affects"] == affects]


def comma_list(value: str | None) -> tuple[str, ...]:
    """Split ``"a, b"`` at its commas; None is empty."""
    return tuple(item for part in (value or "").split(",") if (item := part.strip()))


def parse_quant_options(value: str | None) -> list[tuple[str | list[str], Quantization]]:
    """Parse ``entry:method[/excluded,layers]; ...``, where an entry of several files is a JSON list.

    Raises:
        ValueError: It is malformed, or a method is none of ``QUANT_METHODS``.
    """
    options: list[tuple[str | list[str], Quantization]] = []
    for item in filter(None, map(str.strip, (value or "").split(";"))):
        entry, _, rest = item.rpartition(":")
        method, _, excluded = rest.partition("/")
        if not entry or method not in QUANT_METHODS:
            message = f"{item!r} is not MODEL:METHOD[/LAYER,LAYER] with a method of {', '.join(QUANT_METHODS)}"
            raise ValueError(message)
        files = json.loads(entry) if entry.startswith("[") else entry
        options.append((files, Quantization(method=method, excluded=comma_list(excluded))))
    return options


def suggest(name: str, known: list[str]) -> str:
    """Return ``"; did you mean 'lora_rank'?"``, or nothing if no known name is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> RunConfig:
    """Build the config of a run.

    Args:
        path: YAML file; None for flags alone.
        overrides: Go over the file's values. Strings are parsed, so flags can be handed over as they were typed.

    Raises:
        ConfigError: One line that names each wrong parameter, its value, and the file if it came from there.
    """
    from_file = {} if path is None else _read_yaml(path)
    try:
        return RunConfig.model_validate(from_file | dict(overrides))
    except ValidationError as error:
        lines: dict[str, str] = {}
        for detail in error.errors():
            name = str(detail["loc"][0]) if detail["loc"] else ""
            source = f" in {path}" if name in from_file and name not in overrides else ""
            lines.setdefault(name, _one_line(name, source, detail))
        raise ConfigError("; ".join(lines.values())) from error


def _task_names() -> list[str]:
    tasks = plugin_names("diffsynth_pipe.training.tasks")
    return [f"{task}{suffix}" for task in tasks for suffix in ("", ":data_process", ":train")]


def _one_of(value: str, accepted: list[str]) -> str:
    if value not in accepted:
        message = f"must be one of {', '.join(accepted)}"
        raise ValueError(message)
    return value


def _one_line(name: str, source: str, detail: ErrorDetails) -> str:
    if detail["type"] == "extra_forbidden":
        return f"unknown parameter {name!r}{source}{suggest(name, list(RunConfig.model_fields))}"
    if detail["type"] == "missing":
        return f"{name}: required, but not set"
    text = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else detail["msg"]
    if not name:
        return text
    if detail["type"] == "malformed_json":
        return f"{name}{source}: {text}"
    text = text.replace("Input should be", "must be")
    return f"{name}{source}: {text}, got {detail['input']!r}"


def _json_fault(error: json.JSONDecodeError) -> str:
    """Point at the character where JSON goes wrong."""
    before, after = (" ".join(text.split()) for text in (error.doc[: error.pos], error.doc[error.pos :]))
    place = f"{error.msg} in line {error.lineno}, column {error.colno}: {before[-30:]} >>> {after[:20]}"
    # Python 3.11 and 3.12 point behind the comma, later ones at it.
    trailing = re.match(r"\s*[\]}]", after.removeprefix(",")) and (before.endswith(",") or after.startswith(","))
    return f"is not JSON: {place}" + ("; remove the comma before the bracket" if trailing else "")


class _Dumper(yaml.SafeDumper):
    """Quotes text with line separators, which PyYAML would write as they are and read back as spaces."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    ),
)


class _Loader(yaml.SafeLoader):
    """Refuses what YAML would let pass: a key that stands there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for position, (key, _) in enumerate(node.value):
            if key.value in keys[:position]:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is set twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        message = f"run file {path} cannot be read: {error.strerror}"
        raise ConfigError(message) from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        message = f"{path}{line} is not YAML: {problem}"
        raise ConfigError(message) from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        message = f"{path} must be a mapping of parameter names to values, got {str(content)[:60]!r}"
        raise ConfigError(message)
    return content
