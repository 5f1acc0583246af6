"""Reading, writing, mapping, locks, pipes and sockets, as on ext4; several processes where that matters."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import select
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import posix_rig
import pytest
from posix_rig import LIBC, USER, Place, check, fill, in_child, pattern, product, user

pytestmark = pytest.mark.usefixtures("needs_mounts")

PAGE = 4096
#: Sizes around what a file holds inline, and around an object of the store.
SIZES = (0, 1, PAGE - 1, PAGE, PAGE + 1, 65_535, 65_536, 65_537, 4 * 2**20 - 1, 4 * 2**20, 4 * 2**20 + 1)
HUGE = 5 * 2**30


@pytest.fixture(scope="module", params=["bpf", "off"])
def ground(request: pytest.FixtureRequest) -> Iterator[posix_rig.Ground]:
    with posix_rig.ground(request.param) as made:
        yield made


def create(path: str, flags: int = os.O_RDWR, mode: int = 0o644) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, mode)


# Reading and writing


def case_sizes(p: Place) -> None:
    for size in SIZES:
        path = p.unused()
        data = fill(path, size)
        p.facts(f"{size}", path)
        fd = p.open(f"open {size}", path, os.O_RDWR)
        p.note(f"whole of {size}", os.pread(fd, size + 10, 0) == data)
        for offset, length in (
            (0, 0),
            (0, 1),
            (size - 1, 1),
            (size - 1, 10),
            (size, 1),
            (size + 1, 1),
            (size // 2, 5000),
        ):
            p.do(f"read {size} at {offset - size} ({length})", os.pread, fd, length, max(0, offset))
        p.do(f"append to {size}", os.pwrite, fd, b"end", size)
        p.do(f"before the end of {size}", os.pwrite, fd, b"xyz", max(0, size - 1))
        p.do(f"read back {size}", os.pread, fd, 10, max(0, size - 2))
        p.do(f"behind a hole of {size}", os.pwrite, fd, b"far", 2 * size + PAGE)
        p.do(f"the hole of {size}", os.pread, fd, 12, 2 * size + PAGE - 9)
        p.facts(f"grown {size}", path)
        p.close(fd)


def case_vectors(p: Place) -> None:
    fd = create("file")
    p.do("writev", os.writev, fd, [b"one", b"", b"two" * 5000])
    p.do("pwritev", os.pwritev, fd, [b"ab", b"cd"], 100)
    buffers = [bytearray(3), bytearray(0), bytearray(7), bytearray(200)]
    p.do("preadv", os.preadv, fd, buffers, 95)
    p.note("read", buffers)
    p.do("too many", os.writev, fd, [b"x"] * 1025)
    p.do("RWF_APPEND", os.pwritev, fd, [b"at the end"], 0, os.RWF_APPEND)
    p.facts("appended", "file")
    os.close(fd)


def case_bad_arguments(p: Place) -> None:
    path = p.fresh("file")
    os.truncate(path, 10)
    fd = p.open("open", path, os.O_RDWR)
    only_read, only_write = p.open("r", path, os.O_RDONLY), p.open("w", path, os.O_WRONLY)
    for offset in (-1, -(2**63), 2**63 - 1, 2**63 - 5, 2**62, 2**57):
        p.do(f"pread at {offset}", os.pread, fd, 1, offset)
        p.do(f"pwrite at {offset}", os.pwrite, fd, b"0123456789", offset)
        p.do(f"pwrite none at {offset}", os.pwrite, fd, b"", offset)
        for whence in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END):
            os.lseek(fd, 3, os.SEEK_SET)
            p.do(f"seek {offset} {whence}", os.lseek, fd, offset, whence)
    p.do("seek 7", os.lseek, fd, 0, 7)
    p.do("read what is open for writing", os.read, only_write, 1)
    p.do("write what is open for reading", os.write, only_read, b"1")
    p.do("ftruncate what is open for reading", os.ftruncate, only_read, 1)
    directory = p.open("directory", ".", os.O_RDONLY)
    p.do("read a directory", os.read, directory, 1)
    p.do("map a directory", lambda: mmap.mmap(directory, 1, mmap.MAP_SHARED, mmap.PROT_READ))
    p.do("bad address", lambda: check(LIBC.write(fd, ctypes.c_void_p(8), ctypes.c_size_t(5))))
    p.do("bad address to read", lambda: check(LIBC.pread(fd, ctypes.c_void_p(8), ctypes.c_size_t(5), ctypes.c_long(0))))
    p.do("fsync", os.fsync, fd)
    p.do("fdatasync", os.fdatasync, only_read)
    p.do("fsync of a directory", os.fsync, directory)
    p.do("ioctl", fcntl.ioctl, fd, 0x5401, b"\0" * 64)
    p.facts("at the end", path)


def case_append(p: Place) -> None:
    fd = create("file", os.O_RDWR | os.O_APPEND)
    os.write(fd, b"one")
    p.do("pwrite goes to the end", os.pwrite, fd, b"two", 0)
    os.lseek(fd, 0, os.SEEK_SET)
    p.do("write goes to the end", os.write, fd, b"three")
    p.do("position", os.lseek, fd, 0, os.SEEK_CUR)
    other = create("file", os.O_WRONLY)
    os.pwrite(other, b"x" * 100_000, 50)
    os.write(fd, b"four")
    p.do("after another grew it", os.lseek, fd, 0, os.SEEK_CUR)
    os.ftruncate(other, 5)
    os.write(fd, b"five")
    p.note("all", os.pread(fd, 1000, 0))
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
    os.pwrite(fd, b"F", 0)
    p.note("without the flag", os.pread(fd, 1000, 0))
    os.close(fd)
    os.close(other)


def case_append_by_processes(p: Place) -> None:
    def work(number: int) -> None:
        fd = create("log", os.O_WRONLY | os.O_APPEND)
        for line in range(60):
            os.write(fd, f"{number} {line} ".encode().ljust(2000 + 37 * number, b".") + b"\n")
        os.close(fd)

    run_together([partial(work, number) for number in range(4)])
    with open("log", "rb") as log:
        lines = log.read().split(b"\n")
    p.note("lines", len(lines))
    p.note("whole", sorted((line.split()[0], int(line.split()[1]), len(line)) for line in lines[:-1]))


def run_together(works: list[Callable[[], None]]) -> list[int]:
    """Run each in a process; return their statuses."""
    pids = []
    for work in works:
        pid = os.fork()
        if pid == 0:
            try:
                work()
                os._exit(0)
            except BaseException:
                os._exit(1)
        pids.append(pid)
    return [os.waitpid(pid, 0)[1] for pid in pids]


def case_one_file_in_many_hands(p: Place) -> None:
    """Writers of different parts, and a reader that sees each part old or new as a whole."""
    size, parts = 300_000, 6
    fill("shared", size)

    def write_part(part: int) -> None:
        fd = create("shared")
        for turn in range(10):
            os.pwrite(fd, pattern(size // parts, part + turn), part * (size // parts))
        os.close(fd)

    statuses = run_together([partial(write_part, part) for part in range(parts)])
    p.note("ended", statuses)
    with open("shared", "rb") as file:
        data = file.read()
    step = size // parts
    p.note("content", [data[part * step : (part + 1) * step] == pattern(step, part + 9) for part in range(parts)])


def case_seen_by_others_at_once(p: Place) -> None:
    """What one descriptor or process wrote, the next call of any other sees, without a close or fsync."""
    fd = create("file")
    reader = os.open("file", os.O_RDONLY)
    for size in (10, 5000, 70_000, 200_000, 50, 5_000_000):
        data = pattern(size, size)
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, size)
        p.note(f"{size}: by descriptor", os.pread(reader, size + 1, 0) == data)
        with open("file", "rb") as other:
            p.note(f"{size}: by path", other.read() == data)
        p.note(f"{size}: stat", os.stat("file").st_size)
        p.do(f"{size}: in a process", in_child, None, lambda size=size: _sum("file"))
    os.close(fd)
    os.close(reader)


def _sum(path: str) -> int:
    with open(path, "rb") as file:
        return sum(file.read())


def case_sparse(p: Place) -> None:
    """Files with more than 4 GiB of hole."""
    fd = create("big")
    for offset in (0, HUGE, 2**32 - 5, 2**32, 2**31 - 1, 2**40):
        os.pwrite(fd, b"island", offset)
    p.facts("made", "big")
    for offset in (0, 3, 6, HUGE - 3, HUGE + 3, 2**32 - 8, 2**31 - 4, 2**40 + 2, 2**40 + 6):
        p.do(f"read at {offset}", os.pread, fd, 20, offset)
    os.fsync(fd)
    for offset in (0, HUGE - 3, 2**32 - 8, 2**40 + 2):
        p.do(f"read at {offset} after fsync", os.pread, fd, 20, offset)
    p.do("seek to the end", os.lseek, fd, -6, os.SEEK_END)
    p.do("read the end", os.read, fd, 100)
    os.ftruncate(fd, HUGE + 3)
    p.facts("cut", "big")
    p.do("read at the cut", os.pread, fd, 20, HUGE - 2)
    os.ftruncate(fd, HUGE + PAGE)
    p.do("read behind the cut", os.pread, fd, 20, HUGE - 2)
    with mmap.mmap(fd, PAGE, offset=HUGE // PAGE * PAGE) as mapped:
        p.note("mapped", bytes(mapped[:10]))
        mapped[1:3] = b"M!"
    p.do("read what was mapped", os.pread, fd, 6, HUGE)
    os.close(fd)


def case_blocks(p: Place) -> None:
    """Programs that copy files take those with fewer blocks than bytes for sparse, and look for their holes."""

    def note(label: str) -> None:
        status = os.fstat(fd)
        p.note(f"{label}: sparse", status.st_blocks < status.st_size // 512)
        p.note(f"{label}: empty", status.st_blocks == 0)

    for size in (0, 5000, 65_536, 300_000, 5_000_000):
        fd = create(p.unused())
        note(f"{size}: new")
        os.write(fd, pattern(size))
        note(f"{size}: written")
        os.fsync(fd)
        note(f"{size}: synced")
        os.pwrite(fd, b"again", size // 2)
        os.ftruncate(fd, 10 * size + 100_000)
        note(f"{size}: grown")
        os.pwrite(fd, pattern(100_000), 10 * size)
        os.fsync(fd)
        note(f"{size}: with an island")
        os.ftruncate(fd, size)
        note(f"{size}: cut back")
        if size > 300_000:
            check(LIBC.fallocate(fd, 3, ctypes.c_long(65_536), ctypes.c_long(1 << 20)))
            note(f"{size}: punched")
        os.ftruncate(fd, 0)
        note(f"{size}: cut")
        os.close(fd)
    for command in (["cp", "big", "copy"], ["cp", "--sparse=always", "big", "copy"]):
        fd = create("big")
        os.ftruncate(fd, 1 << 40)
        os.pwrite(fd, pattern(100_000), 1 << 30)
        subprocess.run(command, check=True)
        p.note(f"{' '.join(command)}: small", os.stat("copy").st_blocks < 1000)
        os.close(fd)
        os.unlink("copy")


def case_truncating_and_growing(p: Place) -> None:
    """What was cut off reads as zeros when the file grows again."""
    for size, cut, grown in product(
        (100, 65_537, 200_000, 4_300_000), (0, 1, 50, 4096, 65_536, 100_000), (5000, 4_500_000)
    ):
        if cut > size:
            continue
        label = f"{size} to {cut} to {grown}"
        fd = create("file", os.O_RDWR | os.O_TRUNC)
        os.pwrite(fd, pattern(size), 0)
        os.ftruncate(fd, cut)
        os.ftruncate(fd, grown)
        data = os.pread(fd, grown, 0)
        p.note(label, data == pattern(size)[:cut].ljust(grown, b"\0")[:grown])
        os.pwrite(fd, b"again", max(0, cut - 2))
        p.note(f"{label}: written", os.pread(fd, 12, max(0, cut - 6)))
        os.close(fd)


def case_synchronous(p: Place) -> None:
    for label, flags in {"O_SYNC": os.O_SYNC, "O_DSYNC": os.O_DSYNC, "both": os.O_SYNC | os.O_APPEND}.items():
        path = p.unused()
        fd = p.open(label, path, os.O_RDWR | os.O_CREAT | flags)
        for size in (1, 5000, 100_000):
            p.do(f"{label} {size}", os.write, fd, pattern(size))
        p.note(f"{label}: back", os.pread(fd, 200_000, 0) == pattern(1) + pattern(5000) + pattern(100_000))
        p.note(f"{label}: flags", fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_SYNC | os.O_DSYNC))
        p.facts(f"{label}: after", path)


def case_direct(p: Place) -> None:
    """O_DIRECT in whole blocks; ext4 refuses the rest, which a mount takes."""
    block = mmap.mmap(-1, 256 * 1024)
    block[:] = pattern(len(block))
    fd = p.open("direct", "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    p.do("write", os.pwrite, fd, block, 0)
    p.do("write far", os.pwrite, fd, block, 8 * 2**20)
    p.facts("written", "file")
    room = mmap.mmap(-1, 256 * 1024)
    p.do("read", os.preadv, fd, [room], 0)
    p.note("same", room[:] == block[:])
    p.do("read a hole", os.preadv, fd, [room], 2**20)
    p.note("zeros", not any(room))
    p.do("read at the end", os.preadv, fd, [room], 8 * 2**20 + 128 * 1024)
    p.do("read behind the end", os.preadv, fd, [room], 16 * 2**20)
    buffered = p.open("buffered", "file", os.O_RDWR)
    p.note("seen buffered", os.pread(buffered, 100, 0) == block[:100])
    os.pwrite(buffered, b"B" * 5000, 4096)
    p.do("read what is buffered", os.preadv, fd, [room], 4096)
    p.note("seen direct", room[:10])
    os.pwrite(fd, block, 0)
    p.note("seen buffered again", os.pread(buffered, 10, 4096) == block[4096:4106])
    for label, offset, size in (("offset", 5, PAGE), ("size", 0, 100), ("both", 7, 9)):
        p.do(f"unaligned {label}", os.pwrite, fd, block[:size], offset)
        p.do(f"unaligned {label} read", lambda size=size, offset=offset: len(os.pread(fd, size, offset)))
    with contextlib.suppress(OSError):
        fcntl.fcntl(buffered, fcntl.F_SETFL, os.O_DIRECT)
    p.note("set later", bool(fcntl.fcntl(buffered, fcntl.F_GETFL) & os.O_DIRECT))


# Mappings


def case_shared_mappings(p: Place) -> None:
    for size in (1, 100, PAGE, PAGE + 1, 65_536, 70_000, 4_200_000):
        path = p.unused()
        data = fill(path, size)
        fd = p.open(f"open {size}", path, os.O_RDWR)
        with mmap.mmap(fd, size) as one, mmap.mmap(fd, size) as two:
            p.note(f"{size}: content", one[:] == data)
            one[size // 2] = 0xAA
            p.note(f"{size}: other mapping", two[size // 2])
            p.note(f"{size}: read", os.pread(fd, 1, size // 2))
            os.pwrite(fd, b"W", size - 1)
            p.note(f"{size}: what is written", one[size - 1])
            one.flush()
            two[0] = 0x55
        with open(path, "rb") as file:
            p.note(f"{size}: at the end", file.read() == _edited(data, {size // 2: 0xAA, size - 1: ord("W"), 0: 0x55}))
        p.facts(f"{size}: after", path)
        p.close(fd)


def _edited(data: bytes, changes: dict[int, int]) -> bytes:
    edited = bytearray(data)
    for position, value in changes.items():
        edited[position] = value
    return bytes(edited)


def case_private_mappings(p: Place) -> None:
    data = fill("file", 10_000)
    fd = p.open("open", "file", os.O_RDONLY)
    with mmap.mmap(fd, 10_000, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        mapped[10] = 1
        p.note("changed", mapped[10])
        with open("file", "rb") as file:
            p.note("file as it was", file.read() == data)
        with open("file", "r+b") as file:
            file.write(b"new")
        p.note("untouched page", mapped[8000] == data[8000])
    for protection, label in ((mmap.PROT_READ, "read"), (mmap.PROT_WRITE, "write"), (3, "both"), (5, "exec")):
        for flags, kind in ((mmap.MAP_SHARED, "shared"), (mmap.MAP_PRIVATE, "private")):
            for access, name in ((os.O_RDONLY, "r"), (os.O_WRONLY, "w"), (os.O_RDWR, "rw")):
                with open("file", "rb") as _:
                    fd = os.open("file", access)
                p.do(
                    f"{label} {kind} {name}",
                    lambda fd=fd, flags=flags, protection=protection: mmap.mmap(fd, 100, flags, protection).close(),
                )
                os.close(fd)


def case_mappings_outlive(p: Place) -> None:
    """A mapping is written back after its descriptor is closed, and after its file is unlinked or renamed over."""
    fill("file", 9000)
    fd = os.open("file", os.O_RDWR)
    mapped = mmap.mmap(fd, 9000)
    os.close(fd)
    mapped[5000:5005] = b"after"
    mapped.flush()
    p.note("read", Path("file").read_bytes()[4999:5006])
    mapped[6000:6005] = b"close"
    os.unlink("file")
    mapped[7000:7005] = b"unlnk"
    p.note("unlinked", (mapped[6000:6005], mapped[7000:7005]))
    mapped.close()
    fill("file", 9000)
    fd = os.open("file", os.O_RDWR)
    mapped = mmap.mmap(fd, 9000)
    os.close(fd)
    mapped[100:103] = b"end"
    mapped.close()
    p.note("written at munmap", Path("file").read_bytes()[99:104])


def case_mapping_grows_and_shrinks(p: Place) -> None:
    fill("file", 100)
    fd = os.open("file", os.O_RDWR)
    area = Area(fd, 3 * PAGE)
    area[50] = 1
    area[200] = 7
    p.facts("size stays", "file")
    os.ftruncate(fd, 2 * PAGE)
    p.note("behind the end", (area[50], area[200], area[PAGE]))
    area[PAGE + 10] = 9
    os.ftruncate(fd, PAGE + 5)
    os.ftruncate(fd, 2 * PAGE)
    p.note("cut and grown", area[PAGE + 10])
    area.close()
    p.note("read", os.pread(fd, 5, PAGE + 8))
    for touch in ("read", "write"):
        p.do(f"SIGBUS at a {touch}", touched_behind_the_end, touch)
    os.close(fd)


class Area:
    """A shared mapping longer than its file."""

    def __init__(self, fd: int, size: int) -> None:
        LIBC.mmap.restype = ctypes.c_void_p
        address = LIBC.mmap(None, ctypes.c_size_t(size), 3, mmap.MAP_SHARED, fd, ctypes.c_long(0))
        if address == ctypes.c_void_p(-1).value:
            check(-1)
        self._address, self._size = address, size
        self._bytes = (ctypes.c_ubyte * size).from_address(address)

    def __getitem__(self, position: int) -> int:
        return int(self._bytes[position])

    def __setitem__(self, position: int, value: int) -> None:
        self._bytes[position] = value

    def close(self) -> None:
        check(LIBC.munmap(ctypes.c_void_p(self._address), ctypes.c_size_t(self._size)))


def touched_behind_the_end(touch: str) -> str:
    """Return how a process ends that maps a file, sees it cut, and touches a page that is gone."""
    fill("short", 3 * PAGE)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        import faulthandler

        faulthandler.disable()
        fd = os.open("short", os.O_RDWR)
        area = Area(fd, 3 * PAGE)
        area[2 * PAGE] += 1
        os.ftruncate(fd, 10)
        if touch == "read":
            os._exit(area[2 * PAGE])
        area[2 * PAGE] = 1
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"


# Programs and files


def case_executing(p: Place) -> None:
    with open("script", "w") as file:
        file.write("#!/bin/sh\necho from $0\nexit 3\n")
    for mode in (0o644, 0o755, 0o111):
        os.chmod("script", mode)
        p.do(f"{mode:o}", lambda: subprocess.run(["./script"], capture_output=True, check=False).stdout)
    fill("binary", 0)
    with open("/bin/true", "rb") as source, open("binary", "wb") as target:
        target.write(source.read())
    os.chmod("binary", 0o755)
    p.do("binary", lambda: subprocess.run(["./binary"], check=False).returncode)
    with open("/bin/sleep", "rb") as source, open("sleeper", "wb") as target:
        target.write(source.read())
    os.chmod("sleeper", 0o755)
    running = subprocess.Popen(["./sleeper", "60"])
    p.do("write to what runs", os.open, "sleeper", os.O_WRONLY)
    p.do("truncate what runs", os.truncate, "sleeper", 0)
    p.do("unlink what runs", os.unlink, "sleeper")
    running.kill()
    running.wait()
    writer = os.open("binary", os.O_WRONLY)
    p.do("run what is written", lambda: subprocess.run(["./binary"], check=False).returncode)
    os.close(writer)


def case_pipes(p: Place) -> None:
    os.mkfifo("pipe")
    p.do("open to write without a reader", os.open, "pipe", os.O_WRONLY | os.O_NONBLOCK)
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    p.do("read without a writer", os.read, reader, 10)
    writer = os.open("pipe", os.O_WRONLY | os.O_NONBLOCK)
    p.do("read nothing yet", os.read, reader, 10)
    p.do("write", os.write, writer, b"through the pipe")
    p.do("ready", lambda: bool(select.select([reader], [], [], 0)[0]))
    p.do("read", os.read, reader, 100)
    p.do("seek", os.lseek, reader, 0, os.SEEK_CUR)
    p.do("truncate", os.ftruncate, writer, 1)
    os.close(reader)
    p.do("write without a reader", os.write, writer, b"x")
    os.close(writer)
    p.facts("it", "pipe")

    def child() -> bytes:
        fd = os.open("pipe", os.O_RDONLY)
        data = b""
        while more := os.read(fd, 65536):
            data += more
        return data[:5] + str(len(data)).encode()

    pid = os.fork()
    if pid == 0:
        fd = os.open("pipe", os.O_WRONLY)
        for _ in range(10):
            os.write(fd, b"hello" * 20_000)
        os._exit(0)
    p.do("between processes", in_child, None, child)
    os.waitpid(pid, 0)
    os.unlink("pipe")


def case_sockets(p: Place) -> None:
    for kind, label in (
        (socket.SOCK_STREAM, "stream"),
        (socket.SOCK_DGRAM, "datagram"),
        (socket.SOCK_SEQPACKET, "packets"),
    ):
        with socket.socket(socket.AF_UNIX, kind) as server, socket.socket(socket.AF_UNIX, kind) as client:
            path = f"{label}.socket"
            p.do(f"{label}: connect to nothing", client.connect, path)
            p.do(f"{label}: bind", server.bind, path)
            p.do(f"{label}: bind again", lambda path=path: socket.socket(socket.AF_UNIX).bind(path))
            p.facts(f"{label}: node", path)
            if kind != socket.SOCK_DGRAM:
                p.do(f"{label}: connect before listen", client.connect, path)
                server.listen()
            p.do(f"{label}: connect", client.connect, path)
            p.do(f"{label}: send", client.send, b"hello")
            peer = server if kind == socket.SOCK_DGRAM else server.accept()[0]
            p.do(f"{label}: receive", peer.recv, 10)
            os.rename(path, "moved")
            with socket.socket(socket.AF_UNIX, kind) as second:
                p.do(f"{label}: connect by the old name", second.connect, path)
                p.do(f"{label}: connect by the new name", second.connect, "moved")
            os.chmod("moved", 0o600)
            p.do(
                f"{label}: connect without permission",
                in_child,
                user(USER),
                lambda kind=kind: socket.socket(socket.AF_UNIX, kind).connect("moved"),
            )
            os.unlink("moved")
            peer.close()
        p.do(f"{label}: open", os.open, p.fresh("socket"), os.O_RDONLY)


def case_locks(p: Place) -> None:
    """flock and POSIX locks, between processes of one mount."""
    path = p.fresh("file")
    fd = p.open("open", path, os.O_RDWR)
    other = p.open("open again", path, os.O_RDWR)
    for first, second in product((fcntl.LOCK_SH, fcntl.LOCK_EX), (fcntl.LOCK_SH, fcntl.LOCK_EX)):
        fcntl.flock(fd, first)
        p.do(f"flock {first} then {second}", fcntl.flock, other, second | fcntl.LOCK_NB)
        p.do(
            f"flock {first} then {second}, child",
            in_child,
            None,
            lambda path=path, second=second: fcntl.flock(os.open(path, os.O_RDWR), second | fcntl.LOCK_NB),
        )
        fcntl.flock(fd, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_UN)
    for first, second in product((fcntl.LOCK_SH, fcntl.LOCK_EX), (fcntl.LOCK_SH, fcntl.LOCK_EX)):
        fcntl.lockf(fd, first, 10, 100)
        for start in (95, 100, 109, 110):
            p.do(
                f"lock {first} then {second} at {start}",
                in_child,
                None,
                lambda path=path, second=second, start=start: fcntl.lockf(
                    os.open(path, os.O_RDWR), second | fcntl.LOCK_NB, 5, start
                ),
            )
        fcntl.lockf(fd, fcntl.LOCK_UN)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 10, 20, 0))
    for kind, start, which in product((fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK), (0, 25, 30), (fd, other)):
        asked = struct.pack("hhqqi4x", kind, 0, start, 15, 0)
        p.do(f"test of {kind} at {start}, {which == fd}", fcntl.fcntl, which, fcntl.F_OFD_GETLK, asked)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_UNLCK, 0, 0, 0, 0))
    fcntl.lockf(fd, fcntl.LOCK_EX, 1, 0)
    who = in_child(
        None,
        lambda: struct.unpack(
            "hhqqi4x",
            fcntl.fcntl(os.open(path, os.O_RDWR), fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)),
        )[4],
    )
    p.note("who has it", who == os.getpid())
    os.close(os.open(path, os.O_RDONLY))
    p.do(
        "closing any descriptor lets go",
        in_child,
        None,
        lambda: fcntl.lockf(os.open(path, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB),
    )
    p.do("exclusive on a file open for reading", fcntl.lockf, p.open("r", path, os.O_RDONLY), fcntl.LOCK_EX)
    p.do("lease", fcntl.fcntl, fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)


def case_duplicated_descriptors(p: Place) -> None:
    fd = create("file")
    copy = os.dup(fd)
    os.write(fd, b"one")
    os.write(copy, b"two")
    p.do("position", os.lseek, fd, 0, os.SEEK_CUR)
    os.close(fd)
    os.write(copy, b"three")
    pid = os.fork()
    if pid == 0:
        os.write(copy, b"child")
        os._exit(0)
    os.waitpid(pid, 0)
    os.write(copy, b"parent")
    p.note("content", os.pread(copy, 100, 0))
    p.do("flags", fcntl.fcntl, copy, fcntl.F_GETFL)
    os.close(copy)
    p.do("closed", os.fstat, copy)


def case_limits_of_processes(p: Place) -> None:
    """RLIMIT_FSIZE: a short write, then EFBIG and SIGXFSZ."""

    def work() -> list[object]:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        fd = create("limited")
        answers: list[object] = []
        for call in (
            lambda: os.pwrite(fd, b"x" * 8000, 0),
            lambda: os.pwrite(fd, b"x" * 8000, 5000),
            lambda: os.pwrite(fd, b"x", 10_000),
            lambda: os.ftruncate(fd, 10_001),
            lambda: os.truncate("limited", 10_000),
        ):
            try:
                answers.append(call())
            except OSError as error:
                answers.append(errno.errorcode[error.errno or 0])
        return answers

    p.do("limited", in_child, None, work)
    p.facts("after", "limited")


def case_copying(p: Place) -> None:
    """copy_file_range and sendfile, over the whole range of sizes."""
    for size in SIZES:
        fill("source", size)
        source, target = os.open("source", os.O_RDONLY), create("target", os.O_RDWR | os.O_TRUNC)
        copied, offset = 0, 0
        while (count := os.copy_file_range(source, target, size + 10, offset, offset)) > 0:
            copied, offset = copied + count, offset + count
        p.note(f"copied {size}", copied)
        p.note(f"same {size}", Path("target").read_bytes() == pattern(size))
        p.facts(f"target {size}", "target")
        os.ftruncate(target, 0)
        os.lseek(target, 0, os.SEEK_SET)
        offset = 0
        while (count := os.sendfile(target, source, offset, size + 10)) > 0:
            offset += count
        p.note(f"sent {size}", Path("target").read_bytes() == pattern(size))
        os.close(source)
        os.close(target)
    source, target = os.open("source", os.O_RDONLY), create("target", os.O_RDWR)
    for label, arguments in {
        "from behind the end": (target, source, 10, 2**30, 0),
        "to a file open for reading": (source, source, 10, 0, 100),
        "overlapping": (target, target, 1000, 0, 500),
        "within one file": (target, target, 1000, 0, 50_000),
    }.items():
        p.do(label, os.copy_file_range, *arguments)
    os.close(source)
    os.close(target)


def case_many_open_files(p: Place) -> None:
    fds = [create(f"file{number}") for number in range(300)]
    for number, fd in enumerate(fds):
        os.write(fd, b"%d" % number)
    for number in range(300):
        os.unlink(f"file{number}")
    p.note("all", all(os.pread(fd, 10, 0) == b"%d" % number for number, fd in enumerate(fds)))
    p.note("listing", os.listdir("."))
    for fd in fds:
        os.close(fd)


def case_descriptors_of_others(p: Place) -> None:
    """A descriptor keeps what was allowed when it was opened."""
    fd = create("file")
    os.write(fd, b"content")
    os.chmod("file", 0)
    os.chown("file", 0, 0)

    def work() -> object:
        os.pwrite(fd, b"C", 0)
        return os.pread(fd, 10, 0), stat.S_IMODE(os.fstat(fd).st_mode)

    p.do("by another user", in_child, user(USER), work)
    os.unlink("file")
    p.do("unlinked", in_child, user(USER), work)
    os.close(fd)


@pytest.mark.parametrize("case", posix_rig.cases_of(globals()), ids=lambda case: case.__name__.removeprefix("case_"))
def test_as_on_ext4(ground: posix_rig.Ground, case: Callable[[Place], None]) -> None:
    ground.compare(case)
