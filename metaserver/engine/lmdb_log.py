"""A log beside LMDB's file: what makes changes durable by one synchronous write, where a commit of LMDB takes two.

The file has a fixed length. A record holds what was written since the one before, and belongs to the LMDB transaction
that will hold it, by that one's id; the next transaction begins the file anew. So when LMDB is opened after a crash the
records to be done again are those at the file's beginning that belong to the transaction after LMDB's last, numbered
from 0, up to one that was not written whole (as in the redo logs of databases: Gray and Reuter, Transaction Processing,
chapter 9). Each begins in a block of its own, so that no block that holds what was acknowledged is written again.

The file is laid with zeros once: writing into blocks that it has does not wait for the file system's journal.
"""

from __future__ import annotations

import math
import os
import struct
import time
from collections.abc import Iterator
from typing import Final

import msgspec
import xxhash

from metaserver.engine.lmdb_views import Writes

#: Bytes of the file, of a block, and of the longest record: LMDB's commit costs less than to write more twice.
_LOG_BYTES: Final = 4 * 1024 * 1024
_BLOCK: Final = 4096
_MOST_RECORD: Final = 256 * 1024
_MAGIC: Final = b"bpfuselg"
#: Magic, id of the transaction, number of the record, bytes of its body.
_HEADER: Final = struct.Struct("<8sQII")
_DIGEST_BYTES: Final = 16
_START: Final = _HEADER.size + _DIGEST_BYTES

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Writes]).decode


class CommitLog:
    """The log at ``path``, for one thread at a time. Errors of the file are OSErrors."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = -1
        #: Writes that are not durable, and their bytes.
        self._noted: list[Writes] = []
        self._noted_bytes = 0
        #: Those that are durable here, and not yet in LMDB.
        self.written: list[Writes] = []
        self._number = self._end = 0
        #: Whether something may stand in the file that was not said to be durable.
        self.is_uncertain = False
        #: Seconds that the last record took to be written; none was yet.
        self.took_s = math.inf

    def records(self, txn_id: int) -> Iterator[list[Writes]]:
        """Yield what the records of this transaction say, in their order."""
        try:
            file = open(self._path, "rb", buffering=0)  # noqa: SIM115 - it is closed below
        except FileNotFoundError:
            return
        with file:
            offset = number = 0
            while (body := _read(file.fileno(), offset, txn_id, number)) is not None:
                yield _decode(body)
                offset, number = offset + _blocks(_START + len(body)), number + 1

    def lay(self) -> None:
        """Make the file ready to be written, unless it is; there must be nothing in it that LMDB does not have."""
        if self._descriptor >= 0 or self.written:
            return
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_DSYNC, 0o600)
        try:
            if os.fstat(descriptor).st_size < _LOG_BYTES:
                _write(descriptor, bytes(_LOG_BYTES), 0)
                os.fsync(descriptor)
                sync_directory(os.path.dirname(self._path))
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    @property
    def is_behind(self) -> bool:
        """Whether something was noted that is not durable."""
        return bool(self._noted)

    @property
    def noted_bytes(self) -> int:
        """Bytes of the keys and values that are not durable."""
        return self._noted_bytes

    def note(self, writes: Writes) -> None:
        """Take up what a body wrote into LMDB's transaction."""
        self._noted.append(writes)
        self._noted_bytes += sum(len(key) + len(value or b"") for key, value in writes.items())

    def write(self, txn_id: int) -> bool:
        """Make durable what was noted, as the next record of LMDB's transaction; False: the log has no room for it."""
        if not self._noted:
            return True
        if self._descriptor < 0 or self._noted_bytes > _MOST_RECORD:
            return False
        body = _encode(self._noted)
        size = _blocks(_START + len(body))
        if self._end + size > _LOG_BYTES:
            return False
        header = _HEADER.pack(_MAGIC, txn_id, self._number, len(body))
        begun_s = time.monotonic()
        try:
            _write(self._descriptor, (header + _digest(header, body) + body).ljust(size, b"\0"), self._end)
        except OSError:
            self.is_uncertain = True
            self.close()
            raise
        self.took_s = time.monotonic() - begun_s
        self.written += self._noted
        self._number, self._end = self._number + 1, self._end + size
        self.forget()
        return True

    def forget(self) -> None:
        """What was noted is durable in another way, or lost."""
        self._noted, self._noted_bytes = [], 0

    def committed(self) -> None:
        """LMDB has committed all there is: the next record begins the file anew."""
        self.forget()
        self.written = []
        self._number = self._end = 0
        self.is_uncertain = False

    def close(self) -> None:
        """Give the file back; nothing is written until it is laid again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _read(descriptor: int, offset: int, txn_id: int, number: int) -> bytes | None:
    """Return the body of a record, or None if what is there is not this one, whole."""
    head = os.pread(descriptor, _START, offset)
    if len(head) < _START:
        return None
    header, digest = head[: _HEADER.size], head[_HEADER.size :]
    magic, found_id, found_number, size = _HEADER.unpack(header)
    if (magic, found_id, found_number) != (_MAGIC, txn_id, number) or offset + _START + size > _LOG_BYTES:
        return None
    body = os.pread(descriptor, size, offset + _START)
    return body if len(body) == size and _digest(header, body) == digest else None


def _digest(header: bytes, body: bytes) -> bytes:
    return xxhash.xxh3_128_digest(header + body)


def _blocks(size: int) -> int:
    """Return how many bytes the blocks are that this fills."""
    return -(-size // _BLOCK) * _BLOCK


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def sync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
