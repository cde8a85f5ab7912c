"""A stop on request: the step in progress is finished and saved first, as long as the other ranks are there for it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType, TracebackType

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Notes SIGTERM and SIGINT within the block, in place of dying from them.

    A launcher may send both, and more than once: none of them ends the process. Out of the main thread, where Python
    allows no handlers, it notes nothing.

    A launcher also sends SIGTERM when another rank has died. The main thread may wait for that rank in a collective,
    with NCCL for minutes, and run no handler. So a thread of its own ends the process within ``peers_needed`` once a
    signal has come and a peer is gone: nothing more can be saved.

    Args:
        peers: Process ids of the other ranks on this machine.

    Attributes:
        received: The first signal that came.
    """

    def __init__(self, peers: Iterable[int] = ()) -> None:
        self.received: int | None = None
        self._peers = list(peers)
        self._old: dict[signal.Signals, Any] = {}
        self._held = contextlib.ExitStack()
        self._needed = threading.Event()
        self._left = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _STOP_SIGNALS:
                self._old[number] = signal.signal(number, self._note)
            if self._peers:
                self._watch_peers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._left = True
        self._needed.set()
        self._held.close()

    @contextlib.contextmanager
    def peers_needed(self) -> Iterator[None]:
        """Mark code that waits for the other ranks; elsewhere one that has ended may have finished before this one."""
        self._needed.set()
        try:
            yield
        finally:
            self._needed.clear()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number

    def _watch_peers(self) -> None:
        came, wake_up = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        peers = [os.pidfd_open(pid) for pid in self._peers]
        thread = threading.Thread(target=self._end_without, args=(peers, came), name="peers", daemon=True)
        for descriptor in (*peers, came):
            self._held.callback(os.close, descriptor)
        self._held.callback(thread.join)
        self._held.callback(os.close, wake_up)
        # Python writes a signal's number here at once, whatever the main thread is at.
        old = signal.set_wakeup_fd(wake_up, warn_on_full_buffer=False)
        self._held.callback(signal.set_wakeup_fd, old)
        thread.start()

    def _end_without(self, peers: list[int], came: int) -> None:
        """End this process when a stop signal has come, and a peer has ended that is needed; return after the block."""
        poll = select.poll()
        poll.register(came, select.POLLIN)
        while not self._left:
            for descriptor, _ in poll.poll():
                if descriptor != came:
                    self._needed.wait()
                    if not self._left:
                        os._exit(128 + signal.SIGTERM)
                elif not set(_STOP_SIGNALS).isdisjoint(os.read(came, 64)):
                    for peer in peers:
                        poll.register(peer, select.POLLIN)
