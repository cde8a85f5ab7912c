"""Whole models and LoRAs trained together: the cut follows, each comes out as its own pipeline loads it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_trainings import LAUNCH_FILES, launch

from diffsynth_pipe.errors import CacheMismatch, ConfigError
from diffsynth_pipe.modeling.wan import tiny_dit
from diffsynth_pipe.stages.data_process import data_process
from diffsynth_pipe.stages.plan import plan
from diffsynth_pipe.stages.train import _unfreeze, train

BOTH = {"trainable_models": "text_encoder", "lora_base_model": "dit", "learning_rate": 1e-3, "max_pixels": 1024}
FULL = {"trainable_models": "dit", "lora_base_model": "", "learning_rate": 1e-3, "max_pixels": 1024}


def stage(config, name):
    return config.model_copy(update={"task": f"sft:{name}", "cache_path": str(config.cache_dir)})


def changed_names(before, after):
    return {name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])}


def test_a_trained_text_encoder_runs_live_and_is_saved_beside_the_lora(run_config, tiny_repo):
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = run_config(**BOTH)
    data = data_process(stage(config, "data_process"))
    assert set(data.summary["encoded"]) == {"latents", "prompt"}  # the text is encoded in every step, from its bytes
    result = train(stage(config, "train"))
    assert result.summary["loss_after"] < result.summary["loss_before"]
    checkpoint = result.path / f"step-{result.summary['num_steps']:06d}"
    assert result.summary["files"] == [
        f"{checkpoint.name}/text_encoder/model.safetensors",
        f"{checkpoint.name}/dit_lora.safetensors",
    ]
    before = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_repo / "text_encoder", dtype=torch.float32)
    after = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32)
    changed = changed_names(before, after)
    assert changed
    assert all(name.startswith("model.language_model.") for name in changed)  # not the vision tower, nor the head
    assert {name.split(".")[0] for name in load_file(checkpoint / "dit_lora.safetensors")} == {"transformer"}


def test_one_process_trains_both_to_the_same_bits_as_two_stages(run_config):
    config = run_config(**BOTH)
    data_process(stage(config, "data_process"))
    split = train(stage(config, "train"))
    whole = train(config.model_copy(update={"output_path": f"{config.output_path}-whole"}))
    assert whole.key == split.key
    assert whole.summary["digests"] == split.summary["digests"]


def test_the_gradients_of_the_text_encoder_are_those_of_diffusers_own_encoding(run_config, tiny_repo):
    """One step of SGD moves each weight by the rate times the gradient, which diffusers' pipeline yields as well."""
    from diffusers import QwenImagePipeline
    from transformers import Qwen2_5_VLForConditionalGeneration

    from cache_store.store import Cache
    from diffsynth_pipe.contracts import load_family, load_task
    from diffsynth_pipe.training.flow_match import SigmaDistribution
    from diffsynth_pipe.training.randomness import SampleDraws
    from diffsynth_pipe.training.sampler import BucketSampler
    from diffsynth_pipe.training.sources import CachedSource

    settings = {"customized_optimizer": "torch.optim.SGD", "weight_decay": 0.0, "max_grad_norm": 1e6}
    config = run_config(**BOTH | settings | {"num_epochs": 1, "batch_size": 1, "num_validation_samples": 0})
    data_process(stage(config, "data_process"))
    result = train(stage(config, "train").model_copy(update={"save_steps": 1}))
    trained = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        result.path / "step-000001" / "text_encoder", dtype=torch.float32
    )

    family, task = load_family("qwen_image"), load_task("sft")
    source = CachedSource(Cache.open(config.cache_dir).latest(), ["prompt", "latents"])
    (batch,) = source.batches([BucketSampler(source.bucket_sizes, 1, config.seed).plan(0)])
    prompt = bytes(batch.fields["prompt"][0].flatten().tolist()[:-1]).decode()
    pipe = QwenImagePipeline.from_pretrained(tiny_repo, vae=None, dtype=torch.float32)
    with torch.enable_grad():
        embeddings, _ = pipe.encode_prompt(prompt)
        batch.fields["prompt_emb"], batch.lengths["prompt_emb"] = embeddings, torch.tensor([embeddings.shape[1]])
        batch.fields["latents"] = batch.fields["latents"].float()
        draws = SampleDraws(config.seed, batch.sample_ids, batch.visits)
        levels = SigmaDistribution(family.schedule, config)
        task.loss(family, {"dit": pipe.transformer}, batch, draws, levels).mean().backward()
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    weight = pipe.text_encoder.get_parameter(name)
    assert weight.grad.abs().max() > 0
    torch.testing.assert_close(
        trained.get_parameter(name), weight.detach() - config.learning_rate * weight.grad, rtol=0, atol=1e-7
    )


def test_a_fully_trained_denoiser_takes_its_place_in_the_pipeline(run_config, tiny_repo):
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    config = run_config(**FULL)
    data_process(stage(config, "data_process"))
    result = train(stage(config, "train"))
    (file,) = result.summary["files"]
    folder = (result.path / file).parent
    assert folder.name == "transformer"
    transformer = QwenImageTransformer2DModel.from_pretrained(folder)
    assert len(changed_names(QwenImageTransformer2DModel.from_pretrained(tiny_repo / "transformer"), transformer)) > 50
    pipe = QwenImagePipeline.from_pretrained(tiny_repo, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a cat", height=32, width=32, num_inference_steps=2).images[0].size == (32, 32)


def test_the_prefix_of_the_reference_is_kept_on_request_and_read_again(run_config):
    config = run_config(**FULL | {"num_epochs": 1, "remove_prefix_in_ckpt": ""})
    data_process(stage(config, "data_process"))
    result = train(stage(config, "train"))
    names = load_file(result.path / result.summary["files"][0])
    assert all(name.startswith("pipe.dit.") for name in names)

    # and a LoRA goes on from there
    folder = (result.path / result.summary["files"][0]).parent
    again = train(stage(run_config(max_pixels=1024, resume_from_checkpoint=str(folder)), "train"))
    assert again.summary["loss_before"] == result.summary["loss_after"]


def test_the_cache_of_a_frozen_encoder_does_not_serve_a_trained_one(run_config):
    lora = run_config(max_pixels=1024)
    data_process(stage(lora, "data_process"))
    both = run_config(**BOTH)
    with pytest.raises(
        CacheMismatch, match=r"holds prompt_emb, latents, but training dit, text_encoder also needs prompt"
    ):
        train(stage(both, "train"))
    assert plan(stage(both, "data_process"))[0].verdict == "resume"  # the latents are there
    assert set(data_process(stage(both, "data_process")).summary["encoded"]) == {"prompt"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable_models": "vae"}, "trainable_models: training the vae is not supported; train dit or text_encoder"),
        ({"trainable_models": "controlnet"}, "trainable_models: qwen_image has no 'controlnet', only text_encoder, "),
        ({"trainable_models": "dit"}, "lora_base_model, trainable_models: both name 'dit'"),
        ({"lora_base_model": "text_encoder"}, "lora_base_model: only 'dit' can get a LoRA, got 'text_encoder'"),
        ({"lora_base_model": ""}, "nothing to train: set --lora_base_model"),
        ({"customized_optimizer": "torch.optim.Nadam"}, "customized_optimizer: 'torch.optim.Nadam' cannot be imported"),
        (
            {"customized_optimizer": "torch.optim.LBFGS"},
            r"customized_optimizer: torch.optim.LBFGS\(params, lr, weight_de",
        ),
        ({"customized_optimizer": "builtins.dict"}, "customized_optimizer: builtins.dict"),
    ],
)
def test_what_cannot_be_trained_is_refused(run_config, changes, message):
    config = run_config(max_pixels=1024, **changes)
    with pytest.raises(ConfigError, match=f"^{message}"):
        train(config)
    assert not list(config.cache_dir.parent.glob("train-*/run.json"))


def test_a_parameter_of_the_model_itself_can_be_trained_alone():
    model = tiny_dit(16, 16)
    _unfreeze(model, ("scale_shift_table.",), "dit")
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["scale_shift_table"]


def test_the_run_says_which_files_it_wrote(run_config):
    config = run_config(**FULL | {"use_ema": True, "ema_decay": 0.5})
    data_process(stage(config, "data_process"))
    result = train(stage(config, "train"))
    run = json.loads((result.path / "run.json").read_text())
    assert [file.split("/")[1] for file in run["files"]] == ["transformer", "transformer_ema"]
    plain, average = (load_file(result.path / file) for file in run["files"])
    assert any(not torch.equal(plain[name], average[name]) for name in plain)


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_two_ranks_train_both_models_as_one_does(run_config, engine, zero3, tmp_path):
    config = run_config(**BOTH | {"max_steps": 3, "num_validation_samples": 0})
    data_process(stage(config, "data_process"))
    plain = train(stage(config, "train").model_copy(update={"batch_size": 2}))
    run_file, output = tmp_path / "two.yaml", tmp_path / engine
    stage(config, "train").save(run_file)
    flags = {"config": run_file, "batch_size": 1, "output_path": output}
    launch_file = zero3 if engine == "zero3" else LAUNCH_FILES / f"{engine}.yaml"
    done = launch(launch_file, flags, num_processes=2)
    assert done.returncode == 0, done.stderr
    (run_dir,) = output.glob("train-*")
    for file in plain.summary["files"]:
        expected, found = load_file(plain.path / file), load_file(run_dir / file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)
