"""What this machine offers of what bpfuse needs. Each feature is tried, never guessed from a version number.

The probes change nothing on the machine and leave nothing behind.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from fuseclient.errors import reason

_FUSE_DEVICE: Final = Path("/dev/fuse")
_ENABLE_URING: Final = Path("/sys/module/fuse/parameters/enable_uring")
_IO_URING_DISABLED: Final = Path("/proc/sys/kernel/io_uring_disabled")
_KERNEL_BTF: Final = Path("/sys/kernel/btf/vmlinux")
_BPF_OBJECT: Final = Path(__file__).with_name("answer.bpf.o")
_TRACEPOINT: Final = b"btf_trace_io_uring_complete"

#: Bits of CapEff in /proc/self/status.
_CAP_SYS_ADMIN: Final = 1 << 21


class Feature(msgspec.Struct, frozen=True, kw_only=True):
    """One thing needed: whether it was found, what of it, what it is for, and how to mend it when it is missing."""

    name: str
    found: bool
    detail: str
    purpose: str
    remedy: str
    #: Whether any mount needs it; if not, only one whose requests are answered in the kernel.
    always_needed: bool = False


class _Missing(Exception):
    """A probe's answer that the feature is not there; the text says what was seen."""


def probe(*, for_bpf: bool = True) -> list[Feature]:
    """Try the features and return them, found and missing; without ``for_bpf`` only those that any mount needs."""
    return [_try(*row) for row in _PROBES if for_bpf or row[-1]]


def missing_for_mount(features: list[Feature]) -> list[Feature]:
    """Return what is missing for any mount at all."""
    return [feature for feature in features if feature.always_needed and not feature.found]


def missing_for_bpf(features: list[Feature]) -> list[Feature]:
    """Return what is missing for requests to be answered in the kernel."""
    return [feature for feature in features if not feature.found]


def describe(features: list[Feature]) -> str:
    """Return the features in one line: each one's name, and what was seen of it."""
    return "; ".join(f"{feature.name} ({feature.detail})" for feature in features)


def _try(name: str, attempt: Callable[[], str], purpose: str, remedy: str, always_needed: bool) -> Feature:
    try:
        detail, found = attempt(), True
    except _Missing as missing:
        detail, found = str(missing), False
    return Feature(name=name, found=found, detail=detail, purpose=purpose, remedy=remedy, always_needed=always_needed)


def _privileges() -> str:
    status = Path("/proc/self/status").read_text()
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    if os.geteuid() != 0:
        raise _Missing(f"running as user {os.geteuid()}")
    if not effective & _CAP_SYS_ADMIN:
        raise _Missing("root without CAP_SYS_ADMIN")
    return "root with CAP_SYS_ADMIN"


def _fuse_device() -> str:
    try:
        os.close(os.open(_FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise _Missing(f"{_FUSE_DEVICE}: {reason(error)}") from None
    return f"{_FUSE_DEVICE} opens"


def _fuse_over_uring() -> str:
    try:
        value = _ENABLE_URING.read_text().strip()
    except OSError as error:
        raise _Missing(f"{_ENABLE_URING}: {reason(error)}") from None
    if value in "Y1":
        return "switched on"
    if not os.access(_ENABLE_URING, os.W_OK):
        raise _Missing(f"{_ENABLE_URING} is {value} and cannot be written")
    return "can be switched on for a mount"


def _io_uring() -> str:
    """Set up a ring of the kind that the channel uses, and close it."""
    number = _io_uring_setup()
    if number == errno.EPERM:
        raise _Missing(f"not permitted; {_disabled_setting()}")
    if number:
        raise _Missing(f"io_uring_setup: {os.strerror(number).lower()}")
    return "a ring can be set up"


def _io_uring_setup() -> int:
    """Return 0 or the errno of io_uring_setup(2) with SQE128, SINGLE_ISSUER and DEFER_TASKRUN."""
    setup_call, flags = 425, 1 << 10 | 1 << 12 | 1 << 13
    parameters = ctypes.create_string_buffer(struct.pack("2I", 0, 0) + struct.pack("I", flags), 120)
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(ctypes.c_long(setup_call), ctypes.c_uint(4), parameters)
    if descriptor < 0:
        return ctypes.get_errno()
    os.close(descriptor)
    return 0


def _disabled_setting() -> str:
    try:
        return f"sysctl kernel.io_uring_disabled is {_IO_URING_DISABLED.read_text().strip()}"
    except OSError:
        return "a security policy may forbid it"


def _kernel_btf() -> str:
    try:
        size = _KERNEL_BTF.stat().st_size
    except OSError as error:
        raise _Missing(f"{_KERNEL_BTF}: {reason(error)}") from None
    return f"{size >> 10} KiB of types"


def _tracepoint() -> str:
    try:
        arguments = tracepoint_arguments(_KERNEL_BTF.read_bytes())
    except OSError as error:
        raise _Missing(f"{_KERNEL_BTF}: {reason(error)}") from None
    if arguments is None:
        raise _Missing("io_uring_complete is not among the kernel's types")
    known = {3: "(ctx, req, cqe)", 7: "(ctx, req, user_data, res, cflags, extra1, extra2)"}
    if arguments not in known:
        raise _Missing(f"io_uring_complete has {arguments} arguments, which is no known form")
    return f"io_uring_complete{known[arguments]}"


def _bpf_load() -> str:
    """Load the project's own BPF object, with the smallest maps, and close it again."""
    if not _BPF_OBJECT.exists():
        raise _Missing(f"{_BPF_OBJECT} is not built")
    try:
        from fuseclient import native
    except ImportError as error:
        raise _Missing(f"the native module is not built: {error}") from None
    try:
        native.Bpf(str(_BPF_OBJECT), name_capacity=64, inode_capacity=64, page_count=1, ring_entries=1).close()
    except native.NativeError as error:
        raise _Missing(str(error)) from None
    return "the answering program loads"


_PROBES: Final[tuple[tuple[str, Callable[[], str], str, str, bool], ...]] = (
    (
        "privileges",
        _privileges,
        "mounting, and loading BPF programs",
        "run as root; in a container give CAP_SYS_ADMIN, CAP_BPF and CAP_PERFMON",
        True,
    ),
    (
        "FUSE",
        _fuse_device,
        "every mount",
        "modprobe fuse; in a container pass the device /dev/fuse through",
        True,
    ),
    (
        "FUSE-over-io_uring",
        _fuse_over_uring,
        "requests arrive where a BPF program can answer them",
        "Linux 6.14 or later with CONFIG_FUSE_IO_URING; /sys must be writable, or run `echo Y >"
        " /sys/module/fuse/parameters/enable_uring` outside of the container",
        False,
    ),
    (
        "io_uring",
        _io_uring,
        "the rings that carry requests",
        "sysctl kernel.io_uring_disabled=0; in a container allow the io_uring system calls (seccomp)",
        False,
    ),
    (
        "kernel BTF",
        _kernel_btf,
        "the kernel's types, which BPF programs are fitted to",
        "a kernel with CONFIG_DEBUG_INFO_BTF",
        False,
    ),
    (
        "tracepoint",
        _tracepoint,
        "the BPF program runs where a request's ring entry completes",
        "a kernel whose tracepoint io_uring_complete has a known form; please report this one",
        False,
    ),
    (
        "BPF programs",
        _bpf_load,
        "answering in the kernel",
        "build it (make setup); run as root; kernel lockdown must not be `confidentiality`",
        False,
    ),
)


# Just enough of BTF (Documentation/bpf/btf.rst of the kernel) to count one tracepoint's arguments.

_BTF_HEADER: Final = struct.Struct("<HBBIIIII")
_BTF_TYPE: Final = struct.Struct("<III")
_BTF_MAGIC: Final = 0xEB9F
#: Bytes that follow a type of each kind: a fixed part, and a part for each member.
_BTF_EXTRA: Final = {1: (4, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 13: (0, 8), 14: (4, 0), 15: (0, 12)} | {
    17: (4, 0),
    19: (0, 12),
}
_KIND_TYPEDEF: Final = 8


def tracepoint_arguments(btf: bytes) -> int | None:
    """Return how many arguments the tracepoint io_uring_complete has by the kernel's BTF; ``None``: it is not there."""
    if len(btf) < _BTF_HEADER.size:
        return None
    magic, _, _, header_bytes, type_start, type_bytes, text_start, text_bytes = _BTF_HEADER.unpack_from(btf)
    if magic != _BTF_MAGIC:
        return None
    names = btf[header_bytes + text_start : header_bytes + text_start + text_bytes]
    name = names.find(b"\0" + _TRACEPOINT + b"\0") + 1
    if not name:
        return None
    types = btf[header_bytes + type_start : header_bytes + type_start + type_bytes]
    return _count_arguments(types, name)


def _count_arguments(types: bytes, name: int) -> int | None:
    """Follow typedef -> pointer -> prototype; the prototype's first parameter is the tracepoint's own data."""
    offsets = [0]
    pointer = None
    position = 0
    while position < len(types):
        type_name, info, target = _BTF_TYPE.unpack_from(types, position)
        kind = info >> 24 & 31
        if type_name == name and kind == _KIND_TYPEDEF:
            pointer = target
        offsets.append(position)
        fixed, each = _BTF_EXTRA.get(kind, (0, 0))
        position += _BTF_TYPE.size + fixed + each * (info & 0xFFFF)
    if pointer is None:
        return None
    prototype = _BTF_TYPE.unpack_from(types, offsets[pointer])[2]
    return int(_BTF_TYPE.unpack_from(types, offsets[prototype])[1] & 0xFFFF) - 1
