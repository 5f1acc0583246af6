"""``metaserver fsck``, ``gc``, ``dump`` and ``load``: work on an engine that no metaserver serves meanwhile.

A dump only reads, and does so beside a metaserver, too, where the engine lets it.

All write one JSON object a line to standard output, for the program that started them, and end with 0, with 2 after one
line on standard error for what cannot be worked on, or with 130 when they are interrupted.

fsck, with ``--store``, tells which slices there are, and is then told on standard input which objects are lost: lines
of ``{"missing": [id...]}`` and ``{"damaged": [id...]}``, and at the end ``{"last": id}``, the highest in the store.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from heapq import merge
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import msgspec

from metaserver import dump, gc, namespace, recovery
from metaserver.engine import Engine, candidate, open_engine
from metaserver.errors import EngineBusy, EngineError, EngineUnusable, Refused
from metaserver.fsck.findings import Finding
from metaserver.fsck.run import Check, Interrupted, Losses
from metaserver.fsck.sorting import Sorter
from metaserver.volumes import Volume

#: Seconds between two reports of progress.
_PROGRESS_S: Final = 0.2
_INTERRUPTED: Final = 130


@dataclass(frozen=True, slots=True)
class Options:
    """What to work on. ``change``: repair, or collect; else it is only looked at."""

    engine: str
    volume: str
    change: bool = False
    store: bool = False
    #: What is dumped to, or loaded from.
    file: str = ""


class _Lost(msgspec.Struct):
    """A line from the program that has looked into the store."""

    missing: list[int] = []
    damaged: list[int] = []
    last: int | None = None


def fsck(options: Options) -> int:
    """Check a volume and return the exit code."""
    return _run(options, _fsck)


def collect(options: Options) -> int:
    """Clear up a volume, or count what there is to clear up, and return the exit code."""
    return _run(options, _collect)


def write_dump(options: Options) -> int:
    """Write a volume to a file and return the exit code."""
    return _ended(lambda stop: _dump(options, stop))


def load_dump(options: Options) -> int:
    """Make a volume of a file and return the exit code."""
    return _ended(lambda stop: _load(options, stop))


def _run(options: Options, work: Callable[[Engine, Volume, Options, threading.Event], Any]) -> int:
    return _ended(lambda stop: _with_engine(options, work, stop))


def _ended(work: Callable[[threading.Event], Coroutine[None, None, None]]) -> int:
    """Do something to its end, or until a signal, and return the exit code."""
    stop = threading.Event()

    async def body() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await work(stop)

    try:
        asyncio.run(body())
    except (EngineBusy, EngineUnusable, Refused) as error:
        print(f"metaserver: {error}", file=sys.stderr)
        return 2
    except dump.BadDump as error:
        print(f"metaserver: the dump cannot be used: {error}", file=sys.stderr)
        return 2
    except FileExistsError as error:
        print(f"metaserver: {error.filename2 or error.filename} exists already", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # nobody listens any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _INTERRUPTED
        print(f"metaserver: {error.filename or 'the file'}: {error.strerror}", file=sys.stderr)
        return 2
    except EngineError as error:
        print(f"metaserver: the engine failed: {error}", file=sys.stderr)
        return 2
    except Interrupted:
        return _INTERRUPTED
    return 0


async def _with_engine(
    options: Options, work: Callable[[Engine, Volume, Options, threading.Event], Any], stop: threading.Event
) -> None:
    _must_exist(options.engine)
    standing = candidate(options.engine, "")
    engine = await standing.take()
    try:
        volume = await engine.read(lambda snapshot: namespace.open_volume(snapshot, options.volume))
        identity = volume.identity.hex()
        _say(volume={"name": volume.name, "store": volume.store, "identity": identity})
        await work(engine, volume, options, stop)
    finally:
        await standing.resign()


def _must_exist(url: str) -> None:
    """Raise :exc:`EngineUnusable` where opening would make a new engine."""
    parts = urlsplit(url)
    if parts.scheme == "lmdb" and not Path(unquote(parts.path), "data.mdb").is_file():
        raise EngineUnusable(f"{url}: there is no LMDB engine")


def _say(**message: Any) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


# fsck


async def _fsck(engine: Engine, volume: Volume, options: Options, stop: threading.Event) -> None:
    if options.change:
        await recovery.spoil(engine)
    with Sorter(2) as lost:
        check = Check(engine, volume, _Listener(lost), stop, repair=options.change)
        await check.run(store=options.store)
    totals = check.totals
    _say(
        summary={
            "entries": totals.entries,
            "inodes": totals.inodes,
            "bytes": totals.bytes,
            "slices": totals.slices,
            "found": check.found,
            "repaired": check.repaired,
        }
    )


class _Listener:
    """Writes what a check says, and reads what is said of the store."""

    def __init__(self, lost: Sorter) -> None:
        self._lost = lost

    def progress(self, what: str, done: int, total: int) -> None:
        _say(progress=[what, done, total])

    def finding(self, finding: Finding, repaired: bool) -> None:
        _say(
            finding={
                "kind": finding.kind,
                "ino": finding.ino or None,
                "where": finding.where,
                "what": finding.what,
                "repaired": repaired,
            }
        )

    def slices(self, needed: list[tuple[int, int]]) -> None:
        _say(slices=needed)

    def losses(self) -> tuple[Losses, int]:
        last = 0
        for line in sys.stdin.buffer:
            said = msgspec.json.decode(line, type=_Lost)
            for slice_id, damaged in merge(((each, 0) for each in said.missing), ((each, 1) for each in said.damaged)):
                self._lost.add(slice_id, damaged)
            if said.last is not None:
                last = said.last
                break
        else:
            raise Interrupted
        return self._pairs(), last

    def _pairs(self) -> Iterator[tuple[int, int]]:
        return ((slice_id, damaged) for slice_id, damaged in self._lost)


# gc


async def _collect(engine: Engine, volume: Volume, options: Options, stop: threading.Event) -> None:
    tick = _Ticker(stop)
    orphans, size = await engine.scan(lambda snapshot: gc.count(snapshot, volume, tick))
    if options.change:
        await gc.clear_up(engine, volume, tick)
    _say(orphans={"count": orphans, "bytes": size})


# dump and load


async def _dump(options: Options, stop: threading.Event) -> None:
    _must_exist(options.engine)
    engine = open_engine(options.engine)
    try:
        volume, trailer = await dump.dump(engine, options.volume, Path(options.file), _Progress(stop))
    finally:
        await engine.close()
    _say_moved(volume, trailer)


async def _load(options: Options, stop: threading.Event) -> None:
    standing = candidate(options.engine, "")
    engine = await standing.take()
    try:
        volume, trailer = await dump.load(engine, options.volume, Path(options.file), _Progress(stop))
    finally:
        await standing.resign()
    _say_moved(volume, trailer)


def _say_moved(volume: Volume, trailer: dump.Trailer) -> None:
    rows = sum(trailer.rows.values())
    inodes = trailer.rows.get("i", 0)
    _say(moved={"name": volume.name, "store": volume.store, "inodes": inodes, "rows": rows, "bytes": trailer.size})


class _Progress:
    """Tells of progress now and then, and ends the work when it is to stop."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._told_s = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._stop.is_set():
            raise Interrupted
        if time.monotonic() - self._told_s >= _PROGRESS_S:
            self._told_s = time.monotonic()
            _say(progress=[what, done, total])


class _Ticker:
    """The same for what has one number to tell."""

    def __init__(self, stop: threading.Event) -> None:
        self._progress = _Progress(stop)

    def __call__(self, done: int) -> None:
        self._progress("orphans", done, 0)
