"""Directories as they are listed through a mount: who answers, that the second listing asks nobody, and that it
is right while entries come and go. Whether another mount's changes show is in t5_listings.py.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import figures
import pytest
import rig
import several_mounts
import syscalls
from conftest import MountFactory

from fuseclient.observe.figures import Answers

pytestmark = pytest.mark.usefixtures("needs_mounts")

LISTING: Final = ("READDIR", "READDIRPLUS")
#: More than one reply brings.
MANY: Final = 1200
KINDS: Final = {stat.S_IFREG: 8, stat.S_IFDIR: 4, stat.S_IFLNK: 10, stat.S_IFIFO: 1}


def listed(mounted: rig.Mount) -> Answers:
    """Return who answered how many requests for parts of directories."""
    each = [figures.answers(mounted, opcode) for opcode in LISTING]
    return Answers(sum(one.kernel for one in each), sum(one.daemon for one in each))


def know(directory: Path) -> None:
    """Have whoever can answer know all of a directory, and the kernel itself nothing of its listing."""
    with contextlib.suppress(FileNotFoundError):
        (directory / "no such name").stat()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def rest(fd: int, size: int = 32768) -> list[tuple[bytes, int, int, int]]:
    """Return what follows where a directory is read."""
    return list(itertools.chain.from_iterable(iter(lambda: syscalls.getdents(fd, size), [])))


def names(entries: list[tuple[bytes, int, int, int]]) -> list[bytes]:
    """Return the names that are not "." and ".."."""
    return [name for name, *_ in entries if name.strip(b".")]


def make_one_of_each(directory: Path) -> None:
    (directory / "file").write_bytes(b"content")
    (directory / "directory").mkdir()
    (directory / "link").symlink_to("file")
    os.mkfifo(directory / "pipe")


def test_the_kernel_lists_and_the_second_time_nobody_is_asked(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    top = mounted.path / "top"
    top.mkdir()
    make_one_of_each(top)
    mounted.remount()
    know(top)
    before = listed(mounted)
    expected = ["directory", "file", "link", "pipe"]
    assert sorted(os.listdir(top)) == expected
    first = listed(mounted)
    assert sorted(os.listdir(top)) == expected
    second = listed(mounted)
    if accel == "bpf":
        assert first.kernel > before.kernel
        assert second == first
    assert (first.daemon > before.daemon) == (accel == "off")


def test_a_cold_directory_takes_one_request_of_the_daemon(mount: MountFactory) -> None:
    mounted = mount("bpf")
    top = mounted.path / "top"
    top.mkdir()
    for index in range(600):
        os.mknod(top / f"file-{index:04}")
    mounted.remount()
    assert len(os.listdir(top)) == 600
    assert listed(mounted).daemon == 1
    assert listed(mounted).kernel > 1
    for entry in os.scandir(top):
        assert stat.S_ISREG(entry.stat().st_mode)
    assert figures.answers(mounted, "LOOKUP").daemon <= 1
    assert figures.answers(mounted, "GETATTR").daemon <= 1


def test_what_a_listing_says_is_what_stat_says(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    top = mounted.path / "top"
    top.mkdir()
    make_one_of_each(top)
    for _ in range(2):
        with opened(top) as fd:
            for name, ino, _, kind in rest(fd):
                found = os.lstat(top / os.fsdecode(name))
                assert kind == KINDS[stat.S_IFMT(found.st_mode)]
                assert ino == found.st_ino or name == b".."
        mounted.remount()
        know(top)
    with opened(top) as fd:
        assert [name for name, *_ in rest(fd)][:2] == [b".", b".."]


@pytest.mark.parametrize("known", [True, False])
def test_every_place_can_be_returned_to(mount: MountFactory, accel: str, known: bool) -> None:
    """telldir and seekdir: what getdents calls offsets."""
    mounted = mount(accel)
    top = mounted.path / "top"
    top.mkdir()
    for index in range(60):
        os.mknod(top / f"{index:03}{'x' * (index % 9)}")
    mounted.remount()
    if known:
        know(top)
    with opened(top) as fd:
        whole = rest(fd, 200)
        assert len(whole) == 62
        for index, (_, _, offset, _) in random.Random(1).sample(list(enumerate(whole)), 62):
            os.lseek(fd, offset, os.SEEK_SET)
            assert rest(fd, 1000) == whole[index + 1 :]
        os.lseek(fd, 0, os.SEEK_SET)
        assert rest(fd) == whole
        if known and accel == "bpf":
            assert listed(mounted).daemon == 0


def test_a_listing_goes_on_while_entries_come_and_go(mount: MountFactory, accel: str) -> None:
    """What is there from beginning to end is told of once; what comes and goes, once or never."""
    mounted = mount(accel)
    top = mounted.path / "top"
    top.mkdir()
    stay = [b"stay-%03d" % index for index in range(100)]
    for index, name in enumerate(stay):
        os.mknod(os.fsencode(top) + b"/" + name)
        os.mknod(top / f"go-{index:03}")
    for reopened in (True, False):
        if reopened:
            mounted.remount()
            know(top)
        with opened(top) as fd:
            told = names(syscalls.getdents(fd, 300))
            for index in range(10, 20):
                (top / f"go-{index:03}").unlink(missing_ok=True)
                os.mknod(top / f"new-{reopened}-{index}")
            while some := syscalls.getdents(fd, 700):
                told += names(some)
                (top / f"new-{reopened}-10").unlink(missing_ok=True)
            assert len(told) == len(set(told))
            assert set(stay) <= set(told)
            os.lseek(fd, 0, os.SEEK_SET)
            assert sorted(names(rest(fd))) == sorted(map(os.fsencode, os.listdir(top)))
            os.mknod(top / f"last-{reopened}")
            os.lseek(fd, 0, os.SEEK_SET)
            assert b"last-%s" % str(reopened).encode() in names(rest(fd))


def test_a_listing_ends_though_each_entry_it_tells_of_is_renamed(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    top = mounted.path / "top"
    top.mkdir()
    for index in range(40):
        os.mknod(top / f"{index:03}")
    mounted.remount()
    know(top)
    with opened(top) as fd:
        told: list[bytes] = []
        while some := names(syscalls.getdents(fd, 160)):
            told += some
            for name in some:
                (top / os.fsdecode(name)).rename(top / f"renamed-{len(told)}-{os.fsdecode(name)}")
            assert len(told) < 400, "the listing does not end"
    assert len(os.listdir(top)) == 40


def change_at_random(chance: random.Random, directory: Path) -> None:
    """Make, remove or rename something, as chance has it."""
    name, other = (directory / f"n{chance.randrange(12)}" for _ in range(2))
    with contextlib.suppress(OSError):
        match chance.randrange(6):
            case 0:
                name.write_bytes(b"x" * chance.randrange(9))
            case 1:
                name.unlink()
            case 2:
                name.rename(other)
            case 3:
                name.mkdir()
            case 4:
                name.rmdir()
            case 5:
                os.link(name, other)


def look(directory: Path) -> dict[str, Any]:
    return {
        entry.name: (entry.is_dir(follow_symlinks=False), entry.stat(follow_symlinks=False).st_nlink)
        for entry in os.scandir(directory)
    }


@pytest.mark.parametrize("ttl", ["default", "0"])
def test_random_changes_are_listed_as_by_a_plain_directory(
    mount: MountFactory, accel: str, ttl: str, tmp_path: Path
) -> None:
    mounted = mount(accel, *(("--kernel-ttl", "0") if ttl == "0" else ()))
    for seed in range(3):
        here, plain = mounted.path / f"top{seed}", tmp_path / f"top{seed}"
        here.mkdir()
        plain.mkdir()
        chance, twin = random.Random(seed), random.Random(seed)
        with opened(here) as fd:
            for step in range(60):
                change_at_random(chance, here)
                change_at_random(twin, plain)
                assert look(here) == look(plain), f"seed {seed}, step {step}"
                if step % 3 == 0:
                    know(here)
                os.lseek(fd, 0, os.SEEK_SET)
                assert sorted(names(rest(fd))) == sorted(map(os.fsencode, os.listdir(plain)))
    if accel == "bpf":
        assert listed(mounted).kernel > 50


def test_a_directory_of_many_entries(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    top = mounted.path / "top"
    top.mkdir()
    expected = [f"entry-number-{index:06}" for index in range(MANY)]
    for name in expected:
        os.mknod(top / name)
    mounted.remount()
    for size in (32768, 1 << 20):
        with opened(top) as fd:
            assert list(map(os.fsdecode, names(rest(fd, size)))) == expected
    if accel == "bpf":
        assert figures.stats(mounted)["caches"]["filling"]["listings"] >= 1
        with opened(top) as fd:
            before = listed(mounted).daemon
            assert len(rest(fd)) == MANY + 2
            assert listed(mounted).daemon == before


def test_more_directories_than_the_cache_holds(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel, *(("--kernel-cache-size", "1M") if accel == "bpf" else ()))
    for directory in range(130):
        (mounted.path / f"d{directory}").mkdir()
        for index in range(directory % 5):
            os.mknod(mounted.path / f"d{directory}" / f"{directory}-{index}")
    mounted.remount()
    for _ in range(2):
        for directory in range(130):
            expected = [f"{directory}-{index}" for index in range(directory % 5)]
            assert sorted(os.listdir(mounted.path / f"d{directory}")) == expected
    if accel == "bpf":
        assert figures.stats(mounted)["caches"]["filling"]["overtaken"] > 0


def test_a_directory_larger_than_the_cache_is_said_so_once(mount: MountFactory) -> None:
    mounted = mount("bpf", "--kernel-cache-size", "1M", "--durability", "interval", allowed=("larger --kernel-cache",))
    most = figures.stats(mounted)["maps"]["inodes"]["capacity"] + 100
    (mounted.path / "large").mkdir()
    (mounted.path / "small").mkdir()
    expected = {f"{index}" for index in range(most)}
    for name in expected:
        os.mknod(mounted.path / "large" / name)
    os.mknod(mounted.path / "small" / "file")
    mounted.remount()
    assert os.listdir(mounted.path / "small") == ["file"]
    assert "larger --kernel-cache-size" not in mounted.read_log()
    for _ in range(2):
        assert set(os.listdir(mounted.path / "large")) == expected
    assert all((mounted.path / "large" / name).stat().st_nlink == 1 for name in expected)
    found = figures.stats(mounted)["caches"]
    assert found["directories"]["too_large"] == 1
    assert found["filling"]["evicted_entries"] > 0
    assert mounted.read_log().count("larger --kernel-cache-size") == 1


def test_no_listing_after_the_lease_has_run_out(mount: MountFactory) -> None:
    """Opening a directory asks, and past the deadline nobody answers for a worker that stands still."""
    mounted = mount("bpf", "--lease", "2")
    top = mounted.path / "top"
    top.mkdir()
    os.mknod(top / "file")
    know(top)
    assert os.listdir(top) == ["file"]
    with several_mounts.stopped(mounted.process("worker").pid):
        ended = time.monotonic() + 2
        assert os.listdir(top) == ["file"]
        rig.wait_for(lambda: time.monotonic() > ended, "the lease runs out")
        blocked = figures.until_blocked([sys.executable, "-c", f"import os; print(os.listdir({str(top)!r}))"])
        assert blocked.poll() is None
    assert blocked.communicate(timeout=rig.WAIT_S)[0] == "['file']\n"


def test_programs_ask_the_daemon_for_little(mount: MountFactory, accel: str, subtests: pytest.Subtests) -> None:
    mounted = mount(accel)
    for directory in range(3):
        (mounted.path / f"d{directory}").mkdir()
        for index in range(40):
            (mounted.path / f"d{directory}" / f"{index}").write_bytes(b"x" * index)
    for command in ("ls -lR .", "find . -size +0", "du -a --apparent-size ."):
        with subtests.test(command=command):
            mounted.remount()
            before = figures.stats(mounted)["requests"]
            run = [subprocess.run(command.split(), cwd=mounted.path, check=True, capture_output=True) for _ in "12"]
            assert run[0].stdout == run[1].stdout
            after = figures.stats(mounted)["requests"]
            daemon = sum(each["daemon"] for each in after.values()) - sum(each["daemon"] for each in before.values())
            if accel == "bpf":
                assert daemon <= 16
