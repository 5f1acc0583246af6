"""The fault scenarios of the specification on real mounts of a real metaserver: what is killed, stopped and cut off.

A writer that others hold up waits for one lease at most; nobody shows what is out of date after the writer's call has
returned; nothing that was acknowledged is lost; and what is lost is reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import background
import figures
import network
import pytest
import rig
import several_mounts
from several_mounts import LEASE_S, SLACK_S, WORKER_KILLED, Cluster, kill, stopped, timed

from fuseclient.worker import rpc
from metaserver import wire

pytestmark = pytest.mark.usefixtures("needs_mounts")

#: Every request comes to BPF: the kernel's own caches keep nothing.
NO_TTL: Final = ("--kernel-ttl", "0")
#: Log lines of a worker whose session was ended meanwhile, or whose metaserver is away.
REFUSED: Final = ("STALE_SESSION", "the session was lost while", "no connection to tcp:", WORKER_KILLED)


@pytest.fixture
def cluster(sandbox: rig.Sandbox) -> Iterator[Cluster]:
    """A metaserver that gives short leases."""
    with several_mounts.cluster(sandbox) as made:
        yield made


def error_of(call: Callable[[], Any]) -> int:
    """Return the errno that a call fails with; 0 if it does not fail."""
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


def answered_by_bpf(mounted: rig.Mount, path: Path) -> bool:
    """Look at a file; say whether the worker was asked nothing."""

    def asked() -> int:
        return sum(each["daemon"] for each in figures.stats(mounted)["requests"].values())

    before = asked()
    os.stat(path)
    path.read_bytes()
    return asked() == before


def know(mounted: rig.Mount, path: Path, content: bytes) -> None:
    """Look at a file until every cache has it."""
    for _ in range(3):
        assert os.stat(path).st_size == len(content)
        assert path.read_bytes() == content
    if mounted.accel == "bpf" and len(content) <= 4096:
        rig.wait_for(lambda: answered_by_bpf(mounted, path), "BPF knows it all")


def overwrite(path: Path, content: bytes) -> None:
    """Write without making the file empty first, so that whoever reads it sees the one content or the other."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, content, 0)
    finally:
        os.close(fd)


def let_pass(seconds: float) -> None:
    """Return when so much time has passed."""
    until = time.monotonic() + seconds
    rig.wait_for(lambda: time.monotonic() > until, f"{seconds} s pass")


class Watcher:
    """A thread that reads a file without end, and what it saw when: (begun, ended, content)."""

    def __init__(self, path: Path) -> None:
        self.seen: list[tuple[float, float, bytes]] = []
        self._path = path
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        rig.wait_for(lambda: self.seen, "the file is read")
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(rig.WAIT_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._ended.is_set():
            begun = time.monotonic()
            with contextlib.suppress(OSError):  # cut off for too long
                os.stat(self._path)
                content = self._path.read_bytes()
                self.seen.append((begun, time.monotonic(), content))

    def wait_for(self, content: bytes) -> None:
        """Wait until this is read."""
        rig.wait_for(lambda: self.seen[-1][2] == content, f"{content!r} is read")

    def wait_for_more(self, count: int) -> None:
        """Wait until so many reads more are done."""
        until = len(self.seen) + count
        rig.wait_for(lambda: len(self.seen) >= until, "the file is read on")

    def check(self, before: bytes, after: bytes, written: float) -> None:
        """Fail if what was written at a moment was not seen by a read that began later."""
        assert {content for _, _, content in self.seen} <= {before, after}
        late = [begun - written for begun, _, content in self.seen if content == before and begun > written]
        assert not late, f"what was is read {late} s after it was changed"


# 1


def test_scenario_01_a_holder_that_is_killed(cluster: Cluster, accel: str) -> None:
    holder, other = cluster.pair(accel)
    (holder.path / "kept").write_bytes(b"acknowledged")
    with (holder.path / "synced").open("wb") as file:
        file.write(b"synced" * 50_000)
        file.flush()
        os.fsync(file.fileno())
        know(holder, holder.path / "kept", b"acknowledged")
        kill(holder, "channel", "worker")
        with contextlib.suppress(OSError):
            file.close()
    assert timed(lambda: (other.path / "kept").write_bytes(b"changed")) < LEASE_S + SLACK_S
    assert (other.path / "synced").read_bytes() == b"synced" * 50_000
    cluster.sandbox.run("umount", holder.path).expect_success()


# 2


def test_scenario_02_a_worker_that_stands_still_past_its_deadline(cluster: Cluster, accel: str) -> None:
    """The kernel answers for it until the deadline, and not after; when it goes on it shows what is new."""
    writer, holder = cluster.pair(accel, *NO_TTL, allowed=REFUSED)
    (writer.path / "file").write_bytes(b"before")
    know(holder, holder.path / "file", b"before")
    with Watcher(holder.path / "file") as watcher:
        with stopped(holder.process("worker").pid):
            began = len(watcher.seen)
            assert timed(lambda: overwrite(writer.path / "file", b"after!")) < LEASE_S + SLACK_S
            written = time.monotonic()
            if accel == "bpf":
                assert len(watcher.seen) > began, "BPF answers while the worker stands still"
            with pytest.raises(TimeoutError):
                background.until_blocked(lambda: os.stat(holder.path / "file")).result(LEASE_S / 4)
            if accel == "bpf":
                assert figures.outcome(holder, "miss_deadline") > 0
        watcher.wait_for(b"after!")
    watcher.check(b"before", b"after!", written)
    know(holder, holder.path / "file", b"after!")


def unread(port: int) -> int:
    """Return how many bytes the listeners and connections of a port have not read yet."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[4].partition(":")[2], 16) for row in rows if row[1].endswith(f":{port:04X}"))


def test_scenario_02_a_late_change_is_refused(cluster: Cluster, accel: str) -> None:
    """It is sent in time, and read when the lease of who sent it has run out and others have gone on."""
    writer, late = cluster.pair(accel, allowed=REFUSED)
    (writer.path / "file").touch()
    fd = os.open(late.path / "file", os.O_RDONLY)
    try:
        with stopped(late.process("worker").pid):
            with stopped(cluster.server.pid):
                changing = background.until_blocked(lambda: os.fchmod(fd, 0o700))
                os.kill(late.process("worker").pid, signal.SIGCONT)
                rig.wait_for(lambda: unread(cluster.server.port), "the change is sent")
                os.kill(late.process("worker").pid, signal.SIGSTOP)
                let_pass(LEASE_S)
            assert timed(lambda: os.chmod(writer.path / "file", 0o711)) < LEASE_S + SLACK_S
        assert isinstance(changing.exception(rig.WAIT_S), OSError)
        for each in (late, writer):
            assert os.stat(each.path / "file").st_mode & 0o777 == 0o711
    finally:
        os.close(fd)


# 3


def test_scenario_03_a_partition(sandbox: rig.Sandbox, accel: str) -> None:
    """Both sides live on. Who is cut off shows nothing old once the others' change has returned, and recovers."""
    with network.network() as net:
        net.add("near")
        net.add("far")
        with several_mounts.cluster(sandbox, host=network.MIDDLE, prefix=net.prefix("middle")) as cluster:
            near = cluster.mount("near", accel, prefix=net.prefix("near"))
            far = cluster.mount("far", accel, allowed=REFUSED, prefix=net.prefix("far"))
            (near.path / "file").write_bytes(b"before")
            know(far, far.path / "file", b"before")
            with Watcher(far.path / "file") as watcher:
                net.unplug("far")
                began = len(watcher.seen)
                assert timed(lambda: overwrite(near.path / "file", b"after!")) < LEASE_S + SLACK_S
                written = time.monotonic()
                if accel == "bpf":
                    assert len(watcher.seen) > began, "what is cached is answered until the lease ends"
                net.plug_in("far")
                watcher.wait_for(b"after!")
            watcher.check(b"before", b"after!", written)
            (far.path / "file").write_bytes(b"healed")
            assert (near.path / "file").read_bytes() == b"healed"


# 7


def test_scenario_07_the_metaserver_is_killed_in_the_middle(cluster: Cluster, accel: str) -> None:
    """Every change is made once, and answered as it was made: no EEXIST, no ENOENT for what was one's own doing."""
    changing, other = cluster.pair(accel)
    top = changing.path / "top"
    top.mkdir()
    made: list[str] = []
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            name = f"d{len(made)}"
            os.mkdir(top / f"{name}-new")
            os.rename(top / f"{name}-new", top / name)
            os.mkdir(top / "passing")
            os.rmdir(top / "passing")
            made.append(name)

    def enough(count: int) -> bool:
        return len(made) > count or running.done()

    running, _ = background.start(change)
    try:
        for turn in range(3):
            rig.wait_for(functools.partial(enough, 3 * turn + 3), "changes are made")
            cluster.server.restart()
    finally:
        ended.set()
    running.result(rig.WAIT_S)
    assert sorted(os.listdir(top)) == sorted(made)
    assert sorted(os.listdir(other.path / "top")) == sorted(made)


# 8


def test_scenario_08_the_metaserver_is_started_again_under_live_holders(cluster: Cluster, accel: str) -> None:
    """Both come back with their sessions; what one had cached it drops before the other's next change returns."""
    writer, holder = cluster.pair(accel, *NO_TTL)
    path = writer.path / "file"
    path.write_bytes(b"0")
    know(holder, holder.path / "file", b"0")
    sessions = [figures.stats(each)["caches"]["session"] for each in (writer, holder)]
    for turn in range(1, 4):
        before, after = b"%d" % (turn - 1), b"%d" % turn
        know(holder, holder.path / "file", before)
        with Watcher(holder.path / "file") as watcher:
            cluster.server.kill()
            if accel == "bpf":
                watcher.wait_for_more(10)
            cluster.server.start()
            overwrite(path, after)
            written = time.monotonic()
            watcher.wait_for(after)
        watcher.check(before, after, written)
    assert sessions == [figures.stats(each)["caches"]["session"] for each in (writer, holder)]


def test_scenario_08_what_is_open_is_dropped_with_all_else(sandbox: rig.Sandbox, accel: str) -> None:
    """After a crash of the metaserver all is dropped: the attributes, too, of what no name need be looked up for."""
    with several_mounts.cluster(sandbox, lease_s=20.0) as cluster:
        writer, holder = cluster.pair(accel)
        (writer.path / "directory").mkdir()
        fd = os.open(holder.path / "directory", os.O_PATH | os.O_DIRECTORY)
        try:
            assert (os.fstat(fd).st_nlink, os.stat(holder.path).st_nlink) == (2, 3)
            cluster.server.restart()
            (writer.path / "directory" / "below").mkdir()
            (writer.path / "more").mkdir()
            assert (os.fstat(fd).st_nlink, os.stat(holder.path).st_nlink) == (3, 4)
        finally:
            os.close(fd)


# 14


async def _ignore_breaks(address: str, looked: threading.Event, changed: threading.Event) -> wire.ErrorCode | None:
    """Hold the root directory, ignore what comes, and return how a change is refused that is made after ``changed``."""
    connection = await rpc.connect(address)
    connection.on_break(lambda told: None)
    try:
        opened = await connection.call(wire.OpenSession(several_mounts.VOLUME, "deaf", None), wire.SessionOpened)
        found = await connection.call(wire.Lookup(wire.ROOT_INO, b"file"), wire.Found)
        looked.set()
        renewing = asyncio.create_task(connection.call(wire.Renew(opened.version), wire.Renewed))
        await asyncio.to_thread(changed.wait, rig.WAIT_S)
        await asyncio.wait({renewing})
        try:
            await connection.call(wire.SetAttributes(found.attributes.ino, mode=0o700), wire.Changed)
        except rpc.Refused as refused:
            return refused.code
        return None
    finally:
        connection.abort()


def test_scenario_14_a_client_that_ignores_breaks(cluster: Cluster) -> None:
    """It is evicted when its lease has run out, and fenced: its later change is refused."""
    writer = cluster.mount("a", "off")
    (writer.path / "file").write_bytes(b"before")
    looked, changed = threading.Event(), threading.Event()
    deaf, _ = background.start(lambda: asyncio.run(_ignore_breaks(cluster.server.address, looked, changed)))
    assert looked.wait(rig.WAIT_S)
    assert LEASE_S / 2 < timed(lambda: os.chmod(writer.path / "file", 0o711)) < LEASE_S + SLACK_S
    changed.set()
    assert deaf.result(rig.WAIT_S) is wire.ErrorCode.STALE_SESSION
    assert os.stat(writer.path / "file").st_mode & 0o777 == 0o711


def test_scenario_14_a_mount_that_was_evicted_comes_back_with_empty_caches(cluster: Cluster, accel: str) -> None:
    """What it would not drop it has no more; nor what was changed without a word to it once it was evicted."""
    writer, holder = cluster.pair(accel, allowed=REFUSED)
    names = ("first", "second", "large")
    for name in names:
        (writer.path / name).write_bytes(b"before" * 20_000)
        know(holder, holder.path / name, b"before" * 20_000)
    epoch = figures.stats(holder)["epoch"]
    with stopped(holder.process("worker").pid):
        assert timed(lambda: (writer.path / "first").write_bytes(b"after")) < LEASE_S + SLACK_S
        for name in names[1:]:
            (writer.path / name).write_bytes(b"after")
    for name in names:
        assert os.stat(holder.path / name).st_size == 5
        assert (holder.path / name).read_bytes() == b"after"
    assert accel == "off" or figures.stats(holder)["epoch"] > epoch


# 17


def test_scenario_17_a_worker_killed_with_what_it_has_not_stored(cluster: Cluster, accel: str) -> None:
    """What was synced is there, at every mount; what was not is reported once by close or fsync, for each handle."""
    holder, other = cluster.pair(accel, allowed=(WORKER_KILLED,))
    synced, closed, reported = (os.open(holder.path / name, os.O_RDWR | os.O_CREAT) for name in ("s", "c", "r"))
    for fd in (synced, closed, reported):
        os.write(fd, b"synced" * 50_000)
        os.fsync(fd)
    for fd in (closed, reported):
        os.pwrite(fd, b"LOST", 0)
    restarts = figures.stats(holder)["worker"]["restarts"]
    kill(holder, "worker")
    for name in ("s", "c", "r"):
        assert (other.path / name).read_bytes() == b"synced" * 50_000
    rig.wait_for(lambda: figures.stats(holder)["worker"]["restarts"] > restarts, "the worker is started again")
    assert error_of(lambda: os.fsync(reported)) == errno.EIO
    assert error_of(lambda: os.fsync(reported)) == 0
    assert error_of(lambda: os.close(closed)) == errno.EIO
    os.pwrite(reported, b"again!", 0)
    os.close(reported)
    with contextlib.suppress(OSError):  # that nothing of it was lost the next worker cannot know
        os.close(synced)
    for each in (holder, other):
        assert (each.path / "s").read_bytes() == b"synced" * 50_000
        assert (each.path / "c").read_bytes() == b"synced" * 50_000
        assert (each.path / "r").read_bytes() == b"again!" + b"synced" * 49_999


def test_scenario_17_a_worker_killed_with_a_break_that_it_has_not_answered(sandbox: rig.Sandbox, accel: str) -> None:
    """The next worker drops what is asked for, and says so; the writer waits for that, and not for the lease."""
    with several_mounts.cluster(sandbox, lease_s=60.0) as cluster:
        writer, holder = cluster.pair(accel, allowed=(WORKER_KILLED,))
        (writer.path / "file").write_bytes(b"before")
        know(holder, holder.path / "file", b"before")
        with stopped(holder.process("worker").pid):
            changing = background.until_blocked(lambda: overwrite(writer.path / "file", b"after!"))
            kill(holder, "worker")
        changing.result(rig.WAIT_S)
        know(holder, holder.path / "file", b"after!")


# 18


def test_scenario_18_a_channel_that_is_killed(cluster: Cluster, accel: str) -> None:
    """When another's change has returned, nothing answers with what was before it, the kernel's own caches neither;
    the next mount begins clean.
    """
    writer, holder = cluster.pair(accel)
    (writer.path / "file").write_bytes(b"before")
    know(holder, holder.path / "file", b"before")
    kill(holder, "channel")
    assert timed(lambda: overwrite(writer.path / "file", b"after!")) < LEASE_S + SLACK_S
    assert error_of(lambda: os.stat(holder.path / "file")) == errno.ENOTCONN
    assert error_of(lambda: (holder.path / "file").read_bytes()) == errno.ENOTCONN
    cluster.sandbox.run("umount", holder.path).expect_success()
    holder.mount()
    know(holder, holder.path / "file", b"after!")
