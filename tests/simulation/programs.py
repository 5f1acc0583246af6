"""The programs on a client: system calls on shared names, and the record of what they did and saw."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from pyfuse3 import FUSEError

from metaserver import wire
from simulation.client import Client
from simulation.history import (
    PRESENT,
    Change,
    History,
    Outcome,
    Register,
    Value,
    data_of,
    links_of,
    name_of,
    owner_of,
)
from simulation.loop import VirtualLoop

DIRECTORIES: Final = (b"d0", b"d1")
FILES: Final = (b"f0", b"f1", b"f2")
SUBDIRECTORIES: Final = (b"s0", b"s1")
#: The length of every content that is written.
CONTENT_BYTES: Final = 16

#: What a change is refused with when nothing was changed.
_REFUSALS: Final = frozenset(
    (
        errno.EEXIST,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENOTEMPTY,
        errno.EINVAL,
        errno.EBUSY,
        errno.EPERM,
        errno.EMLINK,
    )
)


T = TypeVar("T")


class Failed(Exception):
    """A step of an operation failed, which is recorded; the rest of it is left out."""


class Program:
    """System calls of one program. Each records its outcome; what fails raises :exc:`Failed`."""

    def __init__(self, loop: VirtualLoop, client: Client, history: History, rng: random.Random) -> None:
        self._loop = loop
        self._client = client
        self._kernel = client.kernel
        self._history = history
        self._rng = rng

    # Reads

    async def lookup(self, parent: int, name: bytes) -> int:
        """Return what a name stands for; 0: nothing."""
        invoked = self._history.now()
        ino, source = await self._reading(self._kernel.lookup(parent, name))
        self._history.read(self._client.index, name_of(parent, name), ino, invoked, source)
        return ino

    async def stat(self, parent: int, name: bytes) -> int:
        """Look a name up and read its attributes; return the inode, or 0."""
        invoked = self._history.now()
        ino = await self.lookup(parent, name)
        if ino:
            inode, source = await self._reading(self._kernel.getattr(ino))
            self._history.read(self._client.index, owner_of(ino), inode.uid, invoked, source)
            if inode.nlink:
                self._history.read(self._client.index, links_of(ino), inode.nlink, invoked, source)
        return ino

    async def list(self, parent: int) -> None:
        """Read a directory: each name is there, or is not."""
        invoked = self._history.now()
        entries = await self._reading(self._kernel.readdir(parent))
        for name in {**dict.fromkeys(FILES + SUBDIRECTORIES), **entries}:
            self._history.read(self._client.index, name_of(parent, name), entries.get(name, 0), invoked, "readdir")

    async def read(self, ino: int) -> bytes:
        """Open, read and close a file."""
        invoked = self._history.now()
        handle = await self._reading(self._kernel.open(ino, writing=False))
        try:
            content, source = await self._reading(self._kernel.read(ino, handle))
            self._history.read(self._client.index, data_of(ino), content, invoked, source)
        finally:
            await self._closing(ino, handle)
        return content

    async def _closing(self, ino: int, handle: int) -> None:
        try:
            await self._kernel.close(ino, handle)
        except FUSEError as error:
            raise Failed from error

    async def _reading(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except FUSEError as error:
            raise Failed from error

    # Changes

    async def create(self, parent: int, name: bytes, content: bytes | None = None) -> int:
        """Make a file, with content perhaps, and close it."""
        register = name_of(parent, name)
        what = f"create of {name!r} in {parent}"
        ino, handle = await self._making(what, register, self._kernel.create(parent, name))
        await self._write_and_close(ino, handle, content)
        return int(ino)

    async def mkdir(self, parent: int, name: bytes) -> int:
        register = name_of(parent, name)
        return int(await self._making(f"mkdir of {name!r} in {parent}", register, self._kernel.mkdir(parent, name)))

    async def _making(self, what: str, register: Register, call: Awaitable[Any]) -> Any:
        change = self._history.begin(self._client.index, what, {register: PRESENT})
        made = await self._changing(change, call, exists=register)
        self._history.end(change, Outcome.OK, {register: made[0] if isinstance(made, tuple) else made})
        return made

    async def link(self, ino: int, parent: int, name: bytes) -> None:
        register = name_of(parent, name)
        change = self._history.begin(self._client.index, f"link of {ino} to {name!r} in {parent}", {register: ino})
        await self._changing(change, self._kernel.link(ino, parent, name), exists=register)
        self._history.end(change, Outcome.OK)

    async def remove(self, parent: int, name: bytes, *, directory: bool) -> None:
        register = name_of(parent, name)
        what = f"{'rmdir' if directory else 'unlink'} of {name!r} in {parent}"
        change = self._history.begin(self._client.index, what, {register: 0})
        await self._changing(change, self._kernel.remove(parent, name, directory=directory), missing=register)
        self._history.end(change, Outcome.OK)

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes) -> None:
        old, new = name_of(parent, name), name_of(new_parent, new_name)
        what = f"rename of {name!r} in {parent} to {new_name!r} in {new_parent}"
        change = self._history.begin(self._client.index, what, {old: 0, new: PRESENT})
        await self._changing(change, self._kernel.rename(parent, name, new_parent, new_name))
        self._history.end(change, Outcome.OK)

    async def chown(self, ino: int, owner: int) -> None:
        change = self._history.begin(self._client.index, f"chown of {ino} to {owner}", {owner_of(ino): owner})
        await self._changing(change, self._kernel.chown(ino, owner))
        self._history.end(change, Outcome.OK)

    async def write(self, ino: int, content: bytes) -> None:
        """Open a file, write it and close it."""
        handle = await self._reading(self._kernel.open(ino, writing=True))
        await self._write_and_close(ino, handle, content)

    async def _write_and_close(self, ino: int, handle: int, content: bytes | None) -> None:
        if content is None:
            await self._closing(ino, handle)
            return
        change = self._history.begin(self._client.index, f"write of {content!r} to {ino}", {data_of(ino): content})
        outcome = Outcome.OK
        try:
            await self._kernel.write(ino, handle, content)
            if self._rng.random() < 0.3:
                await asyncio.sleep(self._rng.uniform(0, 0.5))
        except FUSEError:
            outcome = Outcome.UNKNOWN
        try:
            await self._kernel.close(ino, handle)
        except FUSEError as error:
            self._history.end(change, Outcome.UNKNOWN)
            raise Failed from error
        self._history.end(change, outcome)

    async def _changing(
        self,
        change: Change,
        call: Awaitable[T],
        *,
        exists: Register | None = None,
        missing: Register | None = None,
    ) -> T:
        """Await a change. EEXIST and ENOENT say what a name was, in place of a read."""
        try:
            return await call
        except FUSEError as error:
            refused = error.errno in _REFUSALS
            self._history.end(change, Outcome.FAILED if refused else Outcome.UNKNOWN)
            register, value = (exists, PRESENT) if error.errno == errno.EEXIST else (missing, 0)
            if register is not None and error.errno in (errno.EEXIST, errno.ENOENT):
                told: Value = value
                self._history.read(self._client.index, register, told, change.invoked, f"the errno of {change.what}")
            raise Failed from error


class Wanderer:
    """A program that does random things in a few shared directories until it has done enough."""

    def __init__(self, program: Program, rng: random.Random, tokens: Callable[[], int], operations: int) -> None:
        self._program = program
        self._rng = rng
        self._tokens = tokens
        self._operations = operations

    async def run(self, history: History, who: str) -> None:
        """Do all operations, one after another, with pauses."""
        for _ in range(self._operations):
            await asyncio.sleep(self._pause_s())
            step = self._rng.choices(self._steps(), weights=[weight for weight, _ in self._WEIGHTS])[0]
            with history.operation(f"{step.__name__.strip('_')} by {who}"), contextlib.suppress(Failed):
                await step()

    def _pause_s(self) -> float:
        chance = self._rng.random()
        return self._rng.uniform(0, 0.02 if chance < 0.6 else 0.3 if chance < 0.95 else 3.0)

    _WEIGHTS: Final = (
        (30, "_stat"),
        (16, "_read"),
        (4, "_list"),
        (10, "_create"),
        (8, "_remove"),
        (8, "_rename"),
        (4, "_link"),
        (8, "_chown"),
        (12, "_write"),
        (4, "_mkdir"),
        (3, "_rmdir"),
    )

    def _steps(self) -> list[Callable[[], Awaitable[None]]]:
        return [getattr(self, name) for _, name in self._WEIGHTS]

    async def _directory(self) -> int:
        """Choose a directory, and find the way there."""
        if self._rng.random() < 0.3:
            return wire.ROOT_INO
        directory = await self._program.lookup(wire.ROOT_INO, self._rng.choice(DIRECTORIES))
        if directory and self._rng.random() < 0.2:
            directory = await self._program.lookup(directory, self._rng.choice(SUBDIRECTORIES)) or directory
        if not directory:
            raise Failed
        return directory

    async def _file(self) -> int:
        """Choose a file that exists."""
        ino = await self._program.lookup(await self._directory(), self._rng.choice(FILES))
        if not ino:
            raise Failed
        return ino

    def _content(self) -> bytes:
        return b"content %08d" % self._tokens()

    async def _stat(self) -> None:
        parent, name = await self._directory(), self._rng.choice(FILES + SUBDIRECTORIES)
        for _ in range(self._rng.choice((1, 1, 2, 3))):
            await self._program.stat(parent, name)

    async def _read(self) -> None:
        await self._program.read(await self._file())

    async def _list(self) -> None:
        await self._program.list(await self._directory())

    async def _create(self) -> None:
        content = self._content() if self._rng.random() < 0.7 else None
        await self._program.create(await self._directory(), self._rng.choice(FILES), content)

    async def _remove(self) -> None:
        await self._program.remove(await self._directory(), self._rng.choice(FILES), directory=False)

    async def _rename(self) -> None:
        names = FILES if self._rng.random() < 0.7 else SUBDIRECTORIES
        parent, new_parent = await self._directory(), await self._directory()
        old, new = self._rng.choice(names), self._rng.choice(names)
        if (parent, old) != (new_parent, new):
            await self._program.rename(parent, old, new_parent, new)

    async def _link(self) -> None:
        await self._program.link(await self._file(), await self._directory(), self._rng.choice(FILES))

    async def _chown(self) -> None:
        await self._program.chown(await self._file(), self._tokens())

    async def _write(self) -> None:
        await self._program.write(await self._file(), self._content())

    async def _mkdir(self) -> None:
        await self._program.mkdir(await self._directory(), self._rng.choice(SUBDIRECTORIES))

    async def _rmdir(self) -> None:
        await self._program.remove(await self._directory(), self._rng.choice(SUBDIRECTORIES), directory=True)
