"""The channel asks its worker for figures: a late answer is never taken for the answer to a later question."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any, cast

import pytest

from fuseclient.channel import children
from fuseclient.channel.children import Worker


@pytest.fixture
def pair() -> Iterator[tuple[Worker, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    worker = Worker("worker", cast(Any, None))
    worker._status, worker._asking = ours, asyncio.Lock()
    worker._said, worker._owed = bytearray(), 0
    with ours, theirs:
        yield worker, theirs


async def test_a_late_answer_is_passed_over(
    pair: tuple[Worker, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, theirs = pair
    monkeypatch.setattr(children, "_FIGURES_S", 0.01)
    assert await worker.figures() is None
    monkeypatch.setattr(children, "_FIGURES_S", 10.0)
    theirs.sendall(b'{"epoch": 1}\n{"epoch"')
    answer = asyncio.create_task(worker.figures())
    theirs.sendall(b": 2}\n")
    assert await answer == {"epoch": 2}
    assert theirs.recv(100) == b"figures\nfigures\n"


async def test_a_worker_that_has_gone_or_babbles(pair: tuple[Worker, socket.socket]) -> None:
    worker, theirs = pair
    theirs.sendall(b"not JSON\n")
    assert await worker.figures() is None
    theirs.close()
    assert await worker.figures() is None
