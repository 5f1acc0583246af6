"""Signals of other threads, as /proc tells of them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Iterator

import pytest

from fuseclient.worker import signals


@pytest.fixture
def stopped() -> Iterator[subprocess.Popen[bytes]]:
    """A process that takes no signal, as one that waits for an answer takes none."""
    process = subprocess.Popen(["sleep", "1000"])
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    yield process
    process.kill()
    process.wait()


def test_a_signal_that_waits_to_be_taken_is_seen(stopped: subprocess.Popen[bytes]) -> None:
    assert not signals.has_signal(stopped.pid)
    os.kill(stopped.pid, signal.SIGTERM)
    assert signals.has_signal(stopped.pid)


def test_one_that_is_blocked_is_not() -> None:
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        # To this thread: another one of this process, as a library may start, has it not blocked.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        assert not signals.has_signal(os.getpid())
        assert signal.sigwait([signal.SIGUSR1]) == signal.SIGUSR1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@pytest.mark.parametrize("tid", [0, 2**31 - 1])
def test_who_cannot_be_seen_has_none(tid: int) -> None:
    assert not signals.has_signal(tid)


async def test_come_ends_with_the_signal(stopped: subprocess.Popen[bytes]) -> None:
    coming = asyncio.create_task(signals.come(stopped.pid))
    os.kill(stopped.pid, signal.SIGTERM)
    await asyncio.wait_for(coming, 30)
