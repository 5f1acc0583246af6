"""What makes a mount accelerated: the sizes of its maps, the loaded BPF object, and the kernel's switch."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from fuseclient.channel import transport
from fuseclient.config import MapFds, MountOptions
from fuseclient.native import Bpf

_OBJECT: Final = Path(__file__).parent.parent / "answer.bpf.o"
_ENABLE_URING: Final = Path("/sys/module/fuse/parameters/enable_uring")
#: Held while that is changed; only root can open it, or anybody could hold up mounts.
_SWITCH_LOCK: Final = Path("/run/bpfuse.enable_uring.lock")

_PAGE_BYTES: Final = 4096
#: What a name and an inode cost in the kernel: 48 bytes of hash element, key and value each; half a word in `uses`.
_ENTRY_BYTES: Final = 48 + 24 + 24 + 48 + 8 + 104 + 4
#: Both maps have tables of a power of two of words of this size.
_BUCKET_BYTES: Final = 16
#: What an entry may cost, tables and all.
_MOST_ENTRY_BYTES: Final = 300
#: One inode in `xattrs`, of which there is room for one in BPFUSE_XATTR_SHARE.
_XATTRS_BYTES: Final = 48 + 8 + 728
#: In `xattrs`, whatever the capacity.
_XATTRS_LEAST: Final = 64
_XATTR_SHARE: Final = 64
#: What maps take whatever their size, all together, pages that are not full included.
_FIXED_BYTES: Final = 24 * 1024
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


class Sizes(NamedTuple):
    """Of the maps, in names (and as many inodes), and in pages."""

    entries: int
    pages: int


def _table_bytes(capacity: int) -> int:
    return _BUCKET_BYTES * (1 << max(0, capacity - 1).bit_length())


def entries_bytes(capacity: int) -> int:
    """Return what the maps of so many names and inodes take."""
    xattrs = capacity // _XATTR_SHARE + _XATTRS_LEAST
    entries = capacity * _ENTRY_BYTES + 2 * _table_bytes(capacity)
    return entries + xattrs * _XATTRS_BYTES + _table_bytes(xattrs) + _FIXED_BYTES


def map_sizes(cache_bytes: int) -> Sizes:
    """Divide the cache: about half for names and inodes, the rest for pages.

    The tables are powers of two, which makes some capacities too dear: then it is the nearest one that is not.
    """
    capacity = cache_bytes // 2 // (_ENTRY_BYTES + 2 * _BUCKET_BYTES)
    while capacity > 1 and entries_bytes(capacity) > cache_bytes // 2:
        capacity -= max(1, capacity // 256)
    tables = 2 * _table_bytes(capacity)
    enough = -(-tables // (_MOST_ENTRY_BYTES - _ENTRY_BYTES))
    if capacity < enough:
        below = 1 << capacity.bit_length() - 1
        capacity = enough if enough - capacity < capacity - below else below
    return Sizes(capacity, max(1, (cache_bytes - entries_bytes(capacity)) // _PAGE_BYTES))


def load(options: MountOptions) -> Bpf:
    """Load the BPF object with maps that take the cache's bytes; raise NativeError."""
    sizes = map_sizes(options.kernel_cache_bytes)
    return Bpf(
        str(_OBJECT),
        name_capacity=sizes.entries,
        inode_capacity=sizes.entries,
        page_count=sizes.pages,
        ring_entries=transport.entries_needed(queue_depth(options)),
    )


def map_fds(bpf: Bpf, options: MountOptions) -> MapFds:
    """Return the descriptors that a worker inherits; the numbers are the same in the worker."""
    sizes = map_sizes(options.kernel_cache_bytes)
    return MapFds(
        control=bpf.map_fd("control"),
        names=bpf.map_fd("names"),
        inodes=bpf.map_fd("inodes"),
        uses=bpf.map_fd("uses"),
        xattrs=bpf.map_fd("xattrs"),
        pages=bpf.map_fd("pages"),
        opens=bpf.map_fd("opens"),
        counters=bpf.map_fd("counters"),
        count_program=bpf.program_fd("count_maps"),
        name_capacity=sizes.entries,
        inode_capacity=sizes.entries,
        page_count=sizes.pages,
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
