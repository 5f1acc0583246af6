"""Domain errors to errno: what operations/ shows the kernel. The funnel through which every operation answers.

What is gone is ENOENT where a name was asked for, and ESTALE where an inode was: between the kernel's look for a name
and its request, others may have removed the file or put another in its place. The kernel then looks once more. Through
an open handle it does not: there, what is gone is what was written, and that is EIO.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final, ParamSpec, TypeVar

from pyfuse3 import FUSEError

from fuseclient import levels
from fuseclient.data.objects import NoSpace, StoreError
from fuseclient.worker.rpc import Disconnected, Refused
from metaserver.wire import ErrorCode

_log = logging.getLogger(__name__)

_ERRNO: Final = {
    ErrorCode.EXISTS: errno.EEXIST,
    ErrorCode.NOT_A_DIRECTORY: errno.ENOTDIR,
    ErrorCode.IS_A_DIRECTORY: errno.EISDIR,
    ErrorCode.NOT_EMPTY: errno.ENOTEMPTY,
    ErrorCode.INVALID: errno.EINVAL,
    ErrorCode.NAME_TOO_LONG: errno.ENAMETOOLONG,
    ErrorCode.TOO_MANY_LINKS: errno.EMLINK,
    ErrorCode.NO_XATTR: errno.ENODATA,
    ErrorCode.XATTR_EXISTS: errno.EEXIST,
    ErrorCode.TOO_LARGE: errno.EFBIG,
    ErrorCode.NO_SPACE: errno.ENOSPC,
    ErrorCode.NOT_PERMITTED: errno.EPERM,
    ErrorCode.STALE_SESSION: errno.EIO,
    ErrorCode.NO_SUCH_VOLUME: errno.EIO,
    ErrorCode.VOLUME_EXISTS: errno.EIO,
    ErrorCode.UNSUPPORTED: errno.EOPNOTSUPP,
    ErrorCode.MALFORMED: errno.EIO,
    ErrorCode.BUSY: errno.EBUSY,
    ErrorCode.INTERNAL: errno.EIO,
    ErrorCode.LOST_LOCK: errno.EIO,
    ErrorCode.EVENTS_GONE: errno.EIO,
    ErrorCode.NOT_AUTHENTICATED: errno.EIO,
    ErrorCode.ACCESS_DENIED: errno.EACCES,
    ErrorCode.READ_ONLY: errno.EROFS,
}

_P = ParamSpec("_P")
_R = TypeVar("_R")


def answered(
    operation: Callable[_P, Coroutine[Any, Any, _R]], *, gone: int = errno.ENOENT
) -> Callable[_P, Coroutine[Any, Any, _R]]:
    """Let an operation raise what it likes: pyfuse3 sees :exc:`FUSEError` only. What is not expected is logged.

    It is counted by what it had to go to: see levels.py.
    """

    @functools.wraps(operation)
    async def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        request = levels.begin()
        try:
            return await operation(*args, **kwargs)
        except FUSEError:
            raise
        except Exception as error:
            raise FUSEError(errno_of(error, operation.__name__, gone=gone)) from error
        finally:
            levels.end(request)

    return wrapper


def answered_of_inode(operation: Callable[_P, Coroutine[Any, Any, _R]]) -> Callable[_P, Coroutine[Any, Any, _R]]:
    """As :func:`answered`, of an operation that names an inode and no name."""
    return answered(operation, gone=errno.ESTALE)


def answered_of_writer(operation: Callable[_P, Coroutine[Any, Any, _R]]) -> Callable[_P, Coroutine[Any, Any, _R]]:
    """As :func:`answered`, of an operation that writes through a handle, or says what became of what was written."""
    return answered(operation, gone=errno.EIO)


def errno_of(error: Exception, operation: str, *, gone: int = errno.ENOENT) -> int:
    """Return the errno that stands for an error, and log those that are not a plain answer."""
    if isinstance(error, Refused):
        code = gone if error.code is ErrorCode.NOT_FOUND else _ERRNO[error.code]
        if code == errno.EIO:
            _log.error("%s: %s", operation, error)
        return code
    if isinstance(error, Disconnected | StoreError):
        _log.error("%s: %s", operation, error)
        return errno.ENOSPC if isinstance(error, NoSpace) else errno.EIO
    _log.error("%s failed", operation, exc_info=error)
    return errno.EIO
