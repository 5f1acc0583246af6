"""Processes named so that a reused pid is never mistaken: by pid and start time, watched through pidfds."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a mount. ``start_ticks`` is the kernel's: clock ticks from boot to its start."""

    #: "channel", "worker" or "metaserver".
    role: str
    pid: int
    start_ticks: int


def identify(role: str, pid: int) -> Process:
    """Return the process that has ``pid`` now; raise :exc:`ProcessLookupError`."""
    status = _status(pid)
    if status is None:
        raise ProcessLookupError(pid)
    return Process(role=role, pid=pid, start_ticks=int(status[19]))


def is_alive(process: Process) -> bool:
    """Say whether it still runs; one that has ended and waits for its parent does not."""
    status = _status(process.pid)
    return status is not None and status[0] not in "ZX" and int(status[19]) == process.start_ticks


def wait_ended(processes: Sequence[Process], timeout_s: float) -> list[Process]:
    """Wait until all have ended; return those that still run after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    with _pidfds(processes) as pidfds:
        poll = select.poll()
        for pidfd in pidfds:
            poll.register(pidfd, select.POLLIN)
        running = set(pidfds)
        while running and (left_s := deadline - time.monotonic()) > 0:
            for pidfd, _ in poll.poll(left_s * 1000):
                poll.unregister(pidfd)
                running.discard(pidfd)
        return [pidfds[pidfd] for pidfd in sorted(running)]


def stop(processes: Sequence[Process], grace_s: float) -> None:
    """End the processes: by SIGTERM, and after ``grace_s`` by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal_all(processes, number)
        processes = wait_ended(processes, grace_s)
        if not processes:
            return


def _signal_all(processes: Sequence[Process], number: signal.Signals) -> None:
    with _pidfds(processes) as pidfds:
        for pidfd in pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)


@contextlib.contextmanager
def _pidfds(processes: Sequence[Process]) -> Iterator[dict[int, Process]]:
    """Open a pidfd for each process that runs. The start time is compared after opening, so it cannot be another's."""
    with contextlib.ExitStack() as stack:
        opened = {}
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(process.pid)
                stack.callback(os.close, pidfd)
                if is_alive(process):
                    opened[pidfd] = process
        yield opened


def _status(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on: [0] is the state, [19] the start time."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()
