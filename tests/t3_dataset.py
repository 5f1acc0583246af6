"""The profile `dataset`: a mount that opens nothing, reads what is cached without a request, and shows changes."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import figures
import pytest
import rig
import several_mounts
from conftest import MountFactory
from several_mounts import Cluster
from t3_listings import names, opened, rest

pytestmark = pytest.mark.usefixtures("needs_mounts")

DATASET: Final = ("--profile", "dataset")
#: Seconds: nothing here is right because something ran out.
LONG_LEASE_S: Final = 30.0
HANDLES: Final = ("OPEN", "OPENDIR", "FLUSH", "RELEASE", "RELEASEDIR")
SMALL, LARGE = b"small" * 100, bytes(range(251)) * 2000


def requests(mounted: rig.Mount) -> dict[str, int]:
    """Return how many requests there were of each kind."""
    return {opcode: sum(each.values()) for opcode, each in figures.stats(mounted)["requests"].items()}


def fill(top: Path) -> None:
    (top / "sub").mkdir(parents=True)
    for number in range(20):
        (top / f"small{number}").write_bytes(SMALL + b"%d" % number)
    (top / "large").write_bytes(LARGE)
    (top / "empty").touch()
    (top / "script").write_text("#!/bin/sh\necho it runs\n")
    (top / "script").chmod(0o755)


def check(top: Path) -> None:
    for number in range(20):
        assert (top / f"small{number}").read_bytes() == SMALL + b"%d" % number
    assert (top / "large").read_bytes() == LARGE
    assert (top / "empty").read_bytes() == b""
    assert len(os.listdir(top)) == 24
    assert os.listdir(top / "sub") == []


def test_what_is_cached_is_read_without_a_request(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    top = mounted.path / "top"
    fill(top)
    mounted.remount(*DATASET)
    check(top)
    after_first = requests(mounted)
    check(top)
    again = requests(mounted)
    for opcode in HANDLES:
        assert again.get(opcode, 0) == after_first.get(opcode, 0) <= 2, opcode
    # Those that lie in the page cache; Python asks by IOCTL whether a file is a terminal, so not by open().
    fds = [os.open(top / f"small{number}", os.O_RDONLY) for number in range(20)]
    contents = [os.read(fd, 4096) for fd in fds]
    for fd in fds:
        os.close(fd)
    assert contents == [SMALL + b"%d" % number for number in range(20)]
    last = requests(mounted)
    asked = {opcode: last[opcode] - again.get(opcode, 0) for opcode in last if last[opcode] != again.get(opcode, 0)}
    assert asked == {}


def test_all_that_reading_needs_works_without_handles(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    top = mounted.path / "top"
    fill(top)
    mounted.remount(*DATASET)
    with (top / "large").open("rb") as file:
        assert file.seek(-7, os.SEEK_END) == len(LARGE) - 7
        assert file.read() == LARGE[-7:]
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == len(LARGE)
        assert os.lseek(file.fileno(), 5, os.SEEK_DATA) == 5
        assert os.fstat(file.fileno()).st_size == len(LARGE)
        os.fsync(file.fileno())
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[1000:2000] == LARGE[1000:2000]
    fd = os.open(top / "large", os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, 8192) as buffer:
        assert os.preadv(fd, [buffer], 4096) == 8192
        assert buffer[:] == LARGE[4096 : 4096 + 8192]
    os.close(fd)
    assert subprocess.run([top / "script"], capture_output=True, check=True).stdout == b"it runs\n"
    with opened(top) as fd:
        whole = rest(fd, 200)
        os.lseek(fd, whole[5][2], os.SEEK_SET)
        assert rest(fd) == whole[6:]
        os.fsync(fd)
    for change in (
        lambda: (top / "new").touch(),
        lambda: (top / "large").open("r+b"),
        lambda: (top / "empty").unlink(),
    ):
        with pytest.raises(OSError, match="Read-only"):
            change()


@pytest.fixture(scope="module")
def both() -> Iterator[Cluster]:
    """One volume, mounted as a dataset in both ways, and to be changed as "general"."""
    sandbox = rig.Sandbox()
    try:
        with several_mounts.cluster(sandbox, LONG_LEASE_S) as cluster:
            cluster.mount("bpf", "bpf", *DATASET)
            cluster.mount("off", "off", *DATASET)
            cluster.mount("general", "bpf")
            yield cluster
        sandbox.assert_nothing_runs()
    finally:
        sandbox.close()


@pytest.mark.parametrize("size", [100, 70_000, 500_000])
def test_changes_elsewhere_show_at_once(both: Cluster, accel: str, size: int) -> None:
    here = next(each.path for each in both.mounts if each.path.name == accel) / f"{accel}{size}"
    there = both.mounts[-1].path / here.name
    there.mkdir()
    for name in ("file", "held", "other"):
        (there / name).write_bytes(b"1" * size)
    with (here / "held").open("rb", buffering=0) as held, opened(here) as directory:
        for _ in range(2):
            assert (here / "file").read_bytes() == b"1" * size
            assert os.pread(held.fileno(), size, 0) == b"1" * size
            assert sorted(os.listdir(here)) == ["file", "held", "other"]
        for name in ("file", "held"):
            (there / name).write_bytes(b"2" * (size + 1))
        assert (here / "file").read_bytes() == b"2" * (size + 1)
        assert os.pread(held.fileno(), size + 2, 0) == b"2" * (size + 1)
        (there / "other").rename(there / "file")
        assert (here / "file").read_bytes() == b"1" * size
        (there / "new").write_bytes(b"new")
        (there / "new").chmod(0o600)
        assert (here / "new").read_bytes() == b"new"
        assert (here / "new").stat().st_mode == 0o100600
        os.lseek(directory, 0, os.SEEK_SET)
        assert sorted(names(rest(directory))) == [b"file", b"held", b"new"]
        os.truncate(there / "held", 10)
        assert os.fstat(held.fileno()).st_size == 10
        assert os.pread(held.fileno(), size, 0) == b"2" * 10


def read_until_stale(fd: int) -> bytes:
    """Read to the end, or to where the file is no more."""
    data = b""
    try:
        while some := os.read(fd, 65536):
            data += some
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
    return data


def test_a_file_that_others_remove_may_be_stale(both: Cluster, accel: str) -> None:
    """Nobody knows that it is open here: it is not kept for those who have it open. What is read is right."""
    here = next(each.path for each in both.mounts if each.path.name == accel) / f"{accel}-removed"
    there = both.mounts[-1].path / here.name
    there.mkdir()
    (there / "file").write_bytes(LARGE)
    fd = os.open(here / "file", os.O_RDONLY)
    try:
        assert os.read(fd, 10) == LARGE[:10]
        (there / "file").unlink()
        data = read_until_stale(fd)
        assert data == LARGE[10 : 10 + len(data)]
        assert not (here / "file").exists()
        assert os.listdir(here) == []
    finally:
        os.close(fd)
