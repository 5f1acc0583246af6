"""What every message is made of: limits, field types, error codes, and the records that several messages hold."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

PROTOCOL_VERSION: Final = 5

#: A body before the handshake, a request's body, and a reply's body, in bytes.
MAX_HELLO: Final = 4 * 1024
MAX_REQUEST: Final = 192 * 1024
MAX_REPLY: Final = 2 * 1024 * 1024

#: The largest number of bytes of file data in one message.
MAX_INLINE: Final = 64 * 1024

#: A directory fetch is cut into pages of about this many bytes.
PAGE_BYTES: Final = 256 * 1024

#: The most entries that one fetch may ask for.
MAX_FETCH: Final = 4096
#: The most directories that one fetch brings beside the one that it is about.
MAX_ALSO: Final = 64
MAX_NAME: Final = 255

#: The most inodes that one message tells to be open, or no more.
MAX_OPEN: Final = 8192
#: The most inodes, and the most directories, that one message gives back.
MAX_RETURNED: Final = 8192

#: The largest size of a file, in bytes.
MAX_FILE: Final = 2**56
MAX_TARGET: Final = 4095

#: Files that one request makes, the bytes of their content in all, and inode numbers that one reserves.
MAX_NEW_FILES: Final = 14
MAX_NEW_BYTES: Final = 128 * 1024
#: Names of one RemoveNames.
MAX_REMOVED: Final = 14
MAX_RESERVED: Final = 4096
MAX_XATTR_NAME: Final = 255
MAX_XATTR_VALUE: Final = 60 * 1024
ROOT_INO: Final = 1

#: Slots of a session: changes of which the outcome can be asked for again, at once.
SLOTS: Final = 48
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
U63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Ino = Annotated[int, Meta(ge=1, le=2**48 - 1)]
Nanoseconds = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Name = Annotated[bytes, Meta(min_length=1, max_length=MAX_NAME)]
Target = Annotated[bytes, Meta(min_length=1, max_length=MAX_TARGET)]
XattrName = Annotated[bytes, Meta(min_length=1, max_length=MAX_XATTR_NAME)]
XattrValue = Annotated[bytes, Meta(max_length=MAX_XATTR_VALUE)]
Inline = Annotated[bytes, Meta(max_length=MAX_INLINE)]
VolumeName = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9_.-]{0,62}\Z")]
#: Addresses of metaservers: so many are told at most.
MAX_METASERVERS: Final = 32
Places = Annotated[list[Annotated[str, Meta(max_length=512)]], Meta(max_length=MAX_METASERVERS)]
SessionId = Annotated[bytes, Meta(min_length=16, max_length=16)]


class Malformed(Exception):
    """The peer sent something that is not a frame of this protocol; the connection is not usable any more."""


class ErrorCode(enum.IntEnum):
    """Why a request was refused. The FUSE edge of the client maps these to errno."""

    NOT_FOUND = 1
    EXISTS = 2
    NOT_A_DIRECTORY = 3
    IS_A_DIRECTORY = 4
    NOT_EMPTY = 5
    INVALID = 6
    NAME_TOO_LONG = 7
    TOO_MANY_LINKS = 8
    NO_XATTR = 9
    XATTR_EXISTS = 10
    TOO_LARGE = 11
    NO_SPACE = 12
    NOT_PERMITTED = 13
    STALE_SESSION = 14
    NO_SUCH_VOLUME = 15
    VOLUME_EXISTS = 16
    UNSUPPORTED = 17
    MALFORMED = 18
    BUSY = 19
    INTERNAL = 20
    #: Events that were asked for are not kept any more, or are of another history.
    EVENTS_GONE = 21
    #: Nothing that was shown says who the client is, or that may not be any more.
    NOT_AUTHENTICATED = 23
    #: The identity may not do it: to a file, to a volume, or at all.
    ACCESS_DENIED = 24
    #: The identity may change nothing.
    READ_ONLY = 25
    #: Of the client's own: it is not sent.
    LOST_LOCK = 22


class InodeFlag(enum.IntFlag):
    """Bits of :attr:`Attributes.flags`."""

    HAS_XATTRS = 1
    #: The content, if any, is held by the metadata engine; without it, in slices.
    INLINE = 2
    #: A file that never had a name, and may be given one.
    NAMELESS = 4


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of every message and of the records inside them."""


class Attributes(Message):
    """An inode. ``version`` is the commit version of its last change: of two, the larger is the newer.

    ``stored``: bytes of content, holes left out; more than that, but no more than ``size``, after a cut of many chunks.
    """

    ino: Ino
    mode: U32
    nlink: U32
    uid: U32
    gid: U32
    rdev: U32
    size: U63
    atime_ns: Nanoseconds
    mtime_ns: Nanoseconds
    ctime_ns: Nanoseconds
    flags: U32
    version: U63
    stored: U63 = 0


#: Read from a frame it is a part of that frame, which it keeps in memory, and not a copy.
if TYPE_CHECKING:
    Data = bytes | memoryview
else:
    Data = memoryview


class DirectoryEntry(Message):
    """One entry of a directory. ``cookie`` orders the listing and is never reused within the directory.

    ``data`` is the whole content of an inline file, or a symlink's target; ``None`` when it is not sent.
    """

    name: Name
    cookie: U63
    attributes: Attributes
    data: Data | None = None


class Slice(Message):
    """``length`` bytes of a file at ``offset``, taken from byte ``start`` of the immutable slice ``slice_id``.

    ``slice_id`` 0 is a hole. Later slices of a list lie over earlier ones.
    """

    offset: U63
    length: U63
    slice_id: U63
    start: U63


class Failure(Message, tag=64):
    code: ErrorCode
    message: Annotated[str, Meta(max_length=1024)]


class Done(Message, tag=65):
    pass
