"""Clocks and random numbers of a simulation, put in the place of the machine's for as long as it runs."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import secrets
import time
from collections.abc import Iterator
from typing import Final
from unittest import mock

from simulation.loop import START_S, VirtualLoop, current_node

#: What the wall clock shows at the start, in nanoseconds since 1970.
_WALL_NS: Final = 1_800_000_000_000_000_000


def boottime_ns(loop: VirtualLoop) -> int:
    """Return the current node's CLOCK_BOOTTIME."""
    return round(loop.now * 1e9) + current_node().boot_offset_ns


def wall_ns(loop: VirtualLoop) -> int:
    """Return the current node's wall clock."""
    return _WALL_NS + round((loop.now - START_S) * 1e9) + current_node().wall_offset_ns


@contextlib.contextmanager
def simulated(loop: VirtualLoop, rng: random.Random) -> Iterator[None]:
    """Let the code under test read the current node's clocks, and draw from ``rng``."""
    collecting = gc.isenabled()
    state = random.getstate()
    random.seed(rng.random())
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (time, "clock_gettime_ns", lambda clock: boottime_ns(loop)),
            (time, "time_ns", lambda: wall_ns(loop)),
            (time, "monotonic", loop.time),
            (secrets, "token_bytes", lambda count=32: rng.randbytes(count)),
            (secrets, "randbits", rng.getrandbits),
            (os, "urandom", rng.randbytes),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        gc.disable()
        try:
            yield
        finally:
            random.setstate(state)
            if collecting:
                gc.enable()
