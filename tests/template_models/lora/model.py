"""A template model for the tiny Z-Image: a number becomes a LoRA of one layer."""

import torch

LAYER, RANK, SIZE = "layers.0.attention.to_q", 2, 128


class NumberToLora(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.down = torch.nn.Linear(1, RANK * SIZE)
        self.up = torch.nn.Linear(1, SIZE * RANK)

    def process_inputs(self, pipe, number, **kwargs):
        return {"number": torch.tensor([number], dtype=pipe.torch_dtype, device=pipe.device)}

    def forward(self, number, **kwargs):
        down, up = self.down(number).view(RANK, SIZE), self.up(number).view(SIZE, RANK)
        return {"lora": {f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}}


TEMPLATE_MODEL = NumberToLora
