"""Training that starts from LoRA files, on the tiny model: what it trains, and what decides its key."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from family_samples import write_media
from safetensors.torch import load_file, save_file

from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import load_family
from diffsynth_pipe.errors import ModelError
from diffsynth_pipe.stages.plan import plan_train
from diffsynth_pipe.stages.train import train
from diffsynth_pipe.train import main

CHECKPOINT = "transformer/diffusion_pytorch_model.safetensors"


def run(parameters, **changes):
    """Train, and return the summary and the path of the LoRA file."""
    result = train(load_config(None, parameters | changes))
    return result.summary, result.path / result.summary["lora_path"]


def test_a_started_lora_goes_on_where_the_file_ends(parameters, tmp_path):
    """In another format and with another alpha, so that both conversions take part."""
    first, path = run(parameters, lora_format="comfyui", lora_alpha=6)
    assert all(name.startswith("lora_unet_") for name in load_file(path))
    second, _ = run(parameters, lora_checkpoint=str(path))
    assert first["loss_after"] < first["loss_before"]
    assert second["loss_before"] == pytest.approx(first["loss_after"], rel=1e-6)
    assert second["loss_after"] < second["loss_before"]

    key = plan_train(load_config(None, parameters | {"lora_checkpoint": str(path)})).key
    moved = shutil.copy(path, tmp_path / "moved.safetensors")
    assert plan_train(load_config(None, parameters | {"lora_checkpoint": str(moved)})).key == key == second["key"]
    tensors = load_file(moved)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, moved)
    assert plan_train(load_config(None, parameters | {"lora_checkpoint": str(moved)})).key != key


def test_a_preset_lora_trains_the_difference(parameters, tiny_repo, tmp_path):
    """As on a base whose weights diffusers has fused with it."""
    from diffusers import QwenImagePipeline

    first, path = run(parameters, lora_alpha=8)
    preset = {"preset_lora_path": str(path), "preset_lora_model": "dit"}
    second, difference = run(parameters, **preset)
    assert second["loss_before"] == pytest.approx(first["loss_after"], rel=1e-6)

    pipe = QwenImagePipeline.from_pretrained(tiny_repo, vae=None, text_encoder=None, dtype=torch.float32)
    pipe.load_lora_weights(path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.transformer.save_pretrained(tmp_path / "fused" / "transformer")
    _, expected = run(parameters, model_paths=json.dumps([str(tmp_path / "fused" / CHECKPOINT)]))
    theirs, mine = load_file(expected), load_file(difference)
    assert set(mine) == set(theirs)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-4)
    assert len({first["key"], second["key"]}) == 2


@pytest.fixture
def flux_parameters(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    load_family("flux").write_tiny(tmp_path / "models" / "tiny" / "flux")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.csv").write_text(
        f"image,prompt\n{write_media(tmp_path / 'data', 'image', 0)},a photo\n"
    )
    parts = ("transformer", "text_encoder", "text_encoder_2", "vae")
    return {
        "family": "flux",
        "dataset_base_path": str(tmp_path / "data"),
        "dataset_metadata_path": str(tmp_path / "data" / "metadata.csv"),
        "encode_dtype": "float32",
        "model_id_with_origin_paths": ",".join(f"tiny/flux:{part}/*.safetensors" for part in parts),
        "output_path": str(tmp_path / "output"),
        "lora_base_model": "dit",
        "lora_target_modules": r"transformer_blocks\..*|single_transformer_blocks\..*proj_out",
        "lora_rank": 4,
        "lora_alpha": 6,
        "learning_rate": 1e-2,
        "num_epochs": 3,
        "num_validation_samples": 0,
    }


def test_flux_is_told_the_embedded_guidance(flux_parameters, monkeypatch):
    from diffusers import FluxTransformer2DModel

    forward, told = FluxTransformer2DModel.forward, set()
    monkeypatch.setattr(
        FluxTransformer2DModel,
        "forward",
        lambda *args, **kwargs: told.update(kwargs["guidance"].tolist()) or forward(*args, **kwargs),
    )
    run(flux_parameters, embedded_guidance=4, max_steps=1)
    assert told == {4.0}


def test_flux_is_saved_under_kohyas_names_where_the_references_flag_asks_for_them(flux_parameters, tmp_path):
    """To diffusers the file is the one with its own names."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    repository = tmp_path / "models" / "tiny" / "flux"
    parameters = flux_parameters

    def fused(path):
        dit = FluxTransformer2DModel.from_pretrained(repository / "transformer")
        others = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        pipeline = FluxPipeline(**dict.fromkeys(others), transformer=dit)
        pipeline.load_lora_weights(path)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        return pipeline.transformer.state_dict()

    plain, with_own_names = run(parameters)
    aligned, path = run(parameters, align_to_opensource_format=True)
    assert aligned["key"] != plain["key"]
    names = load_file(path).keys()
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in names
    assert all(name.startswith("lora_unet_") for name in names)
    expected = fused(with_own_names)
    for name, weight in fused(path).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)

    changes = {"align_to_opensource_format": True, "lora_target_modules": "to_q,norm_out.linear"}
    with pytest.raises(
        ModelError, match=r"^lora_target_modules: 'norm_out.linear' has no name in LoRA files of comfyui"
    ):
        run(parameters, **changes)


def test_dropout_is_repeated_by_a_second_run_and_not_part_of_validation(parameters, tmp_path):
    plain, path = run(parameters)
    dropped, first = run(parameters, lora_dropout=0.5)
    _, second = run(parameters, lora_dropout=0.5, output_path=str(tmp_path / "again"))
    assert dropped["loss_before"] == plain["loss_before"]
    assert first.read_bytes() == second.read_bytes()
    name = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    assert not torch.equal(load_file(first)[name], load_file(path)[name])

    continued, _ = run(parameters, lora_checkpoint=str(first), lora_dropout=0.5)
    assert continued["loss_before"] == dropped["loss_after"]


def flags(parameters):
    return [argument for name, value in parameters.items() for argument in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_target_modules": ""},
            'lora_target_modules: the automatic rule ("") finds no linear layer with at least 512',
        ),
        ({"lora_checkpoint": "no.safetensors"}, "lora_checkpoint: no.safetensors is not a file; check the path"),
        ({"lora_checkpoint": "vae"}, "is no weight of a LoRA as diffusers, DiffSynth-Studio or ComfyUI name it"),
        ({"preset_lora_path": "vae", "preset_lora_model": "dit"}, "preset_lora_path: "),
        ({"preset_lora_path": "a.safetensors"}, "preset_lora_path, preset_lora_model: set both or neither, got"),
        ({"preset_lora_model": "dit"}, "preset_lora_path, preset_lora_model: set both or neither, got"),
        ({"lora_use_dora": "true", "lora_format": "diffsynth"}, "lora_use_dora, lora_format: diffsynth cannot hold"),
    ],
    ids=["automatic", "missing", "no_lora", "preset_no_lora", "preset_alone", "preset_model_alone", "dora"],
)
def test_user_errors_are_one_line_and_exit_code_2(parameters, tiny_repo, changes, message, capfd):
    vae = str(tiny_repo / "vae" / "diffusion_pytorch_model.safetensors")
    changes = {name: vae if value == "vae" else value for name, value in changes.items()}
    assert main(flags(parameters | changes)) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert not list(Path(parameters["output_path"]).glob("*/*.safetensors"))
