"""Own one command and everything below it: ``python -m diffsynth_pipe.guard --parent PID --grace SECONDS -- COMMAND``.

Linux only. Three facts of the kernel make orphans impossible as long as this process lives:

* child subreaper: a process whose parent dies becomes our child, so "our descendants" is the full list, even of ranks
  that a launcher put into sessions of their own;
* parent death signal: we get SIGTERM when the process that started us dies, by SIGKILL too;
* blocked signals stay pending until ``sigwaitinfo`` takes them, so none is lost and nothing polls while all is well.

SIGTERM, SIGINT or SIGHUP: SIGTERM to all descendants, SIGKILL after the grace. The exit code is the command's
(128 + n for signal n), or 143 if it was stopped on request.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

STOPPED = 128 + signal.SIGTERM

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_CHECK_S = 0.1


def main() -> int:
    """Run the command and return its exit code, once no descendant is left."""
    parser = argparse.ArgumentParser(prog="diffsynth_pipe.guard")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--grace", type=float, required=True)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()

    watched = _STOP_SIGNALS | {signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != args.parent:  # it died before the kernel knew that we want to hear of it
        return STOPPED
    command = _start(args.command)
    exit_code: int | None = None
    stopped = False
    while exit_code is None:
        stopped = signal.sigwaitinfo(watched).si_signo in _STOP_SIGNALS
        exit_code = _reap(command)
        if stopped:
            break
    last_code = _stop_descendants(command, args.grace)
    return STOPPED if stopped else exit_code if exit_code is not None else last_code


def stop_with_parent() -> None:
    """Send SIGTERM to this process when the one that started it dies."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _start(command: list[str]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # should someone SIGKILL the guard
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.execvp(command[0], command)  # noqa: S606 - no shell is wanted
        except OSError as error:
            sys.stderr.write(f"error: cannot start {command[0]!r}: {error.strerror}\n")
            sys.stderr.flush()
        finally:
            os._exit(127)
    return pid


def _reap(command: int) -> int | None:
    """Collect every child that has ended, adopted ones too; return the command's exit code if it is among them."""
    exit_code = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == command:
                code = os.waitstatus_to_exitcode(status)
                exit_code = code if code >= 0 else 128 - code
    return exit_code


def _stop_descendants(command: int, grace_s: float) -> int:
    exit_code = STOPPED
    deadline = time.monotonic() + grace_s
    told: set[int] = set()
    while left := _descendants():
        late = time.monotonic() > deadline
        for pid in left:
            if late or pid not in told:  # SIGTERM once: a second one makes many programs give up saving
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        told |= left
        signal.sigtimedwait({signal.SIGCHLD}, _CHECK_S)
        code = _reap(command)
        exit_code = exit_code if code is None else code
    return exit_code


def _descendants() -> set[int]:
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The name of the program stands in parentheses and may hold spaces and parentheses itself.
                state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    children[int(parent)].append(int(entry.name))
    found: set[int] = set()
    todo = [os.getpid()]
    while todo:
        for pid in children[todo.pop()]:
            found.add(pid)
            todo.append(pid)
    return found


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    sys.exit(main())
