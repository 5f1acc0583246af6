"""Attributes of files that a mount makes, while they are open: what is said of them is true, and stays so.

Where the mount makes files by itself, they are changed and told without a word of the worker.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import background
import figures
import pytest
import rig
from conftest import MountFactory
from several_mounts import stopped

pytestmark = pytest.mark.usefixtures("needs_mounts")


def made(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)


def told(status: os.stat_result) -> tuple[int, ...]:
    """What is compared of a file: all that a program may know."""
    return (
        status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_size, status.st_blocks,
        status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns,
    )  # fmt: skip


def opened(path: Path) -> os.stat_result:
    with path.open("rb") as file:
        return os.fstat(file.fileno())


def by_path(change: Callable[[Path], object]) -> Callable[[int, Path], object]:
    return lambda fd, path: change(path)


#: What is done to a new file that is open.
STEPS: dict[str, Callable[[int, Path], object]] = {
    "write": lambda fd, path: os.write(fd, b"0123456789"),
    "write again": lambda fd, path: os.pwrite(fd, b"abc", 2),
    "write more": lambda fd, path: os.pwrite(fd, bytes(5000), 10),
    "write far": lambda fd, path: os.pwrite(fd, b"end", 20_000),
    "fchmod": lambda fd, path: os.fchmod(fd, 0o4751),
    "fchown": lambda fd, path: os.fchown(fd, 5, 6),
    "futimens": lambda fd, path: os.utime(fd, ns=(10**18 + 1, 10**18 + 2)),
    "long ago": lambda fd, path: os.utime(fd, ns=(-5, -(10**18) - 7)),
    "far away": lambda fd, path: os.utime(fd, (2**40, 2**40)),
    "touch": lambda fd, path: os.utime(fd),
    "chmod": by_path(lambda path: path.chmod(0o600)),
    "sgid": lambda fd, path: os.fchmod(fd, 0o6755),
    "cut": lambda fd, path: os.ftruncate(fd, 4),
    "fallocate": lambda fd, path: os.posix_fallocate(fd, 0, 9000),
    "xattr": lambda fd, path: os.setxattr(fd, "user.name", b"value"),
    "sync": lambda fd, path: os.fsync(fd),
    "close a copy": lambda fd, path: os.close(os.dup(fd)),
    "append": by_path(lambda path: path.open("ab").write(b"appended")),
    "link": by_path(lambda path: Path(f"{path}-second").hardlink_to(path)),
    "copy": lambda fd, path: os.copy_file_range(fd, fd, 3, 0, 6),
    "read": lambda fd, path: os.pread(fd, 100, 0),
    "write through another": by_path(lambda path: path.open("r+b").write(b"other")),
}
#: Programs: each a list of steps.
PROGRAMS: dict[str, list[str]] = {
    "tar": ["write", "write more", "futimens", "fchown", "fchmod"],
    "rsync": ["fchmod", "write", "close a copy", "futimens"],
    "times": ["futimens", "write", "long ago", "write again", "touch", "far away", "write"],
    "setuid": ["write", "fchmod", "fchown", "sgid", "fchown", "write again"],
    "hole": ["fchmod", "write", "write far", "futimens", "write again"],
    "sizes": ["write", "fchmod", "cut", "futimens", "write more", "fallocate", "fchown"],
    "xattrs": ["write", "xattr", "fchmod", "write more"],
    "synced": ["write", "fchmod", "sync", "futimens", "write more", "sync", "fchown"],
    "shared": ["write", "fchmod", "append", "chmod", "write through another", "futimens"],
    "linked": ["write", "futimens", "link", "fchmod", "write"],
    "copied": ["write", "fchmod", "copy", "futimens", "read", "chmod"],
}


@pytest.mark.parametrize("durability", ["commit", "interval"])
def test_what_is_told_of_a_new_file_stays_true(mount: MountFactory, accel: str, durability: str) -> None:
    """To the nanosecond: while it is open, when it is closed, and when everybody has forgotten it."""
    mounted = mount(accel, "--durability", durability)
    figures.files_are_made_here(mounted, accel)
    before = figures.stats(mounted)["channel"]
    known: dict[str, tuple[int, ...]] = {}
    for name, steps in PROGRAMS.items():
        path = mounted.path / name
        fd = made(path)
        ctime_ns = os.fstat(fd).st_ctime_ns
        for step in steps:
            STEPS[step](fd, path)
            status = os.fstat(fd)
            changes = step not in ("sync", "close a copy", "read")
            assert (status.st_ctime_ns > ctime_ns) == changes, (name, step)
            assert told(status) == told(path.stat()) == told(os.fstat(fd)), (name, step)
            ctime_ns = status.st_ctime_ns
        os.close(fd)
        known[name] = told(status)
        assert told(path.stat()) == known[name], name
    after = figures.stats(mounted)["channel"]
    assert (after["changed"] - before["changed"] > 10) == (accel == "bpf")
    assert (after["told"] - before["told"] > 10) == (accel == "bpf")
    mounted.remount()
    for name, expected in known.items():
        found = told((mounted.path / name).stat())
        if name == "hole":  # a small file is stored whole, which is known when it is
            found, expected = (each[:5] + each[6:] for each in (found, expected))
        assert found == expected, name


@pytest.mark.parametrize("durability", ["commit", "interval"])
def test_what_is_told_of_a_closed_file_stays_true(mount: MountFactory, accel: str, durability: str) -> None:
    """As programs put new files in place: changed and renamed by name, as soon as they are closed."""
    mounted = mount(accel, "--durability", durability)
    figures.files_are_made_here(mounted, accel)
    top, other = mounted.path / "top", mounted.path / "other"
    top.mkdir()
    other.mkdir()
    (top / "taken").write_bytes(b"taken")
    changes: list[Callable[[Path], object]] = [
        lambda path: path.chmod(0o4640),
        lambda path: os.chown(path, 5, 6),
        lambda path: os.utime(path, ns=(-5, 10**18 + 7)),
        lambda path: path.rename(path.with_name("renamed")),
        lambda path: os.truncate(path.with_name("renamed"), 5),
        lambda path: path.with_name("renamed").rename(path.with_name("taken")),
        lambda path: path.with_name("taken").rename(other / path.name),
    ]
    known: dict[int, tuple[Path, bytes, tuple[int, ...], tuple[int, ...]]] = {}
    for count in range(1, len(changes) + 1):
        directory = top / str(count)
        directory.mkdir()
        path = directory / ".file"
        path.write_bytes(b"content")
        directory_ns, ctime_ns = directory.stat().st_mtime_ns, path.stat().st_ctime_ns
        for change in changes[:count]:
            change(path)
            (found,) = [*directory.iterdir(), *other.glob(path.name)]
            status = found.stat()
            assert status.st_ctime_ns > ctime_ns
            ctime_ns = status.st_ctime_ns
        assert (directory.stat().st_mtime_ns > directory_ns) == (count > 3)
        known[count] = (found, found.read_bytes(), told(status), told(directory.stat()))
        if count == len(changes):
            assert not list(directory.iterdir())
        again = path if count > 3 else directory / ".next"
        again.write_bytes(b"the next")
        again.rename(directory / "next")
    mounted.remount()
    for count, (found, content, file, directory_before) in known.items():
        directory = top / str(count)
        assert (found.read_bytes(), told(found.stat())) == (content, file), count
        assert told(directory.stat())[:5] == directory_before[:5], count
        assert (directory / "next").read_bytes() == b"the next"
        assert (directory / ".file").exists() == (count <= 3)


def test_files_are_what_they_are_on_ext4(mount: MountFactory, accel: str, tmp_path: Path) -> None:
    """But for times, which nobody chose, and blocks."""
    mounted = mount(accel)
    figures.files_are_made_here(mounted, accel)

    def outcome(directory: Path, steps: list[str], name: str) -> tuple[object, ...]:
        path = directory / name
        fd = made(path)
        for step in steps:
            STEPS[step](fd, path)
        status = os.fstat(fd)
        os.close(fd)
        return (*told(status)[:5], path.read_bytes())

    for name, steps in PROGRAMS.items():
        assert outcome(mounted.path, steps, name) == outcome(tmp_path, steps, name), name


def test_a_change_waits_for_nobody_and_is_seen_by_all(mount: MountFactory) -> None:
    """Whoever asks in another way than by the open file waits for the worker, which has taken the changes by then."""
    mounted = mount("bpf")
    figures.files_are_made_here(mounted, "bpf")
    worker = mounted.process("worker").pid
    looks: dict[str, Callable[[Path], os.stat_result]] = {
        "rename": lambda path: path.rename(f"{path}-moved").stat(),
        "list": lambda path: next(each for each in os.scandir(path.parent) if each.name == path.name).stat(),
        "open": opened,
        "unlink": lambda path: path.unlink() or mounted.path.stat(),  # type: ignore[func-returns-value]
    }
    for name, look in looks.items():
        fd = made(mounted.path / name)
        with stopped(worker):
            os.write(fd, b"content")
            os.fchmod(fd, 0o604)
            os.utime(fd, ns=(1, 2))
            expected = os.fstat(fd)
            looking = background.until_blocked(lambda look=look, name=name: look(mounted.path / name))  # type: ignore[misc]
        seen = looking.result(rig.WAIT_S)
        if name == "unlink":
            seen = os.fstat(fd)
            assert seen.st_nlink == 0
        assert stat.S_IMODE(seen.st_mode) == 0o604, name
        assert (seen.st_size, seen.st_mtime_ns) == (7, 2) == (expected.st_size, expected.st_mtime_ns), name
        os.fchmod(fd, 0o640)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o640, name
        os.close(fd)


def test_what_a_dead_worker_had_of_a_new_file_is_gone_with_the_file(mount: MountFactory) -> None:
    mounted = mount("bpf", allowed=(r"the worker \(pid \d+\) ended with -9",))
    figures.files_are_made_here(mounted, "bpf")
    kept = made(mounted.path / "kept")
    os.fchmod(kept, 0o600)
    os.fsync(kept)
    lost = made(mounted.path / "lost")
    os.fchmod(lost, 0o600)
    restarts = figures.stats(mounted)["worker"]["restarts"]
    os.kill(mounted.process("worker").pid, signal.SIGKILL)
    rig.wait_for(lambda: figures.stats(mounted)["worker"]["restarts"] > restarts, "the worker is started again")
    for change in (lambda: os.fchmod(lost, 0o640), lambda: os.fstat(lost)):
        with pytest.raises(OSError, match="Stale"):
            change()
    os.fchmod(kept, 0o640)
    assert stat.S_IMODE((mounted.path / "kept").stat().st_mode) == 0o640
    for fd in (kept, lost):
        with contextlib.suppress(OSError):
            os.close(fd)
