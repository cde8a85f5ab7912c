"""Draws depend on (seed, sample id, visit) alone, and are what they claim to be."""

import pytest
import torch

from diffsynth_pipe.training.randomness import SampleDraws

IDS = ["a" * 32, "b" * 32, "c" * 32]
SHAPE = (16, 1, 4, 4)


def draw(ids, visits, seed=0, **options):
    draws = SampleDraws(seed, ids, visits, **options)
    return draws.noise(torch.empty(len(ids), *SHAPE)), draws.uniform()


def test_a_sample_draws_the_same_in_any_batch():
    noise, uniform = draw(IDS, [0, 1, 2])
    torch.rand(3)
    other_noise, other_uniform = draw([IDS[2], IDS[0]], [2, 0])
    assert torch.equal(other_noise, noise[[2, 0]])
    assert torch.equal(other_uniform, uniform[[2, 0]])


def test_like_gives_only_the_shape():
    draws = SampleDraws(0, IDS, [0, 0, 0])
    noise = draws.noise(torch.full((3, *SHAPE), torch.nan, dtype=torch.bfloat16))
    assert noise.dtype == torch.float32
    assert torch.equal(noise, draw(IDS, [0, 0, 0])[0])


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"visits": [1]}, {"ids": [IDS[1]]}, {"stream": "validation"}],
    ids=lambda value: next(iter(value)),
)
def test_every_part_of_the_key_counts(changed):
    plain_noise, plain_uniform = draw([IDS[0]], [0])
    noise, uniform = draw(**{"ids": [IDS[0]], "visits": [0], **changed})
    assert not torch.equal(noise, plain_noise)
    assert not torch.equal(uniform, plain_uniform)


def test_purposes_have_draws_of_their_own_and_strata_are_for_timesteps():
    draws = SampleDraws(0, IDS, [0, 0, 0], slots=(2, 0, 1), num_slots=3)
    plain = SampleDraws(0, IDS, [0, 0, 0])
    like = torch.empty(3, *SHAPE)
    assert torch.equal(draws.noise(like, "noise"), draws.noise(like))
    assert not torch.equal(draws.noise(like, "other"), draws.noise(like))
    assert torch.equal((draws.uniform() * 3).long(), torch.tensor([2, 0, 1]))
    assert torch.equal(draws.uniform("other"), plain.uniform("other"))
    assert not torch.equal(plain.uniform("other"), plain.uniform())


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draw(IDS, [0, 0, 0])
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_standard_normal_and_independent():
    noise, _ = draw([f"{number:032x}" for number in range(400)], [0] * 400)
    flat = noise.flatten(1).double()
    assert abs(flat.mean()) < 0.01
    assert abs(flat.var() - 1) < 0.02
    correlation = torch.corrcoef(flat)
    off_diagonal = correlation[~torch.eye(400, dtype=torch.bool)]
    assert abs(off_diagonal.mean()) < 0.001
    assert off_diagonal.std() == pytest.approx(256**-0.5, rel=0.05)


def test_what_decides_the_noise_level_is_uniform():
    uniform = SampleDraws(0, ["a"] * 50_000, range(50_000)).uniform()
    assert uniform.dtype == torch.float64
    assert 0 <= uniform.min() < 1e-3
    assert 0.999 < uniform.max() < 1
    counts = torch.bincount((uniform * 20).long(), minlength=20).double()
    chi_square = ((counts - 2500) ** 2 / 2500).sum()
    assert chi_square < 43.8  # 99.9 % of chi-square with 19 degrees of freedom


def test_draws_stay_what_they_were():
    """A change here breaks the comparison with every earlier run."""
    noise, uniform = draw(IDS, [0, 1, 2], seed=7)
    assert (uniform * 1000).floor().tolist() == [788, 172, 677]
    torch.testing.assert_close(noise[:, 0, 0, 0, 0], torch.tensor([0.788003, 0.563075, -0.187711]), rtol=0, atol=1e-6)
