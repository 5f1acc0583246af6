"""What makes a mount accelerated: the sizes of its maps, the loaded BPF object, and the kernel's switch."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fuseclient.channel import transport
from fuseclient.config import MapFds, MountOptions
from fuseclient.native import Bpf

_OBJECT: Final = Path(__file__).parent.parent / "answer.bpf.o"
_ENABLE_URING: Final = Path("/sys/module/fuse/parameters/enable_uring")
#: Held while that is changed; only root can open it, or anybody could hold up mounts.
_SWITCH_LOCK: Final = Path("/run/bpfuse.enable_uring.lock")

_PAGE_BYTES: Final = 4096
#: What a name and an inode cost in the kernel: key, value and 64 bytes of an LRU hash element each; and the xattrs of
#: the few that have some.
_ENTRY_BYTES: Final = 2 * 64 + 48 + 104 + (64 + 736) // 64
#: Ring entries of all queues may take this much memory; each is 66 pages.
_RING_BYTES: Final = 256 * 1024 * 1024
_RING_ENTRY_BYTES: Final = 66 * _PAGE_BYTES
_MIN_DEPTH: Final = 8
_MAX_DEPTH: Final = 64


def queue_depth(options: MountOptions) -> int:
    """Return the ring entries of each queue: misses that wait in one must not hold up the hits behind them."""
    if options.queue_depth is not None:
        return options.queue_depth
    affordable = _RING_BYTES // (_RING_ENTRY_BYTES * (os.cpu_count() or 1))
    return max(_MIN_DEPTH, min(_MAX_DEPTH, affordable))


def load(options: MountOptions) -> Bpf:
    """Load the BPF object with half of the cache's bytes for pages, half for names and inodes; raise NativeError."""
    capacity = options.kernel_cache_bytes // 2 // _ENTRY_BYTES
    return Bpf(
        str(_OBJECT),
        name_capacity=capacity,
        inode_capacity=capacity,
        page_count=options.kernel_cache_bytes // 2 // _PAGE_BYTES,
        ring_entries=transport.entries_needed(queue_depth(options)),
    )


def map_fds(bpf: Bpf, options: MountOptions) -> MapFds:
    """Return the descriptors that a worker inherits; the numbers are the same in the worker."""
    capacity = options.kernel_cache_bytes // 2 // _ENTRY_BYTES
    return MapFds(
        control=bpf.map_fd("control"),
        names=bpf.map_fd("names"),
        inodes=bpf.map_fd("inodes"),
        xattrs=bpf.map_fd("xattrs"),
        pages=bpf.map_fd("pages"),
        opens=bpf.map_fd("opens"),
        counters=bpf.map_fd("counters"),
        count_program=bpf.program_fd("count_maps"),
        name_capacity=capacity,
        inode_capacity=capacity,
        page_count=options.kernel_cache_bytes // 2 // _PAGE_BYTES,
    )


@contextlib.contextmanager
def uring_enabled() -> Iterator[None]:
    """Switch FUSE-over-io_uring on, if it is not, for a mount to be made, and back afterwards.

    The kernel asks for the switch when a connection is made, not later.
    """
    with switch_locked():
        before = _ENABLE_URING.read_text().strip()
        if before not in "Y1":
            _ENABLE_URING.write_text("Y")
        try:
            yield
        finally:
            if before not in "Y1":
                _ENABLE_URING.write_text(before)


@contextlib.contextmanager
def switch_locked() -> Iterator[None]:
    """Have the kernel's switch to oneself.

    There is one on the machine. Of mounts that are made at the same moment one would put it back while the other needs
    it, whatever their runtime directories are.
    """
    descriptor = os.open(_SWITCH_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
