"""The kernel's own view of mounts: what is mounted where, unmounting, and aborting a FUSE connection."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: The type that every bpfuse mount has in /proc/mounts.
FILESYSTEM_TYPE: Final = "fuse.bpfuse"

_FUSECTL: Final = Path("/sys/fs/fuse/connections")
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class KernelMount:
    """One line of /proc/self/mountinfo. ``device_minor`` names the FUSE connection."""

    mountpoint: str
    filesystem: str
    source: str
    device_minor: int


def list_mounts() -> list[KernelMount]:
    """Return every mount of this mount namespace, the oldest first."""
    text = Path("/proc/self/mountinfo").read_bytes().decode(errors="surrogateescape")
    return [_parse_line(line) for line in text.splitlines()]


def find_mount(mountpoint: str) -> KernelMount | None:
    """Return what is mounted at this resolved path (the topmost mount), without touching it."""
    found = [mount for mount in list_mounts() if mount.mountpoint == mountpoint]
    return found[-1] if found else None


def resolve(path: str) -> str:
    """Return ``path`` absolute and without symbolic links. A mount point is not touched, so a dead one is no matter."""
    absolute = os.path.abspath(path)
    parent, name = os.path.split(absolute)
    candidate = os.path.join(os.path.realpath(parent), name)
    return candidate if find_mount(candidate) else os.path.realpath(absolute)


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount what is there; ``lazy``: even while it is in use. Raise :exc:`OSError`."""
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    if _libc.umount2(os.fsencode(mountpoint), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), mountpoint)


def abort_connection(device_minor: int) -> bool:
    """Make the kernel fail every request of a FUSE connection, waiting ones too; return whether there was one."""
    with _fusectl() as connections:
        try:
            (connections / str(device_minor) / "abort").write_bytes(b"1")
        except FileNotFoundError:
            return False
        return True


@contextlib.contextmanager
def _fusectl() -> Iterator[Path]:
    """Find the control file system of FUSE; where it is not mounted, mount it for the moment."""
    if find_mount(str(_FUSECTL)) is not None:
        yield _FUSECTL
        return
    with tempfile.TemporaryDirectory(prefix="bpfuse-fusectl-") as directory:
        if _libc.mount(b"none", os.fsencode(directory), b"fusectl", 0, None) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "fusectl")
        try:
            yield Path(directory)
        finally:
            unmount(directory, lazy=True)


def _parse_line(line: str) -> KernelMount:
    """Parse ``ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [FIELD...] - TYPE SOURCE SUPEROPTIONS``."""
    before, _, after = line.partition(" - ")
    fields, (filesystem, source, *_rest) = before.split(" "), after.split(" ")
    minor = int(fields[2].partition(":")[2])
    return KernelMount(_unescape(fields[4]), filesystem, _unescape(source), minor)


def _unescape(text: str) -> str:
    """Undo the kernel's octal escapes of space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
