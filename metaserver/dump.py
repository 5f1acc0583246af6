"""A volume's metadata as a file: written from one engine at one moment, and made a volume of another.

The file is a magic number, a header, and frames, each with its length. A frame is rows, compressed by zstd; a frame of
length 0 ends them, and the trailer follows: how many rows there are of each kind, and the checksum of all. Keys are
without their volume's number, so that it can be another one where they go. Sessions stay behind: they have ended there.

A volume that is being loaded has no name until all its rows are there and were read back: nobody can see half of one.
"""

from __future__ import annotations

import asyncio
import functools
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
import xxhash
from backports import zstd

from metaserver import keys, records
from metaserver.engine.base import MAX_KEY, MAX_TRANSACTION, MAX_VALUE, MAX_WRITES, Engine, Row, Snapshot, Transaction
from metaserver.errors import Refused
from metaserver.fencing import Tenure
from metaserver.volumes import Volume, list_volumes, open_volume
from metaserver.wire import ErrorCode

_MAGIC: Final = b"bpfuse-dump\0\1"
_LENGTH: Final = struct.Struct(">I")
_ROW: Final = struct.Struct(">HI")
#: Bytes of rows in one frame, about, and the largest that is read; and of a header or a trailer.
_FRAME: Final = 512 * 1024
_MOST_FRAME: Final = 2 * 1024 * 1024
_MOST_HEADER: Final = 64 * 1024
#: Rows that are read at once.
_PAGE: Final = 512
#: Transactions that are under way at once.
_WRITES: Final = 32
#: Of a volume's keys: what begins them, and is not in the file.
_PREFIX: Final = 5


class BadDump(Exception):
    """The file is not a dump, or is damaged."""


class Header(msgspec.Struct):
    """The volume."""

    name: str
    inline_limit: int
    store: str
    identity: bytes
    #: Rows there are, about: for progress.
    rows: int = 0


class Trailer(msgspec.Struct):
    """What all frames came to: rows by the letter of their kind, and the bytes of all."""

    rows: dict[str, int]
    checksum: bytes
    size: int


#: Told how many rows are done, and of how many if that is known; it may raise, which ends the work.
Tick = Callable[[str, int, int], None]


class _Sum:
    """Counts rows and sums them up."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._bytes = 0
        self._hash = xxhash.xxh3_128()

    @property
    def count(self) -> int:
        return sum(self._rows.values())

    def add(self, key: bytes, value: bytes) -> None:
        """Add a row, by its key without the volume."""
        self._rows[chr(key[0])] += 1
        self._bytes += len(key) + len(value)
        self._hash.update(_ROW.pack(len(key), len(value)) + key + value)

    def trailer(self) -> Trailer:
        return Trailer(dict(self._rows), self._hash.digest(), self._bytes)


def choose(snapshot: Snapshot, name: str) -> Volume:
    """Return the volume of this name, or the only one if the name is empty; NO_SUCH_VOLUME."""
    if name:
        return open_volume(snapshot, name)
    volumes = list_volumes(snapshot)
    if len(volumes) == 1:
        return volumes[0]
    names = ", ".join(volume.name for volume in volumes)
    raise Refused(ErrorCode.NO_SUCH_VOLUME, f"say which volume (--volume): {names}" if names else "there is no volume")


# Dumping


async def dump(engine: Engine, name: str, path: Path, tick: Tick) -> tuple[Volume, Trailer]:
    """Write a volume to a file, which comes into being when it is whole; raise OSError, Refused and EngineError."""
    part = path.with_name(path.name + ".part")
    try:
        volume, trailer = await engine.scan(functools.partial(_dump, name=name, part=part, tick=tick))
        os.link(part, path)  # fails if it exists
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)
    return volume, trailer


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dump(snapshot: Snapshot, name: str, part: Path, tick: Tick) -> tuple[Volume, Trailer]:
    volume = choose(snapshot, name)
    count = sum(records.Shard.unpack(value).inodes for _, value in snapshot.range(*keys.shards(volume.id)))
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        file.write(_MAGIC)
        # An inode has three rows if it is a file: itself, and its entry in two orders.
        header = Header(volume.name, volume.inline_limit, volume.store, volume.identity, 3 * count)
        _write_piece(file, msgspec.msgpack.encode(header))
        total = _Sum()
        frame = bytearray()
        for key, value in _rows(snapshot, volume.id):
            total.add(key, value)
            frame += _ROW.pack(len(key), len(value)) + key + value
            if len(frame) >= _FRAME:
                _write_piece(file, zstd.compress(frame))
                frame.clear()
                tick("rows", total.count, 3 * count)
        if frame:
            _write_piece(file, zstd.compress(frame))
        _write_piece(file, b"")
        trailer = total.trailer()
        _write_piece(file, msgspec.msgpack.encode(trailer))
        file.flush()
        os.fsync(file.fileno())
    return volume, trailer


def _rows(snapshot: Snapshot, number: int) -> Iterator[Row]:
    """Yield the rows of a volume, their keys without its number."""
    start, end = keys.volume_range(number)
    while rows := snapshot.range(start, end, _PAGE):
        for key, value in rows:
            yield key[_PREFIX:], value
        start = rows[-1][0] + b"\0"


def _write_piece(file: BinaryIO, piece: bytes) -> None:
    file.write(_LENGTH.pack(len(piece)) + piece)


# Loading


async def load(engine: Engine, name: str, path: Path, tick: Tick) -> tuple[Volume, Trailer]:
    """Make a volume of a file, with its own name or another; raise :exc:`BadDump`, OSError, Refused and EngineError.

    Nothing is left of it if it fails.
    """
    with path.open("rb") as file:
        header = _read_header(file)
        name = name or header.name
        await Tenure().begin(engine)
        number = await engine.write(functools.partial(_reserve, name=name))
        try:
            trailer = await _Loader(engine, number, tick, header.rows).run(file)
            await _verify(engine, number, trailer, tick)
            volume = Volume(number, name, header.inline_limit, header.store, header.identity)
            await engine.write(functools.partial(_register, volume=volume))
            await engine.sync()
        except BaseException:
            await _delete(engine, number)
            raise
    return volume, trailer


def _reserve(txn: Transaction, name: str) -> int:
    if txn.get(keys.volume(name)) is not None:
        raise Refused(ErrorCode.VOLUME_EXISTS, f"the engine has a volume {name!r} already: --volume gives another name")
    number = records.unpack_number(txn.get(keys.next_volume()), 1)
    txn.put(keys.next_volume(), records.pack_number(number + 1))
    return number


def _register(txn: Transaction, volume: Volume) -> None:
    if txn.get(keys.volume(volume.name)) is not None:
        raise Refused(ErrorCode.VOLUME_EXISTS, f"the engine has got a volume {volume.name!r} meanwhile")
    record = records.pack_volume(volume.id, volume.inline_limit, volume.identity, volume.store)
    txn.put(keys.volume(volume.name), record)


def _read_header(file: BinaryIO) -> Header:
    if file.read(len(_MAGIC)) != _MAGIC:
        raise BadDump("it is not a dump of bpfuse, or of another version")
    try:
        return msgspec.msgpack.decode(_read_piece(file, _MOST_HEADER), type=Header)
    except msgspec.DecodeError as error:
        raise BadDump(f"its header is damaged: {error}") from None


def _read_piece(file: BinaryIO, most: int) -> bytes:
    head = file.read(_LENGTH.size)
    length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else -1
    piece = file.read(length) if 0 <= length <= most else b""
    if len(piece) != length:
        raise BadDump("it is cut off or damaged")
    return piece


def _read_frame(file: BinaryIO) -> list[Row]:
    """Return the rows of the next frame; none at the end."""
    piece = _read_piece(file, _MOST_FRAME)
    if not piece:
        return []
    try:
        decompressor = zstd.ZstdDecompressor()
        frame = decompressor.decompress(piece, max_length=_MOST_FRAME)
    except zstd.ZstdError:
        frame = b""
    if not frame or not decompressor.eof:
        raise BadDump("a frame of it is damaged")
    return list(_unpack(frame))


def _unpack(frame: bytes) -> Iterator[Row]:
    at = 0
    while at < len(frame):
        if at + _ROW.size > len(frame):
            raise BadDump("a row of it is damaged")
        key_bytes, value_bytes = _ROW.unpack_from(frame, at)
        middle = at + _ROW.size + key_bytes
        key, value = frame[at + _ROW.size : middle], frame[middle : middle + value_bytes]
        at = middle + value_bytes
        if (
            key[:1] not in _KINDS
            or len(key) > MAX_KEY - _PREFIX
            or len(value) != value_bytes
            or value_bytes > MAX_VALUE
        ):
            raise BadDump("a row of it is damaged")
        yield key, value


_KINDS: Final = frozenset(bytes((kind,)) for kind in keys.KINDS)


class _Loader:
    """Writes rows by many transactions at once."""

    def __init__(self, engine: Engine, number: int, tick: Tick, expected: int) -> None:
        self._engine = engine
        self._prefix = keys.volume_range(number)[0]
        self._tick = tick
        self._expected = expected

    async def run(self, file: BinaryIO) -> Trailer:
        """Write all rows of a file; return what it says of them, which they were found to be."""
        total = _Sum()
        writes: set[asyncio.Task[None]] = set()
        try:
            while rows := await asyncio.to_thread(_read_frame, file):
                for key, value in rows:
                    total.add(key, value)
                for part in _parts(rows):
                    if len(writes) == _WRITES:
                        done, writes = await asyncio.wait(writes, return_when=asyncio.FIRST_COMPLETED)
                        for each in done:
                            each.result()
                    writes.add(asyncio.create_task(self._write(part)))
                self._tick("rows", total.count, self._expected)
            await asyncio.gather(*writes)
        finally:
            if writes:
                await asyncio.wait(writes)
        try:
            trailer = msgspec.msgpack.decode(_read_piece(file, _MOST_HEADER), type=Trailer)
        except msgspec.DecodeError as error:
            raise BadDump(f"its end is damaged: {error}") from None
        if trailer != total.trailer():
            raise BadDump("its rows are not those that were dumped: the checksum is another")
        return trailer

    async def _write(self, rows: list[Row]) -> None:
        def body(txn: Transaction) -> None:
            for key, value in rows:
                txn.put(self._prefix + key, value)

        await self._engine.write(body, lazy=True)


def _parts(rows: list[Row]) -> Iterator[list[Row]]:
    """Cut rows into what one transaction takes."""
    part: list[Row] = []
    size = 0
    for row in rows:
        cost = _PREFIX + len(row[0]) + len(row[1])
        if len(part) == MAX_WRITES or size + cost > MAX_TRANSACTION:
            yield part
            part, size = [], 0
        part.append(row)
        size += cost
    if part:
        yield part


async def _verify(engine: Engine, number: int, expected: Trailer, tick: Tick) -> None:
    """Read a volume's rows back and compare them with what they are to be."""

    def body(snapshot: Snapshot) -> Trailer:
        total = _Sum()
        for key, value in _rows(snapshot, number):
            total.add(key, value)
            if total.count % _PAGE == 0:
                tick("rows read back", total.count, sum(expected.rows.values()))
        return total.trailer()

    await engine.sync()
    if await engine.scan(body) != expected:
        raise BadDump("what was read back from the engine is not what was written to it")


async def _delete(engine: Engine, number: int) -> None:
    """Delete the rows of a volume that is not to be."""

    def body(txn: Transaction) -> int:
        rows = txn.range(*keys.volume_range(number), limit=MAX_WRITES)
        for key, _ in rows:
            txn.delete(key)
        return len(rows)

    while await engine.write(body):
        pass
