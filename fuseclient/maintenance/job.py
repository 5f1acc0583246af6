"""``python -m metaserver fsck`` and its like as a child process that is alone with its engine: what it says, typed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Final

import msgspec

from fuseclient.errors import UserError

_LINE_MAX: Final = 1 << 20
#: Seconds until a child that is to end is killed.
_END_S: Final = 20.0
_INTERRUPTED: Final = 130
_CANNOT_WORK: Final = 2


class VolumeInfo(msgspec.Struct):
    """What the engine knows of the volume."""

    name: str
    store: str
    #: In hex.
    identity: str


class Finding(msgspec.Struct):
    """One thing that is wrong. ``ino`` is ``None`` where it is not about an inode."""

    kind: str
    ino: int | None
    where: str
    what: str
    repaired: bool


class Totals(msgspec.Struct):
    """What a check has looked at."""

    entries: int
    inodes: int
    bytes: int
    slices: int
    found: int
    repaired: int


class Amount(msgspec.Struct):
    """So many things, and their bytes."""

    count: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        """Count one more."""
        self.count += 1
        self.bytes += size


class Moved(msgspec.Struct):
    """What was dumped or loaded."""

    name: str
    store: str
    inodes: int
    rows: int
    bytes: int


class Message(msgspec.Struct):
    """A line that the child says; one field of it is set."""

    volume: VolumeInfo | None = None
    #: What is being done, how much of it, and of how much (0: it is not known).
    progress: tuple[str, int, int] | None = None
    finding: Finding | None = None
    #: Slices with the bytes that are needed of their objects (-1: unused); an empty list ends them.
    slices: list[tuple[int, int]] | None = None
    summary: Totals | None = None
    orphans: Amount | None = None
    moved: Moved | None = None


class Job:
    """The child."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        self._process = process
        self._lines = process.stdout
        self._decoder = msgspec.json.Decoder(Message)

    async def messages(self) -> AsyncIterator[Message]:
        """Yield what it says until it ends; raise :exc:`UserError` with its line if it could not do its work."""
        async for line in self._lines:
            yield self._decoder.decode(line)
        await self._check_end()

    async def _check_end(self) -> None:
        _, errors = await self._process.communicate()
        code = self._process.returncode
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            text = errors.decode(errors="replace")
            if code != _CANNOT_WORK or text.count("\n") != 1:
                raise RuntimeError(f"the metaserver ended with {code}:\n{text}")
            raise UserError(text.strip().removeprefix("metaserver: "))

    async def send(self, **message: object) -> None:
        """Tell it something."""
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(message) + b"\n")
        with contextlib.suppress(ConnectionError):  # why it has ended is found where it is read
            await self._process.stdin.drain()

    async def end(self) -> None:
        """Have it stop after what it is at, if it still runs, and wait for that."""
        if self._process.returncode is not None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()  # it may be waiting for what the store has
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(_END_S):
                await self._process.communicate()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@contextlib.asynccontextmanager
async def started(command: str, engine_url: str, volume: str, options: Sequence[str]) -> AsyncIterator[Job]:
    """Have a child for the body; it ends with it."""
    arguments = ["-P", "-m", "metaserver", command, "--engine", engine_url, "--volume", volume, *options]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdin=pipe, stdout=pipe, stderr=pipe, limit=_LINE_MAX, process_group=0
    )
    job = Job(process)
    try:
        yield job
    finally:
        await job.end()
