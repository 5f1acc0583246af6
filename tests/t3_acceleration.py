"""Who answers, and that it is right: counters prove which requests the kernel answered, and none of them with old news.

Every test of caches has its twin without acceleration. Most mount with ``--kernel-ttl 0``, so that the kernel's own
caches hold nothing and each access is a request, which BPF programs answer.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import figures
import pytest
import rig
from conftest import MountFactory

from fuseclient.observe.figures import Answers

pytestmark = pytest.mark.usefixtures("needs_mounts")

NO_TTL: Final = ("--kernel-ttl", "0")
PAGE: Final = 4096


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def warm(directory: Path) -> None:
    """Have everything in a directory known to whoever can answer: the directory's first miss fetches it whole."""
    with contextlib.suppress(FileNotFoundError):
        (directory / "no such name").stat()


# A cold mount


def test_a_cold_tree_is_answered_in_the_kernel(mount: MountFactory) -> None:
    mounted = mount("bpf")
    paths = [mounted.path / f"d{directory}" / f"f{number}" for directory in range(5) for number in range(80)]
    for directory in range(5):
        (mounted.path / f"d{directory}").mkdir()
    for number, path in enumerate(paths):
        write(path, bytes([number % 251]) * (number * 40))
    mounted.remount()
    for number, path in enumerate(paths):
        assert path.read_bytes() == bytes([number % 251]) * (number * 40)
    rig.wait_for(lambda: figures.answers(mounted, "RELEASE").total >= len(paths), "every file is released")
    for opcode in ("LOOKUP", "OPEN", "READ", "RELEASE"):
        answers = figures.answers(mounted, opcode)
        assert answers.total >= len(paths) - 1, opcode  # READ: one file is empty
        assert answers.kernel_share >= 0.95, opcode


# Each kind of request


def _open_and_close(path: Path, flags: int) -> None:
    os.close(os.open(path, flags))


def _fstat(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fstat(fd)
    os.close(fd)


def _no_xattr(path: Path) -> None:
    with pytest.raises(OSError, match="No data"):
        os.getxattr(path, "user.none")


def _no_acl(path: Path) -> None:
    """Set one that says what the mode says, as cp -p does."""
    entries = b"".join(struct.pack("<HHI", tag, 4, 0xFFFFFFFF) for tag in (1, 4, 32))
    with pytest.raises(OSError, match="not supported"):
        os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + entries)


def _absent(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        (path / "absent").stat()


#: What is done below a directory that is known, and the request that must be answered in the kernel then.
ACCESSES: Final[list[tuple[str, str, Callable[[Path], Any]]]] = [
    ("LOOKUP", "a name", lambda top: (top / "file").stat()),
    ("LOOKUP", "an absent name", _absent),
    ("GETATTR", "an open file", lambda top: _fstat(top / "file")),
    ("OPEN", "a file", lambda top: _open_and_close(top / "file", os.O_RDONLY)),
    ("READ", "a small file", lambda top: (top / "unread").read_bytes()),
    ("RELEASE", "a file", lambda top: _open_and_close(top / "file", os.O_RDONLY)),
    ("READLINK", "a symlink", lambda top: (top / "link").readlink()),
    ("GETXATTR", "no such xattr", lambda top: _no_xattr(top / "file")),
    ("LISTXATTR", "no xattrs", lambda top: os.listxattr(top / "file")),
    ("SETXATTR", "an access control list", lambda top: _no_acl(top / "file")),
    ("OPENDIR", "a directory", lambda top: _open_and_close(top / "directory", os.O_RDONLY | os.O_DIRECTORY)),
    ("RELEASEDIR", "a directory", lambda top: _open_and_close(top / "directory", os.O_RDONLY | os.O_DIRECTORY)),
    ("IOCTL", "a file that Python opens, which asks whether it is a terminal", lambda top: (top / "file").read_bytes()),
    ("STATFS", "figures just asked for", lambda top: (os.statvfs(top), os.statvfs(top))),
]


def _until_answered(mounted: rig.Mount, opcode: str, before: Answers) -> Answers:
    """Wait for one more answer: a release is asked for after close has returned."""
    rig.wait_for(lambda: figures.answers(mounted, opcode).total > before.total, f"{opcode} is asked")
    return figures.answers(mounted, opcode)


def test_who_answers_each_kind_of_request(mount: MountFactory, accel: str, subtests: pytest.Subtests) -> None:
    """READ is of a file that was not read yet: what was lies in the kernel's page cache."""
    mounted = mount(accel, *NO_TTL)
    top = mounted.path / "top"
    top.mkdir()
    (top / "directory").mkdir()
    (top / "link").symlink_to("file")
    for name in ("file", "unread"):
        write(top / name, b"content")
    mounted.remount()
    warm(top)
    for opcode, of_what, access in ACCESSES:
        with subtests.test(opcode=opcode, of_what=of_what):
            before = figures.answers(mounted, opcode)
            access(top)
            kernel = _until_answered(mounted, opcode, before).kernel - before.kernel
            assert kernel >= 1 if accel == "bpf" else kernel == 0


# Changes made through the mount


def _answer(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or the name of its errno."""
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def _look(top: Path) -> dict[str, Any]:
    """Return all that is asked of the names a change may concern."""
    seen: dict[str, Any] = {"names": _answer(lambda: sorted(os.listdir(top)))}
    for name in ("file", "other", "link", "directory", "new"):
        seen[name] = _look_at(top / name)
    return seen


def _look_at(path: Path) -> tuple[Any, Any, Any]:
    """Return attributes, content or target, and the names of xattrs."""
    status = _answer(path.lstat)
    kept = status if isinstance(status, str) else (status.st_mode, status.st_nlink, status.st_size, status.st_uid)
    content = _answer(path.readlink if path.is_symlink() else path.read_bytes)
    return kept, content, _answer(lambda: sorted(os.listxattr(path, follow_symlinks=False)))


def _replace_symlink(top: Path) -> None:
    (top / "new").symlink_to("other")
    (top / "new").rename(top / "link")


def _make_it_a_directory(top: Path) -> None:
    (top / "file").unlink()
    (top / "file").mkdir()


def _write_in_place(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, data, offset)
    os.close(fd)


def _map_and_write(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:4] = b"MMAP"


#: A change, and what of the view that _look gives must be different after it: (name, part) or "names".
CHANGES: Final[dict[str, tuple[Callable[[Path], Any], dict[tuple[str, int], Any]]]] = {
    "chmod": (lambda top: (top / "file").chmod(0o600), {("file", 0): (0o100600, 1, 5, 0)}),
    "chown": (lambda top: os.chown(top / "file", 7, -1), {("file", 0): (0o100644, 1, 5, 7)}),
    "write": (lambda top: _write_in_place(top / "file", 1, b"XYZ"), {("file", 1): b"fXYZ\n"}),
    "append": (
        lambda top: _write_in_place(top / "file", 5, b"more"),
        {("file", 0): (0o100644, 1, 9, 0), ("file", 1): b"file\nmore"},
    ),
    "write through a mapping": (lambda top: _map_and_write(top / "file"), {("file", 1): b"MMAP\n"}),
    "truncate": (lambda top: os.truncate(top / "file", 2), {("file", 0): (0o100644, 1, 2, 0), ("file", 1): b"fi"}),
    "unlink": (lambda top: (top / "file").unlink(), {("file", 0): "ENOENT", ("file", 1): "ENOENT"}),
    "create": (lambda top: write(top / "new", b"new"), {("new", 0): (0o100644, 1, 3, 0), ("new", 1): b"new"}),
    "rename": (
        lambda top: (top / "file").rename(top / "new"),
        {("file", 0): "ENOENT", ("new", 0): (0o100644, 1, 5, 0), ("new", 1): b"file\n"},
    ),
    "rename over": (
        lambda top: (top / "other").rename(top / "file"),
        {("file", 1): b"other\n", ("other", 0): "ENOENT"},
    ),
    "link": (
        lambda top: os.link(top / "file", top / "new"),
        {("file", 0): (0o100644, 2, 5, 0), ("new", 0): (0o100644, 2, 5, 0), ("new", 1): b"file\n"},
    ),
    "setxattr": (lambda top: os.setxattr(top / "file", "user.x", b""), {("file", 2): ["user.x"]}),
    "symlink replaced": (_replace_symlink, {("link", 1): Path("other")}),
    "mkdir": (lambda top: (top / "new").mkdir(), {("new", 0): (0o040755, 2, 0, 0), ("new", 1): "EISDIR"}),
    "rmdir": (lambda top: (top / "directory").rmdir(), {("directory", 0): "ENOENT"}),
    "a directory for a file": (
        _make_it_a_directory,
        {("file", 0): (0o040755, 2, 0, 0), ("file", 1): "EISDIR"},
    ),
}


@pytest.mark.parametrize("ttl", ["0", "default"])
def test_a_change_is_seen_at_once(mount: MountFactory, accel: str, ttl: str, subtests: pytest.Subtests) -> None:
    mounted = mount(accel, *(NO_TTL if ttl == "0" else ()))
    for name, (change, expected) in CHANGES.items():
        with subtests.test(change=name):
            top = mounted.path / name
            top.mkdir()
            for file in ("file", "other"):
                write(top / file, f"{file}\n".encode())
            (top / "link").symlink_to("file")
            (top / "directory").mkdir()
            before = _look(top)
            change(top)
            after = _look(top)
            for (where, part), value in expected.items():
                assert after[where][part] == value
                assert before[where][part] != value
            assert after == _look(top)
    if accel == "bpf" and ttl == "0":
        assert figures.answers(mounted, "LOOKUP").kernel > figures.answers(mounted, "LOOKUP").daemon


def test_an_absent_name_is_absent_until_it_is_made(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    warm(mounted.path)
    path = mounted.path / "name"
    for _ in range(3):
        assert not path.exists()
        write(path, b"here")
        assert path.read_bytes() == b"here"
        path.unlink()
        assert not path.exists()
        path.mkdir()
        assert path.is_dir()
        path.rmdir()
    with pytest.raises(FileNotFoundError):
        path.stat()
    absent = figures.outcome(mounted, "answered_absent")
    assert (absent > 0) == (accel == "bpf")


def test_cached_pages_follow_changes(mount: MountFactory, accel: str) -> None:
    """The pages of a file stay in the kernel from one open to the next; changes by other handles and names show."""
    mounted = mount(accel)
    path, other = mounted.path / "file", mounted.path / "other"
    write(path, b"1" * 3 * PAGE)
    os.link(path, other)
    mounted.remount()
    with path.open("rb", buffering=0) as held:
        assert held.read() == b"1" * 3 * PAGE
        _write_in_place(other, PAGE, b"2" * PAGE)
        expected = b"1" * PAGE + b"2" * PAGE + b"1" * PAGE
        assert os.pread(held.fileno(), 4 * PAGE, 0) == path.read_bytes() == expected
        os.truncate(other, PAGE + 1)
        assert os.pread(held.fileno(), 4 * PAGE, 0) == path.read_bytes() == expected[: PAGE + 1]
        os.truncate(other, 2 * PAGE)
        assert os.pread(held.fileno(), 4 * PAGE, 0) == path.read_bytes() == expected[: PAGE + 1] + bytes(PAGE - 1)
        other.unlink()
        path.unlink()
        write(path, b"another")
        assert os.fstat(held.fileno()).st_nlink == 0
        assert os.pread(held.fileno(), 1, PAGE) == b"2"
    assert path.read_bytes() == b"another"


# The lease


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process stand still."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_no_answer_after_the_lease_has_run_out(mount: MountFactory) -> None:
    """The kernel answers for a worker that stands still, until the lease's end; then requests wait for it."""
    mounted = mount("bpf", *NO_TTL, "--lease", "2")
    path = mounted.path / "file"
    write(path, b"x")
    warm(mounted.path)
    path.stat()
    missed = figures.outcome(mounted, "miss_deadline")
    with stopped(mounted.process("worker").pid):
        ended = time.monotonic() + 2
        path.stat()
        rig.wait_for(lambda: time.monotonic() > ended, "the lease runs out")
        blocked = figures.until_blocked([sys.executable, "-c", f"import os; print(os.stat({str(path)!r}).st_size)"])
        assert blocked.poll() is None
    assert blocked.communicate(timeout=rig.WAIT_S)[0] == "1\n"
    assert figures.outcome(mounted, "miss_deadline") > missed
    answered = figures.answers(mounted, "LOOKUP").kernel
    rig.wait_for(lambda: path.stat() and figures.answers(mounted, "LOOKUP").kernel > answered, "BPF answers again")


def test_the_kernel_own_caches_end_with_the_lease(mount: MountFactory, accel: str) -> None:
    """What is left of the lease is the time-to-live of each reply: no stat is answered from a cache for longer."""
    mounted = mount(accel, "--lease", "1")
    path = mounted.path / "file"
    write(path, b"x")
    path.stat()
    started = time.monotonic()
    with stopped(mounted.process("worker").pid):
        child = figures.until_blocked([sys.executable, "-c", f"import os\nwhile True: os.stat({str(path)!r})"])
        assert time.monotonic() - started < 5
    child.kill()
    child.communicate(timeout=rig.WAIT_S)


# Readers beside a writer


class Readers:
    """Threads that read a file again and again, each time whole, until the body ends; what they read is one byte."""

    def __init__(self, read: Callable[[], bytes], count: int = 2) -> None:
        self._read = read
        self.reads = 0
        self.seen: set[int] = set()
        self.faults: list[str] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(rig.WAIT_S)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                data = self._read()
            except OSError as error:
                self.faults.append(repr(error))
                return
            if len(data) == 0 or data.count(data[:1]) != len(data):
                self.faults.append(f"{len(data)} bytes of {sorted(set(data))}")
                return
            self.seen.add(data[0])
            self.reads += 1

    def wait_for_more(self, count: int) -> None:
        """Wait until they have read ``count`` times more, or have failed."""
        until = self.reads + count
        rig.wait_for(lambda: self.reads >= until or self.faults, "the readers read on")


def _read_uncached(path: Path) -> bytes:
    """Read through the page cache, but not what lies there already."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def _read_direct(path: Path, size: int) -> bytes:
    """Read without the page cache."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, size) as buffer:
            return buffer[: os.readv(fd, [buffer])]
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [PAGE, 5 * PAGE])
def test_readers_of_a_file_that_is_replaced(mount: MountFactory, accel: str, size: int) -> None:
    mounted = mount(accel, *NO_TTL)
    path, new = mounted.path / "file", mounted.path / "new"
    write(path, bytes(size))
    before = figures.answers(mounted, "READ").kernel
    with Readers(lambda: _read_uncached(path)) as readers:
        for version in range(1, 40):
            write(new, bytes([version]) * size)
            new.rename(path)
            readers.wait_for_more(4)
    assert not readers.faults
    assert len(readers.seen) > 20
    assert (figures.answers(mounted, "READ").kernel > before) == (accel == "bpf")


def test_readers_of_a_file_that_is_written_in_place(mount: MountFactory, accel: str) -> None:
    size = 3 * PAGE
    mounted = mount(accel, *NO_TTL)
    path = mounted.path / "file"
    write(path, bytes(size))
    before = figures.answers(mounted, "READ").kernel
    with Readers(lambda: _read_direct(path, size)) as readers:
        for version in range(1, 40):
            _write_in_place(path, 0, bytes([version]) * size)
            readers.wait_for_more(4)
    assert not readers.faults
    assert len(readers.seen) > 20
    assert (figures.answers(mounted, "READ").kernel > before) == (accel == "bpf")


def test_content_is_right_while_pages_are_overtaken(mount: MountFactory) -> None:
    """The smallest kernel cache holds a part of these files: each read may find its pages given to another file."""
    mounted = mount("bpf", *NO_TTL, "--kernel-cache-size", "1M")
    paths = [mounted.path / f"f{number}" for number in range(120)]
    for number, path in enumerate(paths):
        write(path, bytes([number]) * 2 * PAGE)
    mounted.remount()

    def read_all() -> bytes:
        for number, path in enumerate(paths):
            data = _read_direct(path, 2 * PAGE)
            if data != bytes([number]) * 2 * PAGE:
                return data + b"?"
        return b"x"

    with Readers(read_all) as readers:
        readers.wait_for_more(8)
    assert not readers.faults
    assert figures.stats(mounted)["caches"]["filling"]["overtaken"] > 0
    assert figures.answers(mounted, "READ").kernel > 0


@pytest.mark.parametrize("how", ["write", "truncate", "chmod", "link", "mapping"])
def test_a_file_just_made_is_known_to_the_kernel_until_it_is_changed(mount: MountFactory, accel: str, how: str) -> None:
    mounted = mount(accel, *NO_TTL)
    warm(mounted.path)
    before = figures.answers(mounted, "GETATTR")
    descriptor = os.open(mounted.path / "f", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    made = [os.fstat(descriptor).st_size for _ in range(10)]
    after = figures.answers(mounted, "GETATTR")
    assert made == [0] * 10
    if accel == "bpf":
        assert after.daemon == before.daemon
    if how == "write":
        os.write(descriptor, bytes(PAGE))
    elif how == "truncate":
        os.ftruncate(descriptor, PAGE)
    elif how == "chmod":
        os.fchmod(descriptor, 0o600)
    elif how == "link":
        os.link(mounted.path / "f", mounted.path / "g")
    else:
        os.ftruncate(descriptor, PAGE)
        with mmap.mmap(descriptor, PAGE) as mapping:
            mapping[:] = b"x" * PAGE
            mapping.flush()
    seen = os.fstat(descriptor)
    assert seen.st_size == (0 if how in ("chmod", "link") else PAGE)
    assert seen.st_mode & 0o777 == (0o600 if how == "chmod" else 0o644)
    assert seen.st_nlink == (2 if how == "link" else 1)
    os.close(descriptor)
    assert (mounted.path / "f").stat().st_size == seen.st_size


@pytest.mark.parametrize("accel", ["bpf", "off"])
def test_removed_files_are_forgotten_many_at_a_time(mount: MountFactory, accel: str) -> None:
    """Each forgetting by itself would be a message to the worker, which the next removal waits behind."""
    files = 400
    mounted = mount(accel)
    store = mounted.path / "d"
    store.mkdir()
    paths = [store / str(number) for number in range(files)]
    for path in paths:
        path.touch()

    def left() -> int:
        space = os.statvfs(mounted.path)
        return space.f_files - space.f_ffree

    inodes = left()
    assert inodes > files
    for path in paths:
        path.unlink()
    rig.wait_for(lambda: left() <= inodes - files, "what was removed is deleted")
    if accel == "bpf":
        messages = [figures.answers(mounted, opcode).daemon for opcode in ("FORGET", "BATCH_FORGET")]
        assert 0 < sum(messages) < files / 2, messages
