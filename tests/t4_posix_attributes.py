"""Modes, owners, times, sizes, extended attributes and who may change them, as on ext4."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from functools import partial

import posix_rig
import pytest
from conftest import MountFactory
from posix_rig import (
    AT_FDCWD,
    AT_SYMLINK_NOFOLLOW,
    KINDS,
    LIBC,
    OTHER,
    USER,
    Group,
    Place,
    check,
    in_child,
    product,
    user,
)

pytestmark = pytest.mark.usefixtures("needs_mounts")

_GET_FLAGS = 0x80086601
NOW, OMIT = 0x3FFFFFFF, 0x3FFFFFFE
#: Root, the owner, one of the group, one who has nothing to do with it.
WHO: dict[str, Group | None] = {
    "root": None,
    "owner": user(USER),
    "owner in the group": user(USER, OTHER),
    "group": user(1111, OTHER),
    "anybody": user(2222),
}


@pytest.fixture(scope="module", params=["bpf", "off"])
def ground(request: pytest.FixtureRequest) -> Iterator[posix_rig.Ground]:
    with posix_rig.ground(request.param) as made:
        yield made


class Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def utimensat(path: str, atime: tuple[int, int], mtime: tuple[int, int], flags: int = 0) -> None:
    times = (Timespec * 2)(Timespec(*atime), Timespec(*mtime))
    check(LIBC.utimensat(AT_FDCWD, path.encode(), ctypes.byref(times), flags))


def owned(p: Place, kind: str, mode: int | None = None) -> str:
    """Make a node of USER and the group of OTHER."""
    path = p.fresh(kind)
    os.chown(path, USER, OTHER, follow_symlinks=False)
    if mode is not None and kind not in ("link", "dangling"):
        os.chmod(path, mode)
    return path


# chmod


def case_chmod(p: Place) -> None:
    for kind, mode in product(KINDS, (0, 0o777, 0o111, 0o4777, 0o2777, 0o1777, 0o7777, 0o644)):
        path = p.fresh(kind)
        with p.stamps(f"{kind} {mode:o}", path, "."):
            p.do(f"{kind} {mode:o}", os.chmod, path, mode)
        p.facts(f"{kind} {mode:o}: after", path)
        p.facts(f"{kind} {mode:o}: followed", path, follow=True)


def case_chmod_by_others(p: Place) -> None:
    for kind, mode, (name, who) in product(
        ("file", "dir", "fifo"), (0o755, 0o4755, 0o2755, 0o6755, 0o1777), WHO.items()
    ):
        path = owned(p, kind)
        with p.stamps(f"{kind} {mode:o} by {name}", path):
            p.do(f"{kind} {mode:o} by {name}", os.chmod, path, mode, who=who)
        p.facts(f"{kind} {mode:o} by {name}: after", path)


def case_fchmod(p: Place) -> None:
    path = owned(p, "file", 0o600)
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_PATH):
        fd = p.open(f"open {flags}", path, flags)
        for name, who in WHO.items():
            with p.stamps(f"{flags} by {name}", fd):
                p.do(f"{flags} by {name}", os.fchmod, fd, 0o640, who=who)
    fd = p.open("directory", ".", os.O_RDONLY)
    p.do("of a directory", os.fchmod, fd, 0o700)
    os.chmod(".", 0o755)


# chown


def case_chown(p: Place) -> None:
    for kind, owner, group in product(KINDS, (-1, 0, USER), (-1, 0, OTHER)):
        label = f"{kind} {owner}:{group}"
        path = owned(p, kind)
        with p.stamps(label, path, "."):
            p.do(label, os.lchown, path, owner, group)
        p.facts(f"{label}: after", path)
    for owner, group in ((2**31, 1), (2**32 - 2, 2**32 - 2), (0, 2**16), (65536, 65535)):
        path = p.fresh("file")
        p.do(f"large {owner}:{group}", os.chown, path, owner, group)
        p.facts(f"large {owner}:{group}: after", path)


def case_chown_follows(p: Place) -> None:
    for kind in ("link", "dangling", "file"):
        path = p.fresh(kind)
        with p.stamps(f"chown {kind}", path):
            p.do(f"chown {kind}", os.chown, path, USER, OTHER)
        p.facts(f"chown {kind}: after", path)
        p.facts(f"chown {kind}: followed", path, follow=True)


def case_chown_by_others(p: Place) -> None:
    """Setuid and setgid go when a file's owner changes, by whoever; and who may change it."""
    pairs = ((-1, -1), (-1, OTHER), (USER, OTHER), (USER, -1), (-1, 0), (0, 0), (2222, -1), (-1, USER))
    for mode, (name, who), (owner, group) in product((0o6755, 0o2745, 0o4711, 0o755), WHO.items(), pairs):
        path = owned(p, "file", mode)
        label = f"{mode:o} {owner}:{group} by {name}"
        with p.stamps(label, path):
            p.do(label, os.chown, path, owner, group, who=who)
        p.facts(f"{label}: after", path)
    for kind, (name, who) in product(("dir", "fifo", "socket", "block"), WHO.items()):
        path = owned(p, kind, 0o6755)
        p.do(f"{kind} by {name}", os.chown, path, -1, OTHER, who=who)
        p.facts(f"{kind} by {name}: after", path)


def case_setuid_goes_with_writing(p: Place) -> None:
    """Writing and truncating clear setuid and setgid, unless root does it."""
    writes: dict[str, Callable[[str], object]] = {
        "write": lambda path: write(path, b"x"),
        "write none": lambda path: write(path, b""),
        "truncate": lambda path: os.truncate(path, 5),
        "truncate to the same": lambda path: os.truncate(path, 10),
        "ftruncate": ftruncate,
        "open with O_TRUNC": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
        "setxattr": lambda path: os.setxattr(path, "user.a", b"1"),
        "utime": lambda path: os.utime(path),
    }
    for mode, (call, work), name in product((0o6777, 0o4777, 0o2777, 0o2767), writes.items(), WHO):
        path = owned(p, "file")
        posix_rig.fill(path, 10)
        os.chmod(path, mode)
        label = f"{call} of {mode:o} by {name}"
        with p.stamps(label, path):
            p.do(label, work, path, who=WHO[name])
        p.facts(f"{label}: after", path)


def write(path: str, data: bytes) -> int:
    fd = os.open(path, os.O_WRONLY)
    try:
        return os.write(fd, data)
    finally:
        os.close(fd)


def ftruncate(path: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.ftruncate(fd, 7)
    finally:
        os.close(fd)


# Permissions


def case_access(p: Place) -> None:
    modes = (0, 0o400, 0o040, 0o004, 0o755, 0o711, 0o070, 0o777, 0o070)
    cases = []
    for kind, mode in product(("file", "dir"), modes):
        cases.append((kind, mode, owned(p, kind, mode)))

    def ask() -> list[list[bool]]:
        return [[os.access(path, bits) for bits in range(8)] for _, _, path in cases]

    for name, who in WHO.items():
        p.do(f"by {name}", in_child, who, ask)
        for kind, mode, path in cases:
            p.do(
                f"{kind} {mode:o} by {name}, effective",
                lambda path=path: [os.access(path, bits, effective_ids=True) for bits in range(8)],
                who=who,
            )


def case_opening(p: Place) -> None:
    for mode, (name, who) in product((0, 0o400, 0o200, 0o600, 0o040, 0o020, 0o004, 0o002, 0o644, 0o777), WHO.items()):
        path = owned(p, "file", mode)
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_PATH, os.O_NOATIME):
            p.close(p.open(f"{mode:o} {flags:o} by {name}", path, flags, who=who))
        p.do(f"truncate {mode:o} by {name}", os.truncate, path, 3, who=who)
        p.do(f"exec {mode:o} by {name}", in_child, who, lambda path=path: os.execv(path, ["x"]))


def go_and_come_back(path: str, here: str) -> None:
    os.chdir(path)
    os.chdir(here)


def case_directories_of_others(p: Place) -> None:
    calls: dict[str, Callable[[str], object]] = {
        "create": lambda path: os.close(os.open(f"{path}/new", os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
        "mkdir": lambda path: os.mkdir(f"{path}/newdir"),
        "symlink": lambda path: os.symlink("x", f"{path}/newlink"),
        "mkfifo": lambda path: os.mkfifo(f"{path}/newfifo"),
        "link": lambda path: os.link("linkable", f"{path}/link"),
        "unlink": lambda path: os.unlink(f"{path}/file"),
        "rmdir": lambda path: os.rmdir(f"{path}/dir"),
        "rename": lambda path: os.rename(f"{path}/file2", f"{path}/file3"),
        "rename over": lambda path: os.rename(f"{path}/file3", f"{path}/file4"),
        "stat": lambda path: stat.S_IFMT(os.stat(f"{path}/file5").st_mode),
        "listdir": lambda path: len(os.listdir(path)) >= 0,
        "open": lambda path: os.close(os.open(f"{path}/file5", os.O_RDONLY)),
        "chdir": lambda path: go_and_come_back(path, here),
        "stat of nothing": lambda path: os.stat(f"{path}/none"),
    }
    here = os.getcwd()
    os.close(os.open("linkable", os.O_CREAT | os.O_WRONLY, 0o666))
    os.chmod("linkable", 0o666)
    for mode, (name, who) in product(
        (0o000, 0o100, 0o300, 0o500, 0o700, 0o070, 0o030, 0o007, 0o003, 0o777), WHO.items()
    ):
        path = p.fresh("dir")
        for number in ("", "2", "4", "5"):
            os.close(os.open(f"{path}/file{number}", os.O_CREAT, 0o644))
        os.mkdir(f"{path}/dir")
        os.chown(path, USER, OTHER)
        os.chmod(path, mode)
        for call, work in calls.items():
            p.do(f"{call} in {mode:o} by {name}", work, path, who=who)


def case_sticky_directories(p: Place) -> None:
    """Who owns the directory, who the entry, who the other end, and who does it."""
    users = {"root": None, "user": user(USER), "other": user(OTHER), "group": user(2222, OTHER)}
    owners = (0, USER, OTHER)
    for kind, directory_owner, owner, (name, who) in product(("file", "dir"), owners, owners, users.items()):
        os.mkdir(directory := p.unused())
        os.chown(directory, directory_owner, OTHER)
        os.chmod(directory, 0o1777)
        os.mkdir(free := p.unused())
        os.chmod(free, 0o777)
        label = f"{kind} of {owner} in sticky of {directory_owner} by {name}"
        remove, move, over, came, mine = (
            p.fresh(kind, owner=owner, below=below) for below in (directory, directory, directory, free, free)
        )
        os.chown(mine, who.user if who else 0, -1)
        p.do(f"{label}: remove", os.rmdir if kind == "dir" else os.unlink, remove, who=who)
        p.do(f"{label}: rename within", os.rename, move, f"{directory}/renamed", who=who)
        p.do(f"{label}: rename over", os.rename, mine, over, who=who)
        p.do(f"{label}: rename in", os.rename, came, f"{directory}/came", who=who)
        last = p.fresh(kind, owner=owner, below=directory)
        p.do(f"{label}: rename out", os.rename, last, f"{free}/out", who=who)
        p.do(f"{label}: chmod", os.chmod, directory, 0o1777, who=who)


# Times


def case_utimensat(p: Place) -> None:
    values = {
        "set": (981_173_106, 123_456_789),
        "now": (0, NOW),
        "omit": (0, OMIT),
        "zero": (0, 0),
        "last ns": (5, 999_999_999),
    }
    for kind, (first, atime), (second, mtime) in product(
        ("file", "dir", "fifo", "link", "dangling"), values.items(), values.items()
    ):
        path = p.fresh(kind)
        label = f"{kind} {first} {second}"
        with p.stamps(label, path, ".", access=True):
            p.do(label, utimensat, path, atime, mtime, AT_SYMLINK_NOFOLLOW)
        status = os.lstat(path)
        p.note(
            f"{label}: set",
            [
                None if which in ("now", "omit") else time
                for which, time in ((first, status.st_atime_ns), (second, status.st_mtime_ns))
            ],
        )
    for seconds, nanoseconds in ((1, 1_000_000_000), (1, -1), (1, NOW + 1), (1, 2**40)):
        p.do(f"bad {nanoseconds}", utimensat, p.fresh("file"), (0, 0), (seconds, nanoseconds))
    p.do("of nothing", utimensat, "none", (0, 0), (0, 0))
    p.do("of an empty name", utimensat, "", (0, 0), (0, 0))
    p.do("bad flags", utimensat, p.fresh("file"), (0, 0), (0, 0), 0x8000)


def case_utimensat_follows(p: Place) -> None:
    path = p.fresh("link")
    p.do("followed", utimensat, path, (1, 2), (3, 4))
    p.note("target", os.stat(path).st_mtime_ns)
    p.do("not followed", utimensat, path, (5, 6), (7, 8), AT_SYMLINK_NOFOLLOW)
    p.note("link", os.lstat(path).st_mtime_ns)
    p.note("target still", os.stat(path).st_mtime_ns)
    p.do("dangling", utimensat, p.fresh("dangling"), (1, 2), (3, 4))


def case_utimensat_by_others(p: Place) -> None:
    pairs = {
        "set": ((1, 2), (3, 4)),
        "now": ((0, NOW), (0, NOW)),
        "omit": ((0, OMIT), (0, OMIT)),
        "now and omit": ((0, NOW), (0, OMIT)),
        "omit and set": ((0, OMIT), (9, 9)),
    }
    for mode, (what, (atime, mtime)), (name, who) in product((0o644, 0o666, 0o444, 0o000), pairs.items(), WHO.items()):
        path = owned(p, "file", mode)
        label = f"{what} on {mode:o} by {name}"
        with p.stamps(label, path, access=True):
            p.do(label, utimensat, path, atime, mtime, who=who)


def case_far_times(p: Place) -> None:
    """Years 1901 to 2262: every second in them, negative ones too, to the nanosecond."""
    for seconds in (-(2**31) + 1, -1, -86_400 * 365, 0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33, 9_000_000_000):
        for nanoseconds in (0, 1, 999_999_999):
            path = p.fresh("file")
            p.do(f"{seconds}.{nanoseconds}", utimensat, path, (seconds, nanoseconds), (seconds, nanoseconds))
            status = os.stat(path)
            p.note(f"{seconds}.{nanoseconds}: set", (status.st_atime_ns, status.st_mtime_ns))
    path = p.fresh("file")
    p.do("year 2400", utimensat, path, (13_569_465_600, 5), (13_569_465_600, 5))
    p.note("year 2400: set", os.stat(path).st_mtime_ns)


def case_times_of_data(p: Place) -> None:
    """What reading and writing do to the times, and that no later call changes them again."""
    path = p.fresh("file")
    fd = p.open("open", path, os.O_RDWR)
    for size in (1, 5000, 70_000, 5_000_000):
        data = b"x" * size
        with p.stamps(f"write of {size}", path, "."):
            os.pwrite(fd, data, 0)
        with p.stamps(f"nothing after a write of {size}", path):
            p.facts(f"stat after {size}", path)
        with p.stamps(f"fsync after {size}", path):
            os.fsync(fd)
        with p.stamps(f"read after {size}", path):
            os.pread(fd, 10, 0)
        with p.stamps(f"write of none after {size}", path):
            os.pwrite(fd, b"", 0)
        os.pwrite(fd, data, 0)
        with p.stamps(f"close after {size}", path):
            os.close(os.dup(fd))
            other = os.open(path, os.O_WRONLY)
            os.close(other)
    os.pwrite(fd, b"last", 0)
    with p.stamps("last close", path):
        p.close(fd)
    fd = p.open("again", path, os.O_WRONLY)
    os.pwrite(fd, b"more", 3)
    with p.stamps("utime is kept", path):
        pass
    os.utime(path, ns=(1, 2))
    with p.stamps("close after utime", path):
        p.close(fd)
    p.note("as set", os.stat(path).st_mtime_ns)


def case_times_of_sizes(p: Place) -> None:
    """truncate(2) and ftruncate(2): to more, to less, to the same, of inline and larger files, of others."""
    for size in (0, 10, 100_000, 5_000_000):
        for change in (0, 1, -1, 65_536, 10_000_000):
            if size + change < 0:
                continue
            path = p.fresh("file")
            posix_rig.fill(path, size)
            label = f"{size} by {change}"
            with p.stamps(f"truncate {label}", path, "."):
                p.do(f"truncate {label}", os.truncate, path, size + change)
            p.facts(f"truncate {label}: after", path)
            fd = p.open(f"open {label}", path, os.O_RDWR)
            with p.stamps(f"ftruncate {label}", path):
                p.do(f"ftruncate {label}", os.ftruncate, fd, size)
            p.facts(f"ftruncate {label}: after", path)
            with p.stamps(f"ftruncate to the same {label}", path):
                p.do(f"ftruncate to the same {label}", os.ftruncate, fd, size)
            p.close(fd)


def case_truncate_errors(p: Place) -> None:
    for kind in KINDS:
        path = p.fresh(kind)
        p.do(f"truncate {kind}", os.truncate, path, 10)
    path = p.fresh("file")
    for size in (-1, -(2**63), 2**63 - 1, 2**62):
        with p.stamps(f"to {size}", path):
            p.do(f"to {size}", os.truncate, path, size)
    fd = p.open("read-only", path, os.O_RDONLY)
    p.do("ftruncate of a file open for reading", os.ftruncate, fd, 1)
    fd = p.open("to write", path, os.O_WRONLY)
    for size in (-1, 2**63 - 1, 2**62):
        p.do(f"ftruncate to {size}", os.ftruncate, fd, size)
    fd = p.open("directory", ".", os.O_RDONLY)
    p.do("ftruncate of a directory", os.ftruncate, fd, 1)
    p.do("of nothing", os.truncate, "none", 1)
    os.truncate(path, 2**40)
    p.facts("a terabyte of hole", path)
    os.truncate(path, 0)


# Extended attributes


def case_xattr_kinds(p: Place) -> None:
    names = (
        "user.a",
        "trusted.a",
        "security.a",
        "system.a",
        "other.a",
        "user.",
        "user",
        "",
        "a",
        "system.posix_acl_access",
        "user." + "n" * 250,
        "user." + "n" * 251,
    )
    for kind, name in product(KINDS, names):
        path = p.fresh(kind)
        label = f"{kind} {name[:20]} ({len(name)})"
        with p.stamps(f"set {label}", path):
            p.do(f"set {label}", os.setxattr, path, name, b"value", follow_symlinks=False)
        with p.stamps(f"get {label}", path):
            p.do(f"get {label}", os.getxattr, path, name, follow_symlinks=False)
        p.do(f"list {label}", os.listxattr, path, follow_symlinks=False)
        with p.stamps(f"remove {label}", path):
            p.do(f"remove {label}", os.removexattr, path, name, follow_symlinks=False)
        p.do(f"remove {label} again", os.removexattr, path, name, follow_symlinks=False)
        p.do(f"list {label} at the end", os.listxattr, path, follow_symlinks=False)


def case_xattr_flags(p: Place) -> None:
    path = p.fresh("file")
    for flags, name in product((os.XATTR_CREATE, os.XATTR_REPLACE, 0, 3, 4), ("user.new", "user.a", "user.empty")):
        os.setxattr(path, "user.a", b"old")
        os.setxattr(path, "user.empty", b"")
        with p.stamps(f"{name} with {flags}", path):
            p.do(f"{name} with {flags}", os.setxattr, path, name, b"new", flags)
        p.do(f"{name} with {flags}: now", os.getxattr, path, name)
        if "user.new" in os.listxattr(path):
            os.removexattr(path, "user.new")


def case_xattr_sizes(p: Place) -> None:
    path = p.fresh("file")
    for size in (0, 1, 255, 256, 1000, 3000, 65_537):
        p.do(f"set {size}", os.setxattr, path, "user.size", b"v" * size)
        p.do(f"get {size}", lambda: len(os.getxattr(path, "user.size")))
        for room in (0, 1, 10, 100_000):
            p.do(f"get {size} into {room}", raw_getxattr, path, "user.size", room)
    for room in (0, 1, 5, 10, 1000):
        p.do(f"list into {room}", raw_listxattr, path, room)
    for number in range(30):
        p.do(f"one more: {number}", os.setxattr, path, f"user.number{number}", b"12")
    p.note("all", sorted(os.listxattr(path)))
    os.unlink(path)


def raw_getxattr(path: str, name: str, room: int) -> int:
    return check(LIBC.getxattr(path.encode(), name.encode(), ctypes.create_string_buffer(max(room, 1)), room))


def raw_listxattr(path: str, room: int) -> int:
    return check(LIBC.listxattr(path.encode(), ctypes.create_string_buffer(max(room, 1)), room))


def case_xattr_by_others(p: Place) -> None:
    for kind, mode, (name, who) in product(("file", "dir"), (0o600, 0o666, 0o444, 0o1777, 0o000), WHO.items()):
        path = owned(p, kind, mode)
        for attribute in ("user.mine", "trusted.root", "security.root"):
            os.setxattr(path, attribute, b"before")
            label = f"{attribute} of {kind} {mode:o} by {name}"
            with p.stamps(f"set {label}", path):
                p.do(f"set {label}", os.setxattr, path, attribute, b"value", who=who)
            p.do(f"get {label}", os.getxattr, path, attribute, who=who)
            p.do(f"list {label}", lambda path=path: sorted(os.listxattr(path)), who=who)
            p.do(f"remove {label}", os.removexattr, path, attribute, who=who)


def case_capabilities_go_with_writing(p: Place) -> None:
    """security.capability is taken away by a change of data, owner or size."""
    value = bytes.fromhex("0100000202000000000000000000000000000000")
    changes: dict[str, Callable[[str], object]] = {
        "write": lambda path: write(path, b"x"),
        "truncate": lambda path: os.truncate(path, 1),
        "chown": lambda path: os.chown(path, 0, 0),
        "chmod": lambda path: os.chmod(path, 0o755),
        "open with O_TRUNC": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
    }
    for call, work in changes.items():
        path = p.fresh("file")
        posix_rig.fill(path, 10)
        p.do(f"set for {call}", os.setxattr, path, "security.capability", value)
        p.do(f"get for {call}", lambda path=path: os.getxattr(path, "security.capability").hex())
        p.do(call, work, path)
        p.do(f"left after {call}", lambda path=path: os.listxattr(path))


# The rest


def case_statfs(p: Place) -> None:
    figures = os.statvfs(".")
    p.note("longest name", figures.f_namemax)
    p.note("it adds up", figures.f_bavail <= figures.f_bfree <= figures.f_blocks and figures.f_ffree <= figures.f_files)
    p.note("same everywhere", os.statvfs(p.fresh("dir")).f_blocks == figures.f_blocks)
    fd = p.open("open", p.fresh("file"), os.O_RDONLY)
    p.note("by descriptor", os.statvfs(fd).f_bsize == figures.f_bsize)
    before = os.statvfs(".").f_files - os.statvfs(".").f_ffree
    p.note("inodes are counted", before > 0)


def case_device_numbers(p: Place) -> None:
    for major, minor in ((0, 0), (1, 3), (255, 255), (259, 1048575), (4095, 1)):
        for kind in (stat.S_IFBLK, stat.S_IFCHR):
            path = p.unused()
            p.do(f"mknod {major}:{minor}", os.mknod, path, kind | 0o600, os.makedev(major, minor))
            p.facts(f"made {major}:{minor}", path)
    p.do("mknod by a user", os.mknod, p.unused(), stat.S_IFCHR | 0o600, os.makedev(1, 3), who=user(USER))
    os.chmod(".", 0o777)
    p.do("mknod by a user who may write", os.mknod, p.unused(), stat.S_IFCHR | 0o600, os.makedev(1, 3), who=user(USER))
    p.do("mknod of a pipe by a user", os.mknod, p.unused(), stat.S_IFIFO | 0o600, who=user(USER))


def case_links_of_directories(p: Place) -> None:
    os.mkdir("dir")
    counts = [os.stat("dir").st_nlink]
    changes: list[tuple[Callable[..., None], tuple[str, ...]]] = [
        (os.mkdir, ("dir/a",)),
        (os.mkdir, ("dir/b",)),
        (os.mkfifo, ("dir/fifo",)),
        (os.rename, ("dir/a", "moved")),
        (os.rename, ("moved", "dir/b")),
        (os.rmdir, ("dir/b",)),
    ]
    for change, arguments in changes:
        change(*arguments)
        counts.append(os.stat("dir").st_nlink)
    p.note("links", counts)


def case_what_is_not_kept(p: Place) -> None:
    path, directory, link = p.fresh("file"), p.fresh("dir"), p.fresh("link")
    posix_rig.fill(path, 100)
    for each in (path, directory, link):
        os.utime(each, (1, 10**9), follow_symlinks=False)
    with p.stamps("read", path, access=True), open(path, "rb") as file:
        file.read()
    with p.stamps("listing", directory, access=True):
        os.listdir(directory)
    with p.stamps("readlink", link, access=True):
        os.readlink(link)
    birth = subprocess.run(["stat", "-c", "%W", path], capture_output=True, text=True, check=True).stdout
    p.note("birth time", int(birth) > 0)
    fd = p.open("open", path, os.O_RDWR)
    p.do("chattr", lambda: len(fcntl.ioctl(fd, _GET_FLAGS, bytes(8))))
    acl = struct.pack(
        "<I" + "HHI" * 5, 2, 1, 6, 2**32 - 1, 2, 6, USER, 4, 4, 2**32 - 1, 16, 6, 2**32 - 1, 32, 4, 2**32 - 1
    )
    p.do("access control list", os.setxattr, path, "system.posix_acl_access", acl)
    os.mknod(device := p.unused(), stat.S_IFCHR | 0o666, os.makedev(1, 3))
    p.do("device", lambda: os.close(os.open(device, os.O_RDWR)))
    shutil.copy("/usr/bin/id", program := p.unused())
    os.chmod(program, 0o4755)
    p.do("setuid program", in_child, user(USER), partial(effective_user, os.path.abspath(program)))


def test_a_trusted_volume(mount: MountFactory, accel: str) -> None:
    """Its devices and setuid programs work."""
    mounted = mount(accel, "--trusted")
    for path in (mounted.sandbox.path, mounted.path):
        path.chmod(0o711)
    os.mknod(mounted.path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    program = str(shutil.copy("/usr/bin/id", mounted.path / "id"))
    os.chmod(program, 0o4755)
    fd = os.open(mounted.path / "null", os.O_RDWR)
    assert os.write(fd, b"gone") == 4
    os.close(fd)
    assert in_child(user(USER), partial(effective_user, program)) == "0"


def effective_user(program: str) -> str:
    return subprocess.run([program, "-u"], capture_output=True, text=True, check=False).stdout.strip()


@pytest.mark.parametrize("case", posix_rig.cases_of(globals()), ids=lambda case: case.__name__.removeprefix("case_"))
def test_as_on_ext4(ground: posix_rig.Ground, case: Callable[[Place], None]) -> None:
    ground.compare(case)
