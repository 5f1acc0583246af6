"""Scenario 19: what one mount has changed every other one shows to whoever asks after the call has returned.

Three mounts of one volume take turns as the one that changes: one whose kernel answers by BPF and from its own caches,
one by BPF alone, and one that is not accelerated. What is expected is what a plain directory shows. The lease is long:
nothing here is right because something ran out.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import figures
import pytest
import rig
import several_mounts
from several_mounts import Cluster

pytestmark = pytest.mark.usefixtures("needs_mounts", "needs_uring")

#: Seconds.
LONG_LEASE_S: Final = 30.0
#: Times that everything is looked at before the change, so that every cache has it.
LOOKS: Final = 3
KINDS: Final = {"bpf": ("bpf",), "bpf-alone": ("bpf", "--kernel-ttl", "0"), "off": ("off",)}
#: More than what lies in the metadata, and less than a part of a file.
LARGE: Final = 200_000


@pytest.fixture(scope="module")
def trio() -> Iterator[Cluster]:
    """One volume, mounted in each way; the mounts live as long as this module."""
    sandbox = rig.Sandbox()
    try:
        with several_mounts.cluster(sandbox, LONG_LEASE_S) as cluster:
            for name, (accel, *options) in KINDS.items():
                cluster.mount(name, accel, *options)
            yield cluster
        sandbox.assert_nothing_runs()
    finally:
        sandbox.close()


# What can be seen of a directory and the things in it


def attempt(look: Callable[[Path], Any], path: Path) -> Any:
    """Return what is seen, or the name of the error."""
    try:
        return look(path)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def attributes(path: Path) -> Any:
    found = os.lstat(path)
    size = None if path.is_dir() else found.st_size
    return found.st_mode, found.st_uid, found.st_gid, found.st_nlink, size


#: Ways to look at a path.
VIEWS: Final[dict[str, Callable[[Path], Any]]] = {
    "stat": attributes,
    "runs": lambda path: os.access(path, os.X_OK),
    "target": os.readlink,
    "xattr": lambda path: os.getxattr(path, "user.key"),
    "xattrs": os.listxattr,
    "content": Path.read_bytes,
}


def seen(directory: Path) -> dict[str, Any]:
    """Look at a directory in every way."""
    found: dict[str, Any] = {"listing": sorted(os.listdir(directory))}
    for name in ("file", "other", "link", "large", "sub", "sub/below"):
        for view, look in VIEWS.items():
            found[f"{name} {view}"] = attempt(look, directory / name)
    return found


def prepare(directory: Path) -> None:
    (directory / "sub").mkdir(parents=True)
    (directory / "file").write_bytes(b"before")
    (directory / "sub" / "below").write_bytes(b"below")
    (directory / "large").write_bytes(b"a" * LARGE)
    (directory / "link").symlink_to("file")
    os.chmod(directory / "file", 0o644)


# What is changed


def overwrite(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def write_by_mapping(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[5000:5004] = b"MAPS"
        mapped.flush()


def replace_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("other")


def replace_file(directory: Path) -> None:
    (directory / "new").write_bytes(b"new content")
    os.rename(directory / "new", directory / "file")


def remove_directory(path: Path) -> None:
    (path / "below").unlink()
    path.rmdir()


def set_twice(path: Path) -> None:
    os.setxattr(path, "user.key", b"one")
    os.setxattr(path, "user.key", b"two")


CHANGES: Final[dict[str, Callable[[Path], Any]]] = {
    "chmod": lambda top: os.chmod(top / "file", 0o755),
    "chown": lambda top: os.chown(top / "file", 12, 34),
    "unlink": lambda top: os.unlink(top / "file"),
    "create": lambda top: (top / "other").write_bytes(b"created"),
    "rename": lambda top: os.rename(top / "file", top / "other"),
    "rename_to_another_directory": lambda top: os.rename(top / "file", top / "sub" / "below"),
    "rename_of_a_directory": lambda top: os.rename(top / "sub", top / "other"),
    "replace": replace_file,
    "write": lambda top: overwrite(top / "file", 0, b"AFTER!"),
    "write_of_a_large_file": lambda top: overwrite(top / "large", 100_000, b"b" * 50_000),
    "write_by_mapping": lambda top: write_by_mapping(top / "large"),
    "append": lambda top: append(top / "file", b", and after"),
    "truncate": lambda top: os.truncate(top / "file", 2),
    "truncate_of_a_large_file": lambda top: os.truncate(top / "large", 70_001),
    "growth": lambda top: os.truncate(top / "file", 100_000),
    "setxattr": lambda top: set_twice(top / "file"),
    "link": lambda top: os.link(top / "file", top / "other"),
    "symlink": lambda top: replace_link(top / "link"),
    "mkdir": lambda top: os.mkdir(top / "other"),
    "rmdir": lambda top: remove_directory(top / "sub"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_scenario_19_a_change_is_seen_everywhere_once_it_has_returned(trio: Cluster, name: str, tmp_path: Path) -> None:
    prepare(plain := tmp_path / "plain")
    before = seen(plain)
    CHANGES[name](plain)
    after = seen(plain)
    assert before != after
    for number, changing in enumerate(trio.mounts):
        tops = [each.path / f"{name}-{number}" for each in trio.mounts]
        prepare(tops[number])
        for top in tops * LOOKS:
            assert seen(top) == before
        CHANGES[name](tops[number])
        for top in tops:
            assert seen(top) == after, f"changed at {changing.path.name}, seen at {top}"


def test_scenario_19_open_files_and_directories(trio: Cluster) -> None:
    """What is asked of a descriptor that was open before the change is the new state, too: synced, and not closed."""
    first, *others = trio.mounts
    prepare(first.path / "opened")
    with contextlib.ExitStack() as stack:
        descriptors = []
        for each in others:
            for name in ("file", "large", "sub", ""):
                fd = os.open(each.path / "opened" / name, os.O_RDONLY)
                stack.callback(os.close, fd)
                descriptors.append((name, fd))
        for name, fd in descriptors:
            os.fstat(fd)
            if name in ("file", "large"):
                os.pread(fd, LARGE, 0)
        for name, data in (("file", b"AFTER, and longer"), ("large", b"LARGE")):
            writing = os.open(first.path / "opened" / name, os.O_WRONLY)
            stack.callback(os.close, writing)
            os.pwrite(writing, data, 0)
            os.fsync(writing)
        os.chmod(first.path / "opened" / "sub", 0o700)
        os.mkdir(first.path / "opened" / "new")
        for name, fd in descriptors:
            if name == "file":
                assert os.fstat(fd).st_size == 17
                assert os.pread(fd, 100, 0) == b"AFTER, and longer"
            elif name == "large":
                assert os.pread(fd, 6, 0) == b"LARGEa"
            elif name == "sub":
                assert os.fstat(fd).st_mode & 0o777 == 0o700
            else:
                assert os.fstat(fd).st_nlink == 4
                assert "new" in os.listdir(fd)


class Answers(NamedTuple):
    """How many requests were answered, by whom."""

    kernel: int
    daemon: int


def answers(mounted: rig.Mount) -> Answers:
    each = figures.stats(mounted)["requests"].values()
    return Answers(sum(one["kernel"] for one in each), sum(one["daemon"] for one in each))


def test_scenario_19_bpf_answers_before_and_after(trio: Cluster) -> None:
    """Who answers: BPF, until the change breaks in; then the worker, once; then BPF again, with what is new."""
    changing, watching = trio.mounts[0], trio.mounts[1]
    (changing.path / "counted").mkdir()
    (changing.path / "counted" / "file").write_bytes(b"before")
    path = watching.path / "counted" / "file"

    def only_bpf_answers(size: int, content: bytes) -> None:
        rig.wait_for(lambda: _asked_of_bpf_alone(watching, path, size, content), "BPF answers it all")

    only_bpf_answers(6, b"before")
    for turn in range(3):
        content = b"after %d" % turn
        (changing.path / "counted" / "file").write_bytes(content)
        known = answers(watching)
        assert os.stat(path).st_size == len(content)
        assert path.read_bytes() == content
        assert answers(watching).daemon > known.daemon, "nobody was asked for what had changed"
        only_bpf_answers(len(content), content)


def _asked_of_bpf_alone(mounted: rig.Mount, path: Path, size: int, content: bytes) -> bool:
    """Look ten times, see what is expected each time, and say whether the daemon was asked nothing."""
    known = answers(mounted)
    for _ in range(10):
        assert os.stat(path).st_size == size
        assert path.read_bytes() == content
    now = answers(mounted)
    return now.daemon == known.daemon and now.kernel - known.kernel >= 30


# Many changes at once


@dataclass
class Register:
    """A path that one mount writes. ``begun`` and ``done``: the last value whose call has begun, has returned."""

    writer: Path
    readers: list[Path]
    begun: int = 0
    done: int = 0


def _write_content(path: Path, value: int) -> None:
    path.write_bytes(b"%d " % value * 20)


def _replace(path: Path, value: int) -> None:
    other = path.with_name(f"{path.name}.new")
    other.write_bytes(b"." * value)
    os.rename(other, path)


def _read_content(path: Path) -> int:
    return int(path.read_bytes().split()[0])


def _write_large(path: Path, value: int) -> None:
    path.write_bytes(b"%07d " % value * 12_000)


def _read_large(path: Path) -> int:
    values = set(path.read_bytes().split())
    assert len(values) == 1, f"mixed: {values}"
    return int(values.pop())


def _write_time(path: Path, value: int) -> None:
    os.utime(path, (value, value))


def _write_link(path: Path, value: int) -> None:
    other = path.with_name(f"{path.name}.new")
    other.symlink_to(str(value))
    os.rename(other, path)


def _write_xattr(path: Path, value: int) -> None:
    os.setxattr(path, "user.value", b"%d" % value)


#: How a value is written and read. What is read while it is written need not be whole where that is said.
REGISTERS: Final[dict[str, tuple[Callable[[Path, int], None], Callable[[Path], int]]]] = {
    "replaced": (_replace, lambda path: os.stat(path).st_size),
    "time": (_write_time, lambda path: int(os.stat(path).st_mtime)),
    "link": (_write_link, lambda path: int(os.readlink(path))),
    "xattr": (_write_xattr, lambda path: int(os.getxattr(path, "user.value"))),
    "content": (_write_content, _read_content),
    "large": (_write_large, _read_large),
}


class Stress:
    """Threads that write registers and read them at other mounts, and check that what is read is never old."""

    def __init__(self, seconds: float) -> None:
        self.faults: list[str] = []
        self.reads = 0
        self._until = time.monotonic() + seconds
        self._threads: list[threading.Thread] = []

    def add(self, name: str, register: Register) -> None:
        write, read = REGISTERS[name]
        write(register.writer, 0)
        self._threads.append(threading.Thread(target=self._guard, args=(self._write, register, write)))
        for path in register.readers:
            self._threads.append(threading.Thread(target=self._guard, args=(self._read, register, path, read)))

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join(rig.WAIT_S)
            assert not thread.is_alive(), self.faults

    def _guard(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            while time.monotonic() < self._until and not self.faults:
                work(*arguments)
        except Exception as error:
            self.faults.append(f"{arguments}: {error!r}")

    def _write(self, register: Register, write: Callable[[Path, int], None]) -> None:
        register.begun += 1
        write(register.writer, register.begun)
        register.done = register.begun
        time.sleep(random.uniform(0, 0.02))  # now and then readers have it cached

    def _read(self, register: Register, path: Path, read: Callable[[Path], int]) -> None:
        least = register.done
        try:
            value = read(path)
        except (IndexError, ValueError, AssertionError):
            if register.done == least and register.begun == least:
                raise  # nobody was writing
            return
        if not least <= value <= register.begun:
            self.faults.append(f"{path}: {value} was read after {least} was written")
        self.reads += 1


def test_never_old_under_load(trio: Cluster) -> None:
    paths = [each.path / "stress" for each in trio.mounts]
    paths[0].mkdir()
    stress = Stress(4.0)
    for number, name in enumerate(REGISTERS):
        writer = paths[number % 3] / name
        if name in ("time", "xattr"):
            writer.touch()
        readers = [path / name for path in paths if path != writer.parent]
        stress.add(name, Register(writer, readers))
    stress.run()
    assert not stress.faults
    assert stress.reads > 100
