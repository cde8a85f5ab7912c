"""Run encode units on samples: what the cache stores and what single-process training sees are made here alike."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from diffsynth_pipe.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from concurrent.futures import Future

    import numpy as np
    import torch
    from torch import Tensor

    from diffsynth_pipe.contracts import Components, EncodeUnit, Input

T = TypeVar("T")
R = TypeVar("R")


def encode_device() -> torch.device:
    """Return this rank's CUDA device, or the CPU.

    Raises:
        ConfigError: There are more processes than GPUs.
    """
    import torch

    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            message = f"no GPU is left for local rank {local_rank}; start {torch.cuda.device_count()} processes at most"
            raise ConfigError(message)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def encode(unit: EncodeUnit, components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Run one unit on one sample.

    Args:
        unit: The unit.
        components: Holds the unit's component.
        inputs: One loaded value per input of the unit.

    Returns:
        One tensor per output, on the CPU, in storage dtype.
    """
    import torch

    with torch.inference_mode():
        outputs = unit.encode(components, inputs)
        return {
            spec.name: outputs[spec.name].to(device="cpu", dtype=getattr(torch, spec.dtype)).contiguous()
            for spec in unit.outputs
        }


def storage_arrays(fields: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the fields as numpy arrays; bfloat16 as uint16 bit patterns."""
    import torch

    return {
        name: (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in fields.items()
    }


def load_inputs(unit: EncodeUnit, inputs: Mapping[str, Input]) -> dict[str, Any]:
    """Load the metadata values that one unit reads."""
    return {name: inputs[name].load() for name in unit.inputs}


def map_ahead(
    function: Callable[[T], R], items: Iterable[T], num_threads: int, num_ahead: int | None = None
) -> Iterator[tuple[T, R]]:
    """Yield ``(item, function(item))`` in order while threads work a few items ahead of the consumer.

    Args:
        function: Runs in the threads.
        items: Its arguments.
        num_threads: How many run at the same time.
        num_ahead: Results, at most, that are there or being made beside the consumer's; twice the threads by default.
    """
    waiting: deque[tuple[T, Future[R]]] = deque()
    num_ahead = 2 * num_threads if num_ahead is None else num_ahead

    def result() -> tuple[T, R]:
        # no name in the generator's frame keeps what the consumer has let go
        item, future = waiting.popleft()
        return item, future.result()

    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > num_ahead:
                    yield result()
            while waiting:
                yield result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def num_decode_threads(dataset_num_workers: int) -> int:
    """Return the number of decoding threads; the reference's 0 workers means one thread beside the encoder."""
    return max(1, dataset_num_workers)
