"""What every process of a mount does for its log: one format on standard error, stacks on SIGUSR1."""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys


def start(role: str, level: str) -> None:
    """Begin to log. ``role`` is "channel" or "worker"; SIGUSR1 prints the stacks of all threads."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format=f"%(asctime)s {role}[%(process)d] %(levelname)s %(name)s: %(message)s",
    )
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
