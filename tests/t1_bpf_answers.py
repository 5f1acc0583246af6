"""What the BPF programs answer, request by request, without a mount.

Each case is a description, a request and what must come of it. `Kernel.ask` checks beside that the header of a reply
is right, and that a request that is not answered is still there as it came.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

import bpf_map
import kernel
import pytest
from kernel import DIRECTORY, FH_KERNEL, FIFO, OPCODE, REGULAR, SYMLINK, Answer, Kernel, Request, attributes
from t0_siphash import KEY, VECTORS, words

from fuseclient._native import ffi, lib
from fuseclient.kernel_cache import KernelCache
from fuseclient.native import NativeError, hash_name
from fuseclient.observe.opcodes import OPCODES
from metaserver.wire import DirectoryEntry

ROOT, FILE, EMPTY, BARE, LINK, LOOSE_LINK, DIR, PIPE, TAGGED, WRITTEN, GONE = 1, 10, 11, 12, 13, 14, 15, 16, 17, 18, 99
LONG = b"n" * 255
CONTENT = bytes(range(256)) * 20
TARGET = b"../a/target"
SIZES = (1, 4095, 4096, 4097, 65536)
WORKER_FH = 5 << 52 | FILE


def entry(name: bytes, ino: int, mode: int = REGULAR, data: bytes | None = None, size: int = 0) -> DirectoryEntry:
    size = size if data is None else len(data)
    return DirectoryEntry(name, 1, attributes(ino, mode, size, xattrs=ino == TAGGED), data)


TREE = [
    entry(b"file", FILE, data=CONTENT),
    entry(b"f", FILE, data=CONTENT),
    entry(LONG, EMPTY, data=b""),
    entry(b"bare", BARE, size=12345),
    entry(b"link", LINK, SYMLINK, TARGET),
    entry(b"loose", LOOSE_LINK, SYMLINK, size=7),
    entry(b"dir", DIR, DIRECTORY, size=3),
    entry(b"pipe", PIPE, FIFO),
    entry(b"tagged", TAGGED, data=b"x"),
    *(entry(b"size%d" % size, 1000 + size, data=bytes([size % 251]) * size) for size in SIZES),
]


@pytest.fixture(scope="module")
def shared() -> Iterator[Kernel]:
    kernel.require_bpf()
    made = Kernel()
    yield made
    made.close()


@pytest.fixture
def bpf(shared: Kernel) -> Kernel:
    """The programs with TREE below the root and an hour of lease; nothing is in use."""
    for opened in (FILE, EMPTY, BARE, DIR):
        while shared.cache.is_open(opened):
            shared.cache.released(opened)
    for tagged in (TAGGED, WRITTEN):
        shared.cache.drop_inode(tagged)
    shared.cache.bump_epoch()
    shared.cache.renew(time.clock_gettime_ns(time.CLOCK_BOOTTIME) + kernel.HOUR_NS)
    shared.control.kernel_ttl_max = 1_500_000_000
    shared.cache.put_inode(attributes(ROOT, DIRECTORY, 9, nlink=3))
    shared.cache.put(ROOT, TREE)
    shared.cache.put_absent(ROOT, b"absent")
    shared.cache.put_inode(kernel.attributes(WRITTEN, mode=0))
    shared.cache.put_name(ROOT, b"written", WRITTEN)
    shared.cache.put_name(ROOT, b"dangling", GONE)
    shared.cache.drop_statfs()
    return shared


# Replies, built by hand from include/uapi/linux/fuse.h.


def attr(ino: int, mode: int, size: int, nlink: int = 1) -> bytes:
    times = (1_600_000_000, 1_700_000_000, 1_800_000_000)
    device = kernel.attributes(ino, mode).rdev
    return struct.pack(
        "<6Q10I", ino, size, (size // 2 + 511) // 512, *times, 1, 2, 3, mode, nlink, 1001, 1002, device, 4096, 0
    )


def attr_out(ino: int, mode: int, size: int, nlink: int = 1) -> bytes:
    return struct.pack("<QII", 1, 500_000_000, 0) + attr(ino, mode, size, nlink)


def entry_out(ino: int, mode: int, size: int) -> bytes:
    return struct.pack("<QQQQII", ino, 0, 1, 1, 500_000_000, 500_000_000) + attr(ino, mode, size)


ABSENT_OUT = struct.pack("<QQQQII", 0, 0, 1, 1, 500_000_000, 500_000_000) + bytes(88)


def open_out(ino: int, flags: int) -> bytes:
    return struct.pack("<QII", FH_KERNEL | ino, flags, 0)


NO_FLUSH = 1 << 5
FOPEN_FILE = 1 << 1 | NO_FLUSH  # KEEP_CACHE
FOPEN_DIRECTORY = 1 << 1 | 1 << 3  # KEEP_CACHE, CACHE_DIR


class Case(NamedTuple):
    description: str
    request: Request
    outcome: str
    payload: bytes = b""
    error: int = 0


ANSWERED = [
    Case("LOOKUP of a file", kernel.lookup(ROOT, b"file"), "ANSWERED", entry_out(FILE, REGULAR, len(CONTENT))),
    Case("LOOKUP of a name of 1 byte", kernel.lookup(ROOT, b"f"), "ANSWERED", entry_out(FILE, REGULAR, len(CONTENT))),
    Case("LOOKUP of a name of 255 bytes", kernel.lookup(ROOT, LONG), "ANSWERED", entry_out(EMPTY, REGULAR, 0)),
    Case("LOOKUP of a directory", kernel.lookup(ROOT, b"dir"), "ANSWERED", entry_out(DIR, DIRECTORY, 3)),
    Case("LOOKUP of a symlink", kernel.lookup(ROOT, b"link"), "ANSWERED", entry_out(LINK, SYMLINK, len(TARGET))),
    Case("LOOKUP of a name known to be absent", kernel.lookup(ROOT, b"absent"), "ANSWERED_ABSENT", ABSENT_OUT),
    Case("GETATTR of the root", kernel.getattr_(ROOT), "ANSWERED", attr_out(ROOT, DIRECTORY, 9, nlink=3)),
    Case("GETATTR of a file", kernel.getattr_(BARE), "ANSWERED", attr_out(BARE, REGULAR, 12345)),
    Case("GETATTR of a pipe", kernel.getattr_(PIPE), "ANSWERED", attr_out(PIPE, FIFO, 0)),
    Case("OPEN", kernel.open_(FILE, os.O_RDONLY), "ANSWERED", open_out(FILE, FOPEN_FILE)),
    Case("OPEN without content", kernel.open_(BARE, os.O_RDONLY), "ANSWERED", open_out(BARE, FOPEN_FILE)),
    Case(
        "OPEN with harmless flags",
        kernel.open_(FILE, 0o100000 | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOATIME | os.O_SYNC),
        "ANSWERED",
        open_out(FILE, FOPEN_FILE),
    ),
    Case("OPEN to execute", kernel.open_(FILE, 0o100040), "ANSWERED", open_out(FILE, FOPEN_FILE)),
    Case("READ of everything", kernel.read(FILE, 0, 131072), "ANSWERED", CONTENT),
    Case("READ with the worker's handle", kernel.read(FILE, 0, 131072, WORKER_FH), "ANSWERED", CONTENT),
    Case("READ of a part", kernel.read(FILE, 4096, 512), "ANSWERED", CONTENT[4096:4608]),
    Case("READ of no bytes", kernel.read(FILE, 0, 0), "ANSWERED", b""),
    Case("READ at an odd offset", kernel.read(FILE, 4093, 10), "ANSWERED", CONTENT[4093:4103]),
    Case("READ across the end", kernel.read(FILE, 5000, 4096), "ANSWERED", CONTENT[5000:]),
    Case("READ at the end", kernel.read(FILE, len(CONTENT), 4096), "ANSWERED", b""),
    Case("READ far behind the end", kernel.read(FILE, 1 << 62, 4096), "ANSWERED", b""),
    Case("READ of an empty file", kernel.read(EMPTY, 0, 4096), "ANSWERED", b""),
    *(
        Case(f"READ of {size} bytes", kernel.read(1000 + size, 0, 262144), "ANSWERED", bytes([size % 251]) * size)
        for size in SIZES
    ),
    *(
        Case(
            f"READ of the last of {size} bytes",
            kernel.read(1000 + size, size - 1, 4096),
            "ANSWERED",
            bytes([size % 251]),
        )
        for size in SIZES
    ),
    Case("READLINK", kernel.readlink(LINK), "ANSWERED", TARGET),
    Case("RELEASE", kernel.release(FILE, FH_KERNEL | FILE), "ANSWERED"),
    Case("RELEASEDIR", kernel.release(DIR, FH_KERNEL | DIR, directory=True), "ANSWERED"),
    Case("FLUSH", kernel.flush(FILE, FH_KERNEL | FILE), "ANSWERED"),
    Case("GETXATTR", kernel.getxattr(FILE, b"user.a", 100), "ANSWERED_ABSENT", error=-errno.ENODATA),
    Case(
        "GETXATTR of a file being written",
        kernel.getxattr(WRITTEN, b"security.capability"),
        "ANSWERED_ABSENT",
        error=-errno.ENODATA,
    ),
    Case("GETXATTR of size 0", kernel.getxattr(FILE, b"security.capability"), "ANSWERED_ABSENT", error=-errno.ENODATA),
    Case("GETXATTR, 255 bytes", kernel.getxattr(FILE, b"user." + b"u" * 250), "ANSWERED_ABSENT", error=-errno.ENODATA),
    Case("GETXATTR trusted", kernel.getxattr(FILE, b"trusted.a"), "ANSWERED_ABSENT", error=-errno.ENODATA),
    Case("GETXATTR label", kernel.getxattr(FILE, b"security.selinux"), "ANSWERED_ABSENT", error=-errno.EOPNOTSUPP),
    Case("GETXATTR like a label", kernel.getxattr(FILE, b"security.selinux2"), "ANSWERED_ABSENT", error=-errno.ENODATA),
    Case("GETXATTR ACL", kernel.getxattr(FILE, b"system.posix_acl_access"), "ANSWERED_ABSENT", error=-errno.ENODATA),
    Case("SETXATTR ACL", kernel.setxattr(FILE, b"system.posix_acl_access", b"v"), "ANSWERED", error=-errno.EOPNOTSUPP),
    Case("LISTXATTR", kernel.listxattr(FILE, 100), "ANSWERED"),
    Case("LISTXATTR of size 0", kernel.listxattr(FILE, 0), "ANSWERED", bytes(8)),
    Case("IOCTL", kernel.ioctl(FILE), "ANSWERED", error=-errno.ENOSYS),
    Case("IOCTL with data", kernel.ioctl(GONE, bytes(64)), "ANSWERED", error=-errno.ENOSYS),
]

MISSED = [
    *(
        Case(f"opcode {opcode}", Request(opcode, FILE, bytes(16), b"x\0"), "MISS_OPCODE")
        for opcode in (0, 2, 4, 9, 16, 35, 45, 52, 63, 64, 4096, 2**32 - 1)
    ),
    Case("LOOKUP of an unknown name", kernel.lookup(ROOT, b"unknown"), "MISS_NAME"),
    Case("LOOKUP of a file being written", kernel.lookup(ROOT, b"written"), "MISS_FLAGS"),
    Case("GETATTR of a file being written", kernel.getattr_(WRITTEN), "MISS_FLAGS"),
    Case("OPEN of a file being written", kernel.open_(WRITTEN), "MISS_FLAGS"),
    Case("READ of a file being written", kernel.read(WRITTEN, 0, 4096), "MISS_FLAGS"),
    Case("LOOKUP in another directory", kernel.lookup(DIR, b"file"), "MISS_NAME"),
    Case("LOOKUP of an unknown inode", kernel.lookup(ROOT, b"dangling"), "MISS_INODE"),
    Case("GETATTR of an unknown inode", kernel.getattr_(GONE), "MISS_INODE"),
    Case("OPEN of an unknown inode", kernel.open_(GONE), "MISS_INODE"),
    Case("OPENDIR of an unknown inode", kernel.opendir(GONE), "MISS_INODE"),
    Case("READ of an unknown inode", kernel.read(GONE, 0, 4096), "MISS_INODE"),
    Case("READLINK of an unknown inode", kernel.readlink(GONE), "MISS_INODE"),
    Case("GETXATTR of an unknown inode", kernel.getxattr(GONE, b"user.a"), "MISS_INODE"),
    Case("LISTXATTR of an unknown inode", kernel.listxattr(GONE, 0), "MISS_INODE"),
    Case("READ of a file without content", kernel.read(BARE, 0, 4096), "MISS_DATA"),
    Case("READLINK without target", kernel.readlink(LOOSE_LINK), "MISS_DATA"),
    Case("STATFS", kernel.statfs(), "MISS_DATA"),
    *(
        Case(f"OPEN with {name}", kernel.open_(FILE, flags), "MISS_FLAGS")
        for name, flags in {
            "O_WRONLY": os.O_WRONLY,
            "O_RDWR": os.O_RDWR,
            "access mode 3": 3,
            "O_TRUNC": os.O_TRUNC,
            "O_CREAT": os.O_CREAT,
            "O_APPEND": os.O_APPEND,
            "O_DIRECT": os.O_DIRECT,
            "O_DIRECTORY": os.O_DIRECTORY,
            "O_TMPFILE": os.O_TMPFILE,
            "O_PATH": os.O_PATH,
            "an unknown flag": 1 << 30,
        }.items()
    ),
    Case("OPEN with a flag to FUSE", kernel.open_(FILE, 0, 1), "MISS_FLAGS"),
    Case("OPEN of a directory", kernel.open_(DIR), "MISS_FLAGS"),
    Case("OPEN of a pipe", kernel.open_(PIPE), "MISS_FLAGS"),
    Case("OPENDIR of a file", kernel.opendir(FILE), "MISS_FLAGS"),
    Case("OPENDIR to write", kernel.opendir(DIR, os.O_RDWR), "MISS_FLAGS"),
    Case("READ of a directory", kernel.read(DIR, 0, 4096), "MISS_FLAGS"),
    Case("READ of a symlink", kernel.read(LINK, 0, 4096), "MISS_FLAGS"),
    Case("READLINK of a file", kernel.readlink(FILE), "MISS_FLAGS"),
    Case("RELEASE that ends a lock", kernel.release(FILE, FH_KERNEL | FILE, release_flags=2), "MISS_FLAGS"),
    Case("RELEASE of a worker's handle", kernel.release(FILE, WORKER_FH), "MISS_HANDLE"),
    Case("RELEASEDIR of a worker's handle", kernel.release(DIR, DIR, directory=True), "MISS_HANDLE"),
    Case("FLUSH of a worker's handle", kernel.flush(FILE, 1 << 62 | FILE), "MISS_HANDLE"),
    Case("GETXATTR of an inode with xattrs", kernel.getxattr(TAGGED, b"user.a"), "MISS_XATTRS"),
    Case("LISTXATTR of an inode with xattrs", kernel.listxattr(TAGGED, 0), "MISS_XATTRS"),
    Case("READ at a negative offset", kernel.read(FILE, 1 << 63, 4096), "MISS_RANGE"),
    Case("READ of more than a reply holds", kernel.read(FILE, 0, lib.BPFUSE_PAYLOAD + 1), "MISS_RANGE"),
    Case("LOOKUP of no name", kernel.lookup(ROOT, b""), "MISS_MALFORMED"),
    Case("LOOKUP without payload", Request(OPCODE["LOOKUP"], ROOT), "MISS_MALFORMED"),
    Case("LOOKUP of 256 bytes", kernel.lookup(ROOT, b"n" * 256), "MISS_MALFORMED"),
    Case("LOOKUP without NUL", Request(OPCODE["LOOKUP"], ROOT, b"", b"file"), "MISS_MALFORMED"),
    Case("GETXATTR of another kind", kernel.getxattr(FILE, b"system.a"), "MISS_FLAGS"),
    Case("SETXATTR", kernel.setxattr(FILE, b"user.a", b"system.posix_acl_access"), "MISS_FLAGS"),
    Case("SETXATTR of another kind", kernel.setxattr(FILE, b"system.posix_acl", b"v"), "MISS_FLAGS"),
    Case("SETXATTR of no name", Request(OPCODE["SETXATTR"], FILE, bytes(8)), "MISS_MALFORMED"),
    Case("GETXATTR of a prefix", kernel.getxattr(FILE, b"user."), "MISS_FLAGS"),
    Case("GETXATTR of a short name", kernel.getxattr(FILE, b"u"), "MISS_FLAGS"),
    Case("GETXATTR of no name", kernel.getxattr(FILE, b""), "MISS_MALFORMED"),
    Case("GETXATTR of 256 bytes", kernel.getxattr(FILE, b"n" * 256), "MISS_MALFORMED"),
]

EVERY_KIND = [
    kernel.lookup(ROOT, b"file"),
    kernel.getattr_(FILE),
    kernel.open_(FILE),
    kernel.opendir(DIR),
    kernel.readdir(DIR),
    kernel.readdir(DIR, plus=True),
    kernel.read(FILE, 0, 4096),
    kernel.readlink(LINK),
    kernel.release(FILE, FH_KERNEL | FILE),
    kernel.release(DIR, FH_KERNEL | DIR, directory=True),
    kernel.flush(FILE, FH_KERNEL | FILE),
    kernel.getxattr(FILE, b"user.a"),
    kernel.listxattr(FILE, 0),
    kernel.statfs(),
    kernel.ioctl(FILE),
]


def without_serial(payload: bytes) -> bytes:
    """Return the reply to an open with a serial number of 0 in its handle."""
    return payload[:6] + bytes([0, payload[7] & 0x80]) + payload[8:]


FROM_MAPS = [request for request in EVERY_KIND if request.opcode not in (17, 18, 25, 29, 39)]


def kind(request: Request) -> str:
    return OPCODES[request.opcode]


@pytest.mark.parametrize("case", ANSWERED, ids=lambda case: case.description)
def test_answered(bpf: Kernel, case: Case) -> None:
    answer = bpf.ask(case.request)
    if kind(case.request) in ("OPEN", "OPENDIR"):
        answer = answer._replace(payload=without_serial(answer.payload))
    assert answer == Answer(case.outcome, case.error, case.payload)


@pytest.mark.parametrize("case", MISSED, ids=lambda case: case.description)
def test_missed(bpf: Kernel, case: Case) -> None:
    assert bpf.ask(case.request).outcome == case.outcome


@pytest.mark.parametrize("request_", EVERY_KIND, ids=kind)
@pytest.mark.parametrize("change", ["longer", "shorter", "payload"])
def test_a_malformed_request_is_missed(bpf: Kernel, request_: Request, change: str) -> None:
    whole = kernel.IN_HEADER.size + len(request_.op) + len(request_.payload)
    if change == "payload":
        request_ = request_._replace(payload=request_.payload + bytes(300))
    else:
        request_ = request_._replace(length=whole + (1 if change == "longer" else -1))
    assert bpf.ask(request_).outcome == "MISS_MALFORMED"


@pytest.mark.parametrize("request_", EVERY_KIND, ids=kind)
@pytest.mark.parametrize("left_ns", [0, -1, -(10**9)])
def test_nothing_is_answered_from_the_deadline_on(bpf: Kernel, request_: Request, left_ns: int) -> None:
    bpf.cache.renew(time.clock_gettime_ns(time.CLOCK_BOOTTIME) + left_ns)
    assert bpf.ask(request_).outcome == "MISS_DEADLINE"
    bpf.cache.renew(0)
    assert bpf.ask(request_).outcome == "MISS_DEADLINE"


@pytest.mark.parametrize("request_", FROM_MAPS, ids=kind)
def test_nothing_of_an_earlier_epoch_is_answered(bpf: Kernel, request_: Request) -> None:
    before = bpf.cache.epoch
    bpf.cache.bump_epoch()
    assert bpf.cache.epoch == before + 1
    assert bpf.ask(request_).outcome == "MISS_EPOCH"


def test_an_inode_of_an_earlier_epoch_below_a_name_of_this_one(bpf: Kernel) -> None:
    bpf.cache.bump_epoch()
    bpf.cache.put_name(ROOT, b"file", FILE)
    assert bpf.ask(kernel.lookup(ROOT, b"file")).outcome == "MISS_EPOCH"


def test_the_time_to_live_is_what_is_left_of_the_lease(bpf: Kernel) -> None:
    bpf.control.kernel_ttl_max = 2**64 - 1
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    deadline = now + 10 * 10**9
    bpf.cache.renew(deadline)
    seconds, nanoseconds = struct.unpack_from("<QI", bpf.ask(kernel.getattr_(FILE)).payload)
    after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert deadline - after <= seconds * 10**9 + nanoseconds <= deadline - now
    assert nanoseconds < 10**9
    reply = bpf.ask(kernel.lookup(ROOT, b"file")).payload
    entry_s, attr_s, entry_ns, attr_ns = struct.unpack_from("<QQII", reply, 16)
    assert (entry_s, entry_ns) == (attr_s, attr_ns)
    assert entry_s * 10**9 + entry_ns <= deadline - after


@pytest.mark.parametrize("ttl_ns", [0, 1, 999_999_999, 10**9])
def test_the_time_to_live_is_bounded(bpf: Kernel, ttl_ns: int) -> None:
    bpf.control.kernel_ttl_max = ttl_ns
    for request, at in ((kernel.getattr_(FILE), 0), (kernel.lookup(ROOT, b"absent"), 16)):
        seconds = struct.unpack_from("<Q", bpf.ask(request).payload, at)[0]
        nanoseconds = struct.unpack_from("<I", bpf.ask(request).payload, 8 if at == 0 else 32)[0]
        assert seconds * 10**9 + nanoseconds == ttl_ns


STATFS = {"bsize": 4096, "blocks": 1000, "bfree": 600, "bavail": 500, "files": 70, "ffree": 60}
STATFS_OUT = struct.pack("<5Q10I", 1000, 600, 500, 70, 60, 4096, 255, 4096, 0, 0, 0, 0, 0, 0, 0)


def test_statfs_is_answered_while_its_figures_are_valid(bpf: Kernel) -> None:
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    bpf.cache.put_statfs(**STATFS, valid_until_ns=now + kernel.HOUR_NS)
    assert bpf.ask(kernel.statfs(DIR)) == Answer("ANSWERED", 0, STATFS_OUT)
    bpf.cache.put_statfs(**STATFS, valid_until_ns=now)
    assert bpf.ask(kernel.statfs()).outcome == "MISS_DATA"


def test_statfs_is_missed_while_its_figures_are_written(bpf: Kernel) -> None:
    bpf.cache.put_statfs(**STATFS, valid_until_ns=2**63)
    bpf.control.statfs.seq += 1
    assert bpf.ask(kernel.statfs()).outcome == "MISS_RACE"
    bpf.cache.put_statfs(**STATFS, valid_until_ns=2**63)
    assert bpf.ask(kernel.statfs()).outcome == "ANSWERED"


def test_a_directory_is_opened_for_its_listing(bpf: Kernel) -> None:
    before = struct.unpack("<QII", bpf.ask(kernel.opendir(DIR, os.O_DIRECTORY)).payload)
    assert (before[0] & (1 << 48) - 1, before[0] >> 63, before[1:]) == (DIR, 1, (FOPEN_DIRECTORY, 0))
    again = struct.unpack("<QII", bpf.ask(kernel.opendir(DIR, os.O_DIRECTORY)).payload)
    assert again[0] != before[0]
    for version in (5, 77, 1 << 40 | 255):
        bpf.cache.put_inode(attributes(DIR, DIRECTORY, version=version))
        fh = struct.unpack_from("<Q", bpf.ask(kernel.opendir(DIR)).payload)[0]
        assert fh >> 48 & 255 == version & 255


XATTRS = {b"user.short": b"v", b"user.empty": b"", b"security.capability": bytes(range(20))}
XATTRS[b"user." + b"n" * 90] = b"x" * 99
NAMES = b"".join(name + b"\0" for name in XATTRS)


@pytest.mark.parametrize("name", XATTRS)
def test_small_xattrs_are_answered(bpf: Kernel, name: bytes) -> None:
    value = XATTRS[name]
    assert bpf.cache.put_xattrs(TAGGED, XATTRS, listed=True)
    assert bpf.ask(kernel.getxattr(TAGGED, name, 0)) == Answer("ANSWERED", 0, struct.pack("<II", len(value), 0))
    for room in (len(value) or 1, len(value) + 1, 65536):
        assert bpf.ask(kernel.getxattr(TAGGED, name, room)) == Answer("ANSWERED", 0, value)
    if len(value) > 1:
        assert bpf.ask(kernel.getxattr(TAGGED, name, len(value) - 1)) == Answer("ANSWERED", -errno.ERANGE, b"")


def test_the_names_of_small_xattrs_are_listed(bpf: Kernel) -> None:
    assert bpf.cache.put_xattrs(TAGGED, XATTRS, listed=True)
    assert bpf.ask(kernel.listxattr(TAGGED, 0)) == Answer("ANSWERED", 0, struct.pack("<II", len(NAMES), 0))
    assert bpf.ask(kernel.listxattr(TAGGED, len(NAMES))) == Answer("ANSWERED", 0, NAMES)
    assert bpf.ask(kernel.listxattr(TAGGED, len(NAMES) - 1)) == Answer("ANSWERED", -errno.ERANGE, b"")
    assert bpf.cache.put_xattrs(TAGGED, XATTRS, listed=False)
    assert bpf.ask(kernel.listxattr(TAGGED, 0)).outcome == "MISS_XATTRS"
    assert bpf.ask(kernel.getxattr(TAGGED, b"user.short", 9)).payload == b"v"


def test_xattrs_that_are_not_there(bpf: Kernel) -> None:
    absent = Answer("ANSWERED_ABSENT", -errno.ENODATA, b"")
    for ino in (TAGGED, FILE, GONE):
        assert bpf.ask(kernel.getxattr(ino, b"system.posix_acl_access")) == absent
    assert bpf.ask(kernel.getxattr(TAGGED, b"user.other")).outcome == "MISS_XATTRS"
    assert bpf.cache.put_xattrs(TAGGED, XATTRS, listed=True)
    for name in (b"user.other", b"user.shor", b"user.short1", b"trusted.x", b"system.posix_acl_default"):
        assert bpf.ask(kernel.getxattr(TAGGED, name, 100)) == absent
    assert bpf.ask(kernel.getxattr(TAGGED, b"system.a")).outcome == "MISS_FLAGS"


def test_xattrs_go_with_their_inode(bpf: Kernel) -> None:
    ask = kernel.getxattr(TAGGED, b"user.short", 9)
    bpf.cache.put_xattrs(TAGGED, XATTRS, listed=True)
    bpf.cache.put_inode(attributes(TAGGED, xattrs=True))
    assert bpf.ask(ask).payload == b"v"
    bpf.cache.drop_inode(TAGGED)
    assert bpf.ask(ask).outcome == "MISS_INODE"
    bpf.cache.put_inode(attributes(TAGGED, xattrs=True))
    assert bpf.ask(ask).outcome == "MISS_XATTRS"
    bpf.cache.put_xattrs(TAGGED, XATTRS, listed=True)
    second = KernelCache(bpf.fds)
    second.drop_inode(TAGGED)
    second.put_inode(attributes(TAGGED, xattrs=True))
    second.close()
    assert bpf.ask(ask).outcome == "MISS_XATTRS"
    bpf.cache.put_xattrs(TAGGED, XATTRS, listed=True)
    bpf.cache.bump_epoch()
    bpf.cache.put_inode(attributes(TAGGED, xattrs=True))
    assert bpf.ask(ask).outcome == "MISS_EPOCH"


def test_xattrs_of_a_file_being_written(bpf: Kernel) -> None:
    bpf.cache.put_inode(attributes(WRITTEN, mode=0, xattrs=True))
    assert bpf.ask(kernel.getxattr(WRITTEN, b"security.capability")).outcome == "MISS_XATTRS"
    bpf.cache.put_xattrs(WRITTEN, {b"user.a": b"1"}, listed=True)
    assert bpf.ask(kernel.getxattr(WRITTEN, b"security.capability")).error == -errno.ENODATA
    assert bpf.ask(kernel.getxattr(WRITTEN, b"user.a", 1)).payload == b"1"


def test_xattrs_that_are_too_many_or_too_large_are_not_kept(bpf: Kernel) -> None:
    most = {b"user.%d" % index: b"" for index in range(lib.BPFUSE_XATTRS)}
    assert bpf.cache.put_xattrs(TAGGED, most, listed=True)
    assert bpf.ask(kernel.getxattr(TAGGED, b"user.7")) == Answer("ANSWERED", 0, bytes(8))
    assert not bpf.cache.put_xattrs(TAGGED, {**most, b"user.more": b""}, listed=True)
    room = lib.BPFUSE_XATTR_BYTES - len(b"user.a\0")
    assert not bpf.cache.put_xattrs(TAGGED, {b"user.a": bytes(room + 1)}, listed=True)
    assert bpf.cache.put_xattrs(TAGGED, {b"user.a": b"z" * room}, listed=True)
    assert bpf.ask(kernel.getxattr(TAGGED, b"user.a", 4096)).payload == b"z" * room


def test_a_mount_that_opens_nothing(bpf: Kernel) -> None:
    """OPEN, OPENDIR and FLUSH are ENOSYS, whatever the inode is; all that has no handle then is answered as ever."""
    cache = KernelCache(bpf.fds, opens_nothing=True)
    try:
        for request in (kernel.open_(FILE), kernel.open_(GONE, os.O_RDWR), kernel.opendir(DIR), kernel.flush(FILE, 0)):
            assert bpf.ask(request) == Answer("ANSWERED", -errno.ENOSYS, b"")
            assert bpf.ask(request._replace(length=41)).outcome == "MISS_MALFORMED"
        assert not any(bpf.cache.is_open(ino) for ino in (FILE, GONE, DIR))
        assert bpf.ask(kernel.read(FILE, 0, 131072)).payload == CONTENT
        cache.renew(0)
        for request in (kernel.open_(FILE), kernel.opendir(DIR), kernel.flush(FILE, 0)):
            assert bpf.ask(request).outcome == "MISS_DEADLINE"
    finally:
        cache.close()
        KernelCache(bpf.fds).close()
    bpf.cache.renew(time.clock_gettime_ns(time.CLOCK_BOOTTIME) + kernel.HOUR_NS)
    assert bpf.ask(kernel.open_(FILE)).error == 0


def test_handles_are_counted_from_open_to_release(bpf: Kernel) -> None:
    assert not bpf.cache.is_open(FILE)
    for _ in range(3):
        bpf.ask(kernel.open_(FILE))
    assert bpf.open_count(FILE) == 3
    bpf.ask(kernel.release(FILE, FH_KERNEL | FILE))
    bpf.cache.released(FILE)
    assert bpf.cache.is_open(FILE)
    bpf.ask(kernel.release(FILE, FH_KERNEL | FILE))
    assert not bpf.cache.is_open(FILE)


def test_directories_are_counted_too(bpf: Kernel) -> None:
    bpf.ask(kernel.opendir(DIR))
    assert bpf.cache.is_open(DIR)
    bpf.ask(kernel.release(DIR, FH_KERNEL | DIR, directory=True))
    assert not bpf.cache.is_open(DIR)


def test_handles_of_one_inode_differ(bpf: Kernel) -> None:
    opened = {bpf.ask(kernel.open_(FILE)).payload[:8] for _ in range(300)}
    assert len(opened) == 300
    for fh in opened:
        assert bpf.ask(kernel.release(FILE, int.from_bytes(fh, "little"))).outcome == "ANSWERED"
    assert bpf.open_count(FILE) == 0


def test_of_a_locked_inode_each_close_is_the_workers(bpf: Kernel) -> None:
    bpf.ask(kernel.open_(FILE))
    bpf.cache.locked(FILE)
    bpf.cache.locked(FILE)
    bpf.cache.unlocked(FILE)
    closing = (kernel.flush(FILE, FH_KERNEL | FILE), kernel.release(FILE, FH_KERNEL | FILE))
    assert [bpf.ask(each).outcome for each in closing] == ["MISS_FLAGS", "MISS_FLAGS"]
    (flags,) = struct.unpack_from("<I", bpf.ask(kernel.open_(FILE)).payload, 8)
    assert flags == FOPEN_FILE & ~NO_FLUSH
    bpf.cache.unlocked(FILE)
    bpf.cache.unlocked(FILE)
    assert [bpf.ask(each).outcome for each in closing] == ["ANSWERED", "ANSWERED"]
    (flags,) = struct.unpack_from("<I", bpf.ask(kernel.open_(FILE)).payload, 8)
    assert flags == FOPEN_FILE


def test_a_release_too_many_does_not_turn_the_count_over(bpf: Kernel) -> None:
    bpf.ask(kernel.release(FILE, FH_KERNEL | FILE))
    bpf.cache.released(FILE)
    assert bpf.open_count(FILE) == 0


def test_an_open_in_passthrough_has_its_backing(bpf: Kernel) -> None:
    assert bpf.cache.set_backing(BARE, 7)
    bpf.cache.put_inode(attributes(BARE, size=1 << 30))
    reply = struct.pack("<QII", FH_KERNEL | BARE, 1 << 7 | 1 << 5, 7)
    answer = bpf.ask(kernel.open_(BARE))
    assert answer._replace(payload=without_serial(answer.payload)) == Answer("ANSWERED_PASSTHROUGH", 0, reply)
    assert bpf.open_count(BARE) == 1
    assert bpf.ask(kernel.open_(BARE, os.O_RDWR)).outcome == "MISS_FLAGS"
    assert bpf.ask(kernel.release(BARE, FH_KERNEL | BARE)).outcome == "ANSWERED"
    assert bpf.open_count(BARE) == 0


def test_what_the_worker_opens_is_missed(bpf: Kernel) -> None:
    assert bpf.cache.set_backing(BARE, 0)
    bpf.cache.put_inode(attributes(BARE, size=10))
    assert bpf.ask(kernel.open_(BARE)).outcome == "MISS_FLAGS"
    assert bpf.ask(kernel.getattr_(BARE)).outcome == "ANSWERED"
    bpf.cache.forget_backing(BARE)
    bpf.cache.put_inode(attributes(BARE, size=10))
    assert bpf.ask(kernel.open_(BARE)).outcome == "ANSWERED"
    large = KernelCache(bpf.fds, worker_opens_bytes=1000)
    for size, outcome in ((999, "ANSWERED"), (1000, "MISS_FLAGS")):
        large.put_inode(attributes(BARE, size=size))
        assert bpf.ask(kernel.open_(BARE)).outcome == outcome
    large.put_inode(attributes(DIR, DIRECTORY, size=5000))
    assert bpf.ask(kernel.opendir(DIR)).outcome == "ANSWERED"
    large.close()


def test_backings_are_bounded(bpf: Kernel) -> None:
    inos = range(1000, 1001 + lib.BPFUSE_BACKINGS)
    assert [bpf.cache.set_backing(ino, 1) for ino in inos].count(False) == 1
    assert bpf.cache.set_backing(1000, 2)
    bpf.cache.forget_backing(1001)
    assert bpf.cache.set_backing(inos[-1], 3)
    for ino in inos:
        bpf.cache.forget_backing(ino)


def test_handles_of_the_worker_are_counted_too(bpf: Kernel) -> None:
    bpf.cache.opened(FILE)
    assert bpf.cache.is_open(FILE)
    bpf.cache.released(FILE)
    assert not bpf.cache.is_open(FILE)


def test_an_open_that_is_missed_is_not_counted(bpf: Kernel) -> None:
    for request in (kernel.open_(FILE, os.O_WRONLY), kernel.open_(DIR), kernel.open_(GONE)):
        bpf.ask(request)
    assert not any(bpf.cache.is_open(ino) for ino in (FILE, DIR, GONE))


@pytest.mark.parametrize("length", [length for length in VECTORS if length])
def test_bpf_hashes_names_by_the_official_vectors(bpf: Kernel, length: int) -> None:
    before = tuple(bpf.control.hash_key)
    bpf.control.hash_key = KEY
    try:
        name = bytes(range(length))
        assert hash_name(name, KEY) == words(VECTORS[length])
        bpf.cache.put_name(ROOT, name, FILE)
        assert bpf.ask(kernel.lookup(ROOT, name)).outcome == "ANSWERED"
        bpf.cache.drop_name(ROOT, name)
        assert bpf.ask(kernel.lookup(ROOT, name)).outcome == "MISS_NAME"
    finally:
        bpf.control.hash_key = before


def test_bpf_finds_names_of_every_length(bpf: Kernel) -> None:
    names = [os.urandom(length).replace(b"\0", b"1") for length in range(1, 256)]
    for index, name in enumerate(names):
        bpf.cache.put_name(ROOT, name, 0 if index % 2 else FILE)
    for index, name in enumerate(names):
        expected = "ANSWERED_ABSENT" if index % 2 else "ANSWERED"
        assert bpf.ask(kernel.lookup(ROOT, name)).outcome == expected, len(name)


def test_every_outcome_is_counted_by_opcode(bpf: Kernel) -> None:
    before = bpf.cache.figures()["counters"]
    cases = [*ANSWERED, *MISSED]
    for case in cases:
        bpf.ask(case.request)
    after = bpf.cache.figures()["counters"]

    def count(figures: dict[str, dict[str, int]], opcode: int, outcome: str) -> int:
        name = OPCODES.get(opcode, str(opcode if opcode < lib.BPFUSE_OPCODES else 0))
        return figures.get(name, {}).get(outcome.lower(), 0)

    for opcode, outcome in {(case.request.opcode, case.outcome) for case in cases if case.request.opcode < 64}:
        ran = sum((case.request.opcode, case.outcome) == (opcode, outcome) for case in cases)
        if opcode:
            assert count(after, opcode, outcome) - count(before, opcode, outcome) == ran
    strangers = sum(case.request.opcode in (0, 64, 4096, 2**32 - 1) for case in cases)
    assert count(after, 0, "miss_opcode") - count(before, 0, "miss_opcode") == strangers


def test_an_entry_that_does_not_exist_is_refused(bpf: Kernel) -> None:

    with pytest.raises(NativeError) as caught:
        bpf.bpf.run("test_answer", ffi.new("struct bpfuse_test_args *", {"entry": 2}))
    assert caught.value.errno == errno.ENOENT


def damage(bpf: Kernel, **fields: int) -> None:
    """Put FILE's value with some fields changed, as no worker would."""
    value = ffi.new("struct bpfuse_inode_value *")
    bpf_map.lookup(bpf.fds.inodes, FILE, value)
    for name, number in fields.items():
        setattr(value, name, number)
    bpf_map.update(bpf.fds.inodes, FILE, value)


@pytest.mark.parametrize(
    "fields",
    [
        {"first_page": 64},
        {"first_page": 2**32 - 1},
        {"first_page": 63},
        {"data_bytes": 65537},
        {"data_bytes": 2**32 - 1},
        {"first_page": 2**32 - 1, "data_bytes": 8192},
    ],
)
def test_an_extent_outside_the_pages_is_missed(bpf: Kernel, fields: dict[str, int]) -> None:
    damage(bpf, **fields)
    assert bpf.ask(kernel.read(FILE, 0, 131072)).outcome == "MISS_DATA"


def test_the_owner_is_the_process_that_attaches(bpf: Kernel) -> None:
    bpf.bpf.run("adopt_owner")
    assert bpf.control.owner_tgid == os.getpid()
