"""Direct distillation on the tiny denoiser, against diffusers' scheduler and the noise that a seed stands for."""

import json

import numpy as np
import pytest
import torch

from cache_store.reader import BatchReader
from cache_store.store import Cache
from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import Batch, load_family, load_task
from diffsynth_pipe.errors import DataError
from diffsynth_pipe.stages.data_process import data_process
from diffsynth_pipe.training.flow_match import SigmaDistribution

FAMILY = load_family("qwen_image")
TASK = load_task("direct_distill")
TARGET = "transformer_blocks.0.attn.to_q.weight"


@pytest.fixture
def distilled(run_config, photos):
    """Cache the photos with seeds and steps of their own; return the config and the rows."""

    def make(**changes):
        lines = (photos / "metadata.csv").read_text("utf-8").splitlines()[1:]
        rows = [
            {
                "image": line.partition(",")[0],
                "prompt": f"caption {number}",
                "seed": 100 + number,
                "rand_device": "cpu",
                "num_inference_steps": 2 + number % 3,
                "cfg_scale": 1,
                **changes,
            }
            for number, line in enumerate(lines)
        ]
        (photos / "metadata.json").write_text(json.dumps(rows), "utf-8")
        config = run_config(
            task="direct_distill:data_process",
            dataset_metadata_path=str(photos / "metadata.json"),
            extra_inputs="seed,rand_device,num_inference_steps,cfg_scale",
        )
        return config, rows

    return make


def test_the_cache_holds_the_noise_that_the_seed_stands_for(distilled, tiny_repo):
    from diffusers import QwenImagePipeline

    config, rows = distilled()
    result = data_process(config)
    assert result.summary["encoded"] == {"text": 7, "latents": 6, "noise": 6, "sampling": 3}
    snapshot = Cache.open(config.cache_dir).latest()
    pipe = QwenImagePipeline.from_pretrained(tiny_repo, transformer=None, text_encoder=None, dtype=torch.float32)
    with BatchReader(snapshot, ["noise", "num_inference_steps"]) as reader:
        for number, row in enumerate(rows):
            batch = reader.read([number])
            stored = torch.from_numpy(batch.fields["noise"]).view(torch.bfloat16)[0]
            height, width = stored.shape[-2:]
            generator = torch.Generator("cpu").manual_seed(row["seed"])
            drawn = torch.randn((1, 16, height, width), generator=generator, dtype=torch.float32)
            assert torch.equal(stored[:, 0], drawn[0].bfloat16())
            assert batch.fields["num_inference_steps"].tolist() == [row["num_inference_steps"]]

            def of_pipeline(dtype, seed=row["seed"], height=height, width=width):
                generator = torch.Generator("cpu").manual_seed(seed)
                packed = pipe.prepare_latents(1, 16, 8 * height, 8 * width, dtype, torch.device("cpu"), generator)
                return pipe._unpack_latents(packed, 8 * height, 8 * width, pipe.vae_scale_factor)[0]

            assert torch.equal(stored, of_pipeline(torch.float32).bfloat16())
            assert torch.equal(stored, of_pipeline(torch.bfloat16))


def test_rows_of_one_batch_take_equally_many_steps(distilled):
    config, rows = distilled()
    data_process(config)
    snapshot = Cache.open(config.cache_dir).latest()
    for name, members in snapshot.bucket_members.items():
        size, _, steps = name.partition("/")
        assert {f"num_inference_steps={rows[member]['num_inference_steps']}" for member in members} == {steps}
        assert all(side.isdigit() for side in size.split("x"))


def test_a_changed_seed_draws_one_noise_again_and_another_number_of_steps_draws_none(distilled, photos):
    config, rows = distilled()
    data_process(config)
    rows[2]["seed"] = 7
    (photos / "metadata.json").write_text(json.dumps(rows), "utf-8")
    assert data_process(config).summary["encoded"] == {"noise": 1}
    rows[2]["num_inference_steps"] = 9
    (photos / "metadata.json").write_text(json.dumps(rows), "utf-8")
    assert data_process(config).summary["encoded"] == {"sampling": 1}


def test_noise_of_a_device_that_is_not_here_is_refused(distilled):
    if torch.cuda.is_available():
        pytest.skip("it is here")
    config, _ = distilled(rand_device="cuda:3")
    with pytest.raises(
        DataError, match=r"^metadata\.\w+ row 1 \(.*\): rand_device: 'cuda', but there is none here; write cpu"
    ):
        data_process(config)


@pytest.mark.parametrize("num_steps", [2, 4, 9])
def test_the_loss_is_that_of_sampling_with_the_diffusers_scheduler(tiny_repo, num_steps):
    """Values and gradients; the scheduler is the repository's own, at the μ that the reference distils with."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    dit = QwenImageTransformer2DModel.from_pretrained(tiny_repo / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_repo / "scheduler")
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 16, 1, 4, 6, generator=generator) for _ in range(2))
    lengths = [5, 3]
    text = torch.randn(2, 5, 64, generator=generator)
    text[1, 3:] = 0
    batch = Batch(
        fields={
            "latents": latents,
            "noise": noise,
            "prompt_emb": text,
            "num_inference_steps": torch.tensor([num_steps, num_steps], dtype=torch.int32),
        },
        lengths={"prompt_emb": torch.tensor(lengths)},
        sample_ids=("0" * 32, "1" * 32),
        visits=(0, 0),
    )
    levels = SigmaDistribution(FAMILY.schedule, load_config(None, {"dataset_base_path": "data"}))
    losses = TASK.loss(FAMILY, {"dit": dit}, batch, None, levels)
    losses.sum().backward()
    losses = losses.detach()
    gradient = dit.get_parameter(TARGET).grad.clone()
    dit.zero_grad()

    for number, length in enumerate(lengths):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist(), mu=0.8)
        assert scheduler.sigmas[-1] == 0
        pack = lambda x: QwenImagePipeline._pack_latents(x, 1, 16, 4, 6)  # noqa: E731
        x = pack(noise[number : number + 1])
        for timestep in scheduler.timesteps:
            velocity = dit(
                hidden_states=x,
                encoder_hidden_states=text[number : number + 1, :length],
                timestep=timestep[None] / 1000,
                img_shapes=[[(1, 2, 3)]],
                return_dict=False,
            )[0]
            x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        expected = torch.nn.functional.mse_loss(x, pack(latents[number : number + 1]))
        expected.backward()
        assert float(losses[number]) == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, dit.get_parameter(TARGET).grad, rtol=1e-3, atol=1e-7)


def test_one_step_cannot_be_stretched_to_the_terminal_sigma(distilled):
    config, _ = distilled(num_inference_steps=1)
    with pytest.raises(DataError, match=r"'num_inference_steps' is 1, must be a whole number from 2 to 1000 \(5 more"):
        data_process(config)


def test_guidance_of_the_student_is_refused(distilled):
    config, _ = distilled(cfg_scale=4)
    with pytest.raises(DataError, match=r"'cfg_scale' is 4, must be 1: the student is trained without guidance"):
        data_process(config)
