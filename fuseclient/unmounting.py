"""Unmounting: the mount point first, then every process of the mount; and clearing up after a killed channel."""

from __future__ import annotations

import errno
import time
from typing import Final

from fuseclient import mounts, processes, runtime
from fuseclient.errors import UserError, reason

_END_TIMEOUT_S: Final = 30.0
#: Seconds for which an unmounting is tried again while the mount is in use, and between two tries. A process that has
#: ended, and whoever looks through /proc (lsof, fuser), may hold a mount for a moment.
_BUSY_S: Final = 2.0
_PAUSE_S: Final = 0.05
#: How long an orphaned process may take to end after SIGTERM.
_ORPHAN_GRACE_S: Final = 10.0


def unmount(path: str, *, force: bool) -> None:
    """Unmount and return when every process of the mount has ended; raise :exc:`UserError`.

    ``force``: requests in flight fail, and the mount goes even while files of it are open.
    """
    mountpoint = mounts.resolve(path)
    directory = runtime.directory_of(mountpoint)
    record = directory.read()
    mount = _find(mountpoint, record)
    if record is None or not runtime.channel_alive(record):
        _clear_dead(mountpoint, mount, directory, record)
        return
    if mount is not None:
        _unmount_live(mount, force=force)
    _wait_ended(record)
    directory.remove()


def _find(mountpoint: str, record: runtime.MountRecord | None) -> mounts.KernelMount | None:
    """Return the mount. There may be none any more while something of it is left to clear."""
    mount = mounts.find_mount(mountpoint)
    if mount is not None and mount.filesystem != mounts.FILESYSTEM_TYPE:
        raise UserError(f"{mountpoint} is a mount of another kind: {mount.filesystem}")
    if mount is None and record is None:
        raise UserError(f"nothing is mounted at {mountpoint}")
    return mount


def _unmount_live(mount: mounts.KernelMount, *, force: bool) -> None:
    try:
        if force:
            mounts.abort_connection(mount.device_minor)
        _unmount_patiently(mount.mountpoint, lazy=force)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise UserError(
                f"{mount.mountpoint} is in use; close its files and leave its directories, or add --force"
            ) from None
        if error.errno == errno.EPERM:
            raise UserError(f"unmounting {mount.mountpoint} is not permitted; run as root") from None
        if error.errno != errno.EINVAL:  # EINVAL: it was unmounted meanwhile
            raise UserError(f"{mount.mountpoint} cannot be unmounted: {reason(error)}") from None


def _unmount_patiently(mountpoint: str, *, lazy: bool) -> None:
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            return mounts.unmount(mountpoint, lazy=lazy)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                raise
        time.sleep(_PAUSE_S)


def _wait_ended(record: runtime.MountRecord) -> None:
    running = processes.wait_ended(record.processes, _END_TIMEOUT_S)
    if running:
        names = ", ".join(f"{process.role} (pid {process.pid})" for process in running)
        raise UserError(f"unmounted {record.mountpoint}, but after {_END_TIMEOUT_S:g} s there still runs: {names}")


def _clear_dead(
    mountpoint: str,
    mount: mounts.KernelMount | None,
    directory: runtime.MountDirectory,
    record: runtime.MountRecord | None,
) -> None:
    """Clear what a killed channel left: the mount point, orphaned processes, the runtime directory."""
    try:
        if mount is not None:
            mounts.abort_connection(mount.device_minor)
            mounts.unmount(mountpoint, lazy=True)
    except OSError as error:
        raise UserError(f"the dead mount point {mountpoint} cannot be cleared: {reason(error)}") from None
    if record is not None:
        processes.stop(record.processes, _ORPHAN_GRACE_S)
    directory.remove()
