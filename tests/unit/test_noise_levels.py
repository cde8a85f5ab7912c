"""How noise levels are drawn and weighted: the reference's numbers, distributions, strata, and the loss they make."""

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
import torch

from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import Batch, FlowMatchSchedule, load_family, load_task
from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.training.flow_match import SigmaDistribution, sigma_grid
from diffsynth_pipe.training.randomness import SampleDraws
from diffsynth_pipe.training.sampler import BucketSampler

FAMILY = load_family("qwen_image")
QWEN_IMAGE = FAMILY.schedule
FLUX = FlowMatchSchedule(shift_type="linear", shift=3.0, u_end=0.003 / 1.002, include_end=True)
FLUX2 = FlowMatchSchedule(shift_type="exponential", shift=0.8, u_end=1 / 1000, include_end=True)
WAN = FlowMatchSchedule(shift_type="linear", shift=5.0)
Z_IMAGE = FlowMatchSchedule(shift_type="linear", shift=3.0)
EACH_LEVEL = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
NUM_DRAWS = 20_000
KS_BOUND = 1.95 / math.sqrt(NUM_DRAWS)  # 99.9 % of the Kolmogorov-Smirnov statistic


def distribution(schedule=QWEN_IMAGE, **values):
    return SigmaDistribution(schedule, load_config(None, {"dataset_base_path": "data", **values}))


def drawn(levels, num_tokens=4096):
    uniform = SampleDraws(0, ["a"] * NUM_DRAWS, range(NUM_DRAWS)).uniform()
    return levels.draw(uniform, num_tokens).sigma.double().numpy()


def qwen_grid():
    """The grid and its weights in float64, written down from the reference's formulas."""
    u = np.linspace(1, 0, 1001)[:-1]
    sigmas = np.exp(0.8) / (np.exp(0.8) + 1 / u - 1)
    sigmas = 1 - (1 - sigmas) / ((1 - sigmas[-1]) / 0.98)
    bell = np.exp(-2 * ((1000 * sigmas - 500) / 1000) ** 2)
    return sigmas, (bell - bell.min()) * 1000 / (bell - bell.min()).sum()


def test_the_default_takes_each_level_of_the_grid_with_the_references_weight():
    sigmas, weights = qwen_grid()
    level = distribution().draw(EACH_LEVEL, 4096)
    np.testing.assert_allclose(level.sigma, sigmas, rtol=0, atol=1e-6)
    np.testing.assert_allclose(level.weight, weights, rtol=0, atol=1e-6)
    assert torch.equal(level.model_sigma, level.sigma)
    for sigma, weight in ((0.02, 0.104), (0.25, 1.179), (0.5, 1.683), (0.9, 0.510), (1.0, 0)):
        nearest = int((level.sigma - sigma).abs().argmin())
        assert float(level.weight[nearest]) == pytest.approx(weight, abs=6e-4)
    singly = [distribution().draw(EACH_LEVEL[i : i + 1], 4096).weight for i in range(0, 1000, 37)]
    assert torch.equal(torch.cat(singly), level.weight[::37])


def test_draws_pick_the_level_that_earlier_versions_picked():
    ids = [f"{number:032x}" for number in range(2000)]
    hashes = [hashlib.blake2b(f"train/3/{name}/0/timestep".encode(), digest_size=8).digest() for name in ids]
    indices = [int.from_bytes(digest, "little") * 1000 >> 64 for digest in hashes]
    levels = distribution().draw(SampleDraws(3, ids, [0] * 2000).uniform(), 1)
    assert torch.equal(levels.sigma, sigma_grid(QWEN_IMAGE)[indices])


def test_the_ends_of_the_unit_interval_stay_on_the_grid():
    level = distribution().draw(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), 1)
    assert level.sigma.tolist() == pytest.approx([1, 0.02])


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.358), (0.417, 1.0), (0.2, 0.201)])
def test_boundaries_are_fractions_of_the_references_steps(low, high):
    indices = range(int(low * 1000), int(high * 1000))
    levels = distribution(WAN, min_timestep_boundary=low, max_timestep_boundary=high)
    found = levels.draw((torch.arange(len(indices), dtype=torch.float64) + 0.5) / len(indices), 1)
    assert torch.equal(found.sigma, sigma_grid(WAN)[list(indices)])


def test_the_high_noise_expert_of_wan_is_trained_above_0_9():
    assert drawn(distribution(WAN, max_timestep_boundary=0.358)).min() == pytest.approx(0.9, abs=1e-3)


def test_a_range_of_sigma_keeps_the_levels_of_the_grid_within():
    sigmas = drawn(distribution(min_sigma=0.3, max_sigma=0.6))
    grid, _ = qwen_grid()
    inside = grid[(grid >= 0.3) & (grid <= 0.6)]
    np.testing.assert_allclose(np.unique(sigmas), inside[::-1], rtol=0, atol=1e-6)


def test_a_range_without_a_level_is_refused():
    with pytest.raises(ConfigError, match=r"^min_sigma, max_sigma: no level .* lies in 0 to 0.01; widen the range$"):
        distribution(max_sigma=0.01)
    assert drawn(distribution(max_sigma=0.01, timestep_sampling="uniform")).max() <= 0.01


def uniform_cdf(x):
    return x


def logit_normal_cdf(x, mean, std):
    with np.errstate(divide="ignore"):
        z = (np.log(x) - np.log1p(-x) - mean) / std
    return np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in np.atleast_1d(z)])


def shifted(cdf, s):
    """The distribution of s·x/(1+(s-1)·x), by solving for x."""
    return lambda y: cdf(y / (s - (s - 1) * y))


def qwen_shift(num_tokens):
    return math.exp(0.5 + 0.4 * (num_tokens - 256) / 7936)


@pytest.mark.parametrize(
    ("values", "cdf"),
    [
        ({"timestep_sampling": "uniform"}, uniform_cdf),
        ({"timestep_sampling": "uniform", "timestep_shift": 3}, shifted(uniform_cdf, 3)),
        ({"timestep_sampling": "uniform", "timestep_shift": "resolution"}, shifted(uniform_cdf, qwen_shift(4096))),
        ({"timestep_sampling": "logit_normal"}, lambda x: logit_normal_cdf(x, 0, 1)),
        (
            {"timestep_sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 0.7, "timestep_shift": 2.0},
            shifted(lambda x: logit_normal_cdf(x, 0.5, 0.7), 2),
        ),
    ],
    ids=["uniform", "shifted", "resolution", "logit_normal", "logit_normal-shifted"],
)
@pytest.mark.parametrize("range_of_sigma", [(0.0, 1.0), (0.2, 0.7)])
def test_levels_are_distributed_as_named(values, cdf, range_of_sigma):
    """Kolmogorov-Smirnov, against the distribution given that the level lies in the range."""
    low, high = range_of_sigma
    sigmas = np.sort(drawn(distribution(**values, min_sigma=low, max_sigma=high)))
    assert low <= sigmas[0]
    assert sigmas[-1] <= high
    expected = (cdf(sigmas) - cdf(np.array(low))) / (cdf(np.array(high)) - cdf(np.array(low)))
    steps = np.arange(NUM_DRAWS + 1) / NUM_DRAWS
    assert max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max()) < KS_BOUND


@pytest.mark.parametrize("num_tokens", [256, 1024, 4096, 8192, 16384])
def test_the_shift_by_resolution_is_that_of_the_pipeline(num_tokens):
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    s = math.exp(calculate_shift(num_tokens, 256, 8192, 0.5, 0.9))
    levels = distribution(timestep_sampling="uniform", timestep_shift="resolution")
    u = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    x = 1 - u
    torch.testing.assert_close(levels.draw(u, num_tokens).sigma, (s * x / (1 + (s - 1) * x)).float())


def test_a_family_without_a_shift_by_resolution_says_so():
    with pytest.raises(ConfigError, match=r"^timestep_shift: family 'qwen_image' has no shift by resolution"):
        distribution(WAN, timestep_sampling="uniform", timestep_shift="resolution")


@pytest.mark.parametrize("values", [{}, {"timestep_sampling": "uniform"}, {"timestep_sampling": "logit_normal"}])
def test_levels_fall_as_u_grows(values):
    sigma = distribution(**values).draw(EACH_LEVEL, 4096).sigma
    assert (sigma.diff() < 0).all()
    assert sigma.isfinite().all()
    ends = distribution(**values).draw(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), 4096)
    assert ends.sigma[0] == 1
    assert 0 <= ends.sigma[1] <= 0.02
    assert (ends.weight >= 0).all()


def test_the_bell_weighs_levels_between_those_of_the_grid_as_their_neighbours():
    sigmas, weights = qwen_grid()
    level = distribution(timestep_sampling="uniform").draw(EACH_LEVEL, 4096)
    expected = np.interp(level.sigma.double(), sigmas[::-1], weights[::-1])
    above = level.sigma >= 0.02
    np.testing.assert_allclose(level.weight[above], expected[above], rtol=0, atol=1e-5)
    assert (level.weight >= 0).all()


def test_weights_by_min_snr_cap_the_weight_of_predicted_clean_latents():
    gamma = 2.0
    level = distribution(loss_weighting="min_snr", min_snr_gamma=gamma).draw(EACH_LEVEL, 4096)
    sigma = level.sigma.double().numpy()
    snr = ((1 - sigma) / sigma) ** 2
    # x0 = x_sigma - sigma v: the squared error of x0 is sigma^2 times that of v
    np.testing.assert_allclose(level.weight, sigma**2 * np.minimum(snr, gamma), rtol=1e-5, atol=1e-7)
    assert (snr > gamma).any()
    assert (snr < gamma).any()


def test_no_weighting_is_the_plain_error():
    assert distribution(loss_weighting="none").draw(EACH_LEVEL, 4096).weight.tolist() == [1.0] * 1000


@pytest.mark.parametrize(
    ("schedule", "num_distinct", "most_often"),
    [
        pytest.param(QWEN_IMAGE, 376, 9, id="qwen_image"),
        pytest.param(FLUX, 351, 12, id="flux"),
        pytest.param(WAN, 294, 20, id="wan"),
        pytest.param(Z_IMAGE, 353, 12, id="z_image"),
        pytest.param(FLUX2, 384, 9, id="flux2"),
    ],
)
def test_snapping_collapses_the_grid_as_in_the_reference(schedule, num_distinct, most_often):
    level = distribution(schedule, snap_timesteps_to_bf16=True).draw(EACH_LEVEL, 4096)
    counts = Counter(level.sigma.tolist())
    assert len(counts) == num_distinct
    assert max(counts.values()) == most_often
    timesteps = (1000 * sigma_grid(schedule)).bfloat16()
    assert float((sigma_grid(schedule) - timesteps.float() / 1000).abs().max()) == pytest.approx(0.002, abs=1e-4)
    assert torch.equal(level.model_sigma, timesteps.float() / 1000)
    assert float(level.weight.double().mean()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_strata_give_a_global_batch_one_level_in_each_part_of_the_distribution(world_size, batch_size):
    sampler = BucketSampler({"a": 50, "b": 30}, 8, 1, stratified=True)
    levels = distribution()
    for step in range(20):
        plan = sampler.plan(step)
        whole = SampleDraws(1, list(map(str, plan.indices)), plan.visits, slots=plan.slots, num_slots=8).uniform()
        assert sorted((whole * 8).long().tolist()) == list(range(8))
        found = {}
        for rank in range(world_size):
            for part in plan.micro_batches(rank=rank, world_size=world_size, batch_size=batch_size):
                ids = list(map(str, part.indices))
                draws = SampleDraws(1, ids, part.visits, slots=part.slots, num_slots=part.num_slots)
                sigma = levels.draw(draws.uniform(), 4096).sigma
                found |= dict(zip(zip(part.indices, part.visits, strict=True), sigma.tolist(), strict=True))
        expected = levels.draw(whole, 4096).sigma.tolist()
        assert [found[item] for item in zip(plan.indices, plan.visits, strict=True)] == expected


def test_strata_halve_the_scatter_of_a_steps_mean_level():
    stratified, plain = (
        [
            float(SampleDraws(0, [f"{step}"] * 8, range(8), slots=slots, num_slots=len(slots) or 1).uniform().mean())
            for step in range(500)
        ]
        for slots in (tuple(range(8)), ())
    )
    assert np.mean(stratified) == pytest.approx(0.5, abs=0.01)
    assert np.std(stratified) < 0.5 * np.std(plain)  # in theory an eighth


class GivenDraws:
    """Noise and uniform numbers as a test wants them."""

    def __init__(self, noise, u):
        self._noise, self._u = noise, torch.tensor(u, dtype=torch.float64)

    def noise(self, like):
        assert like.shape == self._noise.shape
        return self._noise

    def uniform(self):
        return self._u


@pytest.mark.parametrize("weighting", ["bell", "none", "min_snr"])
@pytest.mark.parametrize("snap", [False, True])
def test_the_loss_of_given_latents_noise_and_timestep(tiny_repo, weighting, snap):
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    dit = QwenImageTransformer2DModel.from_pretrained(tiny_repo / "transformer")
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 16, 1, 4, 6, generator=generator) for _ in range(2))
    text = torch.randn(3, 5, 64, generator=generator)
    places = [60, 400, 931]
    batch = Batch(
        fields={"latents": latents, "prompt_emb": text},
        lengths={"prompt_emb": torch.tensor([5, 5, 5])},
        sample_ids=("0" * 32,) * 3,
        visits=(0, 0, 0),
    )
    levels = distribution(loss_weighting=weighting, snap_timesteps_to_bf16=snap)
    draws = GivenDraws(noise, [(place + 0.5) / 1000 for place in places])
    with torch.no_grad():
        losses = load_task("sft").loss(FAMILY, {"dit": dit}, batch, draws, levels)

    sigmas, weights = qwen_grid()
    for number, place in enumerate(places):
        told = sigmas[place]
        if snap:
            timestep = torch.tensor(1000 * told).bfloat16()
            told = float(timestep) / 1000
            place = int(np.abs(1000 * sigmas - float(timestep)).argmin())
        sigma = sigmas[place]
        weight = {"bell": weights[place], "none": 1, "min_snr": sigma**2 * min(((1 - sigma) / sigma) ** 2, 5)}
        clean, random = latents[number : number + 1], noise[number : number + 1]
        pack = lambda x: QwenImagePipeline._pack_latents(x, 1, 16, 4, 6)  # noqa: E731
        with torch.no_grad():
            velocity = dit(
                hidden_states=pack(((1 - sigma) * clean + sigma * random).float()),
                encoder_hidden_states=text[number : number + 1],
                timestep=torch.tensor([told], dtype=torch.float32),
                img_shapes=[[(1, 2, 3)]],
                return_dict=False,
            )[0]
        error = torch.nn.functional.mse_loss(velocity, pack(random - clean))
        assert float(losses[number]) == pytest.approx(float(error) * weight[weighting], rel=1e-5)
