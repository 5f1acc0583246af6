"""Cables between a process and the ports that it connects to, on a thread, for tests that are not coroutines."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from databases import Proxy

_ANSWER_S: Final = 10.0


class Cable:
    """Proxies of ports that are unplugged together."""

    def __init__(self, loop: asyncio.AbstractEventLoop, proxies: dict[int, Proxy]) -> None:
        self._loop = loop
        self._proxies = proxies

    def through(self, url: str) -> str:
        """Return a URL whose ports are reached by this cable."""
        for port, proxy in self._proxies.items():
            assert f":{port}" in url
            url = url.replace(f":{port}", f":{proxy.port}")
        return url

    def unplug(self) -> None:
        """Have nothing come through, in either direction; nobody is told."""
        self._do(Proxy.hold)

    def plug_in(self) -> None:
        """Have everything come through again, and first what was sent meanwhile."""
        self._do(Proxy.let_go)

    def _do(self, what: Callable[[Proxy], None]) -> None:
        done = threading.Event()

        def do() -> None:
            for each in self._proxies.values():
                what(each)
            done.set()

        self._loop.call_soon_threadsafe(do)
        assert done.wait(_ANSWER_S)


@contextlib.contextmanager
def cables(count: int, ports: Sequence[int]) -> Iterator[list[Cable]]:
    """Cables for the body, each to all of the ports."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def lay() -> list[dict[int, Proxy]]:
        laid = [{port: Proxy(port) for port in ports} for _ in range(count)]
        for proxies in laid:
            for each in proxies.values():
                await each.start()
        return laid

    async def take_away(laid: list[dict[int, Proxy]]) -> None:
        for proxies in laid:
            for each in proxies.values():
                each.let_go()
                await each.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    laid = asyncio.run_coroutine_threadsafe(lay(), loop).result(_ANSWER_S)
    try:
        yield [Cable(loop, proxies) for proxies in laid]
    finally:
        asyncio.run_coroutine_threadsafe(take_away(laid), loop).result(_ANSWER_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_ANSWER_S)
        loop.close()
