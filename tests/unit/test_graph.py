"""The cut on graphs whose answer is reasoned by hand, and against a symbolic run of the whole graph."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_store.contract import FieldSpec
from diffsynth_pipe.contracts import EncodeUnit, load_family
from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.graph import cut


def unit(name: str, reads: str, writes: str, component: str | None = None) -> EncodeUnit:
    """Build a unit from space-separated names; it is never run."""
    outputs = tuple(FieldSpec(name=field, dtype="float32", dims=("channel",)) for field in writes.split())
    return EncodeUnit(
        name=name, inputs=tuple(reads.split()), outputs=outputs, component=component, encode=lambda _components, _: {}
    )


def names(units):
    return [unit.name for unit in units]


def test_lora_on_the_denoiser_caches_all_units():
    units = load_family("qwen_image").units
    result = cut(units, frozenset({"dit"}), ("latents", "prompt_emb"))
    assert names(result.cached) == ["text", "latents"]
    assert result.live == ()
    assert result.crossing == ("latents", "prompt_emb")


def test_a_trained_text_encoder_runs_live_from_the_prompt():
    units = load_family("qwen_image").units
    result = cut(units, frozenset({"dit", "text_encoder"}), ("latents", "prompt_emb"))
    assert names(result.cached) == ["latents"]
    assert names(result.live) == ["text"]
    assert set(result.crossing) == {"prompt", "latents"}


def test_what_follows_a_trained_unit_is_live_and_only_the_edge_into_it_crosses():
    # tokens -> [trained] embed -> project; the VAE has nothing to do with it.
    units = (
        unit("tokenize", "prompt", "ids"),
        unit("embed", "ids", "hidden", "text_encoder"),
        unit("latents", "image", "latents", "vae"),
        unit("project", "hidden", "prompt_emb", "projector"),
    )
    result = cut(units, frozenset({"text_encoder"}), ("latents", "prompt_emb"))
    assert names(result.cached) == ["tokenize", "latents"]
    assert names(result.live) == ["embed", "project"]
    assert set(result.crossing) == {"ids", "latents"}  # not hidden: it is made after the cut; not prompt: before it


def test_an_intermediate_field_is_not_stored():
    units = (unit("resize", "image", "pixels"), unit("latents", "pixels", "latents", "vae"))
    result = cut(units, frozenset({"dit"}), ("latents",))
    assert names(result.cached) == ["resize", "latents"]
    assert result.crossing == ("latents",)


def test_cached_units_that_nobody_reads_are_dropped_with_all_that_feeds_them():
    units = (
        unit("resize", "image", "small"),
        unit("vision", "small", "vision_emb", "image_encoder"),
        unit("latents", "image", "latents", "vae"),
    )
    assert names(cut(units, frozenset({"dit"}), ("latents",)).cached) == ["latents"]


def test_a_live_unit_keeps_alive_what_it_reads():
    units = (
        unit("vision", "image", "vision_emb", "image_encoder"),
        unit("latents", "image", "latents", "vae"),
        unit("adapter", "vision_emb", "prompt_emb", "adapter"),
    )
    result = cut(units, frozenset({"adapter"}), ("latents", "prompt_emb"))
    assert names(result.cached) == ["vision", "latents"]
    assert set(result.crossing) == {"vision_emb", "latents"}


def test_later_writers_of_a_field_that_a_live_unit_rewrites_are_live():
    # "trained" reads and rewrites latents. "overlay" reads none, so no edge leads to it; but if it ran before the cut,
    # "trained" would rewrite what in the uncut order "overlay" wrote last.
    units = (
        unit("latents", "image", "latents", "vae"),
        unit("trained", "latents", "latents", "adapter"),
        unit("overlay", "mask", "latents"),
    )
    result = cut(units, frozenset({"adapter"}), ("latents",))
    assert names(result.cached) == ["latents"]
    assert names(result.live) == ["trained", "overlay"]
    assert set(result.crossing) == {"latents", "mask"}


def test_what_reads_an_updating_unit_that_became_live_is_live_too():
    # "overlay" becomes live as a later writer; only then is "count" downstream of a live unit.
    units = (
        unit("latents", "image", "latents", "vae"),
        unit("trained", "latents", "latents", "adapter"),
        unit("overlay", "mask", "latents area"),
        unit("count", "area", "num_masked"),
    )
    result = cut(units, frozenset({"adapter"}), ("latents", "num_masked"))
    assert names(result.live) == ["trained", "overlay", "count"]


def test_earlier_writers_stay_cached_and_their_last_version_crosses():
    units = (
        unit("latents", "image", "latents", "vae"),
        unit("scale", "latents", "latents"),
        unit("trained", "latents", "latents", "adapter"),
    )
    result = cut(units, frozenset({"adapter"}), ("latents",))
    assert names(result.cached) == ["latents", "scale"]
    assert names(result.live) == ["trained"]
    assert result.crossing == ("latents",)


def test_a_wanted_field_that_nobody_writes_is_named():
    units = (unit("latents", "image", "latents", "vae"),)
    with pytest.raises(ConfigError, match=r"'trajectory'.*latents"):
        cut(units, frozenset({"dit"}), ("latents", "trajectory"))


@st.composite
def graphs(draw):
    """Draw units that each write fields of their own and read columns or earlier fields."""
    fields = ["column0", "column1"]
    units = []
    for index in range(draw(st.integers(1, 7))):
        reads = draw(st.lists(st.sampled_from(fields), min_size=1, max_size=3, unique=True))
        writes = [f"field{index}{suffix}" for suffix in "ab"[: draw(st.integers(1, 2))]]
        units.append(unit(f"unit{index}", " ".join(reads), " ".join(writes), f"component{index}"))
        fields += writes
    trainable = draw(st.frozensets(st.sampled_from([unit.component for unit in units])))
    wanted = draw(st.lists(st.sampled_from(fields[2:]), min_size=1, max_size=3, unique=True))
    return tuple(units), trainable, tuple(wanted)


def run(units, values):
    """Run the units symbolically: a value is the term that made it. KeyError if an input is missing."""
    values = dict(values)
    for one in units:
        read = tuple(values[name] for name in one.inputs)
        values |= {spec.name: (spec.name, one.component, read) for spec in one.outputs}
    return values


def components_in(term):
    if isinstance(term, str):
        return set()
    _, component, read = term
    return {component}.union(*map(components_in, read))


def store(cached, crossing):
    """Return what the first half hands over. KeyError if it cannot make it."""
    values = run(cached, {"column0": "column0", "column1": "column1"})
    return {name: values[name] for name in crossing}


@given(graphs())
def test_the_two_halves_compute_what_the_whole_computes(graph):
    units, trainable, wanted = graph
    whole = store(units, [spec.name for one in units for spec in one.outputs])

    result = cut(units, trainable, wanted)
    stored = store(result.cached, result.crossing)
    after = run(result.live, stored)

    assert {name: after[name] for name in wanted} == {name: whole[name] for name in wanted}
    assert not trainable & set().union(*map(components_in, stored.values())), "a stored field depends on training"
    for one in result.live:
        assert trainable & components_in(whole[one.outputs[0].name]), "live without need"
    for dropped in result.cached:
        with pytest.raises(KeyError):
            store([one for one in result.cached if one is not dropped], result.crossing)
