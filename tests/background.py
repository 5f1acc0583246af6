"""Calls that are made on a thread of their own, because they are to wait, or to be watched from outside."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import figures
import rig

T = TypeVar("T")


def start(call: Callable[[], T]) -> tuple[Future[T], int]:
    """Make a call on a thread of its own; return its future and the thread's number."""
    future: Future[T] = Future()
    started: Future[int] = Future()

    def run() -> None:
        started.set_result(threading.get_native_id())
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future, started.result(rig.WAIT_S)


def until_blocked(call: Callable[[], T]) -> Future[T]:
    """Make a call on a thread of its own, and return when a request of it waits for a reply."""
    future, thread = start(call)
    rig.wait_for(lambda: figures.is_blocked(Path(f"/proc/self/task/{thread}")), "the request waits for a reply")
    return future
