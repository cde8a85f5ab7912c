"""Template models: trained as a plain loop of torch trains them, split or not, stopped or not, and loaded again."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from small_trainings import launch

from cache_store.store import Cache
from diffsynth_pipe.contracts import Batch, load_family, load_task
from diffsynth_pipe.errors import ConfigError, ModelError
from diffsynth_pipe.hub import resolve_components
from diffsynth_pipe.modeling.templates import load_template
from diffsynth_pipe.stages.data_process import data_process
from diffsynth_pipe.stages.train import train
from diffsynth_pipe.training.loop import Loop

MODELS = Path(__file__).parents[1] / "template_models"


@pytest.fixture
def template_config(run_config, template_repositories, edit_rows, tmp_path):
    """Return the config of a run that trains a copy of a template model, with changes."""

    def config(base, model, inputs, **changes):
        edit_rows(
            lambda rows: [
                {**row, "template_inputs": json.dumps(inputs(number, row))} for number, row in enumerate(rows[:4])
            ]
        )
        folder = tmp_path / "template"
        if not folder.exists():
            shutil.copytree(MODELS / model, folder)
        files = ("transformer/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model")
        parameters = {
            "family": base,
            "model_paths": [str(template_repositories / base / f"{file}.safetensors") for file in files],
            "model_id_with_origin_paths": None,
            "max_pixels": 1024,
            "lora_base_model": None,
            "trainable_models": "template_model",
            "template_model_id_or_path": str(folder),
            "trust_remote_code": True,
            "extra_inputs": "template_inputs",
            "learning_rate": 1e-2,
            "batch_size": 2,
            "max_steps": 3,
            "num_epochs": 3,
            "num_validation_samples": 0,
        }
        return run_config(**parameters | changes)

    return config


@pytest.fixture
def kv_config(template_config):
    return lambda **changes: template_config("flux2", "kv", lambda number, _: {"scale": 0.1 + number / 4}, **changes)


@pytest.fixture
def lora_config(template_config):
    def config(**changes):
        changes = {"enable_lora_hot_loading": True} | changes
        return template_config("z_image", "lora", lambda number, _: {"number": number / 4}, **changes)

    return config


def stage(config, name):
    return config.model_copy(update={"task": f"sft:{name}", "cache_path": str(config.cache_dir)})


def plain_training(config, predict):
    """Train the template of a run in a loop of torch, sample by sample; return its module.

    ``predict(family, dit, outputs, batch, noisy, sigma)`` is the velocity under what the template yields.
    """
    from diffsynth_pipe.training.flow_match import SigmaDistribution
    from diffsynth_pipe.training.optim import make_optimizer
    from diffsynth_pipe.training.randomness import SampleDraws
    from diffsynth_pipe.training.sampler import BucketSampler
    from diffsynth_pipe.training.sources import CachedSource

    family, task, cpu = load_family(config.family), load_task("sft"), torch.device("cpu")
    files = resolve_components(config, family, ["template_model", "dit"])
    model = load_template(files["template_model"], torch.float32, cpu).model
    model.requires_grad_(True)
    dit = family.components["dit"].load(files["dit"], torch.float32, cpu)
    source = CachedSource(Cache.open(config.cache_dir).latest(), ["prompt_emb", "latents", "template_inputs"])
    sampler = BucketSampler(source.bucket_sizes, config.batch_size, config.seed)
    optimizer = make_optimizer(config, list(model.parameters()))
    for raw in source.batches([sampler.plan(step) for step in range(config.max_steps)]):
        losses = []
        for index, sample_id in enumerate(raw.sample_ids):
            fields = {name: field[index : index + 1].clone() for name, field in raw.fields.items()}
            lengths = {name: length[index : index + 1] for name, length in raw.lengths.items()}
            packed = fields.pop("template_inputs")[0, : lengths["template_inputs"]].numpy().tobytes()
            (value,) = safetensors.torch.load(packed).values()
            oracle = SimpleNamespace(
                predict_velocity=lambda models, batch, noisy, sigma, value=value: predict(
                    family, models["dit"], model(value), batch, noisy, sigma
                ),
                latents_field=family.latents_field,
                num_tokens=family.num_tokens,
            )
            batch = Batch(
                fields={name: field.float() for name, field in fields.items()},
                lengths=lengths,
                sample_ids=(sample_id,),
                visits=(raw.visits[index],),
            )
            draws = SampleDraws(config.seed, batch.sample_ids, batch.visits)
            levels = SigmaDistribution(family.schedule, config)
            losses.append(task.loss(oracle, {"dit": dit}, batch, draws, levels).mean())
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return model


def with_kv_cache(family, dit, outputs, batch, noisy, sigma):
    """Predict with more keys and values in the calls of attention, which are those of the blocks in their order."""
    from diffusers.models.transformers import transformer_flux2

    blocks = iter(("double_0", "single_0", "single_1"))

    def attend_to_more(query, key, value, **kwargs):
        name = next(blocks)
        if name in outputs["kv_cache"]:
            more_keys, more_values = outputs["kv_cache"][name]
            key, value = torch.cat([key, more_keys], dim=1), torch.cat([value, more_values], dim=1)
        weights = (torch.einsum("bqhc,bkhc->bhqk", query, key) / query.shape[-1] ** 0.5).softmax(-1)
        return torch.einsum("bhqk,bkhc->bqhc", weights, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_flux2, "dispatch_attention_fn", attend_to_more)
        velocity = family.predict_velocity({"dit": dit}, batch, noisy, sigma)
    assert next(blocks, None) is None
    return velocity


def with_lora(family, dit, outputs, batch, noisy, sigma):
    """Predict with the product of the matrices added to the weight."""
    down, up = outputs["lora"].values()
    weight = {"layers.0.attention.to_q.weight": dit.layers[0].attention.to_q.weight + up @ down}
    models = {"dit": lambda *args, **kwargs: torch.func.functional_call(dit, weight, args, kwargs)}
    return family.predict_velocity(models, batch, noisy, sigma)


@pytest.mark.parametrize(
    ("config", "predict", "changes"),
    [
        ("kv_config", with_kv_cache, {}),
        ("kv_config", with_kv_cache, {"use_gradient_checkpointing": True}),
        ("lora_config", with_lora, {}),
        ("lora_config", with_lora, {"use_gradient_checkpointing": True}),
    ],
)
def test_the_stages_train_as_a_plain_torch_loop_does(request, config, predict, changes):
    config = request.getfixturevalue(config)(**changes)
    data = data_process(stage(config, "data_process"))
    assert set(data.summary["encoded"]) == {"text", "latents", "template_inputs"}
    result = train(stage(config, "train"))
    (file,) = result.summary["files"]
    trained = load_file(result.path / file)
    expected = plain_training(config, predict).state_dict()
    assert trained.keys() == expected.keys()
    start = plain_training(config.model_copy(update={"max_steps": 0}), predict).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=2e-5)
        assert name.startswith("frozen.") or not torch.equal(tensor, start[name])


def test_one_process_and_a_stopped_run_train_to_the_same_bits(kv_config):
    config = kv_config(save_steps=1)
    data_process(stage(config, "data_process"))
    split = train(stage(config, "train"))
    whole = train(config.model_copy(update={"output_path": f"{config.output_path}-whole"}))
    assert whole.key == split.key
    assert whole.summary["digests"] == split.summary["digests"]

    stopped = config.model_copy(update={"output_path": f"{config.output_path}-stopped"})
    take_step = Loop._step

    def take_two_steps(self, number, batches):
        if number > 2:
            raise KeyboardInterrupt
        return take_step(self, number, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_step", take_two_steps)
        with pytest.raises(KeyboardInterrupt):
            train(stage(stopped, "train"))
    resumed = train(stage(stopped, "train"))
    assert resumed.state == "Resumed"
    assert resumed.summary["digests"] == split.summary["digests"]


def test_a_saved_template_loads_again_and_goes_on(kv_config):
    config = kv_config(num_validation_samples=2)
    data_process(stage(config, "data_process"))
    result = train(stage(config, "train"))
    (file,) = result.summary["files"]
    folder = (result.path / file).parent
    assert (folder.name, Path(file).name) == ("template_model", "model.safetensors")
    again = stage(config.model_copy(update={"template_model_id_or_path": str(folder)}), "train")
    # its process_inputs has other weights for all that the stages know
    data = data_process(again.model_copy(update={"task": "sft:data_process"}))
    assert data.summary["encoded"] == {"template_inputs": 4}
    more = train(again)
    assert more.key != result.key
    base = result.summary["validation"]["base_loss"]
    assert more.summary["validation"]["base_loss"] == base != result.summary["loss_before"]
    assert more.summary["loss_before"] == result.summary["loss_after"]


def test_a_part_of_the_template_is_trained_and_the_rest_saved_beside_it(kv_config):
    config = kv_config(trainable_models="template_model.heads")
    data_process(stage(config, "data_process"))
    result = train(stage(config, "train"))
    trained = load_file(result.path / result.summary["files"][0])
    files = resolve_components(config, load_family("flux2"), ["template_model"])["template_model"]
    start = load_template(files, torch.float32, torch.device("cpu")).model.state_dict()
    changed = {name for name, tensor in start.items() if not torch.equal(trained[name], tensor)}
    assert changed == {name for name in start if name.startswith("heads.")}
    with pytest.raises(ConfigError, match=r"^trainable_models: the template_model has no parameters head"):
        train(stage(kv_config(trainable_models="template_model.head"), "train"))


def test_a_file_that_the_inputs_name_is_a_part_of_the_records_key(template_config, photos):
    config = template_config("flux2", "kv", lambda _, row: {"image": str(photos / row["image"])})
    first = stage(config, "data_process")
    assert data_process(first).summary["encoded"]["template_inputs"] == 4
    assert data_process(first).state == "Cached"
    one, other = sorted(photos.glob("*.jpg"))[:2]
    shutil.copy(other, one)
    assert data_process(first).summary["encoded"]["template_inputs"] == 1


def test_two_ranks_of_zero3_train_as_one_does(template_config, zero3, tmp_path):
    # Of a rank's two cells, those of the first are equal in some step and those of the second are not.
    # The rest of the template gets no gradient, and would only decay under DeepSpeed.
    config = template_config(
        "flux2", "kv", lambda number, _: {"scale": (0.1, 0.1, 0.5, 0.9)[number]},
        trainable_models="template_model.heads", batch_size=4, height=32, width=32, num_epochs=1, dataset_repeat=3,
    )  # fmt: skip
    data_process(stage(config, "data_process"))
    plain = train(stage(config, "train"))
    run_file, output = tmp_path / "two.yaml", tmp_path / "zero3"
    stage(config, "train").save(run_file)
    done = launch(zero3, {"config": run_file, "batch_size": 2, "output_path": output}, num_processes=2)
    assert done.returncode == 0, done.stderr
    (file,) = output.glob("train-*/*/template_model/model.safetensors")
    expected, found = load_file(plain.path / plain.summary["files"][0]), load_file(file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trust_remote_code": False}, "template_model_id_or_path: the model.py of .* read it, then set trust_remote"),
        ({"extra_inputs": None}, "template_model_id_or_path: reads the column template_inputs; name it in extra_in"),
        (
            {"template_model_id_or_path": None, "trust_remote_code": False, "extra_inputs": None},
            "trainable_models: names the template_model; set template_model_id_or_path too",
        ),
        (
            {"template_model_id_or_path": None, "trust_remote_code": False, "trainable_models": "dit"},
            "extra_inputs: names template_inputs; set template_model_id_or_path, which reads them",
        ),
        (
            {"template_model_id_or_path": None, "enable_lora_hot_loading": True},
            "enable_lora_hot_loading: has no effect without template_model_id_or_path; set it too",
        ),
        (
            {"template_model_id_or_path": None, "extra_inputs": None},
            "trust_remote_code: has no effect without template_model_id_or_path; set it too",
        ),
        ({"trainable_models": "template_processor"}, "trainable_models: flux2 has no 'template_processor', only text"),
        (
            {"gradient_checkpointing_backend": "deepspeed", "use_gradient_checkpointing": True},
            "gradient_checkpointing_backend: 'deepspeed' gives a template model no gradient",
        ),
        ({"enable_model_cpu_offload": True}, "enable_model_cpu_offload: is for the denoiser"),
        ({"template_model_id_or_path": "nowhere"}, "template_model_id_or_path: 'nowhere' is neither a folder nor"),
        ({"template_model_id_or_path": "some/model:"}, "template_model_id_or_path: some/model:: is not here; put it"),
        ({"family": "flux"}, "extra_inputs: task 'sft:train' of family 'flux' reads no column template_inputs"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_code_is_run(kv_config, changes, message):
    with pytest.raises((ConfigError, ModelError), match=f"^{message}"):
        train(stage(kv_config(**changes), "train"))


def test_a_lora_needs_hot_loading_and_z_image_takes_no_kv_cache(lora_config, tmp_path):
    config = lora_config(enable_lora_hot_loading=False)
    data_process(stage(config, "data_process"))
    with pytest.raises(ModelError, match=r"^template_model_id_or_path: the model yields a LoRA; set enable_lora_hot"):
        train(stage(config, "train"))
    code = tmp_path / "template" / "model.py"
    code.write_text(code.read_text().replace('{"lora":', '{"kv_cache":'))
    data_process(stage(config, "data_process"))
    with pytest.raises(ModelError, match=r"^template_model_id_or_path: the model yields kv_cache, but this family"):
        train(stage(config, "train"))
