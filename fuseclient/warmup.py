"""Warming a tree of a mount: what is asked of its worker, and what that answers; and the asking.

The worker walks the tree by itself. Whoever wants that asks how far it is, again and again; when nobody has asked for
some seconds, or somebody says so, the walk ends, and what it has done stays.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Callable
from typing import Final, Literal

import msgspec

from fuseclient import control, runtime
from fuseclient.errors import UserError, reason

#: Seconds between two questions.
_PAUSE_S: Final = 0.2


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Begin, go on with or (``stop``) end the walk of this name, from a directory on."""

    job: str
    ino: int
    begin: bool = False
    data: bool = False
    stop: bool = False


class Amount(msgspec.Struct):
    """So many files, and their bytes."""

    files: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        """Count one more."""
        self.files += 1
        self.bytes += size


class Progress(msgspec.Struct, kw_only=True):
    """How far a walk is, and at its end what it has done."""

    state: Literal["running", "done", "stopped", "failed"] = "running"
    #: Why it has failed: one line.
    problem: str | None = None
    seconds: float = 0.0
    #: Put into the kernel cache; and found there whole, and passed over.
    directories: int = 0
    entries: int = 0
    directories_passed_over: int = 0
    entries_passed_over: int = 0
    #: All entries of the tree, by estimate; 0: not known.
    entries_expected: int = 0
    #: Directories that have been seen and did not fit into the kernel cache, or not whole; with all below them.
    directories_left_out: int = 0
    #: Content put into the kernel cache, and what did not fit there.
    content: Amount = msgspec.field(default_factory=Amount)
    content_left_out: Amount = msgspec.field(default_factory=Amount)
    #: Larger files: found, brought into the disk cache, found there already, too many for it, that cannot be read, and
    #: those for which the store is near enough.
    files: Amount = msgspec.field(default_factory=Amount)
    files_brought: Amount = msgspec.field(default_factory=Amount)
    files_passed_over: Amount = msgspec.field(default_factory=Amount)
    files_left_out: Amount = msgspec.field(default_factory=Amount)
    files_failed: Amount = msgspec.field(default_factory=Amount)
    files_in_store: Amount = msgspec.field(default_factory=Amount)
    #: What fits into the kernel cache, and into the disk cache.
    room_entries: int = 0
    room_content_bytes: int = 0
    room_disk_bytes: int = 0

    @property
    def complete(self) -> bool:
        """Whether the whole tree is warm."""
        left_out = self.directories_left_out or self.content_left_out.files or self.files_left_out.files
        return self.state == "done" and not left_out and not self.files_failed.files

    @property
    def files_done(self) -> Amount:
        """The larger files that have been dealt with."""
        parts = (
            self.files_brought,
            self.files_passed_over,
            self.files_left_out,
            self.files_failed,
            self.files_in_store,
        )
        return Amount(sum(each.files for each in parts), sum(each.bytes for each in parts))


def warm(path: str, *, data: bool, report: Callable[[Progress], None]) -> Progress:
    """Warm the tree below a directory, and return how it ended: "done", or "stopped" by Ctrl-C.

    Raises :exc:`UserError`.
    """
    directory, record = runtime.mount_of(path)
    ino = _inode(path)
    if record.accel == "off":
        raise UserError(
            f"{record.mountpoint} has no kernel cache to be warmed (--accel off): mount it with --accel auto, "
            "and see what bpfuse doctor says"
        )
    request = Request(job=secrets.token_hex(8), ino=ino, begin=True, data=data)
    try:
        return _follow(lambda each: _ask(directory, each), request, report)
    except KeyboardInterrupt:
        return _ask(directory, msgspec.structs.replace(request, begin=False, stop=True))
    except BaseException:
        with contextlib.suppress(UserError):
            _ask(directory, msgspec.structs.replace(request, begin=False, stop=True))
        raise


def _follow(ask: Callable[[Request], Progress], request: Request, report: Callable[[Progress], None]) -> Progress:
    progress = ask(request)
    request = msgspec.structs.replace(request, begin=False)
    while progress.state == "running":
        report(progress)
        time.sleep(_PAUSE_S)
        progress = ask(request)
    if progress.state == "failed":
        raise UserError(progress.problem or "it failed")
    return progress


def _ask(directory: runtime.MountDirectory, request: Request) -> Progress:
    reply = control.ask(directory.control_socket, "warmup", msgspec.to_builtins(request))
    try:
        return msgspec.convert(reply, Progress)
    except msgspec.ValidationError as error:
        raise UserError(f"the mount's answer cannot be understood: {error}") from None


def _inode(path: str) -> int:
    """Return the inode of a directory."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path} is not a directory: a directory is warmed with all below it")
    return status.st_ino
