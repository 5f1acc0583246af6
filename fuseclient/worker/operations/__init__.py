"""The FUSE operations, as pyfuse3 calls them for each request that nothing in the kernel answered.

Each method asks the metaserver, brings the caches up to date, and only then answers: when an operation has returned,
no cache of this mount holds the state before it. Only this package, with errors.py, speaks of errno.

Requests of one mount run at once, each in a task of its own. The kernel serialises changes within one directory, and
writes to and truncation of one file; nothing else may be relied upon.
"""

from __future__ import annotations

from fuseclient.worker.operations.base import Begun, Parts
from fuseclient.worker.operations.data import DataOperations
from fuseclient.worker.operations.names import NameOperations

__all__ = ["Begun", "Operations", "Parts"]


class Operations(NameOperations, DataOperations):
    """Every request of one mount."""
