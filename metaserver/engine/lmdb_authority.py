"""The authority over an LMDB directory: the lock on it, which the kernel gives back when its holder ends.

Who has the lock says in a file beside the data who he is and where his clients reach him, and touches it for as long as
his event loop runs. Who has not, leaves the data alone: it is opened, for reading too, only by its holder.

A holder that hangs keeps the lock, and LMDB's own, which no epoch helps against. So whoever waits for one that has not
touched its file for ``HUNG_S`` kills it: on one machine that is possible, and the surest fence there is. What counts is
time in which the waiting one was awake itself, neither the wall clock nor suspend.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from metaserver.engine.authority import LAPSE_S, Candidate
from metaserver.engine.base import Engine
from metaserver.engine.lmdb import LmdbEngine
from metaserver.engine.lmdb_announcements import Announcements
from metaserver.errors import EngineBusy

_log = logging.getLogger(__name__)

#: Seconds without a sign of life after which a holder is killed by who waits for it.
HUNG_S: Final = 5.0
#: Of the time between two looks so much counts, in seconds: in more than that, the waiting one may have hung itself.
_MOST_AWAKE_S: Final = 0.5
_FILE: Final = "authority"
#: The largest file that is read, in bytes.
_MOST: Final = 4096


class _Holder(msgspec.Struct, frozen=True):
    """Who has the authority: where clients reach it, and the process, with its start in ticks since boot."""

    address: str
    pid: int
    started: int


class LmdbCandidate(Candidate):
    """``open_engine`` opens the engine in ``directory``, and raises EngineBusy while another process has it."""

    def __init__(self, address: str, directory: str, open_engine: Callable[[], LmdbEngine]) -> None:
        super().__init__(address)
        self._file = Path(directory) / _FILE
        self._announcements = Announcements(Path(directory))
        self._open = open_engine
        self._engine: LmdbEngine | None = None
        self._touching: asyncio.Task[None] | None = None
        #: The holder's last sign of life, for how long there was none after it, and when that was looked at.
        self._sign = 0
        self._silent_s = 0.0
        self._looked_s = 0.0

    async def take(self) -> Engine:
        try:
            engine = self._open()
        except EngineBusy:
            self._look_at_holder()
            raise
        try:
            self._say()
        except BaseException:
            await engine.close()
            raise
        self._engine = engine
        self._touching = asyncio.create_task(self._touch(), name="authority")
        return engine

    async def holder(self) -> str | None:
        said = self._read()
        return said.address if said is not None else None

    async def announce(self) -> list[str]:
        return self._announcements.announce(self.address)

    async def resign(self) -> None:
        self._announcements.withdraw()
        engine, self._engine = self._engine, None
        if engine is None or self._touching is None:
            return
        self._touching.cancel()
        with contextlib.suppress(FileNotFoundError):
            self._file.unlink()
        await engine.close()

    def _say(self) -> None:
        """Replace the file, so that nobody reads half of it."""
        new = self._file.with_suffix(".new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb") as file:
            file.write(msgspec.json.encode(_Holder(self.address, os.getpid(), _start_of(os.getpid()))))
        new.replace(self._file)

    async def _touch(self) -> None:
        while True:
            await asyncio.sleep(LAPSE_S / 3)
            try:
                os.utime(self._file)
            except OSError as error:
                _log.warning("%s: %s", self._file, error.strerror)

    def _read(self) -> _Holder | None:
        try:
            with self._file.open("rb") as file:
                return msgspec.json.decode(file.read(_MOST), type=_Holder)
        except (OSError, msgspec.DecodeError, msgspec.ValidationError):
            return None

    # The holder, to who waits for it

    def _look_at_holder(self) -> None:
        now_s = time.monotonic()
        passed_s, self._looked_s = now_s - self._looked_s, now_s
        try:
            sign = self._file.stat().st_mtime_ns
        except OSError:
            sign = 0
        if sign != self._sign or not sign:
            self._sign, self._silent_s = sign, 0.0
            return
        self._silent_s += min(passed_s, _MOST_AWAKE_S)
        if self._silent_s >= HUNG_S:
            self._silent_s = 0.0
            self._kill_holder()

    def _kill_holder(self) -> None:
        said = self._read()
        if said is None or said.pid == os.getpid():
            return
        try:
            process = os.pidfd_open(said.pid)
        except OSError:
            _log.error("the metaserver at %s hangs, and process %d is not to be seen here", said.address, said.pid)
            return
        try:
            if _start_of(said.pid) != said.started:
                _log.error("the metaserver at %s hangs, and process %d is another one", said.address, said.pid)
                return
            _log.error("the metaserver at %s hangs: its process, %d, is killed", said.address, said.pid)
            signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)


def _start_of(pid: int) -> int:
    """Return when a process was started, in ticks since boot; 0 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0
