"""Notices that the machine was suspended.

Leases count the time of a suspend, and so do the deadlines that BPF compares; the times to live of what the kernel
keeps by itself do not: they are jiffies. So after a suspend the kernel would rely on names and attributes for longer
than the lease, by the time that the machine slept, unless it is told to drop them.

A timer of CLOCK_REALTIME that is cancelled when that clock is set (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET) wakes
the worker, because the kernel sets it as the machine wakes up. How long it slept is what CLOCK_BOOTTIME has gained on
CLOCK_MONOTONIC; if that is nothing, only the time of day was set, which is no matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator
from typing import Final

_log = logging.getLogger(__name__)

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_ABSOLUTE_AND_CANCELLED: Final = 3
#: struct itimerspec: no interval, and a moment that does not come.
_NEVER: Final = struct.pack("=4q", 0, 0, 2**40, 0)
#: The two clocks are not read at once: a smaller gain is none, in nanoseconds.
_LEAST_NS: Final = 10_000_000


def slept_ns() -> int:
    """Return for how long, in nanoseconds, the machine was suspended since it was booted."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class SuspendWatch:
    """Calls ``on_wake`` when the machine has slept since the last look."""

    def __init__(self, on_wake: Callable[[], object], slept: Callable[[], int] = slept_ns) -> None:
        self._on_wake = on_wake
        self._slept = slept
        self._known_ns = slept()

    def look(self) -> None:
        """Compare the clocks now."""
        slept_ns = self._slept()
        if slept_ns - self._known_ns > _LEAST_NS:
            _log.info(
                "the machine slept for %.1f s; the kernel's caches are dropped", (slept_ns - self._known_ns) / 1e9
            )
            self._on_wake()
        self._known_ns = slept_ns

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look whenever the machine wakes up, while the body runs. Raises OSError if there can be no such timer."""
        timer = _LIBC.timerfd_create(time.CLOCK_REALTIME, os.O_NONBLOCK | os.O_CLOEXEC)
        if timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        loop = asyncio.get_running_loop()
        try:
            self._arm(timer)
            loop.add_reader(timer, self._woken, timer)
            yield
        finally:
            loop.remove_reader(timer)
            os.close(timer)

    def _woken(self, timer: int) -> None:
        with contextlib.suppress(OSError):  # ECANCELED, which is the news
            os.read(timer, 8)
        self._arm(timer)
        self.look()

    def _arm(self, timer: int) -> None:
        if _LIBC.timerfd_settime(timer, _ABSOLUTE_AND_CANCELLED, _NEVER, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")
