"""A discriminator on the features of a frozen denoiser, and how those are taken from its blocks."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.training.lora import linear_layers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from torch.nn import Module

    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.contracts import BlockList, ModelFamily

NEGATIVE_SLOPE = 0.2
MAX_GROUPS = 32


class Discriminator(torch.nn.Module):
    """One convolutional head per feature map, as the reference has them; fp32.

    Args:
        num_features: Feature maps that it sees.
        width: Channels of each.
        hidden_channels: Channels within a head.
    """

    def __init__(self, num_features: int, width: int, hidden_channels: int) -> None:
        super().__init__()
        most = MAX_GROUPS if hidden_channels > MAX_GROUPS else max(1, hidden_channels // 4)
        groups = next(number for number in range(most, 0, -1) if hidden_channels % number == 0)
        self.heads = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Conv2d(width, hidden_channels, kernel_size=4, stride=2, padding=1),
                torch.nn.GroupNorm(groups, hidden_channels),
                torch.nn.LeakyReLU(NEGATIVE_SLOPE),
                torch.nn.Conv2d(hidden_channels, 1, kernel_size=1),
                torch.nn.AdaptiveAvgPool2d(1),
                torch.nn.Flatten(),
            )
            for _ in range(num_features)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return logits, fp32 ``[batch, feature]``; high ones mean real.

        Args:
            features: Maps ``[batch, channel, frame, height, width]``. Frames are judged one by one, and averaged.
        """
        logits = []
        for head, maps in zip(self.heads, features, strict=True):
            frames = maps.transpose(1, 2).flatten(0, 1).float()
            # The kernel wants two rows and columns of tokens; only tiny images have fewer.
            frames = functional.pad(frames, (0, max(0, 2 - frames.shape[-1]), 0, max(0, 2 - frames.shape[-2])))
            logits.append(head(frames).view(len(maps), -1).mean(1))
        return torch.stack(logits, dim=1)


def make_discriminator(config: RunConfig, family: ModelFamily, dit: Module) -> tuple[Discriminator, tuple[int, ...]]:
    """Make a discriminator with the seed's first weights; return it, and the numbers of the blocks that it sees.

    Raises:
        ConfigError: The denoiser has no such blocks.
    """
    all_blocks = blocks(dit, family.blocks)
    num_blocks = config.dmd2_discriminator_num_blocks or len(all_blocks)
    if num_blocks > len(all_blocks):
        raise ConfigError(
            f"dmd2_discriminator_num_blocks: {num_blocks} is more than the {len(all_blocks)} blocks of the denoiser; "
            "lower it or leave it out"
        )
    given = config.dmd2_feature_indices
    indices = sorted({num_blocks // 2} if given is None else {int(item) for item in given.split(",") if item.strip()})
    if indices[-1] >= num_blocks:
        raise ConfigError(
            f"dmd2_feature_indices: {indices[-1]} is no number of a block; they go from 0 to {num_blocks - 1}"
        )
    width = feature_width(dit, family)
    hidden_dim = config.dmd2_discriminator_hidden_dim or width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        discriminator = Discriminator(len(indices), width, hidden_dim // 2)
    return discriminator.to(next(dit.parameters()).device), tuple(indices)


def blocks(dit: Module, lists: Sequence[BlockList]) -> list[tuple[Module, BlockList]]:
    """Return the blocks of a denoiser in the order in which they run, each with the list that it is in."""
    return [(block, which) for which in lists for block in getattr(dit, which.name)]


def feature_width(dit: Module, family: ModelFamily) -> int:
    """Return the channels of what the blocks put out: what the first one reads by its queries' layer."""
    first, _ = blocks(dit, family.blocks)[0]
    return next(layer.in_features for name, layer in linear_layers(first).items() if name.endswith("to_q"))


@contextlib.contextmanager
def feature_maps(family: ModelFamily, dit: Module, indices: Sequence[int], latents: Tensor) -> Iterator[list[Tensor]]:
    """Take the features out of the calls of a denoiser within the block.

    Args:
        family: The denoiser's.
        dit: The denoiser.
        indices: Numbers of blocks, rising.
        latents: What it is called with, for the shape.

    Yields:
        A list that one call fills with the outputs of these blocks at the tokens of the latents, as maps
        ``[batch, channel, frame, height, width]``.
    """
    num_tokens = family.num_tokens(latents.shape)
    num_frames = latents.shape[2] if latents.ndim == 5 else 1
    height, width = latents.shape[-2:]
    patch = math.isqrt(num_frames * height * width // num_tokens)
    size = (num_frames, height // patch, width // patch)
    maps: list[Tensor] = []

    def keep(which: BlockList, _: Module, __: Any, output: Any) -> None:
        tokens = output[1] if isinstance(output, tuple) else output
        tokens = tokens[:, -num_tokens:] if which.text_first else tokens[:, :num_tokens]
        maps.append(tokens.transpose(1, 2).unflatten(2, size))

    all_blocks = blocks(dit, family.blocks)
    hooks = [all_blocks[index][0].register_forward_hook(partial(keep, all_blocks[index][1])) for index in indices]
    try:
        yield maps
    finally:
        # Before the backward pass: where blocks are recomputed, they would be called again.
        for hook in hooks:
            hook.remove()
