"""Parameters that ZeRO-3 has cut into pieces, one per rank."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.nn import Parameter


def whole(parameters: Iterable[Parameter], modifier_rank: int | None = None) -> contextlib.AbstractContextManager[None]:
    """Make parameters whole for a while, also where ZeRO-3 has partitioned them. Every rank must take part.

    Args:
        parameters: None, some or all of them partitioned.
        modifier_rank: The rank whose changes within the block are kept and sent to the others; None: nobody's.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed

    gathered: contextlib.AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        partitioned, modifier_rank=modifier_rank
    )
    return gathered
