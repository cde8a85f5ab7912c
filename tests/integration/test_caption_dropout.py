"""Caption dropout: which visits it befalls, and that a cache and live encoders put the same bits in their place."""

import json

import numpy as np
import pytest
import torch

from cache_store.store import Cache
from diffsynth_pipe.errors import CacheMismatch
from diffsynth_pipe.stages.data_process import data_process
from diffsynth_pipe.stages.live import LiveSource
from diffsynth_pipe.stages.plan import plan_encoding
from diffsynth_pipe.stages.train import train
from diffsynth_pipe.training.randomness import CaptionDropout
from diffsynth_pipe.training.sampler import BatchPlan
from diffsynth_pipe.training.sources import CachedSource

FIELDS = ("prompt_emb", "latents")
CAPTION_FIELDS = ("prompt_emb",)
IDS = [f"{number:032x}" for number in range(200)]


def test_drops_are_a_function_of_seed_sample_and_visit():
    dropout = CaptionDropout(seed=0, probability=0.25)
    dropped = {(sample_id, visit): dropout.drops(sample_id, visit) for sample_id in IDS for visit in range(50)}
    assert np.mean(list(dropped.values())) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 10_000) ** 0.5)
    assert dropped == {(sample_id, visit): dropout.drops(sample_id, visit) for sample_id, visit in reversed(dropped)}
    other = CaptionDropout(seed=1, probability=0.25)
    agreeing = np.mean([other.drops(*item) == drops for item, drops in dropped.items()])
    assert agreeing == pytest.approx(0.25**2 + 0.75**2, abs=0.02)


def test_a_higher_probability_drops_what_a_lower_one_drops_and_more():
    for sample_id in IDS:
        drops = [CaptionDropout(0, probability).drops(sample_id, 0) for probability in (0, 0.3, 0.6, 1)]
        assert drops == sorted(drops)
        assert drops[0] is False
        assert drops[-1] is True


@pytest.fixture
def square(run_config):
    """One bucket of six photos with captions of several lengths."""
    return run_config(height=32, width=32, batch_size=3)


def copies(batches):
    return [({name: value.clone() for name, value in batch.fields.items()}, batch) for batch in batches]


def test_cached_and_live_sources_put_the_pipelines_empty_prompt_in_the_place_of_the_same_captions(square, tiny_repo):
    from diffusers import QwenImagePipeline

    data_process(square)
    snapshot = Cache.open(square.cache_dir).latest()
    cached = CachedSource(snapshot, FIELDS, CAPTION_FIELDS)
    live = LiveSource(square, plan_encoding(square))
    assert dict(cached.bucket_sizes) == dict(live.bucket_sizes) == {"32x32": 6}
    assert live.digest == cached.digest

    plans = [BatchPlan("32x32", (0, 1, 2), (visit,) * 3) for visit in range(8)]
    dropout = CaptionDropout(seed=3, probability=0.5)
    pipe = QwenImagePipeline.from_pretrained(tiny_repo, transformer=None, vae=None, dtype=torch.float32)
    empty = pipe.encode_prompt("")[0][0].bfloat16()
    ((fields, batch),) = copies(cached.batches(plans[:1]))
    kept, lengths = fields["prompt_emb"], batch.lengths["prompt_emb"].tolist()
    assert len(set(lengths)) > 1
    assert len(empty) < min(lengths)

    num_dropped = []
    both = zip(copies(cached.batches(plans, dropout)), copies(live.batches(plans, dropout)), plans, strict=True)
    for (fields, batch), (live_fields, live_batch), plan in both:
        for name in FIELDS:
            assert torch.equal(fields[name], live_fields[name])
        assert torch.equal(batch.lengths["prompt_emb"], live_batch.lengths["prompt_emb"])
        assert batch.sample_ids == live_batch.sample_ids
        drops = [dropout.drops(*item) for item in zip(batch.sample_ids, plan.visits, strict=True)]
        expected = [len(empty) if drop else length for drop, length in zip(drops, lengths, strict=True)]
        assert batch.lengths["prompt_emb"].tolist() == expected
        assert fields["prompt_emb"].shape[1] == max(expected)
        for slot, (drop, length) in enumerate(zip(drops, expected, strict=True)):
            assert torch.equal(fields["prompt_emb"][slot, :length], empty if drop else kept[slot, :length])
            assert not fields["prompt_emb"][slot, length:].any()
        num_dropped.append(sum(drops))
    assert len(set(num_dropped)) > 1


def losses(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("trainable_models", [None, "text_encoder"])
def test_both_ways_of_training_drop_alike_and_validation_does_not(square, trainable_models):
    square = square.model_copy(update={"trainable_models": trainable_models})
    data_process(square)
    results = {}
    for name, changes in {
        "cached": {"task": "sft:train", "caption_dropout": 0.5},
        "live": {"task": "sft", "caption_dropout": 0.5, "output_path": f"{square.output_path}-live"},
        "never": {"task": "sft:train", "caption_dropout": 0.0},
    }.items():
        results[name] = train(square.model_copy(update={**changes, "num_validation_samples": 2, "num_epochs": 2}))
    cached, live, never = (results[name].summary for name in ("cached", "live", "never"))
    assert cached["digests"] == live["digests"] != never["digests"]
    assert results["cached"].key == results["live"].key != results["never"].key
    assert cached["loss_before"] == never["loss_before"]
    assert losses(results["cached"].path) != losses(results["never"].path)


def test_a_cache_of_an_earlier_version_trains_but_cannot_drop(square):
    data_process(square)
    cache = Cache.open(square.cache_dir)
    rows = [sample for sample in cache.latest().samples() if sample.bucket]
    cache.seal(rows, cache.latest().header)
    config = square.model_copy(update={"task": "sft:train", "num_validation_samples": 0})
    assert train(config).state == "Completed"
    with pytest.raises(CacheMismatch, match=r"no record of the empty caption.*run data-process again") as caught:
        train(config.model_copy(update={"caption_dropout": 0.1}))
    assert "\n" not in str(caught.value)
    assert data_process(square).summary["encoded"] == {}
    assert train(config.model_copy(update={"caption_dropout": 0.1})).state == "Completed"


def test_a_row_with_an_empty_caption_shares_the_record(square, edit_rows):
    edit_rows(lambda rows: rows[1].update(prompt=""))
    data_process(square)
    snapshot = Cache.open(square.cache_dir).latest()
    samples = list(snapshot.samples())
    assert samples[1].keys["text"] == samples[-1].keys["text"]
    assert len(snapshot) == 6
