"""LoRA files that cannot be used: one line that names the file, its first bad key and the cure."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffsynth_pipe.errors import ModelError, ModelFileMissing
from diffsynth_pipe.training.lora import LoraSettings, add_lora, load_lora, lora_parameters
from diffsynth_pipe.training.lora_file import export_lora, read_lora, resolution_of


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(6, 8), "to_k": nn.Linear(6, 8)})])


NO_WEIGHT = "is no weight of a LoRA as diffusers, DiffSynth-Studio or ComfyUI name it; take another file"
Q, K = "t.blocks.0.to_q", "t.blocks.0.to_k"


def model_with_lora(**changes):
    model = Model().requires_grad_(False)
    settings = LoraSettings(**{"targets": ("to_q", "to_k"), "rank": 2, "alpha": 2.0} | changes)
    add_lora(model, settings, 0)
    return model, settings


def file_tensors(**changes):
    """Return the tensors of a file that fits."""
    model, settings = model_with_lora(**changes)
    tensors = {name: parameter.detach() for name, parameter in lora_parameters(model).items()}
    return export_lora(tensors, settings, "diffusers", prefix="t", architecture="x")[0]


def without(tensors, key):
    return {name: tensor for name, tensor in tensors.items() if name != key}


def start(path, **changes):
    model, settings = model_with_lora(**changes)
    load_lora(model, read_lora(path, model, prefix="t", parameter="lora_checkpoint"), settings)


def refusal(path, **changes):
    with pytest.raises(ModelError) as caught:
        start(path, **changes)
    line = str(caught.value)
    assert line.startswith(f"lora_checkpoint: {path}")
    assert "\n" not in line
    return line.removeprefix(f"lora_checkpoint: {path}")


def test_the_file_of_these_tests_fits(tmp_path):
    save_file(file_tensors(), tmp_path / "lora.safetensors")
    start(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {f"{Q}.weight": torch.zeros(8, 6)},
            f": '{Q}.weight' {NO_WEIGHT}",
        ),
        (
            lambda t: t | {"t.single_blocks.0.to_q.lora_A.weight": torch.zeros(2, 6)},
            ": 't.single_blocks.0.to_q.lora_A.weight' is for no linear layer of Model; take a LoRA of this model",
        ),
        (
            lambda t: t | {f"{Q}.lora_A.weight": torch.zeros(2, 7)},
            f": '{Q}.lora_A.weight' has shape [2, 7], but Model takes [2, 6]; take a LoRA of this model",
        ),
        (
            lambda t: t | {f"{Q}.lora_B.weight": torch.zeros(8, 3)},
            f": '{Q}.lora_B.weight' has shape [8, 3], but Model takes [8, 2]; take a LoRA of this model",
        ),
        (
            lambda t: t | {f"{Q}.lora_A.weight": torch.zeros(0, 6), f"{Q}.lora_B.weight": torch.zeros(8, 0)},
            f": '{Q}.lora_A.weight' has shape [0, 6], but Model takes [0, 6]; take a LoRA of this model",
        ),
        (
            lambda t: without(t, f"{Q}.lora_B.weight"),
            f": '{Q}.lora_A.weight' is there without the up weight beside it; take a whole file",
        ),
        (
            lambda t: t | {f"{Q}.lora_B.bias": torch.zeros(8)},
            f": '{Q}.lora_B.bias' {NO_WEIGHT}",
        ),
        (
            lambda t: t | {f"{Q}.lora_B.weight": torch.full((8, 2), torch.nan)},
            f": '{Q}.lora_B.weight' is NaN or Inf; take another file",
        ),
        (
            lambda t: t | {f"{Q}.alpha": torch.zeros(2)},
            f": '{Q}.alpha' is not one number; take another file",
        ),
        (
            lambda t: t | {"blocks.0.to_k.lora_A.default.weight": torch.zeros(2, 6)},
            f": '{K}.lora_A.weight' and 'blocks.0.to_k.lora_A.default.weight' are the same weight; take another file",
        ),
        (lambda _: {}, ": holds no weight; take another file"),
        (
            lambda t: {key: tensor for key, tensor in t.items() if K not in key},
            ": lacks 'blocks.0.to_k.lora_A.weight'; leave the layer out of lora_target_modules or take a whole file",
        ),
    ],
    ids=["full", "other", "in", "out", "empty", "half", "bias", "nan", "alpha", "twice", "nothing", "missing"],
)
def test_a_file_that_does_not_fit(tmp_path, change, message):
    save_file(change(file_tensors()), tmp_path / "lora.safetensors")
    assert refusal(tmp_path / "lora.safetensors") == message


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ({"rank": 3}, {}, f": '{K}.lora_A.weight' has rank 3, but lora_rank is 2; set it to that rank"),
        ({"use_dora": True}, {}, f": has a DoRA at '{K}.lora_A.weight', but lora_use_dora is false; change it"),
        ({}, {"use_dora": True}, f": has no DoRA at '{K}.lora_A.weight', but lora_use_dora is true; change it"),
        (
            {},
            {"targets": ("to_q",)},
            f": '{K}.lora_A.weight' is for a layer that lora_target_modules leaves out; name all of the file's",
        ),
    ],
    ids=["rank", "dora", "no_dora", "surplus"],
)
def test_a_file_of_another_kind(tmp_path, made, asked, message):
    save_file(file_tensors(**made), tmp_path / "lora.safetensors")
    assert refusal(tmp_path / "lora.safetensors", **asked) == message


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"t.lora_alpha": "x"}', '{"t.lora_alpha": NaN}', '{"t.alpha_pattern": []}']
)
def test_damaged_metadata(tmp_path, text):
    save_file(file_tensors(), tmp_path / "lora.safetensors", {"lora_adapter_metadata": text})
    assert refusal(tmp_path / "lora.safetensors") == (
        ": its metadata lora_adapter_metadata is damaged; take another file"
    )


def test_what_is_no_file_and_no_safetensors(tmp_path):
    with pytest.raises(ModelFileMissing, match=r"^lora_checkpoint: .*none is not a file; check the path$"):
        start(tmp_path / "none")
    with pytest.raises(ModelFileMissing):
        start(tmp_path)
    (tmp_path / "text").write_text(json.dumps({"a": 1}))
    assert refusal(tmp_path / "text").startswith(" cannot be read as safetensors (")


@pytest.mark.parametrize(
    ("buckets", "resolution"),
    [(["64x32"], "32x64"), (["64x32", "64x64"], None), (["64x32+64x32"], None), (["480x832x81"], "832x480")],
)
def test_resolution_has_the_width_first_and_is_left_out_where_there_are_several(buckets, resolution):
    assert resolution_of(buckets) == resolution
