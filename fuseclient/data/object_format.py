"""The bytes of an object: a header with a checksum for every block, then the blocks. Pure.

All numbers are little-endian. Version 1::

    0    8  magic "bpfuse\\xf5O"
    8    1  version: 1
    9    1  codec: 0 none, 1 LZ4 (block format), 2 Zstandard
    10   2  number of blocks, n
    12   4  bytes of content in each block but the last
    16   8  slice id
    24   8  bytes of content
    32  12n for each block: its stored length (u32) and the XXH3-64 of its stored bytes (u64)
    ..   8  XXH3-64 of everything before
    ..      the blocks, one after the other

A block whose stored length is that of its content is stored as it is, whatever the codec: so what does not shrink is
not compressed. A range is read by its blocks only; each is checked before a byte of it is used. The header is bound to
the slice by its id, so that an object under a wrong name is found out, too. What an unknown version or codec means is
not guessed: the object counts as damaged.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

import lz4.block
import xxhash
from backports import zstd

from fuseclient.data.store_errors import ObjectDamaged

#: The largest object, in bytes of content, and the content of a block.
MAX_OBJECT: Final = 4 * 1024 * 1024
BLOCK: Final = 64 * 1024

_MAGIC: Final = b"bpfuse\xf5O"
_VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sBBHIQQ")
_ENTRY: Final = struct.Struct("<IQ")
_SUM: Final = struct.Struct("<Q")
#: The largest header, in bytes.
MAX_HEADER: Final = _HEAD.size + MAX_OBJECT // BLOCK * _ENTRY.size + _SUM.size
#: Speed goes before density: what is written waits for it.
_ZSTD_LEVEL: Final = 1

Buffer = bytes | bytearray | memoryview


class Codec(enum.IntEnum):
    """How blocks are compressed."""

    NONE = 0
    LZ4 = 1
    ZSTD = 2


class Header:
    """A checked header of an object."""

    blocks: int
    block: int
    slice_id: int
    length: int

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        _, _, codec, self.blocks, self.block, self.slice_id, self.length = _HEAD.unpack_from(raw)
        self.codec = Codec(codec)

    @property
    def size(self) -> int:
        """Bytes of the header itself."""
        return len(self._raw)

    @property
    def stored(self) -> int:
        """Bytes of the whole object."""
        return self.size + sum(length for length, _ in self._entries())

    def place(self, start: int, length: int) -> tuple[int, int]:
        """Return where in the object the blocks are that hold a range of the content: (offset, bytes)."""
        first, behind = self._span(start, length)
        lengths = [stored for stored, _ in self._entries()]
        return self.size + sum(lengths[:first]), sum(lengths[first:behind])

    def content(self, stored: memoryview, start: int, length: int) -> memoryview:
        """Return a range of the content from the bytes at :meth:`place`; raise :exc:`ObjectDamaged`."""
        first, behind = self._span(start, length)
        pieces: list[Buffer] = []
        at = 0
        for number, (size, checksum) in enumerate(self._entries()[first:behind], start=first):
            pieces.append(self._block(number, stored[at : at + size], size, checksum))
            at += size
        if all(isinstance(piece, memoryview) for piece in pieces):
            whole = stored[:at]
        else:
            whole = memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        begin = start - first * self.block
        return whole[begin : begin + length]

    def _block(self, number: int, stored: memoryview, size: int, checksum: int) -> Buffer:
        if len(stored) != size:
            raise ObjectDamaged(f"it ends within block {number}")
        if xxhash.xxh3_64_intdigest(stored) != checksum:
            raise ObjectDamaged(f"the checksum of block {number} is wrong")
        length = min(self.block, self.length - number * self.block)
        if size == length:
            return stored
        data = _decompress(self.codec, stored, length)
        if len(data) != length:
            raise ObjectDamaged(f"block {number} unpacks to {len(data)} bytes instead of {length}")
        return data

    def _span(self, start: int, length: int) -> tuple[int, int]:
        """Return the blocks that hold a range, as [first, behind)."""
        return start // self.block, -(-(start + length) // self.block)

    def _entries(self) -> list[tuple[int, int]]:
        return list(_ENTRY.iter_unpack(memoryview(self._raw)[_HEAD.size : -_SUM.size]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Header) and self._raw == other._raw

    def __hash__(self) -> int:
        return hash(self._raw)


def encode(slice_id: int, data: Buffer, codec: Codec) -> list[Buffer]:
    """Return an object as the buffers that follow each other: the header, then the blocks."""
    view = memoryview(data)
    blocks: list[Buffer] = [
        _compress(codec, view[at : at + BLOCK]) if codec else view[at : at + BLOCK] for at in range(0, len(view), BLOCK)
    ]
    head = _HEAD.pack(_MAGIC, _VERSION, codec, len(blocks), BLOCK, slice_id, len(view))
    head += b"".join(_ENTRY.pack(len(block), xxhash.xxh3_64_intdigest(block)) for block in blocks)
    head += _SUM.pack(xxhash.xxh3_64_intdigest(head))
    return [head, *blocks] if codec else [head, view]


def plain_size(length: int) -> int:
    """Return the bytes of an object that is not compressed and has ``length`` bytes of content."""
    return _HEAD.size + -(-length // BLOCK) * _ENTRY.size + _SUM.size + length


def parse_header(slice_id: int, data: memoryview) -> Header:
    """Return the header that ``data``, an object's beginning of MAX_HEADER bytes if it is so long, has.

    Raises :exc:`ObjectDamaged`.
    """
    if len(data) < _HEAD.size:
        raise ObjectDamaged("it ends within its header")
    magic, version, codec, blocks, block, held_id, length = _HEAD.unpack_from(data)
    size = _HEAD.size + blocks * _ENTRY.size + _SUM.size
    if magic != _MAGIC or size > min(len(data), MAX_HEADER):
        raise ObjectDamaged("it has no header")
    raw = bytes(data[:size])
    if xxhash.xxh3_64_intdigest(raw[: -_SUM.size]) != _SUM.unpack_from(raw, size - _SUM.size)[0]:
        raise ObjectDamaged("the checksum of its header is wrong")
    if version != _VERSION or codec not in Codec.__members__.values():
        raise ObjectDamaged(f"it is of version {version} with codec {codec}, which this program does not know")
    if held_id != slice_id:
        raise ObjectDamaged(f"it is object {held_id} under a wrong name")
    if not block or blocks != -(-length // block):
        raise ObjectDamaged("its header contradicts itself")
    return Header(raw)


def _compress(codec: Codec, block: memoryview) -> Buffer:
    fast = codec is Codec.LZ4
    packed: bytes = lz4.block.compress(block, store_size=False) if fast else zstd.compress(block, _ZSTD_LEVEL)
    return packed if len(packed) < len(block) else block


def _decompress(codec: Codec, stored: memoryview, length: int) -> bytes:
    try:
        if codec is Codec.LZ4:
            return bytes(lz4.block.decompress(stored, uncompressed_size=length))
        if codec is Codec.ZSTD:
            return zstd.ZstdDecompressor().decompress(stored, max_length=length + 1)
    except (lz4.block.LZ4BlockError, zstd.ZstdError, ValueError) as error:
        raise ObjectDamaged(f"a block cannot be unpacked: {error}") from None
    raise ObjectDamaged("a block is shorter than its content, in an object that is not compressed")
