"""A stop on request: the step in progress is finished and saved first."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType, TracebackType


class StopSignals:
    """Notes SIGTERM and SIGINT within the block, in place of dying from them.

    A launcher may send both, and more than once: none of them ends the process. Out of the main thread, where Python
    allows no handlers, it notes nothing.

    Attributes:
        received: The first signal that came.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number
