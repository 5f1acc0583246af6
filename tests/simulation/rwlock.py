"""A lock of readers and writers, first come, first served: an inode's i_rwsem."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class ReadWriteLock:
    """Any number may hold it shared, or one exclusively."""

    def __init__(self) -> None:
        self._readers = 0
        self._writer = False
        self._queue: deque[tuple[bool, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        await self._take(exclusive=False)
        try:
            yield
        finally:
            self._readers -= 1
            self._wake()

    @contextlib.asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        await self._take(exclusive=True)
        try:
            yield
        finally:
            self._writer = False
            self._wake()

    async def _take(self, *, exclusive: bool) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((exclusive, turn))
        self._wake()
        await turn

    def _wake(self) -> None:
        while self._queue and not self._writer:
            exclusive, turn = self._queue[0]
            if exclusive and self._readers:
                return
            self._queue.popleft()
            if exclusive:
                self._writer = True
            else:
                self._readers += 1
            turn.set_result(None)
