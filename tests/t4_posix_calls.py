"""System calls that few programs make: handles, watches, pipes of pages, advice, flags of one read, as on ext4."""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import mmap
import os
import shutil
import socket
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import posix_rig
import pytest
from posix_rig import AT_EMPTY_PATH, AT_FDCWD, LIBC, USER, Place, check, fill, in_child, product, user

pytestmark = pytest.mark.usefixtures("needs_mounts")

PAGE: Final = mmap.PAGESIZE
_SYS_OPENAT2: Final = 437
_PR_SET_KEEPCAPS: Final = 8
_CAPABILITY_VERSION: Final = 0x20080522
_SYS_EXECVEAT: Final = {"x86_64": 322, "aarch64": 281}[os.uname().machine]


@pytest.fixture(scope="module", params=["bpf", "off"])
def ground(request: pytest.FixtureRequest) -> Iterator[posix_rig.Ground]:
    with posix_rig.ground(request.param) as made:
        yield made


# Paths and handles


def openat2(path: str, flags: int, resolve: int, mode: int = 0) -> None:
    how = struct.pack("QQQ", flags, mode, resolve)
    arguments = (AT_FDCWD, path.encode(), how, ctypes.c_size_t(len(how)))
    os.close(check(LIBC.syscall(_SYS_OPENAT2, *arguments)))


def case_resolving(p: Place) -> None:
    os.makedirs("dir/below")
    fill("dir/file", 10)
    os.symlink("file", "dir/link")
    os.symlink("../outside", "dir/out")
    os.symlink(f"{p.root}/dir/file", "dir/absolute")
    paths = ("dir/file", "dir/link", "dir/out", "dir/absolute", "dir/../dir/file", "/proc/self/status", "dir/none")
    for path, resolve in product(paths, (0, 1, 2, 4, 8, 16, 0x18, 64)):
        p.do(f"openat2 {path} {resolve}", openat2, path, os.O_RDONLY, resolve)
    for flag, mode in ((os.O_RDONLY, 0o600), (os.O_CREAT | os.O_WRONLY, 0o7777), (os.O_CREAT | os.O_RDWR, 0o17777)):
        p.do(f"openat2 {flag} {mode:o}", openat2, "dir/made", flag, 0, mode)
    p.facts("made", "dir/made")
    flags = {
        "directory": os.O_DIRECTORY,
        "new directory": os.O_DIRECTORY | os.O_CREAT,
        "no link": os.O_NOFOLLOW,
        "path": os.O_PATH | os.O_NOFOLLOW,
        "written directory": os.O_WRONLY,
        "exclusive": os.O_CREAT | os.O_EXCL,
        "truncated": os.O_TRUNC,
        "direct": os.O_DIRECT,
        "nameless": os.O_TMPFILE | os.O_RDWR,
        "nameless to read": os.O_TMPFILE,
    }
    ways = ("dir", "dir/file", "dir/link", "dir/link/", "dir/out", "dir/file/")
    for (label, flag), path in product(flags.items(), ways):
        p.close(p.open(f"{label} {path}", path, flag))


def _handle(path: str) -> bytes:
    """Return a struct file_handle of a path."""
    buffer = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 8 + 128)
    mount = ctypes.c_int()
    check(LIBC.name_to_handle_at(AT_FDCWD, path.encode(), buffer, ctypes.byref(mount), 0))
    return buffer.raw


def case_handles(p: Place) -> None:
    """open_by_handle_at: a file is found whatever its name, and no more when it is gone."""
    for kind in ("file", "dir"):
        path = p.fresh(kind)
        handle = p.do(f"handle of {kind}", lambda path=path: bool(_handle(path))) and _handle(path)
        if not handle:
            continue
        top = p.open("top", ".", os.O_RDONLY)
        os.rename(path, f"{path}-moved")
        fd = LIBC.open_by_handle_at(top, handle, os.O_RDONLY)
        p.note(f"{kind} by handle", fd >= 0 and os.path.samestat(os.fstat(fd), os.stat(f"{path}-moved")))
        if fd >= 0:
            os.close(fd)
        posix_rig.remove(f"{path}-moved")
        p.do(f"removed {kind} by handle", lambda top=top, handle=handle: check(LIBC.open_by_handle_at(top, handle, 0)))


def case_forgotten_handles(p: Place) -> None:
    """open_by_handle_at after the kernel has given up what it knew of the file."""
    handle = _handle(p.fresh("file"))
    top = p.open("top", ".", os.O_RDONLY)

    def reopen() -> None:
        """What was used of late stays the first time, and what another process looks at stays."""
        for _ in range(10):
            for _ in range(3):
                Path("/proc/sys/vm/drop_caches").write_text("2", "ascii")
            os.close(check(LIBC.open_by_handle_at(top, handle, os.O_RDONLY)))

    p.do("by handle", reopen)


def case_executing_descriptors(p: Place) -> None:
    shutil.copy("/bin/true", "program")
    fd = p.open("program", "program", os.O_RDONLY | os.O_PATH)

    def execveat(flags: int, path: bytes = b"", where: int = fd) -> Any:
        def work() -> None:
            arguments = (ctypes.c_char_p * 2)(b"program", None)
            check(LIBC.syscall(_SYS_EXECVEAT, where, path, arguments, None, flags))

        return in_child(None, work)

    p.do("execveat of a descriptor", execveat, AT_EMPTY_PATH)
    p.do("execveat of no path", execveat, 0)
    p.do("execveat of a path", execveat, 0, b"program", AT_FDCWD)
    os.symlink("program", "link")
    p.do("execveat of a link", execveat, posix_rig.AT_SYMLINK_NOFOLLOW, b"link", AT_FDCWD)
    os.unlink("program")
    p.do("execveat of what is unlinked", execveat, AT_EMPTY_PATH)
    shutil.copy("/bin/sleep", "sleeper")
    with subprocess.Popen(["./sleeper", "60"]) as running:
        p.open("write to a running program", "sleeper", os.O_WRONLY)
        p.do("truncate a running program", os.truncate, "sleeper", 0)
        p.do("rename a running program", os.rename, "sleeper", "other")
        p.do("unlink a running program", os.unlink, "other")
        running.kill()
    shutil.copy("/bin/true", "written")
    p.open("held for writing", "written", os.O_WRONLY)
    p.do("execute what is written", lambda: in_child(None, lambda: os.execv("./written", ["written"])))


def case_changing_the_root(p: Place) -> None:
    os.makedirs("root/dir")
    fill("root/file", 5)
    os.symlink("/file", "root/link")

    def work(path: str) -> object:
        os.chroot(path)
        os.chdir("/")
        return sorted(os.listdir("/")), os.stat("/link").st_size, os.path.exists("/../../proc")

    for who, path in product((None, user(USER)), ("root", "root/file", "root/none")):
        p.do(f"chroot {path} by {who}", in_child, who, lambda path=path: work(path))


# Watching


def case_watching(p: Place) -> None:
    """inotify: which events each change brings, and in which order."""
    _NAMES: dict[int, str] = {
        0x1: "access", 0x2: "modify", 0x4: "attributes", 0x8: "close written", 0x10: "close", 0x20: "open",
        0x40: "moved from", 0x80: "moved to", 0x100: "create", 0x200: "delete", 0x400: "delete itself",
        0x800: "move itself", 0x8000: "ignored", 0x2000: "unmount",
    }  # fmt: skip
    os.mkdir("dir")
    fd = check(LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    check(LIBC.inotify_add_watch(fd, b"dir", 0xFFF))

    def events() -> list[tuple[str, bool, bytes]]:
        with contextlib.suppress(BlockingIOError):
            data, at, found = os.read(fd, 65536), 0, []
            while at < len(data):
                _, mask, _, length = struct.unpack_from("iIII", data, at)
                name = data[at + 16 : at + 16 + length].rstrip(b"\0")
                found.append((_NAMES.get(mask & 0xFFFFFF, hex(mask)), bool(mask & 0x40000000), name))
                at += 16 + length
            return found
        return []

    path = "dir/file"
    changes: dict[str, Callable[[], object]] = {
        "create": lambda: Path(path).touch(),
        "write": lambda: Path(path).write_bytes(b"x"),
        "append": lambda: os.close(_appended(path)),
        "read": lambda: Path(path).read_bytes(),
        "truncate": lambda: os.truncate(path, 0),
        "chmod": lambda: os.chmod(path, 0o600),
        "chown": lambda: os.chown(path, 1, 1),
        "utime": lambda: os.utime(path, (1, 1)),
        "setxattr": lambda: os.setxattr(path, "user.a", b"b"),
        "link": lambda: os.link(path, "dir/link"),
        "symlink": lambda: os.symlink("file", "dir/symlink"),
        "mkdir": lambda: os.mkdir("dir/below"),
        "mknod": lambda: os.mkfifo("dir/pipe"),
        "rename": lambda: os.rename(path, "dir/renamed"),
        "replace": lambda: os.rename("dir/renamed", "dir/link"),
        "move away": lambda: os.rename("dir/symlink", "symlink"),
        "move in": lambda: os.rename("symlink", "dir/symlink"),
        "unlink": lambda: os.unlink("dir/link"),
        "rmdir": lambda: os.rmdir("dir/below"),
        "list": lambda: os.listdir("dir"),
        "rename itself": lambda: os.rename("dir", "other"),
        "remove the rest": lambda: shutil.rmtree("other"),
    }
    for label, change in changes.items():
        change()
        p.note(label, sorted(events()) if label == "remove the rest" else events())
    os.close(fd)


def _appended(path: str) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"more")
    return fd


def case_leases(p: Place) -> None:
    path = p.fresh("file")
    for flags in (os.O_RDONLY, os.O_RDWR):
        fd = p.open(f"open {flags}", path, flags)
        p.do(f"which lease {flags}", fcntl.fcntl, fd, fcntl.F_GETLEASE)
        p.do(f"pipe size {flags}", fcntl.fcntl, fd, fcntl.F_GETPIPE_SZ)
        p.do(f"seals {flags}", fcntl.fcntl, fd, fcntl.F_GET_SEALS)
        p.close(fd)
    p.do("no such command", fcntl.fcntl, p.open("open", path, os.O_RDONLY), 999)


# Data without copies, and advice


def case_splicing(p: Place) -> None:
    for size in (1, 100, PAGE, 65_536, 70_001, 5_000_000):
        data = fill("source", size)
        source, target = p.open("source", "source", os.O_RDONLY), os.open("target", os.O_CREAT | os.O_RDWR | os.O_TRUNC)
        out, into = os.pipe()
        moved = 0
        while moved < size and (count := os.splice(source, into, 65_536)):
            left = count
            while left:
                left -= os.splice(out, target, left)
            moved += count
        p.note(f"{size} moved", moved)
        p.note(f"{size} the same", os.pread(target, size + 1, 0) == data)
        p.do(f"{size} at an offset", os.splice, source, into, 50, offset_src=size // 2)
        p.do(f"{size} to an offset", os.splice, out, target, 20, offset_dst=size + 10)
        p.note(f"{size} then", os.pread(target, 100, max(0, size - 10)))
        p.do(f"{size} file to file", os.splice, source, target, 10)
        for fd in (target, out, into):
            os.close(fd)
        p.close(source)
    appended = p.open("append", "target", os.O_WRONLY | os.O_APPEND)
    out, into = os.pipe()
    os.write(into, b"some")
    p.do("splice to append", os.splice, out, appended, 4)
    one, two = socket.socketpair()
    with one, two:
        p.do("sendfile to a socket", os.sendfile, one.fileno(), p.open("again", "source", os.O_RDONLY), 3, 1000)
        p.do("received", two.recv, 2000)
        message = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [p.open("sent", "source", os.O_RDONLY)]))]
        one.sendmsg([b"x"], message)
        _, fds, _, _ = socket.recv_fds(two, 1, 1)
        p.do("read what was sent", os.read, fds[0], 10)
        os.close(fds[0])
    os.close(out)
    os.close(into)


def case_advice(p: Place) -> None:
    data = fill("file", 300_000)
    directory, pipe = p.open("directory", ".", os.O_RDONLY), os.pipe()
    opened = {"r": os.O_RDONLY, "w": os.O_WRONLY, "path": os.O_PATH}
    fds = {label: p.open(label, "file", flags) for label, flags in opened.items()}
    fds |= {"directory": directory, "pipe": pipe[0]}
    for (label, fd), advice in product(fds.items(), (*range(6), 99)):
        p.do(f"fadvise {label} {advice}", os.posix_fadvise, fd, 0, 0, advice)
    p.do("fadvise of less than nothing", os.posix_fadvise, fds["r"], 0, -1, 0)
    for label, fd in fds.items():
        p.do(f"readahead {label}", lambda fd=fd: check(LIBC.readahead(fd, ctypes.c_long(0), ctypes.c_size_t(100_000))))
        parts = ((0, 0, 0), (1, 0, 10), (2, 0, 100_000), (7, 0, 0), (8, 0, 1), (2, -1, 5), (2, 5, -1))
        for flags, offset, length in parts:
            p.do(
                f"sync_file_range {label} {flags} {offset} {length}",
                lambda fd=fd, o=offset, n=length, f=flags: check(
                    LIBC.sync_file_range(fd, ctypes.c_long(o), ctypes.c_long(n), f)
                ),
            )
        p.do(f"fsync {label}", os.fsync, fd)
        p.do(f"fdatasync {label}", os.fdatasync, fd)
    p.do("syncfs of a path", lambda: check(LIBC.syncfs(fds["path"])))
    p.note("still", Path("file").read_bytes() == data)
    for fd in pipe:
        os.close(fd)


def case_advice_on_mappings(p: Place) -> None:
    data = bytearray(fill("file", 20 * PAGE))
    fd = p.open("open", "file", os.O_RDWR)
    for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
        with mmap.mmap(fd, 20 * PAGE, flags) as mapped:
            for number, advice in enumerate((0, 1, 2, 3, 4, 8, 9, 10, 11, 14, 15, 20, 21, 22, 23)):
                mapped[number * PAGE] = number
                if flags == mmap.MAP_SHARED:
                    data[number * PAGE] = number
                label = f"madvise {flags} {advice}"
                p.do(label, mapped.madvise, advice, number * PAGE, PAGE)
                p.note(f"{label}: then", mapped[number * PAGE : number * PAGE + 5])
            p.do(f"punched by madvise {flags}", mapped.madvise, mmap.MADV_REMOVE, 16 * PAGE, PAGE)
            p.note(f"punched {flags}", mapped[16 * PAGE - 3 : 16 * PAGE + 3])
            p.do(f"flush {flags}", mapped.flush, 0, 2 * PAGE)
            p.do(f"grown {flags}", mapped.resize, 24 * PAGE)
            p.note(f"size {flags}", (len(mapped), os.fstat(fd).st_size))
        p.note(f"file {flags}", os.pread(fd, 30 * PAGE, 0))
        os.truncate("file", 20 * PAGE)


def case_flags_of_one_call(p: Place) -> None:
    """preadv2 and pwritev2."""
    fill("file", 10_000)
    fd = p.open("open", "file", os.O_RDWR)
    reading = os.open("file", os.O_RDONLY)
    flags = {
        "none": 0, "HIPRI": 1, "DSYNC": 2, "SYNC": 4, "APPEND": 0x10, "NOAPPEND": 0x20, "ATOMIC": 0x40,
        "RWF_DONTCACHE": 0x80, "unknown": 0x1000,
    }  # fmt: skip
    for label, flag in flags.items():
        p.do(f"read: {label}", os.preadv, fd, [bytearray(20)], 5000, flag)
        if label != "ATOMIC":  # it depends on the disk below
            p.do(f"write: {label}", os.pwritev, fd, [b"written", b"", b"twice"], 6000, flag)
            size = os.fstat(fd).st_size
            p.note(f"after {label}", (size, os.pread(fd, 40, 5990), os.pread(fd, 20, size - 5)))
        os.ftruncate(fd, 10_000)
    p.do("write what is read only", os.pwritev, reading, [b"x"], 0, os.RWF_APPEND)
    p.do("append by one call", os.pwritev, fd, [b"end"], 0, os.RWF_APPEND)
    p.note("its end", os.pread(fd, 10, os.fstat(fd).st_size - 6))
    many = [b"%d" % number for number in range(1024)]
    p.do("as many as can be", os.pwritev, fd, many, 0)
    p.do("one more", os.pwritev, fd, [*many, b"x"], 0)
    os.close(reading)


def case_no_such_ioctl(p: Place) -> None:
    """What programs ask of every file, and take for an answer that it cannot."""
    fill("source", 10_000)
    source, target = p.open("source", "source", os.O_RDONLY), os.open("target", os.O_CREAT | os.O_RDWR)
    p.do("clone", fcntl.ioctl, target, 0x40049409, source)
    p.do("clone range", fcntl.ioctl, target, 0x4020940D, struct.pack("qQQQ", source, 0, 0, 0))
    p.do("is a terminal", os.isatty, source)
    p.do("bytes to read", lambda: struct.unpack("i", fcntl.ioctl(source, 0x541B, b"\0" * 4)))
    p.do("non-blocking", lambda: fcntl.ioctl(source, 0x5421, struct.pack("i", 1)))
    p.do("block device", fcntl.ioctl, source, 0x1268, b"\0" * 4)
    p.do("swapon", lambda: check(LIBC.swapon(b"target", 0)))
    p.do("acct", lambda: check(LIBC.acct(b"none")))
    p.do("quotas of a file", lambda: check(LIBC.quotactl(0x80000700, b"source", 0, None)))
    p.do("mount a file", lambda: check(LIBC.mount(b"source", b"target", b"ext4", 0, None)))
    p.do("umount a file", lambda: check(LIBC.umount2(b"target", 0)))
    os.close(target)


# What is told of a file


class _Statx(ctypes.Structure):
    _fields_ = (
        ("mask", ctypes.c_uint32), ("blksize", ctypes.c_uint32), ("attributes", ctypes.c_uint64),
        ("nlink", ctypes.c_uint32), ("uid", ctypes.c_uint32), ("gid", ctypes.c_uint32), ("mode", ctypes.c_uint16),
        ("spare", ctypes.c_uint16), ("ino", ctypes.c_uint64), ("size", ctypes.c_uint64), ("blocks", ctypes.c_uint64),
        ("rest", ctypes.c_byte * 208),
    )  # fmt: skip


def case_statx(p: Place) -> None:
    for kind, flags, mask in product(
        ("file", "dir", "link", "fifo"), (0, 0x100, 0x2000, 0x4000, 0x6000, 1), (0, 0x200, 0x7FF, 0x80000000)
    ):
        path = p.fresh(kind)
        found = _Statx()

        def ask(path: str = path, flags: int = flags, mask: int = mask, found: _Statx = found) -> None:
            check(LIBC.statx(AT_FDCWD, path.encode(), flags, mask, ctypes.byref(found)))

        label = f"{kind} {flags:x} {mask:x}"
        p.do(label, ask)
        if mask & 0x7FF == 0x7FF:
            size = 0 if stat.S_ISDIR(found.mode) else found.size
            p.note(f"{label}: mask, mode, size", (found.mask & 0x7FF, oct(found.mode), size))
    p.do("statx of nothing", lambda: check(LIBC.statx(AT_FDCWD, b"", 0, 0x7FF, ctypes.byref(_Statx()))))
    p.do("statx of no memory", lambda: check(LIBC.statx(AT_FDCWD, b".", 0, 0x7FF, None)))


# Who may do what, with real users in processes of their own


_USERS: Final = {"root": None, "owner": user(USER), "group": posix_rig.user(2222, USER), "other": user(3333)}


def case_setgid_directories(p: Place) -> None:
    """What is made in them has their group; setgid goes from files whose maker is not in it."""
    makers: dict[str, Callable[[str], object]] = {
        "file": lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o2775)),
        "plain file": lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o2745)),
        "dir": lambda path: os.mkdir(path, 0o775),
        "node": lambda path: os.mknod(path, stat.S_IFREG | 0o2755),
        "fifo": lambda path: os.mkfifo(path, 0o2755),
        "symlink": lambda path: os.symlink("x", path),
    }
    for mode, (name, who), (kind, make) in product((0o2777, 0o777, 0o3777), _USERS.items(), makers.items()):
        directory = p.fresh("dir", mode, USER)
        path = f"{directory}/made"
        label = f"{kind} in {mode:o} by {name}"
        p.do(label, make, path, who=who)
        p.facts(f"{label}: made", path)
        p.do(f"{label}: chmod", os.chmod, path, 0o6771, who=who)
        p.facts(f"{label}: changed", path)
        p.do(f"{label}: nameless", _nameless, directory, who=who)


def _nameless(directory: str) -> tuple[str, int, int]:
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o2775)
    found = os.fstat(fd)
    os.close(fd)
    return oct(found.st_mode), found.st_uid, found.st_gid


def case_protected_places(p: Place) -> None:
    """Links, pipes and files of others in a directory that is sticky and open to all, as the kernel's sysctls say."""
    for mode, owner, (name, who) in product((0o1777, 0o777, 0o1775), (0, USER, 3333), _USERS.items()):
        directory = p.fresh("dir", mode, USER)
        fill(f"{directory}/target", 3)
        os.chmod(f"{directory}/target", 0o666)
        os.symlink("target", f"{directory}/link")
        os.mkfifo(f"{directory}/pipe", 0o666)
        for node in ("target", "link", "pipe"):
            os.chown(f"{directory}/{node}", owner, owner, follow_symlinks=False)
        os.chmod(f"{directory}/pipe", 0o666)
        label = f"{mode:o} of {owner} by {name}"

        for node in ("target", "link", "pipe"):
            path = f"{directory}/{node}"
            for flags in (os.O_RDWR, os.O_RDWR | os.O_CREAT):
                p.close(p.open(f"open {node} {flags} in {label}", path, flags | os.O_NONBLOCK, who=who))
            p.do(f"link to {node} in {label}", os.link, path, f"{path}-2", follow_symlinks=False, who=who)
        for node in ("target", "link", "pipe"):
            p.do(f"rename {node} in {label}", os.rename, f"{directory}/{node}", f"{directory}/{node}-3", who=who)


def case_capable_users(p: Place) -> None:
    """Each right of a user alone: what lets a program pass, and what takes setuid away."""

    capabilities = {"none": -1, "chown": 0, "override": 1, "search": 2, "fowner": 3, "fsetid": 4, "admin": 21}
    works: dict[str, Callable[[str], object]] = {
        "read": lambda path: Path(f"{path}/file").read_bytes(),
        "write": lambda path: Path(f"{path}/file").write_bytes(b"x"),
        "list": lambda path: sorted(os.listdir(path)),
        "chmod": lambda path: os.chmod(f"{path}/file", 0o6755),
        "chown": lambda path: os.chown(f"{path}/file", 3333, -1),
        "chgrp": lambda path: os.chown(f"{path}/file", -1, 3333),
        "utime": lambda path: os.utime(f"{path}/file", (1, 1)),
        "utime now": lambda path: os.utime(f"{path}/file"),
        "unlink": lambda path: os.unlink(f"{path}/file"),
        "xattr": lambda path: os.setxattr(f"{path}/file", "user.a", b"b"),
        "trusted": lambda path: os.setxattr(f"{path}/file", "trusted.a", b"b"),
        "noatime": lambda path: os.close(os.open(f"{path}/file", os.O_RDONLY | os.O_NOATIME)),
        "truncate": lambda path: os.truncate(f"{path}/file", 1),
    }
    for (name, number), mode in product(capabilities.items(), (0o6777, 0o6700)):
        label = f"{mode:o} with {name}"
        directories = {what: p.fresh("dir", 0o1777 if mode == 0o6777 else 0o700) for what in works}
        for directory in directories.values():
            fill(f"{directory}/file", 10)
            os.chown(f"{directory}/file", USER, USER)
            os.chmod(f"{directory}/file", mode)
        calls: list[Callable[[], object]] = [partial(work, directories[what]) for what, work in works.items()]
        answers = in_child(None, partial(_with_one_right, number, calls))
        for (what, directory), answer in zip(directories.items(), answers, strict=True):
            p.note(f"{what} {label}", answer)
            p.facts(f"{what} {label}: then", f"{directory}/file")


def _with_one_right(right: int, calls: list[Callable[[], object]]) -> list[object]:
    """Make calls as a user who is not root and has one capability, or none (-1); return their answers."""
    check(LIBC.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0))
    os.setgroups([])
    os.setgid(3333)
    os.setuid(3333)
    bits = 1 << right if right >= 0 else 0
    header, data = struct.pack("Ii", _CAPABILITY_VERSION, 0), struct.pack("IIIIII", bits, bits, 0, 0, 0, 0)
    check(LIBC.capset(header, data))
    answers: list[object] = []
    for call in calls:
        try:
            answers.append(call())
        except OSError as error:
            answers.append(posix_rig.name_of(error))
    return answers


@pytest.mark.parametrize("case", posix_rig.cases_of(globals()), ids=lambda case: case.__name__[5:])
def test_as_on_ext4(ground: posix_rig.Ground, case: Callable[[Place], None]) -> None:
    ground.compare(case)
