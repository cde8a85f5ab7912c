import re
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsynth_pipe.config import RunConfig, comma_list, field_metadata, load_config, parse_quant_options
from diffsynth_pipe.contracts import Quantization
from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.flags import FlagParser, add_config_flags, config_from_args

# The commands of the reference's full and low-VRAM LoRA training, as they stand in its documentation.
FULL_COMMAND = """
--dataset_base_path data/example_image_dataset
--dataset_metadata_path data/example_image_dataset/metadata.csv
--max_pixels 1048576
--dataset_repeat 50
--model_id_with_origin_paths "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors,\
Qwen/Qwen-Image:text_encoder/model*.safetensors,Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors"
--learning_rate 1e-5
--num_epochs 2
--remove_prefix_in_ckpt "pipe.dit."
--output_path "./models/train/Qwen-Image_full"
--trainable_models "dit"
--use_gradient_checkpointing
--find_unused_parameters
"""
DATA_PROCESS_COMMAND = """
--dataset_base_path data/example_image_dataset
--dataset_metadata_path data/example_image_dataset/metadata.csv
--max_pixels 1048576
--dataset_repeat 1
--model_id_with_origin_paths "Qwen/Qwen-Image:text_encoder/model*.safetensors,\
Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors"
--learning_rate 1e-4
--num_epochs 5
--remove_prefix_in_ckpt "pipe.dit."
--output_path "./models/train/Qwen-Image_lora-splited-cache"
--lora_base_model "dit"
--lora_target_modules "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,\
to_out.0,to_add_out,img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1"
--lora_rank 32
--task "sft:data_process"
--use_gradient_checkpointing
--dataset_num_workers 8
--find_unused_parameters
"""
TRAIN_COMMAND = """
--dataset_base_path "./models/train/Qwen-Image_lora-splited-cache"
--max_pixels 1048576
--dataset_repeat 50
--model_id_with_origin_paths "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors"
--learning_rate 1e-4
--num_epochs 5
--remove_prefix_in_ckpt "pipe.dit."
--output_path "./models/train/Qwen-Image_lora"
--lora_base_model "dit"
--lora_target_modules "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,\
to_out.0,to_add_out,img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1"
--lora_rank 32
--task "sft:train"
--use_gradient_checkpointing
--dataset_num_workers 8
--find_unused_parameters
--initialize_model_on_cpu
"""
TEMPLATE_COMMAND = """
--dataset_base_path "./models/train/Template-KleinBase4B-Brightness_full_cache"
--extra_inputs "template_inputs"
--max_pixels 1048576
--dataset_repeat 50
--model_id_with_origin_paths "black-forest-labs/FLUX.2-klein-base-4B:transformer/*.safetensors"
--template_model_id_or_path "DiffSynth-Studio/Template-KleinBase4B-Brightness:"
--learning_rate 1e-4
--num_epochs 5
--remove_prefix_in_ckpt "pipe.template_model."
--output_path "./models/train/Template-KleinBase4B-Brightness_full"
--trainable_models "template_model"
--use_gradient_checkpointing
--find_unused_parameters
--task "sft:train"
--trust_remote_code
"""
DMD2_COMMAND = """
--dataset_base_path data/diffsynth_example_dataset/flux2/FLUX.2-klein-base-4B
--height 512
--width 512
--tokenizer_path "black-forest-labs/FLUX.2-klein-4B:tokenizer/"
--dmd2_fake_score_learning_rate 1e-5
--dmd2_discriminator_learning_rate 1e-5
--trainable_models "dit"
--task dmd2
--dmd2_student_sample_steps 4
--dmd2_student_sample_type sde
--dmd2_student_schedule uniform
--dmd2_student_update_freq 5
--dmd2_matching_t_sampling uniform
--dmd2_gan_loss_weight 0.03
--dmd2_matching_t_min 0.001
--dmd2_matching_t_max 0.999
--dmd2_feature_indices 12
--embedded_guidance 4
--dmd2_teacher_cfg_scale 4
--use_gradient_checkpointing
"""
REFERENCE_DEFAULTS = {
    "dataset_metadata_path": None,
    "dataset_repeat": 1,
    "dataset_num_workers": 0,
    "data_file_keys": "image,video",
    "height": None,
    "width": None,
    "max_pixels": 1024 * 1024,
    "num_frames": 81,
    "model_paths": None,
    "model_id_with_origin_paths": None,
    "extra_inputs": None,
    "fp8_models": None,
    "offload_models": None,
    "resume_from_checkpoint": None,
    "quant_options": None,
    "learning_rate": 1e-4,
    "num_epochs": 1,
    "trainable_models": None,
    "find_unused_parameters": False,
    "weight_decay": 0.01,
    "task": "sft",
    "customized_optimizer": None,
    "output_path": "./models",
    "remove_prefix_in_ckpt": "pipe.dit.",
    "enable_tensorboard_log": False,
    "enable_swanlab_log": False,
    "swanlab_project": "DiffSynth-Studio",
    "enable_wandb_log": False,
    "wandb_project": "DiffSynth-Studio",
    "enable_csv_log": False,
    "save_steps": None,
    "lora_base_model": None,
    "lora_rank": 32,
    "lora_checkpoint": None,
    "preset_lora_path": None,
    "preset_lora_model": None,
    "use_gradient_checkpointing": False,
    "use_gradient_checkpointing_offload": False,
    "gradient_accumulation_steps": 1,
    "tokenizer_path": None,
    "processor_path": None,
    "zero_cond_t": False,
    "embedded_guidance": 1.0,
    "align_to_opensource_format": False,
    "framewise_decoding": False,
    "initialize_model_on_cpu": False,
    "max_timestep_boundary": 1.0,
    "min_timestep_boundary": 0.0,
}

# One value other than the default for each field: as typed after a flag, as parsed, and what it decides.
OTHER_VALUES = {
    "audio_processor_path": ("wav2vec", "wav2vec", "nothing"),
    "dataset_base_path": ("data/b", "data/b", "nothing"),
    "dataset_metadata_path": ("m.csv", "m.csv", "nothing"),
    "dataset_repeat": ("3", 3, "weights"),
    "dataset_num_workers": ("4", 4, "nothing"),
    "data_file_keys": ("photo", "photo", "cache"),
    "model_paths": ('["a", ["b", "c"]]', ["a", ["b", "c"]], "nothing"),
    "model_id_with_origin_paths": ("a/b:c*", "a/b:c*", "nothing"),
    "fp8_models": ('["a/b:c*", ["d", "e"]]', ["a/b:c*", ["d", "e"]], "nothing"),
    "offload_models": ("a, b:c*", ["a", "b:c*"], "nothing"),
    "quant_options": ("a/b:c*:bitsandbytes_nf4/d.1,e", "a/b:c*:bitsandbytes_nf4/d.1,e", "nothing"),
    "resume_from_checkpoint": ("a.safetensors", "a.safetensors", "nothing"),
    "extra_inputs": ("seed", "seed", "cache"),
    "learning_rate": ("1e-5", 1e-5, "weights"),
    "num_epochs": ("2", 2, "weights"),
    "trainable_models": ("text_encoder", "text_encoder", "weights"),
    "lr_scheduler": ("cosine_with_restarts", "cosine_with_restarts", "weights"),
    "lr_warmup_steps": ("10", 10, "weights"),
    "lr_num_cycles": ("2", 2, "weights"),
    "lr_power": ("2", 2.0, "weights"),
    "customized_optimizer": ("torch.optim.SGD", "torch.optim.SGD", "weights"),
    "use_ema": ("true", True, "weights"),
    "ema_decay": ("0.99", 0.99, "weights"),
    "find_unused_parameters": ("true", True, "nothing"),
    "weight_decay": ("0", 0.0, "weights"),
    "task": ("sft:train", "sft:train", None),  # the stage decides nothing: see test_both_stages_in_one_command
    "output_path": ("out", "out", "nothing"),
    "remove_prefix_in_ckpt": ("", "", "nothing"),
    "save_steps": ("100", 100, "nothing"),
    "save_minutes": ("1", 1.0, "nothing"),
    "checkpoints_total_limit": ("3", 3, "nothing"),
    "lora_base_model": ("dit", "dit", "weights"),
    "lora_target_modules": ("to_q,to_k", "to_q,to_k", "weights"),
    "lora_rank": ("16", 16, "weights"),
    "lora_alpha": ("8", 8.0, "weights"),
    "lora_dropout": ("0.1", 0.1, "weights"),
    "lora_use_dora": ("true", True, "weights"),
    "lora_use_rslora": ("true", True, "weights"),
    "lora_checkpoint": ("a.safetensors", "a.safetensors", "nothing"),
    "preset_lora_path": ("a.safetensors", "a.safetensors", "nothing"),
    "preset_lora_model": ("dit", "dit", "weights"),
    "lora_format": ("comfyui", "comfyui", "weights"),
    "use_gradient_checkpointing": ("true", True, "nothing"),
    "use_gradient_checkpointing_offload": ("true", True, "nothing"),
    "gradient_accumulation_steps": ("2", 2, "weights"),
    "height": ("512", 512, "cache"),
    "width": ("384", 384, "cache"),
    "max_pixels": ("65536", 65536, "cache"),
    "num_frames": ("17", 17, "cache"),
    "tokenizer_path": ("tokenizer", "tokenizer", "nothing"),
    "processor_path": ("processor", "processor", "nothing"),
    "zero_cond_t": ("true", True, "weights"),
    "embedded_guidance": ("4", 4.0, "weights"),
    "initialize_model_on_cpu": ("true", True, "nothing"),
    "align_to_opensource_format": ("true", True, "weights"),
    "framewise_decoding": ("true", True, "cache"),
    "tokenizer_1_path": ("clip", "clip", "nothing"),
    "tokenizer_2_path": ("t5", "t5", "nothing"),
    "apply_exif_orientation": ("false", False, "cache"),
    "fix_frame_rate": ("true", True, "cache"),
    "frame_rate": ("16", 16.0, "cache"),
    "encode_dtype": ("float32", "float32", "cache"),
    "cache_path": ("cache", "cache", "nothing"),
    "cache_backend": ("webdataset", "webdataset", "nothing"),
    "cache_copies_path": ("copies", "copies", "nothing"),
    "cache_copies_gb": ("0.5", 0.5, "nothing"),
    "cache_commit_seconds": ("0.5", 0.5, "nothing"),
    "data_process_num_processes": ("2", 2, "nothing"),
    "max_batch_tokens": ("8192", 8192, "weights"),
    "batch_size": ("2", 2, "weights"),
    "max_grad_norm": ("0.5", 0.5, "weights"),
    "seed": ("7", 7, "weights"),
    "max_timestep_boundary": ("0.358", 0.358, "weights"),
    "min_timestep_boundary": ("0.358", 0.358, "weights"),
    "timestep_sampling": ("uniform", "uniform", "weights"),
    "logit_mean": ("-0.5", -0.5, "weights"),
    "logit_std": ("0.5", 0.5, "weights"),
    "timestep_shift": ("3", 3.0, "weights"),
    "min_sigma": ("0.5", 0.5, "weights"),
    "max_sigma": ("0.5", 0.5, "weights"),
    "stratified_timesteps": ("true", True, "weights"),
    "snap_timesteps_to_bf16": ("true", True, "weights"),
    "loss_weighting": ("none", "none", "weights"),
    "min_snr_gamma": ("2", 2.0, "weights"),
    "caption_dropout": ("0.1", 0.1, "weights"),
    "gradient_checkpointing_backend": ("deepspeed", "deepspeed", "nothing"),
    "template_model_id_or_path": ("brightness", "brightness", "nothing"),
    "enable_lora_hot_loading": ("true", True, "weights"),
    "trust_remote_code": ("true", True, "nothing"),
    "nvme_path": ("/nvme", "/nvme", "nothing"),
    "enable_tensorboard_log": ("true", True, "nothing"),
    "enable_swanlab_log": ("true", True, "nothing"),
    "swanlab_project": ("mine", "mine", "nothing"),
    "enable_wandb_log": ("true", True, "nothing"),
    "wandb_project": ("mine", "mine", "nothing"),
    "enable_csv_log": ("true", True, "nothing"),
    "num_held_out_samples": ("5", 5, "weights"),
    "num_validation_samples": ("4", 4, "nothing"),
    "validation_steps": ("10", 10, "nothing"),
    "early_stopping_patience": ("3", 3, "weights"),
    "enable_npu_patch": ("true", True, "nothing"),
    "enable_model_cpu_offload": ("true", True, "nothing"),
    "enable_optimizer_cpu_offload": ("true", True, "nothing"),
    "cpu_offload_split_threshold": ("16", 16, "nothing"),
    "max_steps": ("100", 100, "weights"),
    "accelerate_config_file": ("a.yaml", "a.yaml", "nothing"),
    "dmd2_student_update_freq": ("3", 3, "weights"),
    "dmd2_student_sample_steps": ("2", 2, "weights"),
    "dmd2_student_sample_type": ("ode", "ode", "weights"),
    "dmd2_student_schedule": ("family", "family", "weights"),
    "dmd2_student_t_list": ("0.9,0.5,0", "0.9,0.5,0", "weights"),
    "dmd2_matching_t_min": ("0.1", 0.1, "weights"),
    "dmd2_matching_t_max": ("0.9", 0.9, "weights"),
    "dmd2_matching_t_sampling": ("logitnormal", "logitnormal", "weights"),
    "dmd2_matching_t_mean": ("1", 1.0, "weights"),
    "dmd2_matching_t_std": ("0.5", 0.5, "weights"),
    "dmd2_gan_loss_weight": ("0.1", 0.1, "weights"),
    "dmd2_gan_r1_reg_weight": ("1", 1.0, "weights"),
    "dmd2_gan_r1_reg_alpha": ("0.2", 0.2, "weights"),
    "dmd2_gan_logit_reg_weight": ("0.01", 0.01, "weights"),
    "dmd2_fake_score_learning_rate": ("1e-5", 1e-05, "weights"),
    "dmd2_discriminator_learning_rate": ("1e-5", 1e-05, "weights"),
    "dmd2_feature_indices": ("12,24", "12,24", "weights"),
    "dmd2_discriminator_hidden_dim": ("64", 64, "weights"),
    "dmd2_discriminator_num_blocks": ("20", 20, "weights"),
    "dmd2_teacher_cfg_scale": ("4", 4.0, "weights"),
    "dmd2_student_grad_clip_norm": ("1", 1.0, "weights"),
}
LOGIT_NORMAL = {"timestep_sampling": "logit_normal"}
DMD2 = {"task": "dmd2"}
BOTH_OR_NEITHER = {"height", "width", "template_model_id_or_path", "trust_remote_code"}
TRUSTED = {"trust_remote_code": "true", "extra_inputs": "template_inputs"}
PARTNER = {
    "align_to_opensource_format": {"lora_base_model": "dit"},
    "audio_processor_path": {"family": "wan"},
    "height": {"width": "384"},
    "width": {"height": "512"},
    "lr_warmup_steps": {"lr_scheduler": "cosine"},
    "lr_num_cycles": {"lr_scheduler": "cosine_with_restarts"},
    "lr_power": {"lr_scheduler": "polynomial"},
    "ema_decay": {"use_ema": "true"},
    "frame_rate": {"fix_frame_rate": "true"},
    "enable_optimizer_cpu_offload": {"enable_model_cpu_offload": "true"},
    "cpu_offload_split_threshold": {"enable_model_cpu_offload": "true"},
    "gradient_checkpointing_backend": {"use_gradient_checkpointing": "true"},
    "template_model_id_or_path": TRUSTED,
    "trust_remote_code": {"template_model_id_or_path": "brightness", "extra_inputs": "template_inputs"},
    "enable_lora_hot_loading": {"template_model_id_or_path": "brightness", **TRUSTED},
    "swanlab_project": {"enable_swanlab_log": "true"},
    "wandb_project": {"enable_wandb_log": "true"},
    "logit_mean": LOGIT_NORMAL,
    "logit_std": LOGIT_NORMAL,
    "timestep_shift": LOGIT_NORMAL,
    "min_snr_gamma": {"loss_weighting": "min_snr"},
    **{name: DMD2 for name in OTHER_VALUES if name.startswith("dmd2_")},
    "dmd2_matching_t_mean": DMD2 | {"dmd2_matching_t_sampling": "logitnormal"},
    "dmd2_matching_t_std": DMD2 | {"dmd2_matching_t_sampling": "logitnormal"},
    "dmd2_gan_r1_reg_alpha": DMD2 | {"dmd2_gan_r1_reg_weight": "1"},
}


def parse(flags):
    parser = FlagParser(prog="test")
    add_config_flags(parser)
    return config_from_args(parser.parse_flags(flags))


def config(**values):
    return load_config(None, {"dataset_base_path": "data"} | values)


def error_line(path=None, **values):
    with pytest.raises(ConfigError) as caught:
        load_config(path, values)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.fixture
def run_file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("command", [FULL_COMMAND, DATA_PROCESS_COMMAND, TRAIN_COMMAND])
def test_the_script_runs_the_references_commands_word_for_word(command):
    script = (Path(__file__).parents[2] / "deploy" / "reference_commands.sh").read_text()
    words = shlex.split(script.replace("\\\n", " ").replace("$DATASET", "data/example_image_dataset"), comments=True)
    assert f" {' '.join(shlex.split(command))} $EXTRA_FLAGS " in f" {' '.join(words)} "


@pytest.mark.parametrize("command", [FULL_COMMAND, DATA_PROCESS_COMMAND, TRAIN_COMMAND, TEMPLATE_COMMAND, DMD2_COMMAND])
def test_the_references_commands_parse_as_they_stand(command):
    words = shlex.split(command)
    parsed = parse(words)
    for position, word in enumerate(words):
        if word.startswith("--"):
            value = words[position + 1] if position + 1 < len(words) else "--"
            expected = "True" if value.startswith("--") else value
            shown = getattr(parsed, word.removeprefix("--"))
            assert str(shown) == expected or shown == float(expected)


def test_the_references_commands_share_their_cache():
    folder = Path("models/train/Qwen-Image_lora-splited-cache")
    assert parse(shlex.split(DATA_PROCESS_COMMAND)).cache_dir == folder
    assert parse(shlex.split(TRAIN_COMMAND)).cache_dir == folder


def test_defaults_are_the_references():
    assert {name: getattr(config(), name) for name in REFERENCE_DEFAULTS} == REFERENCE_DEFAULTS


@pytest.mark.parametrize("name", RunConfig.model_fields)
def test_a_field_says_what_it_decides(name):
    assert set(field_metadata(name)) == {"group", "affects"}
    assert field_metadata(name)["affects"] in ("cache", "weights", "nothing")
    assert field_metadata(name)["group"]
    assert RunConfig.model_fields[name].description.endswith(".")


def test_every_field_has_another_value_below():
    # Families are files; a second one gives ``family`` another value.
    assert set(RunConfig.model_fields) - set(OTHER_VALUES) == {"family"}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_flag_and_yaml_give_the_same_value(name, run_file):
    typed, value, _ = OTHER_VALUES[name]
    given = {"dataset_base_path": "data", **PARTNER.get(name, {})}
    by_flag = parse([word for key, text in (given | {name: typed}).items() for word in (f"--{key}", text)])
    by_yaml = load_config(run_file(yaml.safe_dump(given | {name: value})), {})
    by_text = load_config(run_file(yaml.safe_dump(given | {name: typed})), {})
    assert by_flag == by_yaml == by_text
    assert getattr(by_flag, name) == value
    assert type(getattr(by_flag, name)) is type(value)


def test_flags_yaml_and_schema_have_the_same_names_and_defaults():
    properties = RunConfig.model_json_schema()["properties"]
    parser = FlagParser(prog="test")
    add_config_flags(parser)
    flags = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    assert set(properties) == set(RunConfig.model_fields) == flags - {"config", "help", "-h"}
    values = config().model_dump(mode="json")
    for name, entry in properties.items():
        assert entry["affects"] == field_metadata(name)["affects"]
        if name != "dataset_base_path":
            assert entry["default"] == values[name]


@pytest.mark.parametrize(("name", "other"), [(name, OTHER_VALUES[name][0]) for name in OTHER_VALUES])
def test_a_field_changes_only_the_key_that_it_decides(name, other):
    partner = PARTNER.get(name, {})
    before = config(**{key: value for key, value in partner.items() if not {key, name} <= BOTH_OR_NEITHER})
    after = config(**PARTNER.get(name, {}) | {name: other})
    changed = [kind for kind in ("cache", "weights", "nothing") if before.keyed(kind) != after.keyed(kind)]
    decides = OTHER_VALUES[name][2]
    assert changed == ([decides] if decides else [])


def test_every_field_is_in_one_key():
    keys = [config().keyed(kind) for kind in ("cache", "weights", "nothing")]
    assert sorted(name for key in keys for name in key) == sorted(RunConfig.model_fields)


def test_the_references_name_of_a_lora_format_shares_its_key():
    lora = {"lora_base_model": "dit"}
    aligned, named = config(align_to_opensource_format=True, **lora), config(lora_format="comfyui", **lora)
    assert aligned.keyed("weights") == named.keyed("weights") != config(**lora).keyed("weights")


def test_both_stages_in_one_command_train_the_same_weights_as_two_commands():
    assert config(task="sft:train").keyed("weights") == config(task="sft").keyed("weights")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset_repeat", "0"),
        ("dmd2_student_update_freq", "1"),
        ("dataset_num_workers", "-1"),
        ("learning_rate", "0"),
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("num_epochs", "1.5"),
        ("num_epochs", True),
        ("weight_decay", "-0.1"),
        ("task", "trajectory_imitation"),
        ("task", "sft:"),
        ("task", "sft:preview"),
        ("output_path", 3),
        ("save_steps", "0"),
        ("lora_rank", "0"),
        ("lora_rank", "many"),
        ("lora_target_modules", ["to_q"]),
        ("use_gradient_checkpointing", "maybe"),
        ("gradient_accumulation_steps", 0),
        ("max_pixels", 255),
        ("family", "qwen-image"),
        ("encode_dtype", "float16"),
        ("cache_backend", "pth"),
        ("cache_commit_seconds", -1),
        ("cache_copies_gb", -1),
        ("output_path", "s3://bucket/output"),
        ("dataset_base_path", "s3://bucket/photos"),
        ("batch_size", 0),
        ("batch_size", None),
        ("max_batch_tokens", 0),
        ("max_grad_norm", 0),
        ("timestep_sampling", "sigmoid"),
        ("timestep_shift", "height"),
        ("timestep_shift", 0),
        ("logit_std", 0),
        ("min_sigma", -0.1),
        ("max_timestep_boundary", 1.5),
        ("loss_weighting", "snr"),
        ("seed", -1),
        ("seed", 2**63),
        ("remove_prefix_in_ckpt", "dit."),
        ("model_paths", "model.safetensors"),
        ("model_paths", '["a",]'),
        ("model_paths", "[1]"),
        ("model_paths", {"dit": "a"}),
        ("fp8_models", '["a",]'),
        ("quant_options", "bitsandbytes_nf4"),
        ("quant_options", "a/b:transformer/c.safetensors"),
        ("quant_options", "a:torchao_int8_w8a16"),
        ("quant_options", '["a",]:bitsandbytes_nf4'),
        ("gradient_checkpointing_backend", "fsdp"),
    ],
)
def test_a_wrong_value_is_named(name, value, run_file):
    line = error_line(**{"dataset_base_path": "data", name: value})
    assert line.startswith(f"{name}: ")
    path = run_file(yaml.safe_dump({"dataset_base_path": "data", name: value}))
    assert error_line(path).startswith(f"{name} in {path}: ")


def test_the_value_and_what_is_accepted_are_named():
    assert error_line(dataset_base_path="data", lora_rank=0) == "lora_rank: must be greater than or equal to 1, got 0"
    assert error_line(dataset_base_path="data", task="sfd").endswith("sft, sft:data_process, sft:train, got 'sfd'")


@pytest.mark.parametrize(
    ("text", "end"),
    [
        # The bracket, or in Python 3.13 the comma before it.
        ('["a.safetensors",\n  ["b.safetensors", "c.safetensors", ]]', r"line 2, column 3\d: .*; remove the comma .*"),
        ('["a.safetensors",\n]', r"line (1, column 17|2, column 1): .*; remove the comma before the bracket"),
        ('["a.safetensors" "b.safetensors"]', r'line 1, column 18: \["a\.safetensors" >>> "b\.safetensors"\]'),
        ("[a.safetensors]", r"line 1, column 2: \[ >>> a\.safetensors\]"),
    ],
)
def test_malformed_json_is_pointed_at(text, end):
    assert re.fullmatch(
        r"model_paths: is not JSON: .* in " + end, error_line(dataset_base_path="data", model_paths=text)
    )


def test_height_needs_width():
    assert (
        error_line(dataset_base_path="data", height=64)
        == "height, width: set both or neither, got height=64, width=None"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"gradient_checkpointing_backend": "deepspeed"},
            "gradient_checkpointing_backend: 'deepspeed' does nothing without use_gradient_checkpointing",
        ),
        (
            {
                "gradient_checkpointing_backend": "deepspeed",
                "use_gradient_checkpointing": True,
                "use_gradient_checkpointing_offload": True,
            },
            "use_gradient_checkpointing_offload: is torch's, but",
        ),
    ],
)
def test_contradictory_ways_of_checkpointing_are_refused(values, message):
    assert error_line(dataset_base_path="data", **values).startswith(message)


def test_fp8_models_may_be_written_as_either_of_the_parameters_that_they_repeat():
    assert config(fp8_models="a/b:c*, d.safetensors").fp8_models == ["a/b:c*", "d.safetensors"]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"wandb_project": "mine"}, "wandb_project: has no effect without enable_wandb_log"),
        ({"swanlab_project": "mine"}, "swanlab_project: has no effect without enable_swanlab_log"),
        (
            {"num_validation_samples": 0, "validation_steps": 5},
            "validation_steps: has no effect with num_validation_samples 0",
        ),
        (
            {"num_validation_samples": 0, "early_stopping_patience": 5},
            "early_stopping_patience: has no effect with num_validation_samples 0",
        ),
    ],
)
def test_a_field_that_another_one_makes_idle_is_refused(values, line):
    assert error_line(dataset_base_path="data", **values) == line


@pytest.mark.parametrize("name", ["num_validation_samples", "validation_steps", "save_steps"])
def test_what_decides_when_a_run_stops_early_decides_the_weights(name):
    change = {name: OTHER_VALUES[name][0]}
    assert config(**change).keyed("weights") == config().keyed("weights")
    stopping = {"early_stopping_patience": 2}
    assert config(**stopping, **change).keyed("weights") != config(**stopping).keyed("weights")


def test_the_shift_by_resolution_is_a_word():
    assert config(timestep_sampling="uniform", timestep_shift="resolution").timestep_shift == "resolution"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"logit_mean": 1},
            "logit_mean: has no effect with timestep_sampling 'grid'; set timestep_sampling to logit_normal",
        ),
        (
            {"logit_std": 2, "timestep_sampling": "uniform"},
            "logit_std: has no effect with timestep_sampling 'uniform'; set timestep_sampling to logit_normal",
        ),
        (
            {"timestep_shift": 3},
            "timestep_shift: has no effect with timestep_sampling 'grid'; "
            "set timestep_sampling to uniform or logit_normal",
        ),
        (
            {"max_timestep_boundary": 0.5, "timestep_sampling": "uniform"},
            "max_timestep_boundary: has no effect with timestep_sampling 'uniform'; set timestep_sampling to grid",
        ),
        (
            {"snap_timesteps_to_bf16": True, "timestep_sampling": "logit_normal"},
            "snap_timesteps_to_bf16: has no effect with timestep_sampling 'logit_normal'; "
            "set timestep_sampling to grid",
        ),
        (
            {"min_snr_gamma": 1},
            "min_snr_gamma: has no effect with loss_weighting 'bell'; set loss_weighting to min_snr",
        ),
        (
            {"min_timestep_boundary": 0.5, "max_sigma": 0.5},
            "min_timestep_boundary, max_timestep_boundary, min_sigma, max_sigma: set a range of timesteps or one of "
            "sigmas, not both",
        ),
        (
            {"min_timestep_boundary": 0.5, "max_timestep_boundary": 0.5},
            "min_timestep_boundary, max_timestep_boundary: the range from 0.5 to 0.5 is empty",
        ),
        (
            {"task": "direct_distill:train", "loss_weighting": "none"},
            "loss_weighting: has no effect with task 'direct_distill:train', which draws no levels; leave it out",
        ),
        ({"min_sigma": 0.7, "max_sigma": 0.6}, "min_sigma, max_sigma: the range from 0.7 to 0.6 is empty"),
    ],
)
def test_noise_level_settings_that_contradict_each_other_are_refused(values, line):
    assert error_line(dataset_base_path="data", **values) == line


def test_a_fixed_batch_size_beside_a_token_budget_is_refused():
    assert (
        error_line(dataset_base_path="data", batch_size=2, max_batch_tokens=100)
        == "batch_size, max_batch_tokens: set one, got 2 and 100"
    )


def test_all_wrong_parameters_are_named_at_once():
    line = error_line(lora_rank=0, seed="x", lora_rnak=3)
    for part in ("dataset_base_path: required", "lora_rank: ", "seed: ", "'lora_rnak'"):
        assert part in line


def test_an_unknown_key_gets_the_nearest_name(run_file):
    path = run_file("dataset_base_path: data\nlora_rnak: 3\n")
    assert error_line(path) == f"unknown parameter 'lora_rnak' in {path}; did you mean 'lora_rank'?"
    assert error_line(dataset_base_path="data", xyzzy=1) == "unknown parameter 'xyzzy'"


def test_flags_go_over_the_file(run_file):
    path = run_file("dataset_base_path: data\nlora_rank: 4\nseed: 0x10\n")
    loaded = parse([str(path), "--lora_rank", "8"])
    assert (loaded.lora_rank, loaded.seed) == (8, 16)
    assert parse(["--lora_rank", "8", "--config", str(path)]) == loaded
    assert parse(["--lora_rank=8", str(path)]) == loaded
    # A wrong value that a flag replaces is no error; a wrong flag is not blamed on the file.
    assert load_config(run_file("dataset_base_path: data\nseed: x\n"), {"seed": 1}).seed == 1
    assert error_line(path, lora_rank=0).startswith("lora_rank: ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("dataset_base_path: data\nseed: [1\n", 3),
        ("dataset_base_path: data\n\tseed: 1\n", 2),
        ("seed: 1\nlora_rank: 2\nseed: 2\n", 3),
        ("seed: !!python/object/apply:os.getcwd []\n", 1),
        ("seed: 1\n---\nseed: 2\n", 2),
    ],
)
def test_a_yaml_error_names_file_and_line(text, line, run_file):
    path = run_file(text)
    assert error_line(path).startswith(f"{path}:{line} is not YAML: ")


@pytest.mark.parametrize("text", ["- seed\n", "seed\n", "3: 4\n", "seed: 2024-13-45\n", "seed: \x00\n"])
def test_a_file_that_is_no_mapping_of_names_is_refused(text, run_file):
    path = run_file(text)
    assert str(path) in error_line(path)


def test_a_missing_file_is_named(tmp_path):
    assert str(tmp_path / "absent.yaml") in error_line(tmp_path / "absent.yaml")
    assert str(tmp_path) in error_line(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"dataset_base_path: caf\xe9\n")
    assert "latin.yaml is not YAML" in error_line(tmp_path / "latin.yaml")


def test_save_and_load(tmp_path):
    for name, (typed, _, _) in OTHER_VALUES.items():
        changed = config(**PARTNER.get(name, {}), **{name: typed})
        changed.save(tmp_path / "new folder" / "run.yaml")
        assert load_config(tmp_path / "new folder" / "run.yaml", {}) == changed
    config().save(tmp_path / "new folder" / "run.yaml")
    assert load_config(tmp_path / "new folder" / "run.yaml", {}) == config()
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["run.yaml"]


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(blacklist_categories=["Cs"]), max_size=20), rate=st.floats(1e-12, 1.0))
def test_any_text_and_number_survives_a_save(text, rate, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    saved = config(output_path=text, learning_rate=rate)
    saved.save(path)
    assert load_config(path, {}) == saved


@pytest.mark.parametrize(
    ("task", "cache_path", "folder"),
    [
        ("sft", None, "out/cache"),
        ("sft:data_process", None, "out"),
        ("sft:train", None, "data"),
        ("sft", "c", "c"),
        ("sft:data_process", "c", "c"),
        ("sft:train", "c", "c"),
    ],
)
def test_cache_dir(task, cache_path, folder):
    assert config(task=task, output_path="out", cache_path=cache_path).cache_dir == Path(folder)


def test_task_and_stage():
    assert (config().task_name, config().stage) == ("sft", None)
    assert (config(task="sft:train").task_name, config(task="sft:train").stage) == ("sft", "train")


def test_comma_list():
    assert comma_list("a, b,,c ") == ("a", "b", "c")
    assert comma_list(None) == comma_list("") == ()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_rnak", "3"], "unknown argument '--lora_rnak'; did you mean '--lora_rank'?"),
        (["run.yaml", "--lora_rnak=3"], "unknown argument '--lora_rnak'; did you mean '--lora_rank'?"),
        (["run.yaml", "more.yaml"], "unknown argument 'more.yaml'"),
        (["--lora_rank"], "argument --lora_rank: expected one argument"),
        (["--lora", "3"], "unknown argument '--lora'; did you mean '--lora_rank'?"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message):
    with pytest.raises(ConfigError) as caught:
        parse(flags)
    assert str(caught.value) == message


def test_the_yaml_of_the_demo_loads():
    demo = Path(__file__).parents[2] / "deploy" / "demo" / "qwen_image.yaml"
    assert load_config(demo, {}).lora_base_model == "dit"


def test_absolute_paths_keep_ids_and_the_models_that_other_parameters_repeat(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae = "tiny/Qwen-Image:vae/*.safetensors"
    config = load_config(
        None,
        {
            "dataset_base_path": "photos",
            "model_paths": ["dit/a.safetensors"],
            "model_id_with_origin_paths": vae,
            "fp8_models": [vae, "dit/a.safetensors"],
            "quant_options": f'{vae}:bitsandbytes_nf4; dit/a.safetensors:bitsandbytes_fp4/b,c.1;["d"]:bitsandbytes_nf4',
            "family": "flux",
            "tokenizer_2_path": "t5",
        },
    ).with_absolute_paths()
    by_id = load_config(None, {"dataset_base_path": "photos", "tokenizer_path": "tiny/Qwen-Image:tokenizer/"})
    assert by_id.with_absolute_paths().tokenizer_path == by_id.tokenizer_path
    (tmp_path / "brightness").mkdir()
    for template, absolute in (("brightness", str(tmp_path / "brightness")), ("org/brightness:", "org/brightness:")):
        named = {"template_model_id_or_path": template, "dataset_base_path": "photos", **TRUSTED}
        assert load_config(None, named).with_absolute_paths().template_model_id_or_path == absolute
    assert config.tokenizer_2_path == str(tmp_path / "t5")
    assert config.model_paths == [str(tmp_path / "dit/a.safetensors")]
    assert config.fp8_models == [vae, *config.model_paths]
    assert parse_quant_options(config.quant_options) == [
        (vae, Quantization(method="bitsandbytes_nf4")),
        (config.model_paths[0], Quantization(method="bitsandbytes_fp4", excluded=("b", "c.1"))),
        ([str(tmp_path / "d")], Quantization(method="bitsandbytes_nf4")),
    ]
