"""The native half of the channel, typed: the mount itself, its queues and the bridge to the worker."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from fuseclient._native import ffi, lib

_ERROR_BYTES: Final = 512


class TransportError(Exception):
    """The mount or its queues could not be made; the message is one line for the user."""


class NoUring(TransportError):
    """The kernel did not grant FUSE-over-io_uring."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the mount was made; see ``struct bpfuse_channel_figures``. ``forwarded`` is indexed by opcode."""

    forwarded: list[int]
    committed: int
    held: int
    posted: int
    flushed: int
    changed: int
    told: int
    replayed: int
    refused: int
    interrupted: int
    crowded: int
    notifications: int
    malformed_requests: int
    malformed_replies: int
    stale_replies: int
    device_errors: int
    ring_errors: int
    dropped: int
    queues: int
    entries: int
    pinned: int
    worker_ready: int


class Transport:
    """One mount. ``entries_fd`` is the BPF map of ring entries, or ``None`` to read every request from /dev/fuse.

    The mount exists, with INIT done, when the constructor returns. After :meth:`start` requests flow, to be answered
    as soon as a worker is attached. :meth:`close` must come after the mount has ended.
    """

    def __init__(
        self,
        mountpoint: str,
        source: str,
        *,
        read_only: bool,
        allow_other: bool,
        shared_locks: bool,
        trusted: bool,
        entries_fd: int | None,
        depth: int,
    ) -> None:
        strings = [ffi.new("char[]", os.fsencode(text)) for text in (mountpoint, source)]
        options = ffi.new("struct bpfuse_channel_options *")
        options.mountpoint, options.source = strings
        options.read_only = read_only
        options.allow_other = allow_other
        options.shared_locks = shared_locks
        options.trusted = trusted
        options.uring = entries_fd is not None
        options.entries_fd = -1 if entries_fd is None else entries_fd
        options.depth = depth
        out = ffi.new("struct bpfuse_channel **")
        message = ffi.new(f"char[{_ERROR_BYTES}]")
        result = lib.bpfuse_channel_open(out, options, message, _ERROR_BYTES)
        if result:
            text = ffi.string(message).decode(errors="replace") or os.strerror(-result)
            raise NoUring(text) if result == -errno.EOPNOTSUPP else TransportError(text)
        self._channel: Any = out[0]

    def start(self) -> None:
        """Start the threads and register every queue; raise :exc:`TransportError`."""
        result = lib.bpfuse_channel_start(self._channel)
        if result:
            raise TransportError(f"the request queues cannot be started: {os.strerror(-result)}")

    def attach_worker(
        self,
        fuse_socket: socket.socket,
        extra_socket: socket.socket,
        notify_socket: socket.socket,
        slow_sockets: Sequence[socket.socket],
    ) -> None:
        """Give requests to the worker at the other end of these sockets from now on; all become the transport's."""
        for slow in slow_sockets:
            result = lib.bpfuse_channel_attach_notifier(self._channel, slow.detach())
            if result:
                raise TransportError(f"the worker cannot be attached: {os.strerror(-result)}")
        sockets = [each.detach() for each in (fuse_socket, extra_socket, notify_socket)]
        result = lib.bpfuse_channel_attach_worker(self._channel, *sockets)
        if result:
            raise TransportError(f"the worker cannot be attached: {os.strerror(-result)}")

    def fileno(self) -> int:
        """Return an eventfd that is readable when :attr:`ended` or the figures' ``worker_ready`` may have changed."""
        return int(lib.bpfuse_channel_event_fd(self._channel))

    @property
    def ended(self) -> bool:
        """Whether the mount has been unmounted or its connection aborted."""
        return bool(lib.bpfuse_channel_ended(self._channel))

    def figures(self) -> Figures:
        """Return the counts of this moment."""
        out = ffi.new("struct bpfuse_channel_figures *")
        lib.bpfuse_channel_figures(self._channel, out)
        scalars = {name: getattr(out, name) for name in Figures.__struct_fields__ if name != "forwarded"}
        return Figures(forwarded=list(out.forwarded), **scalars)

    def close(self) -> None:
        """Join the threads and free everything; blocks until the worker has closed its ends."""
        lib.bpfuse_channel_close(self._channel)
        self._channel = ffi.NULL


def entries_needed(depth: int) -> int:
    """Return how many ring entries queues of this depth need: the capacity of the ``entries`` map."""
    return int(lib.bpfuse_channel_entries(depth))
