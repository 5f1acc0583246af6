"""Signals of waiting programs that the kernel does not tell of.

A program whose request is answered late is to be interruptible: the kernel sends INTERRUPT for its signals. On the
rings it forgets one that comes after the request has left the queue and before it is in a ring's entry (Linux 6.18:
request_wait_answer() finds neither FR_PENDING nor FR_SENT set, and nothing looks again). The program cannot even be
killed then. So who may wait for ever looks for itself.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

#: Seconds: the time of the first look, and between the others. The window is at the wait's beginning.
_FIRST_S: Final = 0.1
_EACH_S: Final = 1.0


def has_signal(tid: int) -> bool:
    """Whether a thread has a signal to take; False if that cannot be told, as of one of another namespace."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{tid}/status").read_text().splitlines())
    except OSError:
        return False
    pending, shared, blocked = (int(fields[name], 16) for name in ("SigPnd", "ShdPnd", "SigBlk"))
    return bool((pending | shared) & ~blocked)


async def come(tid: int) -> None:
    """Return once a thread that waits has a signal; to be cancelled when it waits no more."""
    await asyncio.sleep(_FIRST_S)
    while not has_signal(tid):  # noqa: ASYNC110 - nobody sets an event
        await asyncio.sleep(_EACH_S)
