"""The programs on a client: system calls on shared names, and the record of what they did and saw."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
from collections.abc import Awaitable, Callable, Sequence
from stat import S_IMODE
from typing import Final, TypeVar

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
    atime_of,
    data_of,
    links_of,
    mode_of,
    name_of,
    owner_of,
    record_of,
    records_in,
    xattr_of,
)
from simulation.loop import VirtualLoop

DIRECTORIES: Final = (b"d0", b"d1")
FILES: Final = (b"f0", b"f1", b"f2")
SUBDIRECTORIES: Final = (b"s0", b"s1")
SYMLINKS: Final = (b"l0",)
XATTRS: Final = (b"user.x", b"user.y")
LOG: Final = b"log"

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
        errno.ENODATA,
        errno.ENOSPC,
    )
)


T = TypeVar("T")


class Failed(Exception):
    """A step of an operation failed, which is recorded; the rest of it is left out."""


class Program:
    """System calls of one program. Each records its outcome; what fails raises :exc:`Failed`.

    ``lazy``: what returns need not be durable before an fsync.
    """

    def __init__(
        self, loop: VirtualLoop, client: Client, history: History, rng: random.Random, *, lazy: bool = False
    ) -> None:
        self._loop = loop
        self._durable = not lazy
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
            for register, value in (
                (owner_of(ino), inode.uid),
                (mode_of(ino), S_IMODE(inode.mode)),
                (atime_of(ino), inode.atime_ns),
            ):
                self._history.read(self._client.index, register, value, invoked, source)
            if inode.nlink:
                self._history.read(self._client.index, links_of(ino), inode.nlink, invoked, source)
        return ino

    async def list(self, parent: int) -> None:
        """Read a directory: each name is there, or is not."""
        invoked = self._history.now()
        entries = await self._reading(self._kernel.readdir(parent))
        for name in {**dict.fromkeys((*FILES, *SUBDIRECTORIES, *SYMLINKS)), **entries}:
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

    async def read_log(self, ino: int) -> None:
        """Read a log: how often is each record in it?"""
        invoked, records = self._history.now(), self._history.records(ino)
        handle = await self._reading(self._kernel.open(ino, writing=False))
        try:
            content, source = await self._reading(self._kernel.read(ino, handle))
            found = records_in(content)
            for register in dict.fromkeys((*records, *(record_of(ino, each) for each in found))):
                self._history.read(self._client.index, register, found[register[2]], invoked, source)
        finally:
            await self._closing(ino, handle)

    async def readlink(self, ino: int) -> None:
        invoked = self._history.now()
        target, source = await self._reading(self._kernel.readlink(ino))
        self._history.read(self._client.index, data_of(ino), target, invoked, source)

    async def getxattr(self, ino: int, name: bytes) -> None:
        invoked = self._history.now()
        value, source = await self._reading(self._kernel.getxattr(ino, name))
        self._history.read(self._client.index, xattr_of(ino, name), value, invoked, source)

    async def syncdir(self, ino: int) -> None:
        """fsync of a directory makes all that its client did durable."""
        invoked = self._history.now()
        try:
            await self._kernel.fsyncdir(ino)
        except FUSEError as error:
            self._history.sync_failed(self._client.index)
            raise Failed from error
        self._history.synced(self._client.index, invoked)

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
        """Make a file, with content perhaps, and close it; then it is durable."""
        register = name_of(parent, name)
        change = self._history.begin(self._client.index, f"create of {name!r} in {parent}", {register: PRESENT})
        ino, handle = await self._changing(change, self._kernel.create(parent, name), exists=register)
        self._history.end(change, Outcome.OK, {register: ino})
        self._history.made(change, ino, held=self._client.holds(ino))
        change.doubted = True
        if self._rng.random() < 0.3:
            await asyncio.sleep(self._rng.uniform(0, 3.0))
        try:
            await self._write_and_close(ino, handle, content, made=True)
        except Failed:
            change.gone = min(change.gone, self._history.now().time)
            raise
        self._history.due(change, durable=self._durable)
        return ino

    async def mkdir(self, parent: int, name: bytes) -> None:
        await self._make(f"mkdir of {name!r} in {parent}", name_of(parent, name), self._kernel.mkdir(parent, name))

    async def symlink(self, parent: int, name: bytes, target: bytes) -> None:
        call = self._kernel.symlink(parent, name, target)
        await self._make(f"symlink of {name!r} in {parent}", name_of(parent, name), call)

    async def _make(self, what: str, register: Register, call: Awaitable[int]) -> None:
        change = self._history.begin(self._client.index, what, {register: PRESENT})
        made = await self._changing(change, call, exists=register)
        self._history.end(change, Outcome.OK, {register: made}, durable=self._durable)

    async def link(self, ino: int, parent: int, name: bytes) -> None:
        register = name_of(parent, name)
        change = self._history.begin(self._client.index, f"link of {ino} to {name!r} in {parent}", {register: ino})
        await self._changing(change, self._kernel.link(ino, parent, name), exists=register)
        self._history.end(change, Outcome.OK, durable=self._durable)

    async def remove(self, parent: int, name: bytes, *, directory: bool) -> None:
        register = name_of(parent, name)
        what = f"{'rmdir' if directory else 'unlink'} of {name!r} in {parent}"
        change = self._history.begin(self._client.index, what, {register: 0})
        await self._changing(change, self._kernel.remove(parent, name, directory=directory), missing=register)
        self._history.end(change, Outcome.OK, durable=self._durable)
        change.held = self._client.has_removed(parent, name)

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, exchange: bool) -> None:
        old, new = name_of(parent, name), name_of(new_parent, new_name)
        what = f"{'exchange' if exchange else 'rename'} of {name!r} in {parent} to {new_name!r} in {new_parent}"
        change = self._history.begin(self._client.index, what, {old: PRESENT if exchange else 0, new: PRESENT})
        call = self._kernel.rename(parent, name, new_parent, new_name, exchange=exchange)
        done = await self._changing(change, call)
        self._history.end(change, Outcome.OK if done else Outcome.FAILED, durable=done and self._durable)
        if done and not exchange and (ino := self._client.held_as(new_parent, new_name)) is not None:
            self._history.moved(change, ino, new)

    async def chown(self, ino: int, owner: int) -> None:
        await self._set(f"chown of {ino} to {owner}", {owner_of(ino): owner}, self._kernel.setattr(ino, uid=owner))

    async def chmod(self, ino: int, mode: int) -> None:
        await self._set(f"chmod of {ino} to {mode:o}", {mode_of(ino): mode}, self._kernel.setattr(ino, mode=mode))

    async def utimens(self, ino: int, atime_ns: int) -> None:
        call = self._kernel.setattr(ino, atime_ns=atime_ns)
        await self._set(f"utimens of {ino} to {atime_ns}", {atime_of(ino): atime_ns}, call)

    async def truncate(self, ino: int) -> None:
        await self._set(f"truncation of {ino}", {data_of(ino): b""}, self._kernel.setattr(ino, size=0))

    async def setxattr(self, ino: int, name: bytes, value: bytes) -> None:
        """Set a value; an empty one removes it."""
        register = xattr_of(ino, name)
        call = self._kernel.setxattr(ino, name, value)
        await self._set(f"setxattr of {name!r} of {ino} to {value!r}", {register: value}, call)

    async def _set(self, what: str, effect: dict[Register, Value], call: Awaitable[object]) -> None:
        """Change an inode. While its client writes the file this is durable with that only: so nothing is promised."""
        change = self._history.begin(self._client.index, what, effect)
        await self._changing(change, call)
        self._history.end(change, Outcome.OK)
        kind, ino, _ = next(iter(effect))
        if kind in ("owner", "mode", "atime"):
            self._history.along(change, ino)

    async def write(self, ino: int, content: bytes, *, truncate: bool = False) -> None:
        """Open a file, write it and close it."""
        if not truncate:
            handle = await self._reading(self._kernel.open(ino, writing=True))
        else:
            change = self._history.begin(self._client.index, f"truncating open of {ino}", {data_of(ino): b""})
            handle = await self._changing(change, self._kernel.open(ino, writing=True, truncate=True))
            self._history.end(change, Outcome.OK)
        await self._write_and_close(ino, handle, content)

    async def append(self, ino: int, records: Sequence[bytes]) -> None:
        """Open a log, append records to it, with an fsync after each or a close after all, and close it."""
        handle = await self._reading(self._kernel.open(ino, writing=True, append=True))
        changes, outcome, synced = [], Outcome.OK, self._rng.random() < 0.5
        try:
            for record in records:
                what = f"append of {record!r} to {ino}"
                changes.append(self._history.begin(self._client.index, what, {record_of(ino, record): PRESENT}))
                await self._kernel.append(ino, handle, record)
                if synced:
                    await self._kernel.fsync(handle)
                    self._history.end(changes.pop(), Outcome.OK, durable=True)
        except FUSEError:
            outcome = Outcome.UNKNOWN
        try:
            await self._closing(ino, handle)
        except Failed:
            outcome = Outcome.UNKNOWN
        for change in changes:
            self._history.end(change, outcome, durable=self._durable and outcome is Outcome.OK)

    async def _write_and_close(self, ino: int, handle: int, content: bytes | None, *, made: bool = False) -> None:
        """``made``: the file was made with this handle."""
        if content is None:
            await self._closing(ino, handle)
            return
        change = self._history.begin(self._client.index, f"write of {content!r} to {ino}", {data_of(ino): content})
        failure: FUSEError | None = None
        try:
            await self._kernel.write(ino, handle, content)
            if self._rng.random() < 0.3:
                await asyncio.sleep(self._rng.uniform(0, 0.5))
            if self._rng.random() < 0.2:
                await self._kernel.fsync(handle)
                self._history.end(change, Outcome.OK, durable=True)
                await self._closing(ino, handle)
                return
        except FUSEError as error:
            failure = error
        try:
            await self._kernel.close(ino, handle)
        except FUSEError as error:
            failure = failure or error
        if failure is not None:
            self._history.end(change, Outcome.UNKNOWN)
            raise Failed from failure
        self._history.end(change, Outcome.OK, durable=self._durable)
        if made and self._client.holds(ino):
            change.held = True

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
        return self._rng.uniform(0, 0.02 if chance < 0.6 else 0.3 if chance < 0.85 else 3.0)

    _WEIGHTS: Final = (
        (30, "_stat"),
        (16, "_read"),
        (4, "_list"),
        (2, "_readlink"),
        (4, "_getxattr"),
        (10, "_create"),
        (8, "_remove"),
        (8, "_rename"),
        (4, "_link"),
        (3, "_symlink"),
        (4, "_chown"),
        (4, "_chmod"),
        (3, "_utimens"),
        (4, "_setxattr"),
        (2, "_truncate"),
        (12, "_write"),
        (4, "_append"),
        (3, "_read_log"),
        (4, "_mkdir"),
        (3, "_rmdir"),
        (1, "_syncdir"),
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
        parent, name = await self._directory(), self._rng.choice(FILES + SUBDIRECTORIES + SYMLINKS)
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
        await self._program.remove(await self._directory(), self._rng.choice(FILES + SYMLINKS), directory=False)

    async def _rename(self) -> None:
        names = FILES if self._rng.random() < 0.7 else SUBDIRECTORIES
        parent, new_parent = await self._directory(), await self._directory()
        old, new = self._rng.choice(names), self._rng.choice(names)
        if (parent, old) != (new_parent, new):
            await self._program.rename(parent, old, new_parent, new, exchange=self._rng.random() < 0.2)

    async def _link(self) -> None:
        await self._program.link(await self._file(), await self._directory(), self._rng.choice(FILES))

    async def _symlink(self) -> None:
        await self._program.symlink(await self._directory(), self._rng.choice(SYMLINKS), self._content())

    async def _readlink(self) -> None:
        ino = await self._program.lookup(await self._directory(), self._rng.choice(SYMLINKS))
        if ino:
            await self._program.readlink(ino)

    async def _chown(self) -> None:
        await self._program.chown(await self._file(), self._tokens())

    async def _chmod(self) -> None:
        await self._program.chmod(await self._file(), self._rng.choice((0o600, 0o644, 0o640)))

    async def _utimens(self) -> None:
        await self._program.utimens(await self._file(), self._tokens())

    async def _getxattr(self) -> None:
        await self._program.getxattr(await self._file(), self._rng.choice(XATTRS))

    async def _setxattr(self) -> None:
        value = self._content() if self._rng.random() < 0.7 else b""
        await self._program.setxattr(await self._file(), self._rng.choice(XATTRS), value)

    async def _append(self) -> None:
        ino = await self._program.lookup(wire.ROOT_INO, LOG)
        if ino:
            await self._program.append(ino, [self._content() for _ in range(self._rng.choice((1, 1, 2)))])

    async def _read_log(self) -> None:
        ino = await self._program.lookup(wire.ROOT_INO, LOG)
        if ino:
            await self._program.read_log(ino)

    async def _truncate(self) -> None:
        await self._program.truncate(await self._file())

    async def _syncdir(self) -> None:
        await self._program.syncdir(await self._directory())

    async def _write(self) -> None:
        await self._program.write(await self._file(), self._content(), truncate=self._rng.random() < 0.3)

    async def _mkdir(self) -> None:
        await self._program.mkdir(await self._directory(), self._rng.choice(SUBDIRECTORIES))

    async def _rmdir(self) -> None:
        await self._program.remove(await self._directory(), self._rng.choice(SUBDIRECTORIES), directory=True)
