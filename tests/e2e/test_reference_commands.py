"""The reference's command lines, ``deploy/reference_commands.sh``, on a tiny repository with as many shards."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

DEPLOY = Path(__file__).parents[2] / "deploy"
FOR_A_CPU = "--max_pixels 4096 --max_steps 3 --encode_dtype float32 --num_validation_samples 2"


def shard(file, num_shards):
    """Replace a file of weights by shards with an index, as large models are published."""
    tensors = load_file(file)
    shards = [f"{file.stem}-{number + 1:05}-of-{num_shards:05}.safetensors" for number in range(num_shards)]
    places = {name: shards[place % num_shards] for place, name in enumerate(sorted(tensors))}
    for part in shards:
        members = {name: tensors[name] for name, place in places.items() if place == part}
        save_file(members, file.with_name(part), {"format": "pt"})
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": places}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()


@pytest.fixture(scope="module")
def trained(tiny_repo, tmp_path_factory):
    """Run the script in a folder of its own; return the folder with what it trained."""
    folder = tmp_path_factory.mktemp("commands")
    shutil.copytree(DEPLOY / "demo", folder / "data" / "example_image_dataset")
    repository = folder / "models" / "Qwen" / "Qwen-Image"
    shutil.copytree(tiny_repo, repository)
    shard(repository / "transformer" / "diffusion_pytorch_model.safetensors", 9)
    shard(repository / "text_encoder" / "model.safetensors", 4)
    environment = {name: value for name, value in os.environ.items() if name != "DIFFSYNTH_MODEL_BASE_PATH"}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DIFFSYNTH_SKIP_DOWNLOAD": "True",
        "EXTRA_FLAGS": FOR_A_CPU,
    }
    script = DEPLOY / "reference_commands.sh"
    done = subprocess.run([script], cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("== ") == done.stdout.count(": Completed") == 6
    return folder / "models" / "train"


def run_of(trained, name):
    (run_dir,) = (trained / name).glob("train-*")
    return run_dir, json.loads((run_dir / "run.json").read_text())


def lora_of(trained, name):
    run_dir, run = run_of(trained, name)
    return run_dir / run["lora_path"]


def assert_loads(lora, repository):
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(repository, vae=None, text_encoder=None, dtype=torch.float32)
    pipe.load_lora_weights(lora)
    assert pipe.transformer.peft_config["default_0"].r == 32


def num_changed(before, after):
    return sum(not torch.equal(tensor, before.state_dict()[name]) for name, tensor in after.state_dict().items())


def test_full_training_yields_a_denoiser_that_diffusers_loads(trained, tiny_repo):
    from diffusers import QwenImageTransformer2DModel

    run_dir, run = run_of(trained, "Qwen-Image_full")
    assert "ZeRO stage 2, offload optimizer=cpu param=none" in run["engine"]
    (file,) = run["files"]
    before = QwenImageTransformer2DModel.from_pretrained(tiny_repo / "transformer")
    assert num_changed(before, QwenImageTransformer2DModel.from_pretrained((run_dir / file).parent)) > 50
    assert run["loss_after"] < run["loss_before"]


def test_two_stages_train_the_bytes_of_one(trained, tiny_repo):
    (_, split), (_, whole) = (run_of(trained, name) for name in ("Qwen-Image_lora", "Qwen-Image_lora-one-stage"))
    assert "ZeRO stage 3, offload optimizer=cpu param=cpu" in split["engine"]
    assert split["key"] == whole["key"]
    lora = lora_of(trained, "Qwen-Image_lora")
    assert lora.read_bytes() == lora_of(trained, "Qwen-Image_lora-one-stage").read_bytes()
    assert_loads(lora, tiny_repo)


def test_models_by_their_files_are_the_models_by_id(trained, tiny_repo):
    lora = lora_of(trained, "Qwen-Image_lora-by-paths")
    assert {name.rsplit(".", 3)[1] for name in load_file(lora)} == {"to_q", "to_k", "to_v"}
    assert_loads(lora, tiny_repo)
    by_id, by_paths = (run_of(trained, f"Qwen-Image_lora-{name}")[1] for name in ("one-stage", "by-paths"))
    assert by_paths["loss_before"] == pytest.approx(by_id["loss_before"], rel=1e-6)


def test_a_text_encoder_and_a_lora_come_out_apart(trained, tiny_repo):
    from transformers import Qwen2_5_VLForConditionalGeneration

    run_dir, run = run_of(trained, "Qwen-Image_text-encoder")
    assert [Path(file).parts[1] for file in run["files"]] == ["text_encoder", "dit_lora.safetensors"]
    load = Qwen2_5_VLForConditionalGeneration.from_pretrained
    before = load(tiny_repo / "text_encoder", dtype=torch.float32)
    assert num_changed(before, load((run_dir / run["files"][0]).parent, dtype=torch.float32)) > 10
    assert_loads(run_dir / run["lora_path"], tiny_repo)
