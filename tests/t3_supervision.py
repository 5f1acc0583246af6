"""What happens to a mount when its processes die, when it is ended in use, and when others change its volume.

Whatever is killed is started again, nothing that was acknowledged is lost, and what may be lost is reported.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import background
import figures
import pytest
import rig
from conftest import MountFactory
from several_mounts import stopped

from fuseclient import processes

pytestmark = pytest.mark.usefixtures("needs_mounts")

NO_TTL: Final = ("--kernel-ttl", "0")
#: Log lines that killing a process provokes.
WORKER_KILLED: Final = r"the worker \(pid \d+\) ended with -9"
#: What was written to a new file that went with its worker, as its program is told.
LOST: Final = "(write|flush|fsync): NOT_FOUND"
SERVER_KILLED: Final = r"the metaserver \(pid \d+\) ended with -9"
#: What a connection that was cut off answers.
CUT_OFF: Final = (errno.ENOTCONN, errno.ECONNABORTED, errno.ECANCELED)


def kill_worker(mounted: rig.Mount) -> None:
    """Kill the worker and return when the next one is at work."""
    restarts = figures.stats(mounted)["worker"]["restarts"]
    os.kill(mounted.process("worker").pid, signal.SIGKILL)
    rig.wait_for(lambda: figures.stats(mounted)["worker"]["restarts"] > restarts, "the worker is started again")
    rig.wait_for(lambda: figures.stats(mounted)["channel"]["worker_ready"], "the worker is ready")


@contextlib.contextmanager
def killed_while_stopped(mounted: rig.Mount) -> Iterator[None]:
    """Have the worker stand still for the body, and be killed at its end, with all requests it was sent."""
    worker = mounted.process("worker").pid
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGKILL)


def fails_with(call: Callable[[], Any], *codes: int) -> None:
    with pytest.raises(OSError) as raised:  # noqa: PT011 - the code is what is compared
        call()
    assert raised.value.errno in codes, raised.value


# The worker


class Load:
    """Threads that read what is known, ask for what is not, and make files, until the body ends."""

    def __init__(self, top: Path, files: list[Path]) -> None:
        self.made: dict[Path, bytes] = {}
        self.refused = 0
        self.faults: list[str] = []
        self.rounds = 0
        self._top = top
        self._files = files
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(each,)) for each in (self._read, self._ask, self._make)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * rig.WAIT_S)
            assert not thread.is_alive()

    def wait_for_more(self, rounds: int) -> None:
        """Wait until so much more has been done, or something has failed."""
        until = self.rounds + rounds
        rig.wait_for(lambda: self.rounds > until or self.faults, "there is load")

    def _run(self, work: Callable[[int], None]) -> None:
        number = 0
        while not self._ended.is_set() and not self.faults:
            try:
                work(number)
            except Exception as error:
                self.faults.append(f"{work.__name__}: {error!r}")
            number += 1
            self.rounds += 1

    def _read(self, number: int) -> None:
        path = self._files[number % len(self._files)]
        assert path.read_bytes() == path.name.encode()

    def _ask(self, number: int) -> None:
        assert not (self._top / f"none{number}").exists()

    def _make(self, number: int) -> None:
        """Make a file; a request in hand when a worker dies may fail, and then it may have been done or not."""
        path, data = self._top / f"made{number}", str(number).encode() * 500
        try:
            path.write_bytes(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self.refused += 1
        else:
            self.made[path] = data


def test_a_worker_killed_under_load(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel, *NO_TTL, allowed=(WORKER_KILLED, LOST))
    files = [mounted.path / f"file{number}" for number in range(30)]
    for path in files:
        path.write_bytes(path.name.encode())
    with Load(mounted.path, files) as load:
        for _ in range(3):
            load.wait_for_more(30)
            kill_worker(mounted)
    assert not load.faults
    assert load.refused <= 3
    assert figures.stats(mounted)["worker"]["restarts"] == 3
    assert mounted.process("worker").pid == figures.stats(mounted)["worker"]["pid"]
    for path, data in load.made.items():
        assert path.read_bytes() == data
    mounted.remount()
    for path, data in load.made.items():
        assert path.read_bytes() == data


def test_hits_are_answered_while_there_is_no_worker(mount: MountFactory) -> None:
    mounted = mount("bpf", *NO_TTL, allowed=(WORKER_KILLED,))
    path = mounted.path / "file"
    path.write_bytes(b"known")

    def asked() -> int:
        return sum(each["daemon"] for each in figures.stats(mounted)["requests"].values())

    def is_known() -> bool:
        before = asked()
        return path.read_bytes() == b"known" and asked() == before

    def read_in_the_absence() -> bool:
        """Kill the worker, read, and say whether there was none before and after; the next one may be too quick."""
        rig.wait_for(is_known, "the file is read without the worker")
        os.kill(mounted.process("worker").pid, signal.SIGKILL)
        rig.wait_for(lambda: figures.stats(mounted)["worker"]["pid"] is None, "there is no worker")
        before = figures.stats(mounted)
        assert path.read_bytes() == b"known"
        after = figures.stats(mounted)
        answered = [each["requests"]["OPEN"]["kernel"] for each in (before, after)]
        rig.wait_for(lambda: figures.stats(mounted)["channel"]["worker_ready"], "the worker is ready")
        return after["worker"]["pid"] is None and answered[1] > answered[0]

    assert any(read_in_the_absence() for _ in range(5))


def test_requests_of_a_dead_worker_are_repeated_or_refused(mount: MountFactory, accel: str) -> None:
    """What can be repeated is done by the next worker; a change of names is not, and may have been done or not."""
    mounted = mount(accel, allowed=(WORKER_KILLED,))
    (mounted.path / "directory").mkdir()
    (mounted.path / "other").mkdir()
    old = mounted.path / "other" / "old"
    old.touch()
    (mounted.path / "file").write_bytes(b"x" * 100_000)
    mounted.remount()  # nobody knows any more what "directory" lacks
    old.stat()  # so that the removal is its first request
    fd = os.open(mounted.path / "file", os.O_WRONLY | os.O_APPEND)  # such a write is never posted
    with killed_while_stopped(mounted):
        miss = background.until_blocked(lambda: (mounted.path / "directory" / "none").exists())
        writing = background.until_blocked(lambda: os.write(fd, b"written"))
        change = background.until_blocked(old.unlink)
    assert miss.result(rig.WAIT_S) is False
    assert writing.result(rig.WAIT_S) == len(b"written")
    fails_with(lambda: change.result(rig.WAIT_S), errno.EIO)
    channel = figures.stats(mounted)["channel"]
    assert channel["refused"] == 1
    assert channel["replayed"] >= 2
    old.unlink(missing_ok=True)
    assert os.listdir(mounted.path / "other") == []
    fails_with(lambda: os.close(fd), errno.EIO)
    assert (mounted.path / "file").read_bytes() == b"x" * 100_000 + b"written"


def test_new_files_neither_closed_nor_synced_go_with_their_worker(mount: MountFactory, accel: str) -> None:
    """Unlike on ext4: of what is listed in README. Without acceleration each file is made at once."""
    mounted = mount(accel, allowed=(WORKER_KILLED,))
    directory = mounted.path / "directory"
    directory.mkdir()
    (directory / "first").touch()
    kept, lost = (os.open(directory / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY) for name in ("kept", "lost"))
    os.fsync(kept)
    held = figures.stats(mounted)["caches"]["new_files"]["held"]
    assert held == (accel == "bpf")
    kill_worker(mounted)
    for descriptor in (kept, lost):
        fails_with(lambda descriptor=descriptor: os.close(descriptor), errno.EIO)  # type: ignore[misc]
    names = ["first", "kept"] if held else ["first", "kept", "lost"]
    rig.wait_for(lambda: (directory / "lost").exists() != bool(held), "nothing shows what is lost")
    assert sorted(os.listdir(directory)) == names
    (directory / "lost").write_bytes(b"made again")
    mounted.remount()
    assert sorted(os.listdir(directory)) == ["first", "kept", "lost"]
    assert (directory / "lost").read_bytes() == b"made again"


def test_names_removed_just_before_their_worker_dies_may_be_there_again(mount: MountFactory, accel: str) -> None:
    """With ``--durability interval``, unless they were synced. Without acceleration each is removed at once."""
    mounted = mount(accel, "--durability", "interval", allowed=(WORKER_KILLED,))
    directory = mounted.path / "directory"
    directory.mkdir()
    for name in ("synced", "lost", "kept"):
        (directory / name).write_bytes(b"data")
    synced_size(directory / "kept")
    (directory / "synced").unlink()
    synced_size(directory / "kept")
    removed = figures.stats(mounted)["caches"]["removed_names"]
    assert removed["names"] == (accel == "bpf")
    assert removed["held"] == 0
    (directory / "lost").unlink()
    kill_worker(mounted)
    possible = [["kept"], ["kept", "lost"]] if accel == "bpf" else [["kept"]]
    if accel == "bpf":
        rig.wait_for(lambda: figures.stats(mounted)["lease_remaining_s"] > 0, "all that was shown is dropped")
    names = sorted(os.listdir(directory))
    assert names in possible
    assert (directory / "lost").exists() == ("lost" in names)
    assert not (directory / "synced").exists()
    mounted.remount()
    assert sorted(os.listdir(directory)) == names


@pytest.mark.parametrize("report", [os.fsync, os.close])
def test_writes_lost_with_a_worker_are_reported_once(
    mount: MountFactory, accel: str, report: Callable[[int], None]
) -> None:
    mounted = mount(accel, allowed=(WORKER_KILLED,))
    path = mounted.path / "file"
    path.write_bytes(b"old")
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"new", 0)
    kill_worker(mounted)
    fails_with(lambda: report(fd), errno.EIO)
    if report is os.fsync:
        assert os.pwrite(fd, b"kept", 0) == 4
        os.fsync(fd)
        os.close(fd)
        mounted.remount()
        assert path.read_bytes() == b"kept"
    else:
        assert path.read_bytes() in (b"old", b"new")


def linked(path: Path, second: Path) -> os.stat_result:
    """Give a file a second name, and return what is known by it."""
    second.hardlink_to(path)
    return second.stat()


def synced_size(path: Path) -> int:
    """Have a file's directory synced, and return the file's size then."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return path.stat().st_size


@pytest.mark.parametrize("durability", ["commit", "interval"])
def test_a_new_files_first_write_is_posted_and_so_is_its_closing_if_that_commits_nothing(
    mount: MountFactory, accel: str, durability: str
) -> None:
    """Unless it has become too long for the metaserver to keep, or somebody has locked it."""
    mounted = mount(accel, "--durability", durability)
    figures.files_are_made_here(mounted, accel)
    closes_ahead = accel == "bpf" and durability == "interval"  # without acceleration the metaserver makes each file
    before = figures.stats(mounted)["channel"]
    for number in range(20):
        descriptor = os.open(mounted.path / f"{number}", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        assert os.fstat(descriptor).st_size == 0
        os.write(descriptor, b"content")
        if number == 7:
            assert os.fstat(descriptor).st_size == 7
        os.close(descriptor)
        assert (mounted.path / f"{number}").stat().st_size == 7
    after = figures.stats(mounted)["channel"]
    assert after["posted"] - before["posted"] == (20 if accel == "bpf" else 0)
    assert after["flushed"] - before["flushed"] == (20 if closes_ahead else 0)
    for number in range(3):
        descriptor = os.open(mounted.path / f"long{number}", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        os.write(descriptor, b"content")
        if number == 0:
            os.pwrite(descriptor, bytes(100_000), 7)
        elif number == 1:
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
        else:
            os.fsync(descriptor)
        os.close(descriptor)
        with open(mounted.path / f"long{number}", "rb+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert file.read()[:8] == (b"content" if number else b"content\0")
    assert figures.stats(mounted)["channel"]["flushed"] == after["flushed"]
    mounted.remount()
    assert {(mounted.path / f"{number}").read_bytes() for number in range(20)} == {b"content"}


def test_what_is_closed_ahead_of_its_worker_is_whole(mount: MountFactory) -> None:
    """Whoever asks for anything after the closing, finds the file as it was closed."""
    mounted = mount("bpf", "--durability", "interval")
    figures.files_are_made_here(mounted, "bpf")
    worker, flushed = mounted.process("worker").pid, figures.stats(mounted)["channel"]["flushed"]
    looks: dict[str, Callable[[Path], object]] = {
        "stat": lambda path: path.stat().st_size,
        "read": lambda path: len(path.read_bytes()),
        "rename": lambda path: path.rename(f"{path}-moved").stat().st_size,
        "link": lambda path: linked(path, Path(f"{path}-second")).st_size,
        "sync": synced_size,
        "list": lambda path: next(each for each in os.scandir(path.parent) if each.name == path.name).stat().st_size,
    }
    for name, look in looks.items():
        descriptor = os.open(mounted.path / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with stopped(worker):
            for number in range(10):
                os.write(descriptor, b"%d" % number)
            os.close(descriptor)
            looking = background.until_blocked(lambda look=look, name=name: look(mounted.path / name))  # type: ignore[misc]
        assert looking.result(rig.WAIT_S) == 10, name
    assert figures.stats(mounted)["channel"]["flushed"] - flushed == len(looks)
    mounted.remount()
    for path in mounted.path.iterdir():
        assert path.name == "first" or path.read_bytes() == b"0123456789"


def test_a_posted_write_waits_for_nobody_and_is_seen_by_everything_after_it(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel, allowed=(WORKER_KILLED,))
    path, second = mounted.path / "file", mounted.path / "second"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    other = os.open(mounted.path / "other", os.O_RDWR | os.O_CREAT, 0o644)
    for each in (fd, other):
        os.write(each, b"waits and is told that the next need not, ")
    posted = figures.stats(mounted)["channel"]["posted"]
    worker = mounted.process("worker").pid
    size = 0
    for look in (
        lambda: path.stat().st_size,
        lambda: os.fstat(fd).st_size,
        lambda: next(entry for entry in os.scandir(mounted.path) if entry.name == "file").stat().st_size,
        lambda: linked(path, second).st_size,
        lambda: len(path.read_bytes()),
        lambda: os.copy_file_range(fd, other, 1 << 20, 0, 0) and os.lseek(fd, 0, os.SEEK_CUR),
    ):
        if accel == "off":  # the kernel asks for an xattr before each write, and then it is the worker who answers
            os.write(fd, b"more and more ")
            size = os.lseek(fd, 0, os.SEEK_CUR)
            looking, _ = background.start(look)
        else:
            with stopped(worker):
                os.write(fd, b"more and more ")
                size = os.lseek(fd, 0, os.SEEK_CUR)
                looking = background.until_blocked(look)
        assert looking.result(rig.WAIT_S) == size
    os.fsync(fd)
    assert figures.stats(mounted)["channel"]["posted"] == posted + 6
    assert len((mounted.path / "other").read_bytes()) == size
    os.close(other)
    os.write(fd, b"is gathered, and lost")
    with killed_while_stopped(mounted):
        if accel != "off":
            os.write(fd, b"is not even looked at")
    fails_with(lambda: os.fsync(fd), errno.EIO)
    os.fsync(fd)
    os.close(fd)


def test_handles_outlive_their_worker(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel, allowed=(WORKER_KILLED,))
    path, gone = mounted.path / "file", mounted.path / "gone"
    path.write_bytes(b"0123456789")
    gone.write_bytes(b"unlinked")
    with path.open("rb", buffering=0) as file, gone.open("rb", buffering=0) as unlinked:
        listing = os.open(mounted.path, os.O_RDONLY | os.O_DIRECTORY)
        gone.unlink()
        assert file.read(3) == b"012"
        kill_worker(mounted)
        for held in (file, unlinked):
            os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() == b"3456789"
        assert unlinked.read() == b"unlinked"
        assert os.fstat(unlinked.fileno()).st_nlink == 0
        assert os.listdir(listing) == ["file"]
        os.close(listing)
    assert path.read_bytes() == b"0123456789"


# The metaserver


def test_a_killed_metaserver(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel, allowed=(SERVER_KILLED, "session"))
    kept = {mounted.path / f"file{number}": str(number).encode() * 30_000 for number in range(5)}
    for path, data in kept.items():
        path.write_bytes(data)
    before = mounted.process("metaserver").pid
    with (mounted.path / "file0").open("rb", buffering=0) as held:
        os.kill(before, signal.SIGKILL)
        assert held.read() == kept[mounted.path / "file0"]
        rig.wait_for(lambda: mounted.process("metaserver").pid != before, "the metaserver is started again")
        for path, data in kept.items():
            assert path.read_bytes() == data
        new = mounted.path / "new"
        new.write_bytes(b"made after")
        assert sorted(os.listdir(mounted.path)) == sorted([*(path.name for path in kept), "new"])
    mounted.remount()
    for path, data in {**kept, new: b"made after"}.items():
        assert path.read_bytes() == data


def test_changes_in_hand_when_the_metaserver_dies_are_done_or_refused(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel, allowed=(SERVER_KILLED, "session", "mkdir"))
    made, refused = set(), set()
    before = mounted.process("metaserver").pid
    ended = threading.Event()

    def make() -> None:
        number = 0
        while not ended.is_set():
            name = f"d{number}"
            number += 1
            try:
                (mounted.path / name).mkdir()
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                refused.add(name)
            else:
                made.add(name)

    making, _ = background.start(make)
    rig.wait_for(lambda: len(made) > 20, "directories are made")
    os.kill(before, signal.SIGKILL)
    rig.wait_for(lambda: mounted.process("metaserver").pid != before, "the metaserver is started again")
    count = len(made)
    rig.wait_for(lambda: len(made) > count + 20, "directories are made again")
    ended.set()
    making.result(rig.WAIT_S)
    assert len(refused) <= 1
    assert made <= set(os.listdir(mounted.path)) <= made | refused


# The end of a mount


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_mount_in_use(mount: MountFactory, accel: str, number: signal.Signals) -> None:
    """Who has files open is cut off; what was written is kept."""
    mounted = mount(accel)
    path = mounted.path / "file"
    record, objects = mounted.record, mounted.bpf_objects()
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    reading = os.open(path, os.O_RDONLY)
    os.write(fd, b"written")
    os.kill(record.pid, number)
    assert processes.wait_ended(record.processes, rig.WAIT_S) == []
    rig.assert_gone(record, objects)
    assert mounted.sandbox.registered() == []
    fails_with(lambda: os.fsync(fd), *CUT_OFF)
    for each in (fd, reading):
        with contextlib.suppress(OSError):
            os.close(each)
    mounted.mount()
    assert path.read_bytes() == b"written"


def test_a_directory_in_use_is_not_unmounted(sandbox: rig.Sandbox, mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    (mounted.path / "directory").mkdir()
    user = subprocess.Popen(["sleep", "infinity"], cwd=mounted.path / "directory")
    try:
        sandbox.run("umount", mounted.path).expect_error("in use")
        (mounted.path / "still").write_bytes(b"works")
    finally:
        user.kill()
        user.wait()


def test_unmounting_writes_out(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    files = {mounted.path / f"file{number}": bytes([number]) * number * 9000 for number in range(20)}
    for path, data in files.items():
        path.write_bytes(data)
    with (mounted.path / "mapped").open("w+b") as file:
        file.truncate(100_000)
        with mmap.mmap(file.fileno(), 100_000) as mapped:
            mapped[50_000:50_006] = b"mapped"
    mounted.remount()
    for path, data in files.items():
        assert path.read_bytes() == data
    assert (mounted.path / "mapped").read_bytes() == bytes(50_000) + b"mapped" + bytes(49_994)


def test_many_mounts_leave_nothing(sandbox: rig.Sandbox, mount: MountFactory) -> None:
    mounted = mount("bpf")
    mounted.unmount()
    descriptors = os.listdir("/proc/self/fd")
    for number in range(5):
        mounted.mount()
        (mounted.path / f"file{number}").write_bytes(b"x")
        mounted.unmount()
        sandbox.assert_nothing_runs()
    assert os.listdir("/proc/self/fd") == descriptors
    mounted.mount()
    assert len(os.listdir(mounted.path)) == 5


# Several mounts


def test_two_volumes_are_mounted_at_once(sandbox: rig.Sandbox, mount: MountFactory, accel: str) -> None:
    switch = rig.uring_switch()
    with contextlib.ExitStack() as ends:
        both = []
        starts = []
        for name in ("one", "two"):
            url, path = sandbox.format(f"{name}-volume"), sandbox.directory(name)
            made = rig.Mount(sandbox, url, path, accel, ())
            both.append(made)
            starts.append(sandbox.start("mount", url, path, "--accel", accel, "--log-file", made.log))
        for made, start in zip(both, starts, strict=True):
            assert start.wait(rig.WAIT_S) == 0
            ends.callback(sandbox.run, "umount", made.path, "--force")
        first, second = both
        (first.path / "name").write_bytes(b"first")
        assert not (second.path / "name").exists()
        (second.path / "name").write_bytes(b"second")
        first.unmount()
        assert (second.path / "name").read_bytes() == b"second"
        kept = second.stats()["accel"]
        second.unmount()
        assert kept == accel
    assert rig.uring_switch() == switch


@pytest.fixture
def shared(sandbox: rig.Sandbox) -> Iterator[Callable[[float], str]]:
    """A metaserver of its own with a lease; returns the URL of a volume on it."""
    started = []

    def start(lease_s: float) -> str:
        engine = f"lmdb://{sandbox.path}/engine"
        server = sandbox.start("metaserver", "--engine", engine, "--listen", "127.0.0.1:0", "--lease", str(lease_s))
        started.append(server)
        assert server.stderr is not None
        address = re.search(r"tcp:(127\.0\.0\.1:\d+)", server.stderr.readline())
        assert address is not None
        url = f"bpfuse://{address[1]}/volume"
        sandbox.run("format", url, "--store", f"file://{sandbox.path}/blocks").expect_success()
        return url

    yield start
    for server in started:
        server.terminate()
        assert server.wait(rig.WAIT_S) == 0


def _state(path: Path) -> Any:
    """Return what a name stands for: its attributes, content and xattrs."""
    try:
        status = path.lstat()
        content = sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()
        return status.st_mode, status.st_size, status.st_nlink, content, os.listxattr(path)
    except FileNotFoundError:
        return None


REMOTE_CHANGES: Final[dict[str, Callable[[Path], Any]]] = {
    "chmod": lambda path: path.chmod(0o600),
    "write": lambda path: path.write_bytes(b"other"),
    "write in place": lambda path: _rewrite(path, b"FILE"),
    "append": lambda path: path.open("ab").write(b"more"),
    "truncate": lambda path: os.truncate(path, 1),
    "unlink": lambda path: path.unlink(),
    "create": lambda path: path.with_name("absent").write_bytes(b"here"),
    "rename over": lambda path: path.with_name("second").rename(path),
    "rename": lambda path: path.rename(path.with_name("absent")),
    "link": lambda path: os.link(path, path.with_name("absent")),
    "setxattr": lambda path: os.setxattr(path, "user.x", b""),
    "mkdir": lambda path: path.with_name("absent").mkdir(),
}


def _rewrite(path: Path, data: bytes) -> None:
    """Put other bytes of the same number in a file's place, with the same times."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=times)


def test_a_change_elsewhere_is_seen_within_the_lease(
    mount: MountFactory, accel: str, shared: Callable[[float], str]
) -> None:
    """Every kind of change at once, each in a directory of its own, all of it known to the other mount before."""
    lease_s = 2.0
    url = shared(lease_s)
    here = mount(accel, url=url, name="here")
    there = mount(accel, url=url, name="there")
    names = ("file", "second", "absent")
    for kind in REMOTE_CHANGES:
        (here.path / kind).mkdir()
        for name in ("file", "second"):
            (here.path / kind / name).write_bytes(name.encode())

    def view(mounted: rig.Mount) -> dict[str, Any]:
        return {f"{kind}/{name}": _state(mounted.path / kind / name) for kind in REMOTE_CHANGES for name in names}

    rig.wait_for(lambda: view(there) == view(here), "the other mount sees all of it")
    before = view(there)
    for kind, change in REMOTE_CHANGES.items():
        change(here.path / kind / "file")
    changed = time.monotonic()
    expected = view(here)
    assert all(any(before[f"{kind}/{name}"] != expected[f"{kind}/{name}"] for name in names) for kind in REMOTE_CHANGES)
    rig.wait_for(lambda: view(there) == expected, "the other mount sees every change", lease_s + 3)
    assert view(there) == expected
    assert time.monotonic() - changed < lease_s + 3
    if accel == "bpf":
        assert figures.answers(there, "LOOKUP").kernel > 0


def test_a_new_worker_after_the_lease_has_no_old_pages(
    mount: MountFactory, accel: str, shared: Callable[[float], str]
) -> None:
    """A worker that dies takes with it what it knew of the kernel's caches; the lease may have run out meanwhile."""
    url = shared(1.0)
    here = mount(accel, url=url, name="here", allowed=(WORKER_KILLED,))
    there = mount(accel, url=url, name="there")
    path = here.path / "file"
    path.write_bytes(b"old")
    with path.open("rb"):  # the kernel keeps the inode, and with it the pages
        assert path.read_bytes() == b"old"
        with killed_while_stopped(here):
            ended = time.monotonic() + 1.0
            _rewrite(there.path / "file", b"new")
            rig.wait_for(lambda: time.monotonic() > ended, "the lease runs out")
        rig.wait_for(lambda: figures.stats(here)["worker"]["restarts"] == 1, "the worker is started again")
        rig.wait_for(lambda: path.read_bytes() == b"new", "the change is seen", 5)
