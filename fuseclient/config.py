"""What a mount is made of: the options a user gives, and what the channel hands to its worker.

Both travel as JSON over an inherited file descriptor, never in argv.
"""

from __future__ import annotations

import msgspec


class MountOptions(msgspec.Struct, frozen=True, kw_only=True):
    """A mount as asked for by the user, checked and with defaults filled in."""

    url: str
    #: Absolute and resolved.
    mountpoint: str
    #: "auto", "bpf" or "off".
    accel: str = "auto"
    #: "general" or "dataset".
    profile: str = "general"
    read_only: bool = False
    allow_other: bool = True
    #: Setuid programs and device nodes of the volume are obeyed.
    trusted: bool = False
    #: Bytes of kernel memory for maps and pages together.
    kernel_cache_bytes: int = 256 * 1024 * 1024
    #: The longest time-to-live given to the kernel's own caches, in seconds; None: what is left of the lease.
    kernel_ttl_s: float | None = None
    #: Where file content is kept, absolute, in a directory for each volume; None: below /var/cache/bpfuse.
    cache_directory: str | None = None
    #: The most that may lie there, 0: nothing; None: the default, and no second copy of objects of this machine.
    cache_bytes: int | None = None
    #: Ring entries of each queue; None: by the number of CPUs.
    queue_depth: int | None = None
    #: Lease length that an embedded metaserver gives, in seconds.
    lease_s: float = 30.0
    #: "shared": with other mounts of the volume; "local": the kernel's own, known to this mount only.
    locks: str = "shared"
    #: When an embedded metaserver's commits are durable: "commit" or "interval".
    durability: str = "commit"
    #: Absolute; None: standard error.
    log_file: str | None = None
    log_level: str = "INFO"


class MapFds(msgspec.Struct, frozen=True, kw_only=True):
    """Descriptors of the BPF maps that the worker fills, as inherited by it, and their capacities in entries."""

    control: int
    names: int
    inodes: int
    uses: int
    xattrs: int
    pages: int
    opens: int
    counters: int
    #: The loaded program count_maps; -1: entries are counted one by one, which takes long in a large map.
    count_program: int = -1
    name_capacity: int
    inode_capacity: int
    page_count: int


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the channel hands to a worker."""

    options: MountOptions
    #: The metaserver: "unix:/path" or "tcp:host:port".
    address: str
    volume: str
    #: One end of the SOCK_SEQPACKET pair that carries FUSE messages.
    fuse_fd: int
    #: One end of the SOCK_SEQPACKET pair that carries the FUSE requests that pyfuse3 has no method for.
    extra_fd: int
    #: One end of the SOCK_SEQPACKET pair that carries notifications to the kernel and their results.
    notify_fd: int
    #: The same for those that may wait for a lock, so as to hold up no others: of names, of pages, of written pages.
    #: Without them all go through ``notify_fd``.
    slow_fds: tuple[int, int, int] | None = None
    #: A pipe: the worker writes one JSON line, {"ready": true, "session": hex} or {"error": text}, and later figures.
    status_fd: int
    #: Rises by one with each worker of a mount; part of the handles it gives out.
    generation: int
    #: None: the mount is not accelerated.
    maps: MapFds | None
    #: Where the locks of programs are kept (lock_store.py); None: with the worker.
    locks_fd: int | None = None
    #: Where it is kept which metaservers there are beside those in ``address`` (known.py); None: with the worker.
    metaservers_fd: int | None = None
    #: The session of the worker before this one, to be resumed, as hex; None: open a new one.
    session: str | None

    @property
    def opens_nothing(self) -> bool:
        """Whether the kernel is told to do without OPEN, OPENDIR and FLUSH."""
        return self.options.profile == "dataset"
