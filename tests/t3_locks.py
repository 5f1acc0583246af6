"""File locks on one mount, as programs see them: each case with locks shared and with the kernel's own, as its twin."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Final

import pytest
import rig
from conftest import MountFactory
from lock_programs import WHOLE, Programs

pytestmark = pytest.mark.usefixtures("needs_mounts")

_FLOCK64: Final = struct.Struct("hhqqi4x")


@pytest.fixture(params=["shared", "local"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def mounted(mount: MountFactory, accel: str, kind: str) -> rig.Mount:
    return mount(accel, "--locks", kind)


@pytest.fixture
def programs(mounted: rig.Mount) -> Iterator[Programs]:
    path = mounted.path / "file"
    path.write_bytes(b"content")
    started = Programs(path)
    try:
        yield started
    finally:
        started.end()


def test_the_locks_of_two_programs(programs: Programs) -> None:
    """Several cases on one mount, which takes longer to make than they take."""
    _flock(programs)
    _ranges(programs)
    _getlk(programs)
    _closing_any_descriptor_ends_ranges(programs)
    _a_duplicate_keeps_a_flock(programs)
    _a_child_keeps_a_flock_but_no_range(programs)
    _ofd(programs)
    _read_only(programs)
    _killed(programs)
    _interrupted(programs)
    _waiting(programs)
    _deadlock(programs)


def _free(programs: Programs) -> None:
    """Nobody has any lock; what was closed just now may take a moment."""
    probe = programs.start()
    rig.wait_for(lambda: probe.do("flock", "f", "ex") == 0, "the flock is free")
    rig.wait_for(lambda: probe.do("posix", "f", "ex", *WHOLE) == 0, "the ranges are free")
    probe.end()


def _flock(programs: Programs) -> None:
    one, two = programs.two()
    assert one.do("flock", "f", "sh") == 0
    assert two.do("flock", "f", "sh") == 0
    assert two.do("flock", "f", "ex") == errno.EAGAIN
    assert one.do("flock", "f", "ex") == 0, "the other's was given up when it was to be converted"
    assert two.do("flock", "f", "sh") == errno.EAGAIN
    assert two.do("posix", "f", "ex", *WHOLE) == 0, "the two kinds know nothing of each other"
    assert one.do("flock", "f", "un") == 0
    assert two.do("flock", "f", "ex") == 0
    one.end()
    two.end()
    _free(programs)


def _ranges(programs: Programs) -> None:
    one, two = programs.two()
    assert one.do("posix", "f", "ex", 0, 10) == 0
    assert one.do("posix", "f", "sh", 4, 2) == 0
    assert two.do("posix", "f", "sh", 4, 2) == 0
    assert two.do("posix", "f", "sh", 3, 2) == errno.EAGAIN
    assert two.do("posix", "f", "ex", 10, 0) == 0
    assert one.do("posix", "f", "ex", 1 << 60, 1) == errno.EAGAIN
    assert one.do("posix", "f", "un", 0, 4) == 0
    assert two.do("posix", "f", "ex", 0, 4) == 0
    one.end()
    two.end()
    _free(programs)


def _getlk(programs: Programs) -> None:
    one = programs.start()
    with programs.path.open("r+b") as file:
        ask = _FLOCK64.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        assert _FLOCK64.unpack(fcntl.fcntl(file, fcntl.F_GETLK, ask))[0] == fcntl.F_UNLCK
        assert one.do("posix", "f", "sh", 5, 3) == 0
        found = _FLOCK64.unpack(fcntl.fcntl(file, fcntl.F_GETLK, ask))
        assert found == (fcntl.F_RDLCK, os.SEEK_SET, 5, 3, one.process.pid)
    one.end()
    _free(programs)


def _closing_any_descriptor_ends_ranges(programs: Programs) -> None:
    one, two = programs.two()
    assert one.do("open", "g", programs.path, "r") == 0
    assert one.do("posix", "f", "ex", *WHOLE) == 0
    assert two.do("posix", "f", "sh", *WHOLE) == errno.EAGAIN
    assert one.do("dup", "f", "h") == 0
    assert one.do("close", "h") == 0
    assert two.do("posix", "f", "sh", *WHOLE) == 0
    one.end()
    two.end()
    _free(programs)


def _a_duplicate_keeps_a_flock(programs: Programs) -> None:
    one, two = programs.two()
    assert one.do("flock", "f", "ex") == 0
    assert one.do("dup", "f", "g") == 0
    assert one.do("close", "f") == 0
    assert two.do("flock", "f", "sh") == errno.EAGAIN
    assert one.do("close", "g") == 0
    rig.wait_for(lambda: two.do("flock", "f", "sh") == 0, "the flock has ended with its last descriptor")
    one.end()
    two.end()
    _free(programs)


def _a_child_keeps_a_flock_but_no_range(programs: Programs) -> None:
    one, two = programs.two()
    assert one.do("flock", "f", "ex") == 0
    assert one.do("posix", "f", "ex", *WHOLE) == 0
    assert one.do("fork") == 0
    assert one.do("close", "f") == 0
    assert two.do("posix", "f", "ex", *WHOLE) == 0
    assert two.do("flock", "f", "sh") == errno.EAGAIN
    one.end()
    rig.wait_for(lambda: two.do("flock", "f", "sh") == 0, "the child is gone, and the flock with it")
    two.end()
    _free(programs)


def _ofd(programs: Programs) -> None:
    one, two = programs.two()
    assert one.do("open", "g", programs.path, "w") == 0
    assert one.do("ofd", "f", "ex", 0, 10) == 0
    assert one.do("ofd", "g", "ex", 0, 10) == errno.EAGAIN, "an open file is an owner, not a process"
    assert two.do("posix", "f", "sh", 5, 1) == errno.EAGAIN
    assert one.do("close", "g") == 0
    assert two.do("ofd", "f", "sh", 5, 1) == errno.EAGAIN, "another one was closed"
    assert one.do("close", "f") == 0
    rig.wait_for(lambda: two.do("ofd", "f", "sh", 5, 1) == 0, "it has ended with its open file")
    one.end()
    two.end()
    _free(programs)


def _read_only(programs: Programs) -> None:
    """Handles that BPF gives out where it can, before there is a lock and while there is."""
    one, two = programs.two("r")
    assert one.do("posix", "f", "sh", *WHOLE) == 0
    writer = programs.start()
    assert writer.do("posix", "f", "ex", *WHOLE) == errno.EAGAIN
    assert two.do("open", "g", programs.path, "r") == 0
    assert two.do("posix", "g", "sh", *WHOLE) == 0
    assert one.do("close", "f") == 0
    assert writer.do("posix", "f", "ex", *WHOLE) == errno.EAGAIN
    assert two.do("close", "g") == 0
    assert writer.do("posix", "f", "ex", *WHOLE) in (0, errno.EAGAIN)
    rig.wait_for(lambda: writer.do("posix", "f", "ex", *WHOLE) == 0, "both have closed it")
    one.end()
    two.end()
    writer.end()
    _free(programs)


def _killed(programs: Programs) -> None:
    one, two = programs.two()
    assert [one.do("flock", "f", "ex"), one.do("posix", "f", "ex", *WHOLE)] == [0, 0]
    waiting = programs.start()
    waiting.tell("posix", "f", "ex", *WHOLE, "wait")
    rig.wait_for(waiting.sleeps, "it waits")
    waiting.end()
    one.end()
    assert two.do("posix", "f", "ex", *WHOLE, "wait") == 0
    assert two.do("flock", "f", "ex", "wait") == 0
    two.end()
    _free(programs)


def _interrupted(programs: Programs) -> None:
    one, two = programs.two()
    for words in (("flock", "f", "ex"), ("posix", "f", "ex", *WHOLE)):
        assert one.do(*words) == 0
        assert two.do("alarm", "0.2") == 0
        assert two.do(*words, "wait") == errno.EINTR
        assert one.do(words[0], "f", "un", *WHOLE) == 0
        assert one.do(*words) == 0, "the wait is over: nobody else has got it"
    one.end()
    two.end()
    _free(programs)


def _waiting(programs: Programs) -> None:
    one, two = programs.two()
    for words in (("flock", "f", "ex"), ("posix", "f", "ex", 3, 3), ("ofd", "f", "ex", 3, 3)):
        assert one.do(*words) == 0
        two.tell(*words, "wait")
        rig.wait_for(two.sleeps, "it waits")
        assert one.do(words[0], "f", "un", *(words[3:] or WHOLE)) == 0
        assert two.answer() == 0
        assert two.do(words[0], "f", "un", *(words[3:] or WHOLE)) == 0
    one.end()
    two.end()
    _free(programs)


def _deadlock(programs: Programs) -> None:
    one, two = programs.two()
    assert one.do("posix", "f", "ex", 0, 1) == 0
    assert two.do("posix", "f", "ex", 1, 1) == 0
    one.tell("posix", "f", "ex", 1, 1, "wait")
    rig.wait_for(one.sleeps, "it waits")
    assert two.do("posix", "f", "ex", 0, 1, "wait") == errno.EDEADLK
    assert two.do("posix", "f", "un", 1, 1) == 0
    assert one.answer() == 0
    one.end()
    two.end()
    _free(programs)


@pytest.mark.parametrize("kind", ["shared"])
def test_a_worker_that_dies_leaves_the_locks_to_the_next(programs: Programs, mounted: rig.Mount) -> None:
    mounted.allowed.append(r"the worker \(pid \d+\) ended with -9")
    one, two = programs.two()
    reader = programs.start("r")
    assert [one.do("flock", "f", "ex"), one.do("posix", "f", "ex", 0, 5), one.do("ofd", "f", "ex", 8, 1)] == [0, 0, 0]
    assert reader.do("posix", "f", "sh", 6, 1) == 0
    two.tell("posix", "f", "ex", 0, 5, "wait")
    rig.wait_for(two.sleeps, "it waits")
    before = mounted.stats()["worker"]["pid"]
    os.kill(before, signal.SIGKILL)
    rig.wait_for(lambda: mounted.stats()["worker"].get("pid") not in (None, before), "the next worker")
    probe = programs.start()
    assert probe.do("flock", "f", "sh") == errno.EAGAIN
    assert probe.do("posix", "f", "ex", 6, 1) == errno.EAGAIN
    assert probe.do("ofd", "f", "sh", 8, 1) == errno.EAGAIN
    assert one.do("posix", "f", "un", 0, 5) == 0
    assert two.answer() == 0
    one.end()
    reader.end()
    rig.wait_for(lambda: probe.do("flock", "f", "ex") == 0, "its flock ended with its process")
    rig.wait_for(lambda: probe.do("ofd", "f", "ex", 6, 9) == 0, "so did the others'")


@pytest.mark.parametrize("kind", ["shared"])
def test_more_wait_than_a_queue_has_entries_for(mount: MountFactory, accel: str, kind: str) -> None:
    mounted = mount(accel, "--queue-depth", "4")
    path = mounted.path / "file"
    path.touch()
    got: list[int | None] = []
    with path.open("r+b") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)

        def wait() -> None:
            with path.open("r+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    got.append(0)
                except OSError as error:
                    got.append(error.errno)

        threads = [threading.Thread(target=wait) for _ in range(24)]
        for thread in threads:
            thread.start()
        rig.wait_for(
            lambda: mounted.stats()["caches"]["locks"]["waiting"] + len(got) == len(threads), "all wait, or may not"
        )
        assert path.stat().st_size == 0, "the mount goes on"
        fcntl.flock(mine, fcntl.LOCK_UN)
    for thread in threads:
        thread.join(rig.WAIT_S)
    assert set(got) == ({0, errno.ENOLCK} if accel == "bpf" else {0})


_WRITER: Final = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)
for number in range(40):
    database.execute("begin immediate")
    (value,) = database.execute("select value from counter").fetchone()
    database.execute("update counter set value = ?", (value + 1,))
    database.execute("commit")
"""


def test_sqlite_with_two_processes(mounted: rig.Mount) -> None:
    path = mounted.path / "database"
    with sqlite3.connect(path) as database:
        database.execute("create table counter (value integer)")
        database.execute("insert into counter values (0)")
    database.close()
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(path)]) for _ in range(2)]
    assert [writer.wait(50) for writer in writers] == [0, 0]
    database = sqlite3.connect(path)
    assert database.execute("select value from counter").fetchone() == (80,)
    assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    database.close()
