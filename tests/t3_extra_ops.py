"""fallocate, SEEK_DATA and SEEK_HOLE, copy_file_range and O_TMPFILE on real mounts, compared with a plain directory.

The random sequences run on both side by side. What can be compared of data and holes depends on the sequence: a plain
directory has holes in blocks of 4 KiB, and copies them as data.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import rig
from conftest import MountFactory
from file_steps import acting_as
from syscalls import (
    COLLAPSE_RANGE,
    INSERT_RANGE,
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    data_map,
    fallocate,
    link_open_file,
    seek,
)

pytestmark = pytest.mark.usefixtures("needs_mounts")

PAGE: Final = 4096
MIB: Final = 1 << 20
#: Files up to this size may be held inline.
INLINE: Final = 64 * 1024
_PATTERN: Final = random.Random(0).randbytes(2 * MIB).replace(b"\0", b"\1")


class Ground:
    """A directory on a mount that the whole module uses, and a plain one, of one test."""

    def __init__(self, mount: rig.Mount, name: str) -> None:
        self.mount = mount
        self.mounted, self.plain = mount.path / name, mount.sandbox.directory("plain") / name
        for path in self.both:
            path.mkdir()

    @property
    def both(self) -> tuple[Path, Path]:
        return self.plain, self.mounted


@pytest.fixture(scope="module", params=["bpf", "off"])
def module_mount(request: pytest.FixtureRequest) -> Iterator[rig.Mount]:
    rig.require_mounts()
    if request.param == "bpf":
        rig.require_uring()
    box = rig.Sandbox()
    try:
        mount = rig.Mount(box, box.format(), box.directory("mnt"), request.param, ())
        try:
            mount.mount()
            yield mount
            mount.unmount()
            rig.assert_log_is_clean(mount)
        except BaseException:
            print(f"--- log of {mount.path}\n{mount.read_log()}", file=sys.stderr)
            raise
        box.assert_nothing_runs()
    finally:
        box.close()


@pytest.fixture
def ground(module_mount: rig.Mount, request: pytest.FixtureRequest) -> Iterator[Ground]:
    with rig.guarded(module_mount):
        yield Ground(module_mount, re.sub(r"\W", "-", request.node.name))


def content(fd: int, start: int = 0) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, start)


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def answer(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call answers, or the name of its errno."""
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


# Random sequences


class Kind(NamedTuple):
    """A kind of sequence: what offsets and lengths are multiples of, where in the files it is, and what may happen."""

    steps: int
    unit: int
    base: int
    reach: int
    longest: int
    calls: tuple[str, ...]
    exact: bool


_WITHOUT_COPY: Final = ("write", "write", "write", "truncate", "punch", "zero", "zero_grow", "allocate", "keep")
KINDS: Final = {
    "small": Kind(250, 1, 0, 90_000, 30_000, (*_WITHOUT_COPY, "copy", "copy", "copy_self", "map"), exact=False),
    "large": Kind(120, 1, 0, 3 * MIB, MIB, (*_WITHOUT_COPY, "copy", "copy", "copy_self", "map"), exact=False),
    "blocks": Kind(120, PAGE, 0, 8 * MIB, 2 * MIB, _WITHOUT_COPY, exact=True),
    "chunks": Kind(80, PAGE, 62 * MIB, 4 * MIB, 3 * MIB, (*_WITHOUT_COPY, "copy", "copy"), exact=False),
}


class Files:
    """Two files of one directory, on which calls are made."""

    def __init__(self, directory: Path) -> None:
        self.fds = [os.open(directory / name, os.O_RDWR | os.O_CREAT, 0o644) for name in ("a", "b")]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)

    def play(self, call: str, which: int, offset: int, length: int, other: int) -> Any:
        return answer(getattr(self, call), self.fds[which], offset, length, other)

    def write(self, fd: int, offset: int, length: int, other: int) -> int:
        start = other % MIB
        return os.pwrite(fd, _PATTERN[start : start + min(length, MIB)], offset)

    def truncate(self, fd: int, offset: int, length: int, other: int) -> None:
        os.ftruncate(fd, offset)

    def punch(self, fd: int, offset: int, length: int, other: int) -> None:
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length)

    def zero(self, fd: int, offset: int, length: int, other: int) -> None:
        fallocate(fd, ZERO_RANGE | KEEP_SIZE, offset, length)

    def zero_grow(self, fd: int, offset: int, length: int, other: int) -> None:
        fallocate(fd, ZERO_RANGE, offset, length)

    def allocate(self, fd: int, offset: int, length: int, other: int) -> None:
        fallocate(fd, 0, offset, length)

    def keep(self, fd: int, offset: int, length: int, other: int) -> None:
        fallocate(fd, KEEP_SIZE, offset, length)

    def copy(self, fd: int, offset: int, length: int, other: int) -> int:
        source = self.fds[self.fds.index(fd) - 1]
        return os.copy_file_range(source, fd, length, other, offset)

    def copy_self(self, fd: int, offset: int, length: int, other: int) -> int:
        return os.copy_file_range(fd, fd, length, other, offset)

    def map(self, fd: int, offset: int, length: int, other: int) -> bytes | None:
        """Write through a mapping, which is not flushed, and read what is there."""
        size = os.fstat(fd).st_size
        if offset >= size:
            return None
        with mmap.mmap(fd, 0) as mapped:
            end = min(size, offset + min(length, 10_000))
            mapped[offset:end] = _PATTERN[: end - offset]
            return mapped[max(0, offset - 100) : end + 100]


def check_alike(plain: Files, mounted: Files, kind: Kind) -> None:
    for one, other in zip(plain.fds, mounted.fds, strict=True):
        assert os.fstat(one).st_size == os.fstat(other).st_size
        expected = content(one, kind.base)
        assert content(other, kind.base) == expected
        found = data_map(other, kind.base)
        if kind.exact:
            os.fsync(one)
            os.posix_fadvise(one, 0, 0, os.POSIX_FADV_DONTNEED)  # what was allocated and is cached counts as data there
            assert found == data_map(one)
        covered = 0
        for begin, end in [*found, (kind.base + len(expected), kind.base + len(expected))]:
            assert not any(expected[covered : begin - kind.base]), f"data in the hole before {begin}"
            covered = end - kind.base


def test_random_sequences(ground: Ground) -> None:
    """Each kind has its own directory; all are looked at again when every cache is cold."""
    for name, kind in KINDS.items():
        for path in ground.both:
            (path / name).mkdir()
        run_sequence(Files(ground.plain / name), Files(ground.mounted / name), kind, random.Random(name))
    ground.mount.remount()
    for name, kind in KINDS.items():
        plain, files = (Files(path / name) for path in ground.both)
        check_alike(plain, files, kind)
        plain.close()
        files.close()


def run_sequence(plain: Files, files: Files, kind: Kind, chosen: random.Random) -> None:
    done = []
    if kind.exact:  # not inline, so holes are holes
        for each in (plain, files):
            for which in (0, 1):
                each.play("write", which, kind.reach, PAGE, 0)
                os.fsync(each.fds[which])
    for number in range(kind.steps):
        units = (chosen.randrange(kind.exact, kind.reach // kind.unit), chosen.randint(1, kind.longest // kind.unit))
        offset, length = (each * kind.unit for each in units)
        other = kind.base + chosen.randrange(kind.reach // kind.unit) * kind.unit
        step = chosen.choice(kind.calls), chosen.randrange(2), kind.base + offset, length, other
        done.append(step)
        assert files.play(*step) == plain.play(*step), f"after {done}"
        if number % 10 == 9:
            check_alike(plain, files, kind)
    check_alike(plain, files, kind)
    plain.close()
    files.close()


# fallocate


def test_fallocate_refusals(ground: Ground) -> None:
    answers = []
    for directory in ground.both:
        with opened(directory / "f") as fd, opened(directory / "f", os.O_RDONLY) as reading:
            os.write(fd, b"x" * 10_000)
            answers.append(
                [
                    answer(fallocate, fd, mode, offset, length)
                    for mode, offset, length in (
                        (PUNCH_HOLE, 0, 10),
                        (PUNCH_HOLE | ZERO_RANGE | KEEP_SIZE, 0, 10),
                        (0, 0, 0),
                        (0, -1, 10),
                        (0, 2**62, 2**62),
                        (KEEP_SIZE, 2**60, 10),
                        (PUNCH_HOLE | KEEP_SIZE, 20_000, 10),
                    )
                ]
                + [answer(fallocate, reading, 0, 0, 10), content(fd)]
            )
    assert answers[0] == answers[1]
    with opened(ground.mounted / "f") as fd:
        for mode in (COLLAPSE_RANGE, INSERT_RANGE):
            assert answer(fallocate, fd, mode, 0, PAGE) == errno.errorcode[errno.EOPNOTSUPP]


def test_fallocate_moves_times_and_clears_setuid(ground: Ground) -> None:
    seen = []
    ground.mount.sandbox.path.chmod(0o711)
    for directory in ground.both:
        directory.chmod(0o777)
        with opened(directory / "f") as fd:
            os.write(fd, b"x" * 100_000)
            os.fchown(fd, 1234, 1234)
            for mode in (0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE):
                os.fchmod(fd, 0o6755)
                os.utime(fd, (1, 1))
                with acting_as(1234), opened(directory / "f") as theirs:
                    fallocate(theirs, mode, 10, 200_000)
                status = os.fstat(fd)
                seen.append((stat.S_IMODE(status.st_mode), status.st_size, status.st_mtime > 10))
    assert seen[:4] == seen[4:]


def test_holes_in_a_large_file(ground: Ground) -> None:
    with opened(ground.mounted / "f") as fd:
        os.write(fd, _PATTERN * 8)
        os.fsync(fd)
        assert seek(fd, 0, os.SEEK_HOLE) == 16 * MIB
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, MIB, 14 * MIB)
        assert data_map(fd) == [(0, MIB), (15 * MIB, 16 * MIB)]
        fallocate(fd, 0, 0, 10**12)
        assert os.fstat(fd).st_size == 10**12
        assert data_map(fd) == [(0, MIB), (15 * MIB, 16 * MIB)]
        fallocate(fd, ZERO_RANGE, 0, 10**12)
        assert data_map(fd) == []


# SEEK_DATA and SEEK_HOLE


def test_seek_in_buffered_writes(ground: Ground) -> None:
    """Nothing has been flushed when it is asked for; and who only reads is answered the same."""
    path = ground.mounted / "f"
    with opened(path) as fd, opened(path, os.O_RDONLY) as reading:
        assert seek(fd, 0, os.SEEK_DATA) is None
        assert seek(fd, 0, os.SEEK_HOLE) is None
        os.pwrite(fd, b"x" * 100, 300_000)
        os.pwrite(fd, b"x" * 100, 500_000)
        assert data_map(reading) == [(300_000, 300_100), (500_000, 500_100)]
        os.pwrite(fd, b"y", 10)
        assert data_map(fd) == [(10, 11), (300_000, 300_100), (500_000, 500_100)]
        assert seek(fd, 500_099, os.SEEK_HOLE) == 500_100
        assert seek(fd, 500_100, os.SEEK_HOLE) is None
        assert seek(fd, 500_100, os.SEEK_DATA) is None
        assert answer(os.lseek, fd, -1, os.SEEK_DATA) == answer(os.lseek, fd, -1, os.SEEK_HOLE) == "ENXIO"
        os.ftruncate(fd, 600_000)
        assert seek(fd, 500_100, os.SEEK_HOLE) == 500_100
        assert seek(fd, 500_100, os.SEEK_DATA) is None
        path.unlink()
        assert data_map(reading) == [(10, 11), (300_000, 300_100), (500_000, 500_100)]


def test_seek_finds_what_was_written_through_a_mapping(ground: Ground) -> None:
    path = ground.mounted / "f"
    with opened(path) as fd, opened(path, os.O_RDONLY) as reading:
        os.pwrite(fd, b"x", 10 * MIB)
        os.fsync(fd)
        with mmap.mmap(fd, 0) as mapped:
            mapped[5 * MIB] = 1
            assert data_map(reading) == [(5 * MIB, 5 * MIB + PAGE), (10 * MIB, 10 * MIB + 1)]
            mapped[2 * MIB] = 2
            assert seek(fd, 0, os.SEEK_DATA) == 2 * MIB
            assert (mapped[2 * MIB], mapped[5 * MIB], mapped[7 * MIB]) == (2, 1, 0)


def test_seek_in_a_file_opened_in_the_kernel(mount: MountFactory) -> None:
    mounted = mount("bpf")
    (mounted.path / "f").write_bytes(b"x" * 1000)
    os.truncate(mounted.path / "f", 5000)
    mounted.remount()
    os.listdir(mounted.path)
    os.stat(mounted.path / "f")
    before = mounted.answered("OPEN")[0]
    with opened(mounted.path / "f", os.O_RDONLY) as fd:
        assert mounted.answered("OPEN")[0] == before + 1
        assert data_map(fd) == [(0, 1000)]
    with opened(mounted.path, os.O_RDONLY) as fd:
        assert answer(os.lseek, fd, 0, os.SEEK_DATA) != 0


# copy_file_range


def test_a_copy_makes_no_objects(ground: Ground) -> None:
    blocks = Path(ground.mount.url.removeprefix("file://")) / "blocks"
    requests = copies_answered(ground.mount)
    with opened(ground.mounted / "f") as source, opened(ground.mounted / "g") as target:
        os.write(source, _PATTERN * 10)
        os.ftruncate(source, 30 * MIB)
        os.fsync(source)
        stored = _stored(blocks)
        assert os.copy_file_range(source, target, 40 * MIB, 5, 3) == 30 * MIB - 5
        assert os.fstat(target).st_size == 30 * MIB - 2
        assert not _stored(blocks) - stored
        expected = bytes(3) + content(source)[5:]
        assert content(target) == expected
        assert data_map(target) == [(3, 20 * MIB - 2)]
        os.unlink(ground.mounted / "f")
    assert (ground.mounted / "g").read_bytes() == expected
    assert copies_answered(ground.mount) > requests


def copies_answered(mount: rig.Mount) -> int:
    requests = mount.stats()["requests"]
    return sum(requests.get(name, {"daemon": 0})["daemon"] for name in ("COPY_FILE_RANGE", "COPY_FILE_RANGE_64"))


def _stored(blocks: Path) -> set[Path]:
    return {path for path in blocks.rglob("*") if path.is_file()}


def test_copy_refusals(ground: Ground) -> None:
    answers = []
    for directory in ground.both:
        with opened(directory / "f") as fd, opened(directory / "g", os.O_RDONLY | os.O_CREAT) as reading:
            os.write(fd, _PATTERN[:200_000])
            with opened(directory / "g", os.O_WRONLY | os.O_APPEND) as appending:
                answers.append(
                    [
                        answer(os.copy_file_range, *arguments)
                        for arguments in (
                            (fd, fd, 100, 0, 50),
                            (fd, fd, 100, 50, 0),
                            (fd, fd, 100, 0, 0),
                            (fd, fd, 100, 0, 100),
                            (fd, fd, 200, 199_950, 199_900),
                            (fd, fd, 200, 199_950, 199_500),
                            (fd, reading, 100, 0, 0),
                            (fd, appending, 100, 0, 0),
                            (reading, fd, 100, 0, 0),
                            (fd, fd, 100, 300_000, 0),
                            (fd, fd, 0, 0, 0),
                        )
                    ]
                    + [content(fd)]
                )
    assert answers[0] == answers[1]


def test_a_copy_is_seen_at_once(ground: Ground) -> None:
    """What is written and not flushed is copied; pages and mappings of the target have what was copied."""
    with opened(ground.mounted / "f") as source, opened(ground.mounted / "g") as target:
        os.write(target, b"t" * 300_000)
        os.write(source, b"s" * 300_000)
        assert content(target) == b"t" * 300_000
        with mmap.mmap(target, 0) as seen, mmap.mmap(source, 0) as dirty:
            assert seen[200_000] == ord("t")
            dirty[150_000] = ord("d")
            os.utime(target, (1, 1))
            assert os.copy_file_range(source, target, 100_000, 100_000, 100_000) == 100_000
            assert os.fstat(target).st_mtime > 10
            expected = b"t" * 100_000 + b"s" * 50_000 + b"d" + b"s" * 49_999 + b"t" * 100_000
            assert seen[:] == expected
            os.pwrite(source, b"later", 100_000)
            assert content(target) == expected
            seen[100_000:100_002] = b"mm"
        assert os.pread(target, 4, 99_999) == b"tmms"


@pytest.mark.parametrize("source_size", [0, 1, 5000, INLINE, INLINE + 1, MIB])
def test_copies_between_all_sizes(ground: Ground, source_size: int) -> None:
    """Inline or not, before or behind the target's end."""
    copied = _PATTERN[:source_size][7:]
    with opened(ground.mounted / "f") as source, opened(ground.mounted / "g") as target:
        for target_size in (0, 5000, INLINE, MIB):
            for offset in (0, 100, INLINE - 10, 2 * INLINE):
                before = _PATTERN[99 : 99 + target_size]
                for fd, data in ((source, _PATTERN[:source_size]), (target, before)):
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, data, 0)
                assert _copy_all(source, target, 7, offset) == len(copied)
                padded = before.ljust(offset, b"\0") if copied else before
                assert content(target) == padded[:offset] + copied + before[offset + len(copied) :]


def _copy_all(source: int, target: int, source_offset: int, offset: int) -> int:
    done = 0
    while copied := os.copy_file_range(source, target, 10 * MIB, source_offset + done, offset + done):
        done += copied
    return done


# Files without a name


def test_nameless_files(ground: Ground) -> None:
    for by_proc in (True, False):
        (ground.mounted / str(by_proc)).mkdir()
        name_nameless_files(ground.mounted / str(by_proc), by_proc)
    ground.mount.remount()
    for by_proc in (True, False):
        kept = ground.mounted / str(by_proc) / "kept"
        assert os.listdir(kept.parent) == ["kept"]
        assert kept.read_bytes() == b"kept" * 50_000
        assert kept.stat().st_nlink == 1
    let_go_of_nameless_files(ground.mounted)


def name_nameless_files(top: Path, by_proc: bool) -> None:
    before = os.stat(top)
    with opened(top, os.O_TMPFILE | os.O_RDWR) as fd:
        assert os.fstat(fd).st_nlink == 0
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o644 & ~_umask()
        assert os.listdir(top) == []
        assert os.stat(top).st_mtime_ns == before.st_mtime_ns
        os.write(fd, b"text" * 50_000)
        link_open_file(fd, top / "name", by_proc=by_proc)
        os.write(fd, b"more")
        assert os.fstat(fd).st_nlink == 1
        link_open_file(fd, top / "other", by_proc=by_proc)
        assert (top / "name").stat().st_nlink == 2
        assert (top / "name").read_bytes() == b"text" * 50_000 + b"more"
        os.unlink(top / "name")
        os.unlink(top / "other")
        with pytest.raises(FileNotFoundError):
            link_open_file(fd, top / "again", by_proc=by_proc)
    with opened(top, os.O_TMPFILE | os.O_WRONLY) as fd:
        os.write(fd, b"kept" * 50_000)
        link_open_file(fd, top / "kept", by_proc=by_proc)


def let_go_of_nameless_files(top: Path) -> None:
    """Nothing else may be about to be deleted."""
    with opened(top, os.O_TMPFILE | os.O_RDWR | os.O_EXCL) as fd:
        os.write(fd, b"secret" * 50_000)
        assert content(fd) == b"secret" * 50_000
        os.fsync(fd)
        inodes = _inodes(top)
        with pytest.raises(FileNotFoundError):
            link_open_file(fd, top / "name", by_proc=True)
    rig.wait_for(lambda: _inodes(top) == inodes - 1, "the file is deleted")
    assert answer(os.open, top / "absent", os.O_TMPFILE | os.O_RDWR) == "ENOENT"
    (top / "f").write_bytes(b"")
    assert answer(os.open, top / "f", os.O_TMPFILE | os.O_RDWR) == "ENOTDIR"
    assert answer(os.open, top, os.O_TMPFILE | os.O_RDONLY) == "EINVAL"


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


def _inodes(path: Path) -> int:
    figures = os.statvfs(path)
    return figures.f_files - figures.f_ffree


# The worker's end


def test_another_worker_takes_over(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel, allowed=(r"it is started again", r"flush|fsync"))
    with opened(mounted.path / "f") as fd, opened(mounted.path / "g") as other:
        os.write(fd, _PATTERN[:200_000])
        for each in (fd, other):  # a new file that was never synced may be gone with its worker
            os.fsync(each)
        worker = mounted.process("worker").pid
        os.kill(worker, signal.SIGKILL)
        rig.wait_for(lambda: not Path(f"/proc/{worker}").exists(), "it has died, and takes no more requests")
        assert data_map(fd) == [(0, 200_000)]
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 50_000, 50_000)
        assert os.copy_file_range(fd, other, 200_000, 0, 0) == 200_000
        assert content(other) == _PATTERN[:50_000] + bytes(50_000) + _PATTERN[100_000:200_000]
        with opened(mounted.path, os.O_TMPFILE | os.O_RDWR) as nameless:
            link_open_file(nameless, mounted.path / "named", by_proc=True)
        for each in (fd, other):  # what was written to the worker that died may be lost: that is said once
            assert answer(os.fsync, each) == "EIO"
            assert answer(os.fsync, each) is None
    rig.wait_for(lambda: mounted.process("worker").pid != worker, "another worker is recorded")


# Locks


_LOCKER: Final = """
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
how = sys.argv[2]
print("ready", flush=True)
for line in sys.stdin:
    try:
        if how == "flock":
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif how == "posix":
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)
        else:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 5, 10, 0))
        print("locked", flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


@pytest.mark.parametrize("how", ["posix", "flock", "ofd"])
def test_locks_between_processes(ground: Ground, how: str) -> None:
    path = ground.mounted / "f"
    path.write_bytes(b"x" * 100)
    with opened(path) as fd, opened(path) as second:
        _lock(fd, how, fcntl.LOCK_EX, 10, 5)
        if how != "posix":  # locks of open files, not of processes
            with pytest.raises(BlockingIOError):
                _lock(second, how, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)
        command = [sys.executable, "-c", _LOCKER, str(path), how]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert _ask(other, None) == "ready"
            assert _ask(other, "lock") in (str(errno.EAGAIN), str(errno.EACCES))
            if how == "posix":  # a lock elsewhere in the file is no hindrance, and who holds this one can be asked for
                _lock(fd, how, fcntl.LOCK_UN, 10, 5)
                _lock(fd, how, fcntl.LOCK_EX, 10, 50)
            else:
                _lock(fd, how, fcntl.LOCK_UN, 10, 5)
            assert _ask(other, "lock") == "locked"
            with pytest.raises(BlockingIOError):
                _lock(fd, how, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)
            held = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 5, 10, 0))
            kind, _, start, length, pid = struct.unpack("hhqqi4x", held)
            if how == "posix":
                assert (kind, start, length, pid) == (fcntl.F_WRLCK, 5, 10, other.pid)
            other.kill()
        _lock(fd, how, fcntl.LOCK_EX, 10, 5)


def _lock(fd: int, how: str, operation: int, length: int, start: int) -> None:
    if how == "flock":
        fcntl.flock(fd, operation)
    elif how == "posix":
        fcntl.lockf(fd, operation, length, start)
    else:
        kind = fcntl.F_UNLCK if operation & fcntl.LOCK_UN else fcntl.F_WRLCK
        command = fcntl.F_OFD_SETLK if operation & (fcntl.LOCK_NB | fcntl.LOCK_UN) else fcntl.F_OFD_SETLKW
        fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, 0, start, length, 0))


def _ask(process: subprocess.Popen[str], line: str | None) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    if line is not None:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


# Programs


def run(*command: str | Path, fails: bool = False) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def require(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


@pytest.mark.parametrize("options", [("--reflink=auto", "--sparse=always"), ("--reflink=auto",), ("--sparse=never",)])
def test_cp(ground: Ground, options: Sequence[str]) -> None:
    pieces = [(0, b"head"), (3 * MIB, _PATTERN[:MIB]), (9 * MIB, b"x" * 10)]
    for directory in ground.both:
        with opened(directory / "sparse") as fd:
            for offset, data in pieces:
                os.pwrite(fd, data, offset)
            os.ftruncate(fd, 12 * MIB)
    expected = (ground.plain / "sparse").read_bytes()
    for source, target in (
        (ground.mounted / "sparse", ground.mounted / "copy"),
        (ground.plain / "sparse", ground.mounted / "in"),
        (ground.mounted / "sparse", ground.plain / "out"),
    ):
        run("cp", *options, source, target)
        assert target.read_bytes() == expected
    if options[-1] != "--sparse=never":
        with opened(ground.mounted / "copy", os.O_RDONLY) as fd:
            assert sum(end - begin for begin, end in data_map(fd)) <= MIB + 3 * PAGE


def test_fallocate_program(ground: Ground) -> None:
    require("fallocate")
    path, zeros = ground.mounted / "f", ground.mounted / "zeros"
    path.write_bytes(_PATTERN)
    run("fallocate", "-p", "-o", str(MIB), "-l", str(MIB // 2), path)
    expected = _PATTERN[:MIB] + bytes(MIB // 2) + _PATTERN[MIB + MIB // 2 :]
    assert path.read_bytes() == expected
    run("fallocate", "-l", str(3 * MIB), path)
    assert path.read_bytes() == expected + bytes(MIB)
    run("fallocate", "-n", "-l", str(5 * MIB), path)
    assert path.stat().st_size == 3 * MIB
    run("fallocate", "-z", "-o", "0", "-l", "4096", path)
    assert path.read_bytes() == bytes(4096) + expected[4096:] + bytes(MIB)
    zeros.write_bytes(bytes(MIB) + b"x" * PAGE + bytes(MIB))
    run("fallocate", "-d", zeros)
    with opened(zeros, os.O_RDONLY) as fd:
        assert data_map(fd) == [(MIB, MIB + PAGE)]
    assert "not supported" in run("fallocate", "-i", "-o", "0", "-l", "4096", path, fails=True)
    assert "not supported" in run("fallocate", "-c", "-o", "0", "-l", "4096", path, fails=True)


def test_fio(ground: Ground) -> None:
    require("fio")
    for how in ("posix", "keep", "truncate"):
        job = f"--name={how} --directory={ground.mounted} --size=8m --bs=16k --rw=randwrite --verify=crc32c"
        run("fio", *job.split(), f"--fallocate={how}", "--verify_state_save=0", "--output-format=terse")
    (ground.mounted / "t").write_bytes(_PATTERN * 2)
    trims = f"--name=trim --filename={ground.mounted}/t --size=4m --bs=64k --rw=randtrim --ioengine=falloc"
    run("fio", *trims.split(), "--output-format=terse")
    assert not any((ground.mounted / "t").read_bytes())
