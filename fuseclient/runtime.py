"""The registry of this machine's mounts: one directory each below /run/bpfuse (or ``BPFUSE_RUNTIME_DIR``).

A mount's directory is named after its mount point and holds ``mount.json`` (:class:`MountRecord`), ``control.sock``
and, of an embedded volume, ``metaserver.sock``. Whoever holds the lock on the directory itself (:func:`claim`) has
the mount point: the command that mounts takes it and the channel inherits the descriptor, so that the lock is free
again at the very moment the channel ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from fuseclient import mounts
from fuseclient.errors import UserError, reason
from fuseclient.processes import Process, is_alive

_DEFAULT_ROOT: Final = "/run/bpfuse"
#: sun_path of a unix socket holds this many bytes and a final NUL.
_SOCKET_PATH_MAX: Final = 107


class MountRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the channel tells of its mount in ``mount.json``."""

    mountpoint: str
    url: str
    #: The channel.
    pid: int
    #: How requests are answered: "bpf" or "off".
    accel: str
    profile: str
    #: Seconds since 1970.
    started: float
    #: The minor number of the mount's device, which names the FUSE connection.
    device_minor: int
    #: All processes of the mount, the channel first. Written again whenever one is started.
    processes: list[Process]


@dataclass(frozen=True)
class MountDirectory:
    """The runtime directory of one mount point; it need not exist."""

    path: Path

    @property
    def record_path(self) -> Path:
        return self.path / "mount.json"

    @property
    def control_socket(self) -> Path:
        return self.path / "control.sock"

    @property
    def metaserver_socket(self) -> Path:
        return self.path / "metaserver.sock"

    def write(self, record: MountRecord) -> None:
        """Put the record in place at one stroke, readable by its owner only."""
        temporary = self.record_path.with_suffix(".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(msgspec.json.encode(record))
        os.replace(temporary, self.record_path)

    def read(self) -> MountRecord | None:
        """Return the record, or ``None`` if there is none that can be understood."""
        try:
            return msgspec.json.decode(self.record_path.read_bytes(), type=MountRecord)
        except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
            return None

    def remove(self) -> None:
        """Remove the directory and all in it, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path)


@dataclass(frozen=True)
class Claim:
    """A mount point that nobody else can mount on as long as ``descriptor``, or an inherited copy, is open."""

    directory: MountDirectory
    descriptor: int

    def close(self) -> None:
        """Give up this process's copy; the lock lives on in those who inherited it."""
        os.close(self.descriptor)

    def abandon(self) -> None:
        """Give up the mount point and remove what is in its runtime directory."""
        self.directory.remove()
        self.close()


def root() -> Path:
    """Return the directory that holds all runtime directories."""
    return Path(os.environ.get("BPFUSE_RUNTIME_DIR") or _DEFAULT_ROOT)


def mount_key(mountpoint: str) -> str:
    """Return the name of a mount's runtime directory (and log): 16 hex digits of the resolved mount point's hash."""
    return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]


def directory_of(mountpoint: str) -> MountDirectory:
    """Return the runtime directory of a resolved mount point."""
    return MountDirectory(root() / mount_key(mountpoint))


def channel_alive(record: MountRecord) -> bool:
    """Say whether the mount's channel runs."""
    return any(process.role == "channel" and is_alive(process) for process in record.processes)


def live_records() -> list[MountRecord]:
    """Return the records of all mounts whose channel runs."""
    try:
        directories = [MountDirectory(path) for path in sorted(root().iterdir())]
    except (FileNotFoundError, NotADirectoryError):
        return []
    records = [record for directory in directories if (record := directory.read()) is not None]
    return [record for record in records if channel_alive(record)]


def mount_of(path: str) -> tuple[MountDirectory, MountRecord]:
    """Return the live mount that ``path`` is on; raise :exc:`UserError` if it is on none, or on a dead one."""
    resolved = Path(mounts.resolve(path))
    for candidate in (resolved, *resolved.parents):
        mount = mounts.find_mount(str(candidate))
        if mount is not None:
            break
    if mount is None or mount.filesystem != mounts.FILESYSTEM_TYPE:
        raise UserError(f"{path} is not on a bpfuse mount")
    directory = directory_of(mount.mountpoint)
    record = directory.read()
    if record is None or not channel_alive(record):
        raise UserError(f"{mount.mountpoint} is a dead mount point; clear it: bpfuse umount {mount.mountpoint}")
    return directory, record


def claim(mountpoint: str) -> Claim:
    """Make the runtime directory of a mount point and lock it; raise :exc:`UserError` if somebody else has it."""
    directory = directory_of(mountpoint)
    if len(os.fsencode(directory.metaserver_socket)) > _SOCKET_PATH_MAX:
        raise UserError(f"the runtime directory's path is too long for a socket's name: {directory.path}")
    while True:
        descriptor = _open_directory(directory)
        if not _lock(descriptor):
            os.close(descriptor)
            raise UserError(f"{mountpoint} is in use by another bpfuse mount that is starting, running or ending")
        if _is_same(descriptor, directory.path):
            return Claim(directory, descriptor)
        os.close(descriptor)


def _open_directory(directory: MountDirectory) -> int:
    try:
        directory.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            directory.path.mkdir(mode=0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile by a mount that ended
                return os.open(directory.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"the runtime directory {directory.path} cannot be made: {reason(error)}") from None


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same(descriptor: int, path: Path) -> bool:
    """Say whether ``path`` still leads to the locked directory, not to one made after it was removed."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
