"""The BPF object and its maps, typed: what :mod:`fuseclient._native` offers of loader.h and figures.h.

The extension module is built by cffi_build.py. A closed :class:`Bpf` raises and cannot crash.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Final, NamedTuple

from fuseclient._native import ffi, lib
from fuseclient.config import MapFds
from fuseclient.observe.opcodes import opcode_name

#: Where the build puts the BPF object.
OBJECT_PATH: Final = Path(__file__).parent / "answer.bpf.o"

_ERROR_BYTES: Final = 512
_OUTCOMES: Final[dict[int, str]] = {
    number: name.removeprefix("BPFUSE_").lower() for number, name in ffi.typeof("enum bpfuse_outcome").elements.items()
}

_HINTS: Final[dict[int, str]] = {
    errno.EPERM: "run as root; in a container give CAP_SYS_ADMIN, CAP_BPF and CAP_PERFMON",
    errno.EACCES: "run as root; in a container give CAP_SYS_ADMIN, CAP_BPF and CAP_PERFMON",
    errno.ENOENT: "build it with make setup; the kernel's own types must be at /sys/kernel/btf/vmlinux",
    errno.EOPNOTSUPP: "this kernel's tracepoint has a form that is not known; bpfuse doctor shows what is needed",
    errno.ENOMEM: "give the kernel cache less memory",
    errno.E2BIG: "give the kernel cache less memory",
}


class NativeError(Exception):
    """The kernel or libbpf refused something. ``hint`` says how to mend it, or is empty; ``errno`` is positive."""

    def __init__(self, message: str, number: int) -> None:
        self.errno = number
        self.hint = _HINTS.get(number, "")
        super().__init__(f"{message} ({self.hint})" if self.hint else message)


def check(result: int, what: str) -> int:
    """Return what a native function returned, or raise :exc:`NativeError` for a negative errno."""
    if result < 0:
        raise NativeError(f"{what}: {os.strerror(-result)}", -result)
    return result


class MapCounts(NamedTuple):
    """Entries in the two hash maps."""

    names: int
    inodes: int


class Bpf:
    """The loaded BPF programs and their maps, which exist until :meth:`close` and until nobody holds a descriptor.

    ``name_capacity`` and ``inode_capacity`` are in entries, ``page_count`` in pages of 4096 bytes, ``ring_entries`` in
    entries of 270,336 bytes. Raises :exc:`NativeError`.
    """

    def __init__(
        self, object_path: str, *, name_capacity: int, inode_capacity: int, page_count: int, ring_entries: int
    ) -> None:
        path = ffi.new("char[]", os.fsencode(object_path))
        options = ffi.new("struct bpfuse_bpf_options *")
        options.object_path = path
        options.name_capacity = name_capacity
        options.inode_capacity = inode_capacity
        options.page_count = page_count
        options.ring_entries = ring_entries
        out = ffi.new("struct bpfuse_bpf **")
        message = ffi.new(f"char[{_ERROR_BYTES}]")
        result = lib.bpfuse_bpf_open(out, options, message, _ERROR_BYTES)
        if result:
            text = ffi.string(message).decode(errors="replace") or os.strerror(-result)
            raise NativeError(text, -result)
        self._bpf: Any = out[0]

    def map_fd(self, name: str) -> int:
        """Return a map's descriptor, which belongs to this object; raise :exc:`NativeError`."""
        return check(lib.bpfuse_bpf_map_fd(self._handle(), name.encode()), f"BPF map {name}")

    def map_id(self, name: str) -> int:
        """Return the number by which other processes open a map (:func:`open_map`); raise :exc:`NativeError`."""
        number = ffi.new("__u32 *")
        check(lib.bpfuse_bpf_map_id(self._handle(), name.encode(), number), f"BPF map {name}")
        return int(number[0])

    def program_fd(self, name: str) -> int:
        """Return a program's descriptor, which belongs to this object; raise :exc:`NativeError`."""
        return check(lib.bpfuse_bpf_program_fd(self._handle(), name.encode()), f"BPF program {name}")

    def run(self, program: str, context: Any = None) -> int:
        """Run a ``syscall`` program with a cffi struct (a pointer) as context, and return what it returned."""
        size = 0 if context is None else ffi.sizeof(context[0])
        pointer = ffi.NULL if context is None else context
        return check(lib.bpfuse_bpf_run(self._handle(), program.encode(), pointer, size), f"BPF program {program}")

    def attach(self) -> None:
        """Have the ring completions of this process answered from now on; raise :exc:`NativeError`."""
        check(lib.bpfuse_bpf_attach(self._handle()), "cannot attach the BPF program")

    def close(self) -> None:
        """Detach the program and let go of the maps. Twice does no harm."""
        if self._bpf is not None:
            lib.bpfuse_bpf_close(self._bpf)
            self._bpf = None

    def _handle(self) -> Any:
        if self._bpf is None:
            raise ValueError("the BPF object is closed")
        return self._bpf


def recent_slots() -> int:
    """Return how many entries the map ``recent`` has."""
    return int(lib.BPFUSE_RECENT_SLOTS)


def open_map(number: int) -> int:
    """Return a descriptor, which is the caller's to close, of a map that exists; raise :exc:`NativeError`."""
    return check(lib.bpfuse_map_open(number), f"BPF map {number}")


class Busy(NamedTuple):
    """Requests since somebody watches, of an inode or a process; ``answered``: how many of them in the kernel."""

    id: int
    requests: int
    answered: int


def watch(watched_fd: int, until_ns: int) -> None:
    """Have requests be counted by inode and process until a time of CLOCK_BOOTTIME; raise :exc:`NativeError`."""
    check(lib.bpfuse_watch(watched_fd, until_ns), "BPF map watched")


def busiest(busiest_fd: int) -> tuple[list[Busy], list[Busy]]:
    """Return what was counted of inodes and of processes; raise :exc:`NativeError`."""
    out = ffi.new("struct bpfuse_busy_entry[]", lib.BPFUSE_BUSY_ENTRIES)
    count = check(lib.bpfuse_read_busiest(busiest_fd, out, lib.BPFUSE_BUSY_ENTRIES), "BPF map busiest")
    found: dict[int, list[Busy]] = {lib.BPFUSE_BUSY_INODE: [], lib.BPFUSE_BUSY_PROCESS: []}
    for each in out[0:count]:
        found[each.key.kind].append(Busy(each.key.id, each.value.requests, each.value.answered))
    return found[lib.BPFUSE_BUSY_INODE], found[lib.BPFUSE_BUSY_PROCESS]


def hash_name(name: bytes, key: tuple[int, int]) -> tuple[int, int]:
    """Return SipHash-2-4-128 of a name of at most 255 bytes, as in the keys of the map ``names``."""
    if len(name) > lib.BPFUSE_NAME_MAX:
        raise ValueError(f"a name of {len(name)} bytes")
    out = ffi.new("__u64[2]")
    lib.bpfuse_hash_name(name, len(name), key, out)
    return int(out[0]), int(out[1])


def read_control(control_fd: int) -> Any:
    """Return a copy of the control page, a ``struct bpfuse_control``; raise :exc:`NativeError`."""
    out = ffi.new("struct bpfuse_control *")
    check(lib.bpfuse_read_control(control_fd, out), "BPF map control")
    return out


def read_counters(counters_fd: int) -> dict[str, dict[str, int]]:
    """Return how often each outcome (names of ``enum bpfuse_outcome`` in lower case) came about, by opcode."""
    counts = ffi.new("__u64[]", lib.BPFUSE_OPCODES * lib.BPFUSE_OUTCOMES)
    check(lib.bpfuse_read_counters(counters_fd, counts), "BPF map counters")
    found: dict[str, dict[str, int]] = {}
    for index, count in enumerate(counts):
        if count:
            opcode, outcome = divmod(index, lib.BPFUSE_OUTCOMES)
            found.setdefault(opcode_name(opcode), {})[_OUTCOMES.get(outcome, str(outcome))] = count
    return found


def count_entries(fds: MapFds) -> MapCounts:
    """Return how many names and inodes there are: from the kernel's own counts if ``fds`` has the program for it."""
    if fds.count_program >= 0:
        counts = ffi.new("struct bpfuse_map_counts *")
        check(lib.bpfuse_bpf_run_fd(fds.count_program, counts, ffi.sizeof(counts[0])), "BPF program count_maps")
        return MapCounts(counts.names, counts.inodes)
    return MapCounts(_walk(fds.names), _walk(fds.inodes))


def _walk(map_fd: int) -> int:
    out = ffi.new("__u64 *")
    check(lib.bpfuse_count_entries(map_fd, out), "BPF map")
    return int(out[0])


def map_bytes(map_fd: int) -> int:
    """Return the bytes of kernel memory that a map takes; 0 if the kernel does not say."""
    for line in Path(f"/proc/self/fdinfo/{map_fd}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "memlock":
            return int(value)
    return 0


def figures(fds: MapFds) -> dict[str, Any]:
    """Return ``maps`` (entries, capacity and bytes of each), ``counters``, ``epoch`` and ``deadline_ns``."""
    control = read_control(fds.control)
    counts = count_entries(fds)
    sizes = (
        ("names", fds.names, counts.names, fds.name_capacity),
        ("inodes", fds.inodes, counts.inodes, fds.inode_capacity),
        ("pages", fds.pages, control.pages_used, fds.page_count),
    )
    return {
        "maps": {
            name: {"entries": entries, "capacity": capacity, "bytes": map_bytes(fd)}
            for name, fd, entries, capacity in sizes
        },
        "counters": read_counters(fds.counters),
        "epoch": control.epoch,
        "deadline_ns": control.deadline,
    }
