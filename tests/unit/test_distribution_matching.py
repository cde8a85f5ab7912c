"""The losses of DMD2 against the plain ones of ``plain_dmd2``; each flag changes them as its formula says."""

import zlib

import numpy as np
import pytest
import torch
from plain_dmd2 import PlainDMD2

from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import Batch, load_family, load_task
from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.training.distribution_matching import energy_scores, matching_sigmas, student_sigmas
from diffsynth_pipe.training.lora import add_lora, lora_parameters, lora_settings

FAMILY = load_family("qwen_image")
LENGTHS = (5, 3)
TARGET = "transformer_blocks.0.attn.to_q"


def config_of(**changes):
    return load_config(None, {"dataset_base_path": "data", "task": "dmd2", "lora_base_model": "dit", **changes})


class FixedDraws:
    """Numbers that depend on nothing but their purpose."""

    def noise(self, like, purpose="noise"):
        generator = torch.Generator().manual_seed(zlib.crc32(purpose.encode()))
        return torch.randn(like.shape, generator=generator)

    def uniform(self, purpose="timestep"):
        generator = torch.Generator().manual_seed(zlib.crc32(purpose.encode()))
        return torch.rand(len(LENGTHS), generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, max(LENGTHS), 64, generator=generator)
    text[1, LENGTHS[1] :] = 0
    return Batch(
        fields={"latents": torch.randn(2, 16, 1, 4, 8, generator=generator), "prompt_emb": text},
        lengths={"prompt_emb": torch.tensor(LENGTHS)},
        sample_ids=("0" * 32, "1" * 32),
        visits=(0, 0),
    )


EMPTY = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(9))


def losses(tiny_repo, batch, **changes):
    """Return the losses of both turns, the gradient of one of the student's weights, the models and the plain way."""
    from diffusers import QwenImageTransformer2DModel

    config = config_of(**changes)
    objective = load_task("dmd2").objective(config, FAMILY)
    if objective.needs_empty_caption:
        lengths = {"prompt_emb": torch.tensor([2])}
        objective.empty_caption = Batch(fields={"prompt_emb": EMPTY}, lengths=lengths, sample_ids=("",), visits=(0,))
    dit = QwenImageTransformer2DModel.from_pretrained(tiny_repo / "transformer").requires_grad_(False)
    models = {"dit": dit, **objective.helpers(dit)}
    add_lora(dit, lora_settings(config, FAMILY.lora_target_modules), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for model in (dit, models["dit_fake_score"]):
            for parameter in lora_parameters(model).values():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    student = objective.loss(models, batch, FixedDraws(), objective.turns[0])
    student.sum().backward()
    assert all(
        parameter.grad is None for name, model in models.items() if name != "dit" for parameter in model.parameters()
    )
    gradient = lora_parameters(dit)[f"{TARGET}.lora_B.weight"].grad.clone()
    dit.zero_grad()
    critic = objective.loss(models, batch, FixedDraws(), objective.turns[-1])
    critic.sum().backward()
    assert all(parameter.grad is None for name in ("dit", "dit_teacher") for parameter in models[name].parameters())
    return student.detach(), critic.detach(), gradient, models


def plain_losses(models, batch, **settings):
    discriminator = models["discriminator"].state_dict() if "discriminator" in models else None
    plain = PlainDMD2(
        models["dit"], models["dit_teacher"], models["dit_fake_score"], discriminator,
        **{"sigmas": (0.999, 0.74925, 0.4995, 0.24975, 0.0), "empty": EMPTY, **settings},
    )  # fmt: skip
    draws, latents = FixedDraws(), batch.fields["latents"]
    noises = {name: draws.noise(latents, name) for name in ("student", "matching", "r1")}
    u, steps = draws.uniform(), draws.uniform("student_step")
    models["dit"].zero_grad()
    students, critics = [], []
    for row, length in enumerate(LENGTHS):
        sample = {name: noise[row : row + 1] for name, noise in noises.items()}
        sample |= {"u": float(u[row]), "step": float(steps[row])}
        arguments = (latents[row : row + 1], batch.fields["prompt_emb"][row : row + 1, :length], sample)
        students.append(plain.student_loss(*arguments))
        critics.append(plain.critic_loss(*arguments).detach())
    torch.stack(students).sum().backward()
    gradient = lora_parameters(models["dit"])[f"{TARGET}.lora_B.weight"].grad
    return torch.stack(students).detach(), torch.stack(critics), gradient


GRID = (1.0, 0.88, 0.66, 0.02, 0.0)
CASES = {
    "defaults": ({}, {}),
    "one step": ({"dmd2_student_sample_steps": 1}, {"sigmas": (0.999, 0.0)}),
    "two steps": ({"dmd2_student_sample_steps": 2}, {"sigmas": (0.999, 0.4995, 0.0)}),
    "list": ({"dmd2_student_t_list": "1, .9, .7, .2, 0"}, {"sigmas": (1.0, 0.9, 0.7, 0.2, 0.0)}),
    "highest": (
        {"dmd2_matching_t_max": 0.8},
        {"high": 0.8, "sigmas": (0.8, 0.6, 0.4, 0.2, 0.0)},
    ),
    "lowest": ({"dmd2_matching_t_min": 0.5}, {"low": 0.5}),
    "logitnormal": ({"dmd2_matching_t_sampling": "logitnormal"}, {"logit": (0.0, 1.0)}),
    "mean": ({"dmd2_matching_t_sampling": "logitnormal", "dmd2_matching_t_mean": 1.5}, {"logit": (1.5, 1.0)}),
    "deviation": ({"dmd2_matching_t_sampling": "logitnormal", "dmd2_matching_t_std": 0.2}, {"logit": (0.0, 0.2)}),
    "no discriminator": ({"dmd2_gan_loss_weight": 0}, {"gan": 0}),
    "gan": ({"dmd2_gan_loss_weight": 0.7}, {"gan": 0.7}),
    "r1": ({"dmd2_gan_r1_reg_weight": 3}, {"r1": 3}),
    "alpha": ({"dmd2_gan_r1_reg_weight": 3, "dmd2_gan_r1_reg_alpha": 0.5}, {"r1": 3, "alpha": 0.5}),
    "logits": ({"dmd2_gan_logit_reg_weight": 2}, {"logit_reg": 2}),
    "layers": ({"dmd2_feature_indices": "1, 0"}, {"layers": (0, 1)}),
    "hidden": ({"dmd2_discriminator_hidden_dim": 24}, {}),
    "blocks": ({"dmd2_discriminator_num_blocks": 1}, {"layers": (0,)}),
    "guidance": ({"dmd2_teacher_cfg_scale": 4}, {"guidance": 4}),
}
SAME_STUDENT = {"r1", "alpha", "logits"}
SAME_CRITIC = {"gan", "guidance"}
BESIDE = {"alpha": "r1", "mean": "logitnormal", "deviation": "logitnormal"}


@pytest.fixture(scope="module")
def found(tiny_repo, batch):
    cache = {}
    return lambda name: (
        cache.setdefault(name, None) or cache.update({name: losses(tiny_repo, batch, **CASES[name][0])}) or cache[name]
    )


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_the_plain_ones(found, batch, name):
    student, critic, gradient, models = found(name)
    expected_student, expected_critic, expected_gradient = plain_losses(models, batch, **CASES[name][1])
    torch.testing.assert_close(student, expected_student, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(critic, expected_critic, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
    if name != "defaults":
        before = found(BESIDE.get(name, "defaults"))
        changed = [
            not torch.allclose(one, other, rtol=1e-3) for one, other in zip((student, critic), before, strict=False)
        ]
        assert changed == [name not in SAME_STUDENT, name not in SAME_CRITIC]


def test_a_lora_has_one_base_for_all_roles(found):
    models = found("defaults")[3]
    student, teacher, fake_score = (
        {name.replace(".base_layer", ""): parameter for name, parameter in models[role].named_parameters()}
        for role in ("dit", "dit_teacher", "dit_fake_score")
    )
    assert all(student[name] is parameter and fake_score[name] is parameter for name, parameter in teacher.items())
    assert not any(parameter.requires_grad for parameter in teacher.values())
    of_fake_score = {id(parameter) for parameter in fake_score.values() if parameter.requires_grad}
    of_student = {id(parameter) for parameter in student.values() if parameter.requires_grad}
    assert len(of_fake_score) == len(of_student) == len(student) - len(teacher)
    assert of_fake_score.isdisjoint(of_student)


def test_hidden_dim_is_twice_the_channels_of_a_head(found):
    heads = found("hidden")[3]["discriminator"].heads
    assert [tuple(head[0].weight.shape) for head in heads] == [(12, 128, 4, 4)]
    assert heads[0][1].num_groups == 3
    assert found("defaults")[3]["discriminator"].heads[0][0].out_channels == 64


def test_the_familys_schedule_is_its_grid(tiny_repo):
    """The scheduler is the repository's own, at the μ of the family's training grid."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_repo / "scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 3, 3).tolist(), mu=0.8)
    found = student_sigmas(config_of(dmd2_student_schedule="family", dmd2_student_sample_steps=3), FAMILY.schedule)
    np.testing.assert_allclose(found, scheduler.sigmas, rtol=1e-6)
    assert found != student_sigmas(config_of(dmd2_student_sample_steps=3), FAMILY.schedule)
    with pytest.raises(ConfigError, match=r"^dmd2_student_schedule: the family's grid has no single step"):
        student_sigmas(config_of(dmd2_student_schedule="family", dmd2_student_sample_steps=1), FAMILY.schedule)


@pytest.mark.parametrize("sampling", ["uniform", "logitnormal"])
def test_matching_levels_have_their_distribution(sampling):
    settings = {"dmd2_matching_t_sampling": sampling, "dmd2_matching_t_min": 0.2, "dmd2_matching_t_max": 0.6}
    if sampling == "logitnormal":
        settings |= {"dmd2_matching_t_mean": 0.5, "dmd2_matching_t_std": 2.0}
    found = matching_sigmas((torch.arange(20000) + 0.5).double() / 20000, config_of(**settings))
    assert found.dtype == torch.float32
    assert (found.diff() <= 0).all()
    drawn = np.random.default_rng(0).random(20000)
    if sampling == "logitnormal":
        drawn = 1 / (1 + np.exp(-(0.5 + 2.0 * np.random.default_rng(0).standard_normal(20000))))
    quantiles = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(np.quantile(found, quantiles), 0.2 + 0.4 * np.quantile(drawn, quantiles), atol=0.01)
    edges = matching_sigmas(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), config_of(**settings))
    assert ((edges >= 0.2) & (edges <= 0.6 + 1e-6)).all()


def test_the_energy_score_is_smallest_for_samples_of_the_true_distribution():
    """Over many captions, each with one real image; the others are too narrow, too wide, or beside it."""
    generator = torch.Generator().manual_seed(0)
    means = {}
    real = torch.randn(3000, 1, 2, generator=generator).expand(-1, 4, -1)
    for name, (mean, std) in {"true": (0, 1), "narrow": (0, 0.3), "wide": (0, 2), "beside": (1, 1)}.items():
        samples = mean + std * torch.randn(3000, 4, 2, generator=generator)
        means[name] = float(torch.stack([energy_scores(x, y) for x, y in zip(samples, real, strict=True)]).mean())
    assert min(means, key=means.get) == "true"
    one, other, target = torch.randn(3, 1, 5, generator=generator)
    rms = lambda x: x.square().mean().sqrt()  # noqa: E731
    expected = [rms(one - target) - rms(one - other) / 2, rms(other - target) - rms(one - other) / 2]
    found = energy_scores(torch.cat([one, other]), target.expand(2, -1))
    torch.testing.assert_close(found, torch.stack(expected))
    torch.testing.assert_close(energy_scores(one, target), rms(one - target)[None])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": "sft"},
            r"^dmd2_student_update_freq: has no effect with task 'sft'; leave it out, or set task to dmd2$",
        ),
        ({"dmd2_student_schedule": "cosine"}, r"^dmd2_student_schedule: must be 'uniform' or 'family', got 'cosine'$"),
        ({"dmd2_student_sample_type": "ddim"}, r"^dmd2_student_sample_type: must be 'sde' or 'ode', got 'ddim'$"),
        (
            {"dmd2_student_t_list": "0.9,0.5"},
            r"^dmd2_student_t_list: must be noise levels that fall from at most 1 to a",
        ),
        ({"dmd2_student_t_list": "0.5,0.9,0"}, r"^dmd2_student_t_list: must be noise levels that fall"),
        (
            {"dmd2_student_t_list": "0.9,0.5,0", "dmd2_student_schedule": "family"},
            r"^dmd2_student_schedule: has no effect with dmd2_student_t_list '0.9,0.5,0'; set",
        ),
        ({"dmd2_matching_t_mean": 1}, r"^dmd2_matching_t_mean: has no effect with dmd2_matching_t_sampling 'uniform'"),
        ({"dmd2_matching_t_min": 0.9, "dmd2_matching_t_max": 0.9}, r"the range from 0.9 to 0.9 is empty$"),
        ({"dmd2_feature_indices": "1,-2"}, r"^dmd2_feature_indices: must be numbers of blocks, from 0, such as 12,24"),
        (
            {"dmd2_gan_loss_weight": 0, "dmd2_feature_indices": "1"},
            r"^dmd2_feature_indices: has no effect with dmd2_gan_loss_weight 0, as there is no discriminator; leave it",
        ),
        ({"dmd2_gan_r1_reg_alpha": 0.2}, r"^dmd2_gan_r1_reg_alpha: has no effect with dmd2_gan_r1_reg_weight 0"),
        (
            {"trainable_models": "text_encoder"},
            r"^trainable_models: task dmd2 trains the dit alone, .* leave out text_enc",
        ),
        ({"min_sigma": 0.5}, r"^min_sigma: has no effect with task 'dmd2', which draws no levels; leave it out$"),
    ],
)
def test_a_flag_that_cannot_act_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config_of(dmd2_student_update_freq=3, **changes) if "task" not in changes else load_config(
            None, {"dataset_base_path": "data", "dmd2_student_update_freq": 3, **changes}
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dmd2_student_t_list": "0.9,0"},
            r"^dmd2_student_t_list: 2 levels are for 1 steps, but .* is 4; list one level",
        ),
        ({"dmd2_feature_indices": "0,2"}, r"^dmd2_feature_indices: 2 is no number of a block; they go from 0 to 1$"),
        (
            {"dmd2_feature_indices": "1", "dmd2_discriminator_num_blocks": 1},
            r"^dmd2_feature_indices: 1 is no number of a block; they go from 0 to 0$",
        ),
        ({"dmd2_discriminator_num_blocks": 3}, r"^dmd2_discriminator_num_blocks: 3 is more than the 2 blocks"),
    ],
)
def test_what_the_denoiser_does_not_have_is_refused(tiny_repo, batch, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        losses(tiny_repo, batch, **changes)
    assert "\n" not in str(caught.value)
