"""Programs that write to mounts and read from them without a pause, and what their completed calls have made.

A read that begins after a write's call has returned on another mount must show it; and a file is one of those that
were written, whole.

They are in a process of their own. Who starts a server while it has files of a mount open waits until those are
flushed, as the child closes them before it is another program: for ever, if the mount waits for that server.
"""

from __future__ import annotations

import contextlib
import errno
import math
import multiprocessing
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Final, NamedTuple, cast

import rig

#: Files that a writer goes round; every so many writes it makes a large file, and a directory that it renames.
FILES: Final = 20
_EVERY: Final = 10
_LARGE: Final = 200_000
#: Seconds that a store may take to start, and an access to it until it is tried again.
_GOES_ON_S: Final = 60.0


class Manifest:
    """What completed calls have made: the number that each file has at least, and the directories that there are.

    It is a file outside the volume, too, for who looks into a failure.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._file = path.open("a")
        self.numbers: dict[str, int] = {}
        self.directories: set[str] = set()

    def wrote(self, name: str, number: int) -> None:
        with self._lock:
            self.numbers[name] = number
            print(name, number, file=self._file, flush=True)

    def made(self, name: str) -> None:
        with self._lock:
            self.directories.add(name)
            print(name, file=self._file, flush=True)

    def least(self, rng: random.Random) -> tuple[str, int]:
        """Return one of the files, and the number that it has at least."""
        with self._lock:
            return rng.choice(list(self.numbers.items()))


def content(name: str, number: int) -> bytes:
    """Return what a file of this number holds: its number first, then bytes that tell it from every other."""
    size = _LARGE if number % _EVERY == 0 else 100
    return f"{number} {name} ".encode() + random.Random(f"{name} {number}").randbytes(size)


def number_of(name: str, found: bytes) -> int:
    """Return the number that a file has; fail if it holds anything but the content of that number."""
    number = int(found.partition(b" ")[0])
    assert found == content(name, number), f"{name} is mixed up"
    return number


class Done(NamedTuple):
    """What programs have done: how often what, and what the manifest says (:class:`Manifest`)."""

    counts: Counter[str]
    numbers: dict[str, int]
    directories: set[str]


class Load:
    """Programs on the mounts. ``manifest`` is the path of a new file."""

    def __init__(self, manifest: Path, paths: list[Path], seed: int) -> None:
        self._manifest = Manifest(manifest)
        self._ended = threading.Event()
        self._failures: list[BaseException] = []
        self._counts: Counter[str] = Counter()
        #: Until when the store is away, on the monotonic clock: for so long that calls say so (EIO). What they did not
        #: do is not in the manifest.
        self._store_away_until = 0.0
        self._pauses: dict[str, float] = {}
        #: Since when they are taken, on the monotonic clock: a call of before may still be waiting for what was then.
        self._taken = 0.0
        self._threads: list[threading.Thread] = []
        self._writers = [f"w{index}" for index in range(len(paths))]
        for index, path in enumerate(paths):
            others = paths[index - 1]
            self._start(self._write, path, self._writers[index])
            self._start(self._read, others, random.Random(f"{seed} {index}"))

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        def run() -> None:
            try:
                while not self._ended.is_set():
                    work(*arguments)
            except BaseException as error:
                self._failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _timed(self, kind: str, call: Callable[[], bytes | None]) -> bytes | None:
        began = time.monotonic()
        try:
            result = call()
        except OSError as error:
            if began < self._store_away_until and kind in ("read", "write") and error.errno == errno.EIO:
                self._counts["failed"] += 1
                return None
            # A close may say that the new file, which LMDB had put off for a moment, is lost with a metaserver.
            if kind != "write" or error.errno != errno.EIO:
                raise
            self._counts["told"] += 1
            return None
        self._pauses[kind] = max(self._pauses.get(kind, 0.0), time.monotonic() - max(began, self._taken))
        self._counts[kind] += 1
        return result

    def _write(self, root: Path, writer: str) -> None:
        number = self._counts[writer] = self._counts[writer] + 1
        name = f"{writer}-{number % FILES}"
        if self._timed("write", lambda: _replace(root / name, content(name, number))) is None:
            return
        self._manifest.wrote(name, number)
        if number % _EVERY == 0:
            made, kept = f"{writer}-made{number}", f"{writer}-directory{number}"
            self._timed("mkdir", lambda: (root / made).mkdir())
            self._timed("rename", lambda: _rename(root / made, root / kept))
            self._manifest.made(kept)

    def _read(self, root: Path, rng: random.Random) -> None:
        if not self._manifest.numbers:
            return
        name, least = self._manifest.least(rng)
        found = self._timed("read", (root / name).read_bytes)
        if found is None:
            return
        number = number_of(name, found)
        assert number >= least, f"{name} shows {number}, though {least} was there"

    def store_goes(self) -> None:
        """Calls may fail for want of the store, from now on until after it is back."""
        self._store_away_until = math.inf

    def store_is_back(self) -> None:
        """The store answers: what is called from now on may not fail."""
        self._store_away_until = time.monotonic()

    def went_on(self) -> None:
        """Wait until each mount has written and been read again."""
        before = Counter(self._counts)
        rig.wait_for(
            lambda: self._failures or all(self._counts[kind] > before[kind] + 3 for kind in (*self._writers, "read")),
            "the load goes on",
            _GOES_ON_S,
        )
        assert not self._failures, self._failures

    def stands_still(self, seconds: float) -> None:
        """Return when no write has been completed for so long."""
        last, since = self._counts["write"], time.monotonic()
        deadline = since + _GOES_ON_S
        while time.monotonic() < since + seconds:
            assert time.monotonic() < deadline, "the load goes on, in spite of everything"
            time.sleep(0.01)
            if self._counts["write"] != last:
                last, since = self._counts["write"], time.monotonic()

    def take_pauses(self) -> dict[str, float]:
        """Return the longest time that a call of each kind took since this was called last, in seconds."""
        self._taken = time.monotonic()
        pauses, self._pauses = self._pauses, {}
        return {kind: round(pause, 2) for kind, pause in pauses.items()}

    def stop(self) -> None:
        """Begin no more calls, and wait a while for those that are under way."""
        self._ended.set()
        for thread in self._threads:
            thread.join(rig.WAIT_S)

    def end(self) -> Done:
        """Return when all calls have returned; fail if one of them has shown or said what it should not."""
        self.stop()
        assert not any(thread.is_alive() for thread in self._threads)
        assert not self._failures, self._failures
        return Done(self._counts, self._manifest.numbers, self._manifest.directories)


class _Process(BaseManager):
    """The process of the programs."""


_Process.register("Load", Load)


@contextlib.contextmanager
def running(manifest: Path, paths: list[Path], seed: int) -> Iterator[Load]:
    """Programs, until the end of the body. What is called may raise whatever there is to say of their process, too."""
    with _Process(ctx=multiprocessing.get_context("spawn")) as process:
        load = cast(Load, process.Load(manifest, paths, seed))  # type: ignore[attr-defined]
        try:
            yield load
        finally:
            load.stop()


def _replace(path: Path, data: bytes) -> bytes:
    """Make a file's content this, so that a reader sees the former or this one, and return it."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(data)
    new.rename(path)
    return data


def _rename(path: Path, new: Path) -> None:
    path.rename(new)
