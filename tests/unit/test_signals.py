"""A rank that is told to stop saves first, unless its peers are gone: real processes, stuck as in a collective."""

import signal
import subprocess
import sys

import pytest

DEADLINE_S = 60

# Locked twice, a mutex holds the main thread where no handler of Python's runs, as a collective of NCCL does.
RANK = """
import contextlib, ctypes, sys
from diffsynth_pipe.training.signals import StopSignals
with StopSignals([int(pid) for pid in sys.argv[2:]]) as signals:
    with contextlib.suppress(KeyError), signals.peers_needed():
        if sys.argv[1] == "failed":
            raise KeyError
        if sys.argv[1] == "stuck":
            print("ready", flush=True)
            mutex = ctypes.create_string_buffer(64)
            while True:
                ctypes.CDLL(None).pthread_mutex_lock(mutex)
    print("ready", flush=True)
    sys.stdin.readline()
print("left", signals.received, flush=True)
sys.stdin.readline()
"""


class Rank(subprocess.Popen):
    def __init__(self, how, *peers):
        command = [sys.executable, "-c", RANK, how, *(str(peer.pid) for peer in peers)]
        super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.stdout.readline() == "ready\n"

    def go_on(self):
        self.stdin.write("\n")
        self.stdin.flush()


@pytest.fixture
def peer():
    with Rank("free") as peer:
        yield peer
        peer.kill()


@pytest.mark.parametrize("order", ["peer first", "signal first"])
def test_a_rank_that_waits_for_a_dead_one_ends_at_sigterm(peer, order):
    with Rank("stuck", peer) as rank:
        for victim, number in ((peer, signal.SIGKILL), (rank, signal.SIGTERM))[:: 1 if order == "peer first" else -1]:
            victim.send_signal(number)
            if victim is peer:
                peer.wait(DEADLINE_S)
        assert rank.wait(DEADLINE_S) == 128 + signal.SIGTERM


def test_a_peer_that_ends_without_a_signal_ends_nobody(peer):
    with Rank("free", peer) as rank:
        peer.kill()
        peer.wait(DEADLINE_S)
        rank.go_on()
        assert rank.stdout.readline() == "left None\n"
        rank.go_on()
        assert rank.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("how", ["free", "failed"])
def test_a_rank_that_saves_or_has_failed_needs_no_peer_and_dies_of_no_signal(peer, how):
    with Rank(how, peer) as rank:
        for number in (signal.SIGINT, signal.SIGTERM):
            rank.send_signal(number)
        peer.kill()
        peer.wait(DEADLINE_S)
        rank.go_on()
        assert rank.stdout.readline() == f"left {int(signal.SIGINT)}\n"
        rank.go_on()
        assert rank.wait(DEADLINE_S) == 0
