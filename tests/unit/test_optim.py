"""Learning rates against schedulers that are stepped, the moving average against diffusers', optimizers by name."""

import pytest
import torch
from torch.optim import lr_scheduler

from diffsynth_pipe.config import load_config
from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.training.optim import MovingAverage, learning_rates, make_optimizer

NUM_STEPS = 23
RATE = 3e-3


def config(**values):
    return load_config(None, {"dataset_base_path": "data", "learning_rate": RATE} | values)


def stepped(make):
    """Return the rate of each step under a scheduler, as a plain loop applies it."""
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=RATE)
    scheduler = make(optimizer)
    rates = []
    for _ in range(NUM_STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        weight.grad = torch.zeros(())
        optimizer.step()
        scheduler.step()
    return rates


def ours(**values):
    rate = learning_rates(config(**values), NUM_STEPS)
    return [rate(step) for step in range(NUM_STEPS)]


@pytest.mark.parametrize(
    ("name", "fields", "theirs"),
    [
        ("constant_with_warmup", {}, {}),
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("cosine_with_restarts", {"lr_num_cycles": 3}, {"num_cycles": 3}),
        ("polynomial", {"lr_power": 2.5}, {"power": 2.5}),
    ],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_rates_are_those_of_a_scheduler_of_transformers(name, fields, theirs, warmup):
    from transformers import get_scheduler

    expected = stepped(
        lambda optimizer: get_scheduler(name, optimizer, warmup, NUM_STEPS, scheduler_specific_kwargs=theirs or None)
    )
    assert ours(lr_scheduler=name, lr_warmup_steps=warmup, **fields) == pytest.approx(expected, rel=1e-12)
    assert (expected[0] == 0) == (warmup > 0)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("constant", lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=1)),
        ("linear", lambda optimizer: lr_scheduler.LinearLR(optimizer, 1, 0, NUM_STEPS)),
        ("cosine", lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)),
        ("diffsynth", lr_scheduler.ConstantLR),
    ],
)
def test_rates_are_those_of_torch_where_it_has_the_course(name, make):
    """The reference's is torch's ``ConstantLR`` with its defaults."""
    assert ours(lr_scheduler=name) == pytest.approx(stepped(make), rel=1e-12)


def test_a_peak_below_the_end_of_a_polynomial_is_refused():
    with pytest.raises(
        ConfigError, match=r"^lr_scheduler: lr_end \(1e-07\) must be smaller than initial lr \(1e-08\)$"
    ):
        learning_rates(config(lr_scheduler="polynomial", learning_rate=1e-8), NUM_STEPS)


def test_a_warm_up_that_outlasts_the_run_is_refused():
    with pytest.raises(ConfigError, match=rf"^lr_warmup_steps: {NUM_STEPS} is not below the {NUM_STEPS} steps"):
        ours(lr_scheduler="cosine", lr_warmup_steps=NUM_STEPS)
    assert ours(lr_scheduler="cosine", lr_warmup_steps=NUM_STEPS - 1)[-1] == RATE


def test_a_rate_follows_from_its_step_alone():
    rate = learning_rates(config(lr_scheduler="cosine", lr_warmup_steps=4), NUM_STEPS)
    forwards = [rate(step) for step in range(NUM_STEPS)]
    assert [rate(step) for step in reversed(range(NUM_STEPS))] == forwards[::-1]


@pytest.mark.parametrize("decay", [0.3, 0.9999])
def test_the_moving_average_is_that_of_diffusers(decay):
    """At 0.3 the smaller decay of the first steps soon gives way, at 0.9999 it never does."""
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    weights = {"a": torch.nn.Parameter(torch.randn(3, 2)), "b": torch.nn.Parameter(torch.randn(5))}
    theirs = EMAModel(weights.values(), decay=decay)
    average = None
    for step in range(1, 12):
        for weight in weights.values():
            weight.data += torch.randn_like(weight)
        theirs.step(weights.values())
        if average is None:
            average = MovingAverage({name: weight.detach() for name, weight in weights.items()}, decay)
        else:
            average.update({name: weight.detach() for name, weight in weights.items()}, step)
        for mine, expected in zip(average.weights.values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(mine, expected)
    assert not torch.equal(average.weights["a"], weights["a"])


def test_the_moving_average_is_kept_in_fp32_beside_bf16_weights():
    """A bf16 average would stand still: the share of a step is below its precision."""
    weight = torch.ones(1, dtype=torch.bfloat16)
    average = MovingAverage({"w": weight}, 0.9999)
    for step in range(100_000, 100_010):
        average.update({"w": weight + 1}, step)
    assert average.weights["w"].item() == pytest.approx(2 - 0.9999**10, rel=1e-5)
    assert weight.item() == 1  # a copy


def step_with_zero_gradient(**values):
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = make_optimizer(config(**values), [weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return type(optimizer), weight.detach()


@pytest.mark.parametrize("weight_decay", [0.0, 0.01, 0.5])
def test_the_default_is_adamw_and_weights_decay_by_rate_and_decay(weight_decay):
    kind, weight = step_with_zero_gradient(weight_decay=weight_decay)
    assert kind is torch.optim.AdamW
    assert weight.tolist() == pytest.approx([1 - RATE * weight_decay] * 2, rel=1e-12)


def test_an_optimizer_by_its_dotted_path_gets_rate_and_decay():
    kind, weight = step_with_zero_gradient(customized_optimizer="torch.optim.sgd.SGD", weight_decay=0.25)
    assert kind is torch.optim.SGD
    assert weight.tolist() == pytest.approx([1 - RATE * 0.25] * 2, rel=1e-12)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package.Lion", "'no_such_package.Lion' cannot be imported: No module named 'no_such_package'"),
        ("torch.optim.Nadam", "'torch.optim.Nadam' cannot be imported: module 'torch.optim' has no attribute 'Nadam'"),
        ("AdamW", "'AdamW' cannot be imported: Empty module name"),
        (".AdamW", "'.AdamW' cannot be imported: Empty module name"),
        ("torch.optim", "torch.optim(params, lr, weight_decay) fails: 'module' object is not callable"),
        ("torch.optim.LBFGS", "torch.optim.LBFGS(params, lr, weight_decay) fails: LBFGS.__init__() got an unexpected"),
        ("builtins.dict", "builtins.dict makes a dict, not a torch Optimizer"),
        ("torch.optim.ScheduleFree", "torch.optim.ScheduleFree must be switched between train() and eval(), as"),
    ],
)
def test_what_is_no_optimizer_is_refused_in_one_line(path, message, monkeypatch):
    # As the schedulefree package makes them.
    methods = dict.fromkeys(("train", "eval"), lambda _: None)
    monkeypatch.setattr(torch.optim, "ScheduleFree", type("ScheduleFree", (torch.optim.SGD,), methods), raising=False)
    with pytest.raises(ConfigError) as caught:
        make_optimizer(config(customized_optimizer=path), [torch.nn.Parameter(torch.ones(2))])
    assert str(caught.value).startswith(f"customized_optimizer: {message}")
    assert "\n" not in str(caught.value)
