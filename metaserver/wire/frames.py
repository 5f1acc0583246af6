"""Frames: what a message is on a stream of bytes."""

from __future__ import annotations

import struct
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from metaserver.wire.base import SLOTS, U63, Done, Failure, Malformed
from metaserver.wire.content import (
    Allocate,
    CommitSlices,
    CompactSlices,
    Content,
    CopyRange,
    ForgetSlices,
    GetContent,
    InspectSlices,
    ListSlices,
    NewSlices,
    RetireSlices,
    Seek,
    SliceIds,
    SlicesInspected,
    Sought,
    WriteInline,
)
from metaserver.wire.events import EventPage, FollowEvents
from metaserver.wire.identities import CreateIdentity, Identities, ListIdentities, RevokeIdentity
from metaserver.wire.locks import CancelLock, HoldLocks, LockAnswer, LockIs, LockSettled, LocksLost, SetLock, TestLock
from metaserver.wire.namespace import (
    Changed,
    DirectoryPage,
    FetchDirectory,
    Found,
    GetAttributes,
    GetXattr,
    InodesReserved,
    Link,
    ListXattrs,
    Lookup,
    MakeFiles,
    MakeNode,
    MakeTemporary,
    ReadLink,
    Reap,
    Remove,
    RemoveNames,
    RemoveXattr,
    Rename,
    ReserveInodes,
    SetAttributes,
    SetXattr,
    TargetIs,
    XattrIs,
    XattrNames,
)
from metaserver.wire.sessions import (
    Acknowledge,
    Break,
    ClosedForWriting,
    CloseSession,
    CreateVolume,
    GetStatistics,
    Hello,
    OpenFile,
    OpenSession,
    Renew,
    Renewed,
    ReturnLeases,
    SessionOpened,
    Statistics,
    Sync,
    Welcome,
)
from metaserver.wire.status import EvictSession, GetStatus, Status

_HEADER: Final = struct.Struct(">I")
HEADER_BYTES: Final = _HEADER.size

# fmt: off
Request = (
    Hello | CreateVolume | OpenSession | Renew | CloseSession | Lookup | FetchDirectory | GetAttributes | SetAttributes
    | MakeNode | Link | Remove | Rename | Reap | ReadLink | GetXattr | ListXattrs | SetXattr | RemoveXattr | GetContent
    | WriteInline | NewSlices | CommitSlices | GetStatistics | ListSlices | ForgetSlices | MakeTemporary | Allocate
    | CopyRange | Seek | OpenFile | ClosedForWriting | Sync | CompactSlices | InspectSlices | RetireSlices
    | TestLock | SetLock | CancelLock | HoldLocks | FollowEvents | Acknowledge | ReturnLeases
    | CreateIdentity | RevokeIdentity | ListIdentities | GetStatus | EvictSession | MakeFiles | ReserveInodes
    | RemoveNames
)
Reply = (
    Failure | Done | Welcome | SessionOpened | Renewed | Found | DirectoryPage | Changed | TargetIs | XattrIs
    | XattrNames | Content | SliceIds | Statistics | Sought | SlicesInspected | LockIs | LockAnswer | LocksLost
    | LockSettled | Break | EventPage | Identities | Status | InodesReserved
)
_T = TypeVar("_T")
_ENCODER: Final = msgspec.msgpack.Encoder()


class Frame(msgspec.Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """A request with its id and, if it is a change whose outcome is to be kept, its slot and sequence."""

    id: U63
    request: Request
    slot: Annotated[int, Meta(ge=0, lt=SLOTS)] = 0
    #: 0: the outcome is not to be kept.
    sequence: U63 = 0


_FRAME_DECODER: Final = msgspec.msgpack.Decoder(Frame)
_REPLY_DECODER: Final = msgspec.msgpack.Decoder(tuple[U63, Reply])


def body_length(header: bytes | bytearray | memoryview, limit: int) -> int:
    """Return the body's length that a frame header announces; raise :exc:`Malformed` if it is 0 or over ``limit``."""
    (length,) = _HEADER.unpack(header)
    if not 0 < length <= limit:
        raise Malformed(f"a frame of {length} bytes; the limit is {limit}")
    return int(length)


class FrameSplitter:
    """Cuts a stream of bytes into frame bodies.

    ``limit``, in bytes, may be changed between two bodies. A frame that announces more is refused as soon as its
    header is here, so that no more than a frame of that size is ever waited for. A body that came in one piece is a
    part of that piece, not a copy.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        #: Of the last piece, what follows the bodies that were returned.
        self._rest = memoryview(b"")
        #: A frame that came in several pieces, as far as it is here.
        self._begun = bytearray()

    def feed(self, data: bytes) -> None:
        """Keep the next bytes of the stream."""
        self._rest = memoryview(b"".join((self._rest, data)) if self._rest else data)

    def next_body(self) -> memoryview | None:
        """Return the next whole body, or ``None`` if more bytes are needed; raise :exc:`Malformed` for its length."""
        if 0 < len(self._begun) < HEADER_BYTES:
            self._move(HEADER_BYTES - len(self._begun))
        begun = self._begun or self._rest
        if len(begun) < HEADER_BYTES:
            self._move(HEADER_BYTES)
            return None
        end = HEADER_BYTES + body_length(begun[:HEADER_BYTES], self.limit)
        if not self._begun and len(self._rest) >= end:
            body, self._rest = self._rest[HEADER_BYTES:end], self._rest[end:] or memoryview(b"")
            return body
        self._move(end - len(self._begun))
        if len(self._begun) < end:
            return None
        frame, self._begun = memoryview(self._begun), bytearray()
        return frame[HEADER_BYTES:]

    def _move(self, most: int) -> None:
        self._begun += self._rest[:most]
        self._rest = self._rest[most:] or memoryview(b"")


def encode(request_id: int, message: Request | Reply) -> bytes:
    """Return the whole frame of a message."""
    return bytes(_frame((request_id, message)))


def encode_reply(request_id: int, reply: Reply) -> bytearray:
    """Return the whole frame of a reply, which may be large: content is copied once."""
    return _frame((request_id, reply))


def encode_change(request_id: int, message: Request, slot: int, sequence: int) -> bytes:
    """Return the whole frame of a request whose outcome is to be kept."""
    return bytes(_frame((request_id, message, slot, sequence)))


def _frame(body: tuple[object, ...]) -> bytearray:
    frame = bytearray(HEADER_BYTES)
    _ENCODER.encode_into(body, frame, HEADER_BYTES)
    _HEADER.pack_into(frame, 0, len(frame) - HEADER_BYTES)
    return frame


def decode_frame(body: bytes | memoryview) -> Frame:
    """Return a request with what goes with it; raise :exc:`Malformed`."""
    return _decode(_FRAME_DECODER, body)


def decode_request(body: bytes | memoryview) -> tuple[int, Request]:
    """Return a request's id and message; raise :exc:`Malformed`."""
    frame = decode_frame(body)
    return frame.id, frame.request


def decode_reply(body: bytes | memoryview) -> tuple[int, Reply]:
    """Return a reply's id and message; raise :exc:`Malformed`."""
    return _decode(_REPLY_DECODER, body)


def _decode(decoder: msgspec.msgpack.Decoder[_T], body: bytes | memoryview) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"not a message of this protocol: {error}") from None
