"""The order of samples: complete, the same for any number of ranks, and a function of the step alone."""

import hashlib
import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.training.sampler import BatchPlan, BucketSampler, KeyedPermutation

sizes = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 12), min_size=1)
large_sizes = st.dictionaries(st.sampled_from("abcd"), st.integers(10, 10**12), min_size=1)

TRILLION = 10**12


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
def test_every_sample_comes_once_per_pass_and_the_last_batch_borrows_from_the_next(sizes, global_batch_size, passes):
    sampler = BucketSampler(sizes, global_batch_size, 0)
    seen = visits_of(sampler, sampler.num_steps(passes))
    for bucket, size in sizes.items():
        num_borrowed = 0
        for index in range(size):
            visits = sorted(seen.pop((bucket, index)))
            assert visits == list(range(len(visits)))
            assert len(visits) >= passes
            num_borrowed += len(visits) - passes
        assert num_borrowed == -passes * size % global_batch_size
    assert not seen


@given(
    sizes=sizes,
    batch_sizes=st.fixed_dictionaries(dict.fromkeys("abcd", st.integers(1, 30))),
    passes=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_each_bucket_may_have_a_batch_size_of_its_own(sizes, batch_sizes, passes, seed):
    sampler = BucketSampler(sizes, batch_sizes, seed)
    num_steps = sampler.num_steps(passes)
    assert num_steps == sum(-(-passes * size // batch_sizes[bucket]) for bucket, size in sizes.items())
    for step in range(num_steps):
        plan = sampler.plan(step)
        assert len(plan.indices) == batch_sizes[plan.bucket]
        finished = sampler.finished_passes(step)
        assert sampler.num_steps(finished) <= step < sampler.num_steps(finished + 1)
    seen = visits_of(sampler, num_steps)
    for bucket, size in sizes.items():
        all_visits = [sorted(seen.pop((bucket, index))) for index in range(size)]
        assert all(visits == list(range(len(visits))) and len(visits) >= passes for visits in all_visits)
        assert sum(map(len, all_visits)) - passes * size == -passes * size % batch_sizes[bucket]
    assert not seen


@given(sizes=sizes, global_batch_size=st.integers(1, 30), seed=st.integers(0, 99), step=st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_equal_batch_sizes_are_one_batch_size(sizes, global_batch_size, seed, step):
    one = BucketSampler(sizes, global_batch_size, seed, stratified=True).plan(step)
    assert BucketSampler(sizes, dict.fromkeys(sizes, global_batch_size), seed, stratified=True).plan(step) == one


@given(sizes=sizes, global_batch_size=st.integers(1, 30), step=st.integers(0, 40), num_steps=st.integers(1, 10))
@settings(max_examples=60, deadline=None)
def test_an_order_goes_on_from_any_step(sizes, global_batch_size, step, num_steps):
    whole = BucketSampler(sizes, global_batch_size, 3)
    uninterrupted = [whole.plan(number) for number in range(step + num_steps)]
    resumed = BucketSampler(sizes, global_batch_size, 3)
    assert [resumed.plan(number) for number in range(step, step + num_steps)] == uninterrupted[step:]


@given(sizes=large_sizes, step=st.integers(0, 10**9), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_global_batches_are_the_same_for_any_number_of_ranks(sizes, step, seed):
    global_batch_size = 48
    plan = BucketSampler(sizes, global_batch_size, seed).plan(step)
    for world_size in (1, 2, 3, 4, 8, 16):
        for batch_size in (1, global_batch_size // world_size):
            ranks = [
                BucketSampler(sizes, global_batch_size, seed)
                .plan(step)
                .micro_batches(rank=rank, world_size=world_size, batch_size=batch_size)
                for rank in range(world_size)
            ]
            parts = [part for micro_step in zip(*ranks, strict=True) for part in micro_step]
            assert {part.bucket for part in parts} == {plan.bucket}
            assert {len(part.indices) for part in parts} == {batch_size}
            assert tuple(index for part in parts for index in part.indices) == plan.indices
            assert tuple(visit for part in parts for visit in part.visits) == plan.visits


def test_a_batch_that_does_not_divide_is_refused():
    plan = BatchPlan("a", (0, 1, 2, 3, 4, 5), (0,) * 6)
    with pytest.raises(ConfigError, match="global batch of 6 samples does not divide by 2 ranks x 2"):
        plan.micro_batches(rank=0, world_size=2, batch_size=2)


@given(step=st.integers(0, 10**9), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_each_sample_of_a_step_has_a_slot_of_its_own_whatever_the_ranks_and_the_accumulation(step, seed):
    sizes = {"a": 1000, "b": 70}
    plan = BucketSampler(sizes, 16, seed, stratified=True).plan(step)
    assert plan[:3] == BucketSampler(sizes, 16, seed).plan(step)[:3]
    assert sorted(plan.slots) == list(range(16))
    assert plan.num_slots == 16
    slot_of = dict(zip(zip(plan.indices, plan.visits, strict=True), plan.slots, strict=True))
    for world_size, batch_size in itertools.product((1, 2, 4), (1, 2, 4)):
        parts = [
            part
            for rank in range(world_size)
            for part in plan.micro_batches(rank=rank, world_size=world_size, batch_size=batch_size)
        ]
        items = [item for part in parts for item in zip(part.indices, part.visits, part.slots, strict=True)]
        assert {(index, visit): slot for index, visit, slot in items} == slot_of
        assert len(items) == 16
        assert {part.num_slots for part in parts} == {16}


def test_slots_differ_from_step_to_step():
    sampler = BucketSampler({"a": 64}, 8, 0, stratified=True)
    slots = np.array([sampler.plan(step).slots for step in range(200)])
    assert len(np.unique(slots, axis=0)) > 190
    assert abs(slots.mean(0) - 3.5).max() < 0.7


def test_passes_and_buckets_are_mixed():
    sampler = BucketSampler({"a": 50, "b": 50}, 1, 0)
    plans = [sampler.plan(step) for step in range(200)]
    first, second = ([plan.indices[0] for plan in plans if plan.bucket == "a" and plan.visits == (v,)] for v in (0, 1))
    assert first != second != sorted(second)
    turns = sum(one.bucket != other.bucket for one, other in itertools.pairwise(plans[:100]))
    assert 30 < turns < 70


def permuted(size, key, position):
    """The keyed permutation as its paper puts it, in Python's integers."""
    half_bits = max(1, -(-(size - 1).bit_length() // 2))
    digest = hashlib.blake2b(key.encode(), digest_size=48).digest()
    while True:
        left, right = divmod(position, 1 << half_bits)
        for start in range(0, 48, 8):
            mixed = (right + int.from_bytes(digest[start : start + 8], "little")) % 2**64
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ (mixed ^ mixed >> 31) % (1 << half_bits)
        position = left << half_bits | right
        if position < size:
            return position


@given(size=st.integers(1, TRILLION), data=st.data())
@settings(max_examples=60, deadline=None)
def test_arithmetic_is_exact_far_beyond_a_trillion_visits(size, data):
    global_batch_size = 7
    repeat = data.draw(st.integers(1, 10**18 // size))
    sampler = BucketSampler({"a": size}, global_batch_size, 5)
    num_steps = sampler.num_steps(repeat)
    assert num_steps == -(-size * repeat // global_batch_size)
    step = data.draw(st.integers(0, num_steps - 1) | st.just(num_steps - 1))
    epoch = sampler.finished_passes(step)
    first, end = (-(-passes * size // global_batch_size) for passes in (epoch, epoch + 1))
    assert first <= step < end
    start = global_batch_size * (first + permuted(end - first, f"5/order/{epoch}", step - first))
    places = [divmod(place, size) for place in range(start, start + global_batch_size)]
    plan = sampler.plan(step)
    assert plan.visits == tuple(visit for visit, _ in places)
    assert plan.indices == tuple(permuted(size, f"5/a/{visit}", place) for visit, place in places)


@pytest.mark.parametrize("sizes", [{"a": TRILLION - 5, "b": 5}, {"a": TRILLION // 10**6}, {"a": 2, "b": 1}])
@pytest.mark.parametrize("batch_size", [256, {"a": 256, "b": 256}])
def test_an_order_of_a_trillion_samples_needs_no_memory(sizes, batch_size):
    repeat = TRILLION // sum(sizes.values())
    tracemalloc.start()
    try:
        sampler = BucketSampler(sizes, batch_size, 0)
        num_steps = sampler.num_steps(repeat)
        assert 0 <= num_steps * 256 - repeat * sum(sizes.values()) < 256 * len(sizes)
        for step in (0, num_steps // 2, num_steps - 1):
            plan = sampler.plan(step)
            assert len(set(zip(plan.indices, plan.visits, strict=True))) == 256
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 18


def test_the_order_stays_what_it_was():
    """A change here breaks the comparison with every earlier run."""
    sampler = BucketSampler({"512x512": 5, "512x384": 3}, 2, 7)
    assert [sampler.plan(step)[:3] for step in range(3)] == [
        ("512x384", (0, 1), (0, 0)),
        ("512x512", (1, 1), (0, 1)),
        ("512x384", (2, 0), (0, 1)),
    ]
