"""The BPF programs without a mount: loaded with small maps, asked through the program test_answer."""

from __future__ import annotations

import errno
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import pytest

from fuseclient import native
from fuseclient._native import ffi, lib
from fuseclient.config import MapFds
from fuseclient.kernel_cache import KernelCache
from fuseclient.observe.opcodes import OPCODES
from metaserver.wire import Attributes

OPCODE: Final = {name: number for number, name in OPCODES.items()}
OUTCOME: Final = {
    number: name.removeprefix("BPFUSE_") for number, name in ffi.typeof("enum bpfuse_outcome").elements.items()
}

IN_HEADER: Final = struct.Struct("<IIQQIIIHH")
OUT_HEADER: Final = struct.Struct("<IiQ")
UNIQUE: Final = 0x1122334455667788
FH_KERNEL: Final = 1 << lib.BPFUSE_FH_KERNEL_BIT

REGULAR: Final = 0o100644
DIRECTORY: Final = 0o040755
SYMLINK: Final = 0o120777
FIFO: Final = 0o010644

HOUR_NS: Final = 3600 * 10**9


class Request(NamedTuple):
    """A FUSE request as a ring entry holds it. ``length``: what the header says, if it is not the truth."""

    opcode: int
    nodeid: int = 0
    op: bytes = b""
    payload: bytes = b""
    length: int | None = None


class Answer(NamedTuple):
    """What test_answer made of a request. ``error`` is as on the wire: 0 or a negative errno."""

    outcome: str
    error: int
    payload: bytes


def attributes(
    ino: int, mode: int = REGULAR, size: int = 0, *, xattrs: bool = False, nlink: int = 1, version: int = 5
) -> Attributes:
    """Return attributes whose every field differs; files stand for no device."""
    return Attributes(
        ino=ino,
        mode=mode,
        nlink=nlink,
        uid=1001,
        gid=1002,
        rdev=0 if mode & 0o170000 == REGULAR & 0o170000 else 0x0803,
        size=size,
        atime_ns=1_600_000_000_000_000_001,
        mtime_ns=1_700_000_000_000_000_002,
        ctime_ns=1_800_000_000_000_000_003,
        flags=int(xattrs),
        version=version,
        stored=size // 2,
    )


class Kernel:
    """The loaded programs, their maps, a cache to fill them with and one ring entry to ask with."""

    def __init__(self, *, capacity: int = 4096, page_count: int = 64) -> None:
        self.bpf = native.Bpf(
            str(native.OBJECT_PATH),
            name_capacity=capacity,
            inode_capacity=capacity,
            page_count=page_count,
            ring_entries=2,
        )
        self.fds = MapFds(
            **{
                name: self.bpf.map_fd(name)
                for name in ("control", "names", "inodes", "uses", "xattrs", "pages", "opens", "counters")
            },
            count_program=self.bpf.program_fd("count_maps"),
            name_capacity=capacity,
            inode_capacity=capacity,
            page_count=page_count,
        )
        self.cache = KernelCache(self.fds)
        self.cache.renew(time.clock_gettime_ns(time.CLOCK_BOOTTIME) + HOUR_NS)
        self._entries = mmap.mmap(self.bpf.map_fd("entries"), 2 * ffi.sizeof("struct bpfuse_entry"))
        self._control = mmap.mmap(self.fds.control, lib.BPFUSE_PAGE)
        whole = ffi.from_buffer(self._entries, require_writable=True)
        self.entry: Any = ffi.cast("struct bpfuse_entry *", whole) + 1
        self.control: Any = ffi.cast("struct bpfuse_control *", ffi.from_buffer(self._control, require_writable=True))
        self._args = ffi.new("struct bpfuse_test_args *", {"entry": 1})

    def close(self) -> None:
        self.cache.close()
        self.bpf.close()

    def place(self, request: Request) -> None:
        """Write a request into the ring entry, as the kernel does; all else of the entry is filled with rubbish."""
        uring = self.entry.uring
        length = IN_HEADER.size + len(request.op) + len(request.payload) if request.length is None else request.length
        header = IN_HEADER.pack(length, request.opcode, UNIQUE, request.nodeid, 1, 2, 3, 0, 0)
        ffi.memmove(uring.in_out, header.ljust(128, b"\xaa"), 128)
        ffi.memmove(uring.op_in, request.op.ljust(128, b"\xbb"), 128)
        uring.commit_id = 77
        uring.payload_size = len(request.payload)
        rubbish = request.payload + b"\xcc" * 512
        ffi.memmove(self.entry.payload, rubbish, len(rubbish))

    def run(self) -> str:
        """Have the program answer the request in the entry; return the outcome."""
        outcome: str = OUTCOME[self.bpf.run("test_answer", self._args)]
        assert outcome == OUTCOME[self.entry.outcome]
        assert self.entry.answered == outcome.startswith("ANSWERED")
        return outcome

    def image(self, payload_bytes: int) -> bytes:
        """Return the entry's header and the first bytes of its payload."""
        return bytes(ffi.buffer(ffi.addressof(self.entry, "uring"))) + bytes(
            ffi.buffer(self.entry.payload, payload_bytes)
        )

    def reply(self) -> tuple[int, bytes]:
        """Return error and payload of the finished reply in the entry, having checked its header."""
        length, error, unique = OUT_HEADER.unpack(bytes(ffi.buffer(self.entry.uring.in_out, OUT_HEADER.size)))
        size = self.entry.uring.payload_size
        assert unique == UNIQUE
        assert length == OUT_HEADER.size + size
        assert self.entry.uring.commit_id == 77
        return error, bytes(ffi.buffer(self.entry.payload, size))

    def ask(self, request: Request) -> Answer:
        """Answer one request; on a miss, check that it is still there whole."""
        self.place(request)
        kept = len(request.payload)
        before = self.image(kept)
        outcome = self.run()
        if outcome.startswith("ANSWERED"):
            return Answer(outcome, *self.reply())
        assert self.image(kept) == before, "a miss changed the request"
        return Answer(outcome, 0, b"")

    def open_count(self, ino: int) -> int:
        """Return the counter in `opens` of an inode's slot."""
        return int(lib.bpfuse_cache_opens(self.cache._handle(), ino))


def require_bpf() -> None:
    """Skip, and say why, where the programs cannot be loaded."""
    if os.geteuid() != 0:
        pytest.skip("loading BPF programs needs root")
    if not native.OBJECT_PATH.exists():
        pytest.skip(f"{native.OBJECT_PATH} is not built")
    try:
        native.Bpf(str(native.OBJECT_PATH), name_capacity=64, inode_capacity=64, page_count=1, ring_entries=1).close()
    except native.NativeError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP) or not os.path.exists("/sys/kernel/btf/vmlinux"):
            pytest.skip(f"BPF programs cannot be loaded here: {error}")
        raise


# Requests by name: what the kernel sends.


def lookup(parent: int, name: bytes) -> Request:
    return Request(OPCODE["LOOKUP"], parent, b"", name + b"\0")


def getattr_(ino: int) -> Request:
    return Request(OPCODE["GETATTR"], ino, struct.pack("<IIQ", 0, 0, 0))


def open_(ino: int, flags: int = 0, open_flags: int = 0) -> Request:
    return Request(OPCODE["OPEN"], ino, struct.pack("<II", flags, open_flags))


def opendir(ino: int, flags: int = 0) -> Request:
    return Request(OPCODE["OPENDIR"], ino, struct.pack("<II", flags, 0))


def read(ino: int, offset: int, size: int, fh: int = 0) -> Request:
    return Request(OPCODE["READ"], ino, struct.pack("<QQIIQII", fh, offset, size, 0, 0, 0, 0))


def readdir(ino: int, offset: int = 0, size: int = 4096, fh: int = 0, *, plus: bool = False) -> Request:
    opcode = OPCODE["READDIRPLUS" if plus else "READDIR"]
    return Request(opcode, ino, struct.pack("<QQIIQII", fh, offset, size, 0, 0, 0, 0))


def readlink(ino: int) -> Request:
    return Request(OPCODE["READLINK"], ino)


def release(ino: int, fh: int, *, release_flags: int = 0, directory: bool = False) -> Request:
    opcode = OPCODE["RELEASEDIR" if directory else "RELEASE"]
    return Request(opcode, ino, struct.pack("<QIIQ", fh, 0, release_flags, 0))


def flush(ino: int, fh: int) -> Request:
    return Request(OPCODE["FLUSH"], ino, struct.pack("<QIIQ", fh, 0, 0, 0))


def getxattr(ino: int, name: bytes, size: int = 0) -> Request:
    return Request(OPCODE["GETXATTR"], ino, struct.pack("<II", size, 0), name + b"\0")


def setxattr(ino: int, name: bytes, value: bytes) -> Request:
    return Request(OPCODE["SETXATTR"], ino, struct.pack("<II", len(value), 0), name + b"\0" + value)


def listxattr(ino: int, size: int) -> Request:
    return Request(OPCODE["LISTXATTR"], ino, struct.pack("<II", size, 0))


def statfs(ino: int = 1) -> Request:
    return Request(OPCODE["STATFS"], ino)


def ioctl(ino: int, data: bytes = b"") -> Request:
    return Request(OPCODE["IOCTL"], ino, struct.pack("<QIIQII", 0, 0, 0x5401, 0, len(data), 36), data)


MakeKernel = Callable[..., Kernel]


def making() -> Iterator[MakeKernel]:
    """What a fixture yields from: makes kernels of the sizes that a test asks for, which end with it."""
    made: list[Kernel] = []

    def make_one(**sizes: int) -> Kernel:
        made.append(Kernel(**sizes))
        return made[-1]

    yield make_one
    for each in made:
        each.close()
