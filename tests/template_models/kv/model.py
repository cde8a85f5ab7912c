"""A template model for the tiny FLUX.2: a number becomes keys and values of some blocks."""

import numpy as np
import torch
from PIL import Image

BLOCKS = ("double_0", "single_1")
HEADS, CHANNELS, TOKENS = 4, 32, 3


class Brightness(torch.nn.Module):
    def __init__(self):
        super().__init__()
        size = TOKENS * HEADS * CHANNELS
        self.frozen = torch.nn.Linear(1, 8)
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(8, 2 * size) for name in BLOCKS})

    @torch.no_grad()
    def process_inputs(self, pipe, scale, **kwargs):
        return {"hidden": self.frozen(torch.tensor([scale], dtype=pipe.torch_dtype, device=pipe.device))}

    def forward(self, hidden, **kwargs):
        shape = (2, 1, TOKENS, HEADS, CHANNELS)
        return {"kv_cache": {name: tuple(head(hidden).view(shape)) for name, head in self.heads.items()}}


class DataProcessor:
    def __call__(self, scale=None, image=None, **kwargs):
        return {"scale": float(np.asarray(Image.open(image)).mean() / 255) if scale is None else scale}


TEMPLATE_MODEL = Brightness
TEMPLATE_DATA_PROCESSOR = DataProcessor
