"""The channel asks its worker for figures: a late answer is never taken for the answer to a later question."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any, cast

import pytest

from fuseclient.channel import children
from fuseclient.channel.children import Worker
from fuseclient.errors import UserError


@pytest.fixture
def pair() -> Iterator[tuple[Worker, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    worker = Worker("worker", cast(Any, None))
    worker._status, worker._asking = ours, asyncio.Lock()
    worker._said, worker._asked = bytearray(), 0
    with ours, theirs:
        yield worker, theirs


async def test_a_late_answer_is_passed_over(
    pair: tuple[Worker, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, theirs = pair
    monkeypatch.setattr(children, "_FIGURES_S", 0.01)
    assert await worker.figures() is None
    monkeypatch.setattr(children, "_FIGURES_S", 10.0)
    theirs.sendall(b'{"id": 1, "answer": {"epoch": 1}}\n{"id": 2, "answer": {"epoch"')
    answer = asyncio.create_task(worker.figures())
    theirs.sendall(b": 2}}\n")
    assert await answer == {"epoch": 2}
    asked = [json.loads(line) for line in theirs.recv(100).splitlines()]
    assert asked == [{"name": "figures", "id": 1}, {"name": "figures", "id": 2}]


async def test_an_error_is_the_users(pair: tuple[Worker, socket.socket]) -> None:
    worker, theirs = pair
    theirs.sendall(b'{"id": 1, "error": "it is not to be"}\n')
    with pytest.raises(UserError, match="not to be"):
        await worker.answer("warmup", {"ino": 1})
    assert json.loads(theirs.recv(100)) == {"name": "warmup", "id": 1, "arguments": {"ino": 1}}


async def test_a_worker_that_has_gone_or_babbles(pair: tuple[Worker, socket.socket]) -> None:
    worker, theirs = pair
    theirs.sendall(b"not JSON\n")
    assert await worker.figures() is None
    theirs.close()
    assert await worker.figures() is None
