"""The engine as one server may use it: each of its transactions first compares the epoch.

So it holds for whatever the server does, its clearing up included, and no verb needs to think of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from metaserver.engine.base import Engine, Snapshot, Transaction
from metaserver.errors import Fenced
from metaserver.fencing import Tenure

T = TypeVar("T")


class FencedEngine(Engine):
    """``engine`` under a tenure; ``on_fenced`` is called, on the event loop, when it is found to be over."""

    def __init__(self, engine: Engine, tenure: Tenure, on_fenced: Callable[[], object] = lambda: None) -> None:
        self._engine = engine
        self._tenure = tenure
        self.on_fenced = on_fenced

    async def take_over(self) -> None:
        """Begin the tenure: what an earlier server tries from here on is refused."""
        await self._tenure.begin(self._engine)

    async def check(self) -> None:
        """Raise :exc:`Fenced` if another server has taken over."""
        try:
            await self._engine.read(self._tenure.check)
        except Fenced:
            self.on_fenced()
            raise

    async def read(self, body: Callable[[Snapshot], T]) -> T:
        return await self._engine.read(body)

    async def read_durable(self, body: Callable[[Snapshot], T]) -> T:
        return await self._engine.read_durable(body)

    async def scan(self, body: Callable[[Snapshot], T]) -> T:
        return await self._engine.scan(body)

    def watch(self, callback: Callable[[], object] | None) -> None:
        self._engine.watch(callback)

    async def write(self, body: Callable[[Transaction], T], *, lazy: bool = False) -> T:
        """As :meth:`Engine.write`; raises :exc:`Fenced`, too."""
        try:
            return await self._engine.write(self._under_tenure(body), lazy=lazy)
        except Fenced:
            self.on_fenced()
            raise

    def _under_tenure(self, body: Callable[[Transaction], T]) -> Callable[[Transaction], T]:
        def checked(txn: Transaction) -> T:
            self._tenure.check(txn)
            return body(txn)

        return checked

    async def _attempt(self, body: Callable[[Transaction], T], lazy: bool) -> T:
        return await self._engine._attempt(self._under_tenure(body), lazy)

    @property
    def is_lazy(self) -> bool:
        return self._engine.is_lazy

    @property
    def puts_off(self) -> bool:
        return self._engine.puts_off

    @property
    def losses(self) -> int:
        return self._engine.losses

    async def sync(self) -> None:
        await self._engine.sync()

    async def close(self) -> None:
        await self._engine.close()
