"""Held-out samples, the confidence interval and early stopping, against plain arithmetic."""

import json
import random
from dataclasses import asdict

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.training.metrics import LossByDecile
from diffsynth_pipe.training.sources import hold_out
from diffsynth_pipe.training.validation import EarlyStopping, Validation, mean_and_margin, student_t95


class Ids:
    """A source that knows ids only."""

    digest = ""

    def __init__(self, buckets):
        self.buckets = buckets

    @property
    def bucket_sizes(self):
        return {bucket: len(ids) for bucket, ids in self.buckets.items()}

    def sample_ids(self, bucket):
        return iter(self.buckets[bucket])


def ids_of(source):
    return {(bucket, sample_id) for bucket in source.bucket_sizes for sample_id in source.sample_ids(bucket)}


def random_buckets(seed, sizes):
    rng = random.Random(seed)
    return {f"bucket-{number}": [f"{rng.getrandbits(128):032x}" for _ in range(size)] for number, size in sizes}


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_held_out_samples_are_the_smallest_ids_that_leave_every_bucket_one(sizes, share, seed):
    source = Ids(random_buckets(seed, enumerate(sizes)))
    num = round(share * (sum(sizes) - len(sizes)))
    train, bank = hold_out(source, num)
    may_go = [
        (sample_id, bucket) for bucket, ids in source.buckets.items() for sample_id in ids if sample_id != max(ids)
    ]
    expected = {(bucket, sample_id) for sample_id, bucket in sorted(may_go)[:num]}
    assert ids_of(bank) == expected
    assert ids_of(train) == ids_of(source) - expected
    assert set(train.bucket_sizes) == set(source.buckets)
    assert sum(train.bucket_sizes.values()) == sum(sizes) - num
    assert 0 not in bank.bucket_sizes.values()


def test_neither_the_order_of_samples_nor_a_new_one_changes_much():
    buckets = random_buckets(0, enumerate([200, 100]))
    _, bank = hold_out(Ids(buckets), 30)
    shuffled = {bucket: random.Random(1).sample(ids, len(ids)) for bucket, ids in reversed(buckets.items())}
    assert ids_of(hold_out(Ids(shuffled), 30)[1]) == ids_of(bank)
    grown = buckets | {"bucket-1": [*buckets["bucket-1"], "0" * 32]}
    assert len(ids_of(hold_out(Ids(grown), 30)[1]) & ids_of(bank)) == 29
    assert bank.bucket_sizes["bucket-0"] == pytest.approx(20, abs=6)


def test_too_many_held_out_samples_are_refused():
    source = Ids(random_buckets(0, enumerate([3, 1])))
    with pytest.raises(ConfigError, match=r"^num_held_out_samples: 3 are more than 2: of 4 samples, one in each of 2"):
        hold_out(source, 3)
    assert hold_out(source, 2)[0].bucket_sizes == {"bucket-0": 1, "bucket-1": 1}


@pytest.mark.parametrize("degrees_of_freedom", [1, 2, 3, 4, 7, 8, 30, 63, 500])
def test_student_t_is_that_of_the_incomplete_beta_function(degrees_of_freedom):
    t, df = student_t95(degrees_of_freedom), degrees_of_freedom
    outside = mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True)
    assert float(outside) == pytest.approx(0.05, rel=1e-10)


def test_student_t_is_that_of_the_tables():
    tables = {1: 12.706, 2: 4.303, 7: 2.365, 30: 2.042, 120: 1.980}
    assert {df: round(student_t95(df), 3) for df in tables} == tables


def test_the_interval_holds_the_true_mean_in_19_of_20_cases():
    samples = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    intervals = [mean_and_margin(row) for row in samples.tolist()]
    share = np.mean([abs(mean - 3.0) < margin for mean, margin in intervals])
    assert share == pytest.approx(0.95, abs=0.01)


def test_a_single_sample_has_no_interval():
    assert mean_and_margin([2.5]) == (2.5, None)
    assert mean_and_margin([1.0, 3.0]) == (2.0, pytest.approx(12.7062047362))


def stopped_by_hand(losses, patience):
    """Return the number of validations until the run ends, and the place of the best of them."""
    for end in range(1, len(losses) + 1):
        best = min(range(end), key=losses.__getitem__)
        if end - 1 - best >= patience:
            return end, best
    return len(losses), min(range(len(losses)), key=losses.__getitem__)


@given(losses=st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0]), min_size=1, max_size=20), patience=st.integers(1, 4))
def test_early_stopping_follows_a_simulation_by_hand(losses, patience):
    stopping, num = EarlyStopping(patience=patience), 0
    while num < len(losses) and not stopping.should_stop:
        improved = stopping.update(10 * num, losses[num])
        assert improved == (losses[num] < min([*losses[:num], float("inf")]))
        num += 1
        stopping = EarlyStopping(**json.loads(json.dumps(asdict(stopping))))  # as a resumed run does
    expected_num, best = stopped_by_hand(losses, patience)
    assert (num, stopping.best_step, stopping.best_loss) == (expected_num, 10 * best, losses[best])


def test_without_patience_nothing_stops_a_run():
    stopping = EarlyStopping(patience=None)
    assert [stopping.update(step, loss) for step, loss in enumerate([2.0, 1.0, 3.0, 3.0, 3.0])] == [True, True] + [
        False
    ] * 3
    assert not stopping.should_stop
    assert (stopping.best_step, stopping.best_loss) == (1, 1.0)


def test_loss_by_decile_is_the_mean_of_each_decile_since_it_was_last_taken():
    loss_by_decile = LossByDecile()
    loss_by_decile.add(torch.tensor([0, 9, 0]), torch.tensor([1.0, 5.0, 2.0]))
    loss_by_decile.add(torch.tensor([9]), torch.tensor([7.0]))
    assert loss_by_decile.take() == [1.5, *[None] * 8, 6.0]
    loss_by_decile.add(torch.tensor([3]), torch.tensor([4.0]))
    assert loss_by_decile.take() == [None] * 3 + [4.0] + [None] * 6


def test_a_validation_is_one_line():
    validation = Validation(
        step=20,
        loss=1.0,
        loss_margin=0.25,
        loss_by_level=(2.0, 0.0),
        base_loss=1.5,
        base_loss_by_level=(2.0, 1.0),
        improvement=0.5,
        improvement_margin=0.125,
        num_samples=8,
        held_out=True,
    )
    assert str(validation) == (
        "step 20: validation loss 1.0000 +- 0.2500, base model 1.5000, better by 0.5000 +- 0.1250 "
        "(95 %, 8 held-out samples)"
    )
    assert json.loads(json.dumps(validation.values()))["validation_loss_by_level"] == [2.0, 0.0]
