"""The optimizer's state comes back as it was, whatever the shapes of the weights."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from diffsynth_pipe.training.engine import Engine
from diffsynth_pipe.training.state import load_optimizer, master_weights, write_optimizer


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))


def stepped(make, num_steps):
    model = Scaled()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(make(model.parameters(), lr=0.1))
    engine = Engine(
        accelerator=accelerator, model=model, optimizer=optimizer, compute_dtype=torch.float32, description=""
    )
    for _ in range(num_steps):
        (model.scale.float() * model.weight).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine, dict(model.named_parameters())


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.NAdam])
def test_moments_of_a_weight_without_dimensions_keep_dtype_and_bits(make, tmp_path):
    """NAdam keeps a tensor without dimensions per weight, ``mu_product``, beside the moments."""
    engine, parameters = stepped(make, 3)
    numbers = write_optimizer(engine, parameters, tmp_path)
    save_file(master_weights(engine, parameters), tmp_path / "weights.safetensors")
    restored, others = stepped(make, 0)
    load_optimizer(restored, others, tmp_path, numbers)
    for name, parameter in parameters.items():
        expected = engine.optimizer.optimizer.state[parameter]
        found = restored.optimizer.optimizer.state[others[name]]
        assert found.keys() == expected.keys()
        for kind, value in expected.items():
            assert found[kind].dtype == value.dtype, kind
            assert torch.equal(found[kind], value), kind
