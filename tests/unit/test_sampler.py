"""The order of samples: complete, the same for any number of ranks, and a function of the step alone."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.training.sampler import BatchPlan, BucketSampler, KeyedPermutation

sizes = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 12), min_size=1)


def visits_of(sampler, num_steps):
    """Return the visit numbers of each (bucket, index), in the order of the steps."""
    seen = {}
    for step in range(num_steps):
        plan = sampler.plan(step)
        for index, visit in zip(plan.indices, plan.visits, strict=True):
            seen.setdefault((plan.bucket, index), []).append(visit)
    return seen


@given(size=st.integers(1, 5000), key=st.text(max_size=8))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(size, key):
    values = KeyedPermutation(size, key)(np.arange(size))
    assert np.array_equal(np.sort(values), np.arange(size))


def test_permutation_looks_random():
    values = KeyedPermutation(100_000, "key")(np.arange(100_000))
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.01
    assert abs(np.corrcoef(values, np.arange(100_000))[0, 1]) < 0.01
    firsts = Counter(int(KeyedPermutation(10, str(key))(np.array([0]))[0]) for key in range(4000))
    chi_square = sum((firsts[value] - 400) ** 2 / 400 for value in range(10))
    assert chi_square < 27.9  # 99.9 % of chi-square with 9 degrees of freedom


@given(sizes=sizes, passes=st.integers(1, 5), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_with_global_batch_1_every_sample_comes_once_per_pass(sizes, passes, seed):
    sampler = BucketSampler(sizes, 1, seed)
    assert sampler.num_steps(passes) == passes * sum(sizes.values())
    seen = visits_of(sampler, sampler.num_steps(passes))
    assert seen == {(bucket, index): list(range(passes)) for bucket, size in sizes.items() for index in range(size)}


@given(sizes=sizes, global_batch_size=st.integers(1, 30), passes=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_every_sample_comes_at_least_once_per_pass_and_no_batch_is_wasted(sizes, global_batch_size, passes):
    sampler = BucketSampler(sizes, global_batch_size, 0)
    num_steps = sampler.num_steps(passes)
    seen = visits_of(sampler, num_steps)
    surplus = 0
    for bucket, size in sizes.items():
        for index in range(size):
            visits = sorted(seen[bucket, index])
            assert visits == list(range(len(visits)))
            assert len(visits) >= passes
            surplus += len(visits) - passes
            if passes * size % global_batch_size == 0:
                assert len(visits) == passes
    assert surplus < len(sizes) * global_batch_size
    assert num_steps * global_batch_size == passes * sum(sizes.values()) + surplus


@given(sizes=sizes, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_global_batches_are_the_same_for_1_2_and_4_ranks(sizes, seed):
    for step in range(6):
        plan = BucketSampler(sizes, 8, seed).plan(step)
        for world_size, batch_size in ((1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1)):
            ranks = [
                BucketSampler(sizes, 8, seed)
                .plan(step)
                .micro_batches(rank=rank, world_size=world_size, batch_size=batch_size)
                for rank in range(world_size)
            ]
            parts = [part for micro_step in zip(*ranks, strict=True) for part in micro_step]
            assert {part.bucket for part in parts} == {plan.bucket}
            assert tuple(index for part in parts for index in part.indices) == plan.indices
            assert tuple(visit for part in parts for visit in part.visits) == plan.visits


def test_a_batch_that_does_not_divide_is_refused():
    plan = BatchPlan("a", (0, 1, 2, 3, 4, 5), (0,) * 6)
    with pytest.raises(ConfigError, match="global batch of 6 samples does not divide by 2 ranks x 2"):
        plan.micro_batches(rank=0, world_size=2, batch_size=2)


def test_passes_and_buckets_are_mixed():
    sampler = BucketSampler({"a": 50, "b": 50}, 1, 0)
    plans = [sampler.plan(step) for step in range(200)]
    first, second = ([plan.indices[0] for plan in plans if plan.bucket == "a" and plan.visits == (v,)] for v in (0, 1))
    assert first != second != sorted(second)
    turns = sum(one.bucket != other.bucket for one, other in itertools.pairwise(plans[:100]))
    assert 30 < turns < 70


def test_an_order_of_a_trillion_samples_needs_no_memory():
    sampler = BucketSampler({"a": 10**12 - 5, "b": 5}, 256, 0)
    for step in (0, 3, 10**11):
        plan = sampler.plan(step)
        assert len(set(plan.indices)) == 256
        assert sampler.finished_passes(step) <= plan.visits[0] <= sampler.finished_passes(step) + 1
    assert BucketSampler({"a": 1000}, 1, 0).num_steps(10**9) == 10**12


def test_the_order_stays_what_it_was():
    """A change here breaks the comparison with every earlier run."""
    sampler = BucketSampler({"512x512": 5, "512x384": 3}, 2, 7)
    assert [tuple(sampler.plan(step)) for step in range(3)] == [
        ("512x384", (0, 1), (0, 0)),
        ("512x512", (1, 1), (0, 1)),
        ("512x384", (2, 0), (0, 1)),
    ]
