"""Locks between the mounts of a volume: what they protect, and what is left of them when something dies."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import rig
import several_mounts
from lock_programs import WHOLE, Programs
from several_mounts import LEASE_S, SLACK_S, WORKER_KILLED, Cluster, kill, stopped, timed

pytestmark = pytest.mark.usefixtures("needs_mounts")

#: Adds to a number in a file, through one handle and without a word of fsync.
_COUNTER: Final = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR)
lock = fcntl.flock if sys.argv[2] == "flock" else fcntl.lockf
for _ in range(int(sys.argv[3])):
    lock(file, fcntl.LOCK_EX)
    number = int(os.pread(file, 100, 0))
    os.pwrite(file, b"%8d" % (number + 1), 0)
    lock(file, fcntl.LOCK_UN)
"""
_EACH: Final = 10


@pytest.fixture
def cluster(sandbox: rig.Sandbox) -> Iterator[Cluster]:
    """A metaserver that gives short leases."""
    with several_mounts.cluster(sandbox) as made:
        yield made


@contextlib.contextmanager
def programs_on(*mounts: rig.Mount) -> Iterator[list[Programs]]:
    """Programs that have the same file open on each mount."""
    (mounts[0].path / "file").write_bytes(b"before")
    started = [Programs(mounted.path / "file") for mounted in mounts]
    try:
        yield started
    finally:
        for each in started:
            each.end()


def test_locks_between_mounts(cluster: Cluster, accel: str) -> None:
    """Several cases on one pair of mounts, which takes longer to make than they take."""
    mounts = cluster.pair(accel, allowed=(WORKER_KILLED, "no connection to tcp:"))
    with programs_on(*mounts) as (here, there):
        for how in ("flock", "fcntl"):
            _no_update_is_lost(mounts, how)
        _excluded(here, there)
        _deadlock(mounts[0], here, there)
        _holder_killed(here, there)
        _waiter_killed(here, there)
        _metaserver_killed(cluster, here, there)
        _mount_killed(cluster, here, there)


def _no_update_is_lost(mounts: tuple[rig.Mount, rig.Mount], how: str) -> None:
    (mounts[0].path / "counter").write_bytes(b"%8d" % 0)
    adders = [
        subprocess.Popen([sys.executable, "-c", _COUNTER, str(mounted.path / "counter"), how, str(_EACH)])
        for mounted in mounts * 2
    ]
    assert [adder.wait(50) for adder in adders] == [0] * 4
    assert [int((mounted.path / "counter").read_bytes()) for mounted in mounts] == [4 * _EACH] * 2


def _excluded(here: Programs, there: Programs) -> None:
    one, two = here.start(), there.start()
    for kind in ("flock", "posix", "ofd"):
        assert one.do(kind, "f", "ex", *WHOLE) == 0
        assert two.do(kind, "f", "sh", *WHOLE) == errno.EAGAIN
        assert one.do(kind, "f", "un", *WHOLE) == 0
        assert two.do(kind, "f", "sh", *WHOLE) == 0
        assert two.do(kind, "f", "un", *WHOLE) == 0
    one.end()
    two.end()


def _deadlock(mounted: rig.Mount, here: Programs, there: Programs) -> None:
    one, two = here.start(), there.start()
    assert one.do("posix", "f", "ex", 0, 1) == 0
    assert two.do("posix", "f", "ex", 1, 1) == 0
    one.tell("posix", "f", "ex", 1, 1, "wait")
    rig.wait_for(lambda: _figures(mounted)["waiting"], "the metaserver knows that it waits")
    assert two.do("posix", "f", "ex", 0, 1, "wait") == errno.EDEADLK
    two.end()
    assert one.answer() == 0
    one.end()


def _holder_killed(here: Programs, there: Programs) -> None:
    one, two = here.start(), there.start()
    assert one.do("flock", "f", "ex") == 0
    assert one.do("posix", "f", "ex", *WHOLE) == 0
    one.end()
    assert two.do("flock", "f", "ex", "wait") == 0
    assert two.do("posix", "f", "ex", *WHOLE, "wait") == 0
    two.end()


def _waiter_killed(here: Programs, there: Programs) -> None:
    """It is killed as soon as it waits, when the kernel may forget to tell of it."""
    one, two, three = here.start(), there.start(), there.start()
    assert one.do("posix", "f", "ex", *WHOLE, "wait") == 0
    two.tell("posix", "f", "ex", *WHOLE, "wait")
    rig.wait_for(two.sleeps, "it waits")
    two.end()
    one.end()
    assert three.do("posix", "f", "ex", *WHOLE, "wait") == 0
    three.end()


def _metaserver_killed(cluster: Cluster, here: Programs, there: Programs) -> None:
    """Nobody gets a lock of somebody else, and who waited gets it in the end."""
    one, two, three = here.start(), there.start(), there.start()
    assert one.do("posix", "f", "ex", 0, 10) == 0
    assert one.do("flock", "f", "sh") == 0
    three.tell("flock", "f", "ex", "wait")
    rig.wait_for(three.sleeps, "it waits")
    cluster.server.restart()
    assert two.do("posix", "f", "sh", 5, 1) == errno.EAGAIN
    assert two.do("flock", "f", "ex") == errno.EAGAIN
    assert two.do("posix", "f", "ex", 10, 1) == 0
    one.end()
    assert three.answer() == 0
    assert two.do("posix", "f", "ex", 0, 10, "wait") == 0
    two.end()
    three.end()


def _mount_killed(cluster: Cluster, here: Programs, there: Programs) -> None:
    """Its locks are free after its lease."""
    one, two = here.start(), there.start()
    assert one.do("posix", "f", "ex", *WHOLE) == 0
    assert two.do("posix", "f", "ex", *WHOLE) == errno.EAGAIN
    kill(cluster.mounts[0], "channel", "worker")
    assert timed(lambda: two.do("posix", "f", "ex", *WHOLE, "wait")) < LEASE_S + SLACK_S
    one.end()
    cluster.sandbox.run("umount", cluster.mounts[0].path).expect_success()


def test_who_has_lost_its_lock_learns_it_and_writes_nothing(cluster: Cluster, accel: str) -> None:
    lost = ("were lost with the session", "LOST_LOCK", "STALE_SESSION", "the session was lost", "no connection to")
    holder, other = cluster.pair(accel, allowed=lost)
    with programs_on(holder, other) as (here, there):
        one, two = here.start(), there.start()
        assert one.do("posix", "f", "ex", *WHOLE) == 0
        assert one.do("write", "f", "too late") == 0
        with stopped(holder.process("worker").pid):
            assert two.do("posix", "f", "ex", *WHOLE, "wait") == 0
            assert two.do("write", "f", "theirs") == 0
            assert two.do("posix", "f", "un", *WHOLE) == 0
        rig.wait_for(lambda: _figures(holder).get("lost"), "it knows what it has lost")
        assert one.do("posix", "f", "ex", *WHOLE) == errno.EIO
        assert one.do("write", "f", "never") == errno.EIO
        assert one.do("close", "f") in (0, errno.EIO)
        assert one.do("open", "f", here.path, "w") == 0
        assert one.do("posix", "f", "ex", *WHOLE) == 0
        assert [each.path.read_bytes() for each in (here, there)] == [b"theirs"] * 2
        assert one.do("write", "f", "again!") == 0
        assert one.do("posix", "f", "un", *WHOLE) == 0
        assert there.path.read_bytes() == b"again!"


def _figures(mounted: rig.Mount) -> dict[str, int]:
    locks: dict[str, int] = mounted.stats()["caches"].get("locks", {})
    return locks


def test_local_locks_are_not_shared(cluster: Cluster) -> None:
    with programs_on(*cluster.pair("off", "--locks", "local")) as (here, there):
        one, two = here.start(), there.start()
        assert one.do("flock", "f", "ex") == 0
        assert two.do("flock", "f", "ex") == 0
        assert Path(here.path).read_bytes() == b"before"
