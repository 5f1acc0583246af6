"""Candidates for the authority over an engine that a test commands: each in a process, or, in memory, in this one.

As a program: ``claimant.py URL ADDRESS``; a command a line on its standard input, its answer a line on its output.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

from metaserver.engine import Candidate, Engine, Transaction, candidate
from metaserver.engine.memory import MemoryCandidate, Store
from metaserver.errors import EngineBusy, Fenced
from metaserver.fencing import Tenure

DEADLINE_S = 30.0
_LOG = b"\1log"


class Commands:
    """What a claimant does on command; each method returns what came of it."""

    def __init__(self, standing: Candidate) -> None:
        self.standing = standing
        standing.on_lost = self._on_lost
        self._engine: Engine | None = None
        self._tenure = Tenure()
        self._lost = asyncio.Event()
        self._losses = 0

    def _on_lost(self, why: str) -> None:
        self._losses += 1
        self._lost.set()

    async def take(self) -> str:
        """Try once: the epoch, or "busy"."""
        try:
            return await self._begin(await self.standing.take())
        except EngineBusy:
            return "busy"

    async def wait(self) -> str:
        """Wait for the authority: the epoch."""
        return await self._begin(await self.standing.wait())

    async def _begin(self, engine: Engine) -> str:
        self._engine = engine
        await self._tenure.begin(engine)
        return str(self._tenure.epoch)

    async def write(self) -> str:
        """Make a change under this one's epoch: all changes so far, by whom, or "fenced"."""
        assert self._engine is not None

        def body(txn: Transaction) -> bytes:
            self._tenure.check(txn)
            log = (txn.get(_LOG) or b"") + self.standing.address.encode() + b" "
            txn.put(_LOG, log)
            return log

        try:
            return (await self._engine.write(body)).decode().strip()
        except Fenced:
            return "fenced"

    async def read(self) -> str:
        """All changes so far, by whom."""
        assert self._engine is not None
        return (await self._engine.read(lambda view: view.get(_LOG) or b"")).decode().strip()

    async def holder(self) -> str:
        """Who has the authority, as far as the engine says."""
        return str(await self.standing.holder())

    async def announce(self) -> str:
        """Say that this one stands: all that have said so."""
        return " ".join(sorted(await self.standing.announce()))

    async def lost(self) -> str:
        """Wait until this one is told that it has lost the authority: how often."""
        await self._lost.wait()
        return str(self._losses)

    async def resign(self) -> str:
        """Give up the authority."""
        await self.standing.resign()
        return "done"


class Claimant(Protocol):
    """One that a test commands."""

    async def do(self, command: str) -> str:
        """Have it do what :class:`Commands` calls so, and return what came of it."""

    async def kill(self) -> None:
        """End it without a farewell."""

    async def stop(self) -> None:
        """Have it do nothing, as one that hangs."""

    async def go_on(self) -> None:
        """Have one that was stopped go on."""


class InMemory:
    """A claimant in this process."""

    def __init__(self, store: Store, address: str) -> None:
        self._standing = MemoryCandidate(address, store)
        self._commands = Commands(self._standing)

    async def do(self, command: str) -> str:
        async with asyncio.timeout(DEADLINE_S):
            return str(await getattr(self._commands, command)())

    async def kill(self) -> None:
        self._standing.lapse()
        self._standing.vanish()

    async def stop(self) -> None:
        self._standing.lapse()

    async def go_on(self) -> None:
        self._standing.notice()


class InProcess:
    """A claimant in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def do(self, command: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(f"{command}\n".encode())
        async with asyncio.timeout(DEADLINE_S):
            return (await self._process.stdout.readline()).decode().rstrip("\n") or "dead"

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    async def go_on(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGCONT)


@contextlib.asynccontextmanager
async def claimants(url: str) -> AsyncIterator[Callable[[], Any]]:
    """Give a coroutine function that makes the next claimant, named a, b, ..., on the engine at ``url``."""
    store, names = Store(), (chr(each) for each in itertools.count(ord("a")))
    made: list[InProcess] = []

    async def make() -> Claimant:
        if url == "memory://":
            return InMemory(store, next(names))
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, url, next(names), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )  # fmt: skip
        made.append(InProcess(process))
        return made[-1]

    try:
        yield make
    finally:
        for each in made:
            await each.kill()


async def _main(url: str, address: str) -> None:
    commands = Commands(candidate(url, address))
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(await getattr(commands, line.strip())(), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
