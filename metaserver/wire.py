"""The protocol between a client and the metaserver: frames, typed messages and error codes.

A frame is a big-endian u32 body length and a MessagePack body ``[id, [tag, field, ...]]``. The id pairs a reply with
its request; a streamed reply is several frames with the id of the request. Bodies are arrays throughout, never maps,
so there are no duplicate keys to argue about; extension types are refused.

A request that changes something may be sent as ``[id, [tag, ...], slot, sequence]``, sequence from 1. The metaserver
keeps the outcome of each slot's last sequence with the commit: the same two numbers sent again, over whatever
connection of the session, to whatever run of the metaserver, get the first outcome. A higher sequence of a slot says
that the reply to the lower one is of no interest any more.

Frames of id 0 are the metaserver's own: a Failure that ends the connection, a :class:`LockSettled`, or a
:class:`Break`, which is to be answered by :class:`Acknowledge` (of id 0, too; it has no reply). A Break that a reply
depends on is sent before it.

Both sides check the length before they allocate, and :func:`decode_request` and :func:`decode_reply` check every
field's type and bounds, so the code behind them sees only well-typed messages.

Names, targets and xattr names are ``bytes``. Times are integer nanoseconds since 1970.
"""

from __future__ import annotations

import enum
import struct
from typing import Annotated, Final, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

PROTOCOL_VERSION: Final = 2

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
MAX_NAME: Final = 255
#: The most inodes that one message tells to be open, or no more.
MAX_OPEN: Final = 8192
#: The largest size of a file, in bytes.
MAX_FILE: Final = 2**56
MAX_TARGET: Final = 4095
MAX_XATTR_NAME: Final = 255
MAX_XATTR_VALUE: Final = 60 * 1024

ROOT_INO: Final = 1

#: What is kept of a volume's events unless it is made otherwise: so many, for a week.
KEPT_EVENTS: Final = 500_000
KEPT_S: Final = 7 * 24 * 3600

#: The last byte of a file that can be locked, and the most locks that one message tells of.
LAST_BYTE: Final = 2**63 - 1
MAX_LOCKS: Final = 2048

#: Slots of a session: changes of which the outcome can be asked for again, at once.
SLOTS: Final = 48

_HEADER: Final = struct.Struct(">I")
HEADER_BYTES: Final = _HEADER.size

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
    #: Of the client's own: it is not sent.
    LOST_LOCK = 22


class Operation(enum.IntEnum):
    """What an :class:`Event` tells of."""

    CREATE = 1
    MKDIR = 2
    SYMLINK = 3
    MKNOD = 4
    LINK = 5
    UNLINK = 6
    RMDIR = 7
    RENAME = 8
    EXCHANGE = 9
    #: Mode, owner or times.
    ATTRIBUTES = 10
    #: Bytes or size; perhaps attributes, too.
    CONTENT = 11
    XATTR = 12
    #: Anything may have changed, by a check that repairs: the tree is to be read anew.
    REPAIR = 13


class LockOutcome(enum.IntEnum):
    """What a request for a lock came to."""

    GRANTED = 1
    #: Somebody else has it, and it was not to be waited for.
    DENIED = 2
    #: It is told later, by :class:`LockSettled`.
    WAITING = 3
    #: Waiting for it would never end.
    DEADLOCK = 4
    #: The session has, or waits for, too many.
    FULL = 5
    #: It is not waited for any more.
    CANCELLED = 6


class InodeFlag(enum.IntFlag):
    """Bits of :attr:`Attributes.flags`."""

    HAS_XATTRS = 1
    #: The content, if any, is held by the metadata engine; without it, in slices.
    INLINE = 2
    #: A file that never had a name, and may be given one.
    NAMELESS = 4


class _Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of every message and of the records inside them."""


class Attributes(_Message):
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


class DirectoryEntry(_Message):
    """One entry of a directory. ``cookie`` orders the listing and is never reused within the directory.

    ``data`` is the whole content of an inline file, or a symlink's target; ``None`` when it is not sent.
    """

    name: Name
    cookie: U63
    attributes: Attributes
    data: bytes | None = None


class Slice(_Message):
    """``length`` bytes of a file at ``offset``, taken from byte ``start`` of the immutable slice ``slice_id``.

    ``slice_id`` 0 is a hole. Later slices of a list lie over earlier ones.
    """

    offset: U63
    length: U63
    slice_id: U63
    start: U63


class Event(_Message):
    """One committed change of a volume. ``version`` counts them from 1, in the order of the commits, without gaps.

    ``parent`` and ``name`` are the entry that was made, removed, or exchanged, or (RENAME) where it was; 0 and empty
    for what concerns an inode only. ``new_parent`` and ``new_name``: where it was moved, or what it was exchanged with.
    """

    version: U63
    #: When the change was asked for, by the metaserver's clock.
    time_ns: Nanoseconds
    operation: Operation
    ino: U63 = 0
    #: The type bits of the inode's mode.
    kind: U32 = 0
    #: After the change; of a directory 0.
    size: U63 = 0
    #: Who did it: what the client calls itself, cut to 64 characters.
    client: str = ""
    parent: U63 = 0
    name: bytes = b""
    new_parent: U63 = 0
    new_name: bytes = b""
    #: The inode that a RENAME took the place of, or an EXCHANGE moved the other way; 0: none.
    other: U63 = 0


class Lock(_Message):
    """An advisory lock: bytes ``start`` to ``end``, the last one included, of a file.

    ``owner`` is a number of the session's own choice: locks of one owner do not conflict. ``flock``: one of flock(2),
    of the whole file always, which knows nothing of other locks. ``pid``: of the process, on its session's machine.
    """

    ino: Ino
    owner: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
    flock: bool
    start: U63
    end: U63
    exclusive: bool
    pid: U32 = 0


# Requests


class Hello(_Message, tag=1):
    version: U32
    software: Annotated[str, Meta(max_length=64)]


class CreateVolume(_Message, tag=2):
    name: VolumeName
    store: Annotated[str, Meta(max_length=4096)]
    inline_limit: Annotated[int, Meta(ge=0, le=MAX_INLINE)]
    #: How many events are kept at most, and for how many seconds.
    kept_events: Annotated[int, Meta(ge=1, le=2**40)] = KEPT_EVENTS
    kept_s: Annotated[int, Meta(ge=1, le=2**40)] = KEPT_S
    #: The slice id to begin with: above those of objects that are in the store already.
    first_slice: Annotated[int, Meta(ge=1, le=2**62)] = 1


class OpenSession(_Message, tag=3):
    """Open a session on a volume. Every other request below needs one on its connection.

    ``resume`` continues an earlier session of this client over a new connection; if that is gone a new one is opened,
    which the reply says. ``writing``: what this client has open for writing in it.
    """

    volume: VolumeName
    client: Annotated[str, Meta(max_length=256)]
    resume: SessionId | None = None
    writing: Annotated[list[Ino], Meta(max_length=MAX_OPEN)] = []


class Renew(_Message, tag=4):
    """Renew the lease. ``seen`` is the version up to which this client has been told of others' changes."""

    seen: U63


class CloseSession(_Message, tag=5):
    pass


class Lookup(_Message, tag=6):
    parent: Ino
    name: Name


class FetchDirectory(_Message, tag=7):
    """Fetch up to ``limit`` entries, attributes and small content, streamed as :class:`DirectoryPage`.

    With ``around``, a directory of more than ``limit`` entries is read from the entry of that name on; a smaller one
    whole. Without it, from the first entry after ``cookie``. ``data_limit``: content of files up to that size is
    sent; ``data_budget``: bytes of content in all, after which entries come without.
    """

    ino: Ino
    cookie: U63
    limit: Annotated[int, Meta(ge=1, le=MAX_FETCH)]
    data_limit: Annotated[int, Meta(ge=0, le=MAX_INLINE)]
    data_budget: U63
    around: Name | None = None


class GetAttributes(_Message, tag=8):
    ino: Ino


class SetAttributes(_Message, tag=9):
    """Change what is not ``None``; ctime becomes ``changed_ns``, or now. A new size cuts the content or extends it by a
    hole."""

    ino: Ino
    mode: U32 | None = None
    uid: U32 | None = None
    gid: U32 | None = None
    size: U63 | None = None
    atime_ns: Nanoseconds | None = None
    mtime_ns: Nanoseconds | None = None
    #: As in :class:`MakeNode`.
    lazy: bool = False
    #: When a program made the change, and was told so by stat.
    changed_ns: Nanoseconds | None = None


class MakeNode(_Message, tag=10):
    """Create a file, directory, special file or symlink (with ``target``), by the type bits of ``mode``.

    The caller has applied the umask. A setgid parent gives its group to the node, and the bit to a directory.
    """

    parent: Ino
    name: Name
    mode: U32
    uid: U32
    gid: U32
    rdev: U32 = 0
    target: Target | None = None
    #: The reply may come before the change is durable: Sync, and every later change that is not lazy, makes it so.
    lazy: bool = False
    #: It is open for writing then, as after :class:`OpenFile`.
    writing: bool = False


class Link(_Message, tag=11):
    ino: Ino
    parent: Ino
    name: Name


class Remove(_Message, tag=12):
    """Unlink (``directory`` false) or rmdir.

    The last link leaves an orphan, kept until this client, and each that has it open, has sent Reap or ended.
    """

    parent: Ino
    name: Name
    directory: bool


class Rename(_Message, tag=13):
    parent: Ino
    name: Name
    new_parent: Ino
    new_name: Name
    no_replace: bool = False
    exchange: bool = False


class Reap(_Message, tag=14):
    """This client uses these unlinked inodes no more. Unknown ones, and ones with links, are passed over."""

    inos: Annotated[list[Ino], Meta(max_length=1024)]


class ReadLink(_Message, tag=15):
    ino: Ino


class GetXattr(_Message, tag=16):
    ino: Ino
    name: XattrName


class ListXattrs(_Message, tag=17):
    ino: Ino


class SetXattr(_Message, tag=18):
    ino: Ino
    name: XattrName
    value: XattrValue
    create: bool = False
    replace: bool = False


class RemoveXattr(_Message, tag=19):
    ino: Ino
    name: XattrName


class GetContent(_Message, tag=20):
    """Where the bytes [offset, offset + length) of a file are: inline, or the slices that cover them."""

    ino: Ino
    offset: U63
    length: U63


class WriteInline(_Message, tag=21):
    """Write bytes of an inline file. TOO_LARGE if it would pass the volume's inline limit, or is not inline.

    ``written_ns`` becomes its mtime: when a program wrote it, and was told so by stat; None: now.
    """

    ino: Ino
    offset: U63
    data: Inline
    written_ns: Nanoseconds | None = None
    #: As in :class:`MakeNode`.
    lazy: bool = False
    #: What else is changed of the same file, after the writing; its size is not.
    then: SetAttributes | None = None
    #: Of what is appended: BUSY unless the file has this size.
    appended_at: U63 | None = None


class NewSlices(_Message, tag=22):
    """Reserve slice ids. An id is never given twice, to whomever."""

    count: Annotated[int, Meta(ge=1, le=4096)]


class CommitSlices(_Message, tag=23):
    """Lay slices, whose objects are durable in the store, over the content; size becomes at least ``size``.

    ``replaces_inline``: the slices hold all that was inline, and the inline content is dropped. Without it, a commit
    to an inline file that is not empty is refused as INVALID, and a commit with it whose ``inline_version`` is not
    the inode's version as BUSY (somebody wrote meanwhile; read again). ``written_ns`` and ``appended_at`` as in
    :class:`WriteInline`.
    """

    ino: Ino
    slices: Annotated[list[Slice], Meta(max_length=1024)]
    size: U63
    replaces_inline: bool = False
    inline_version: U63 = 0
    written_ns: Nanoseconds | None = None
    appended_at: U63 | None = None


class GetStatistics(_Message, tag=24):
    pass


class ListSlices(_Message, tag=25):
    """The slice ids above ``after`` that no inode uses any more and whose objects are to be deleted.

    At most ``limit``, by rising id; none: there are no more.
    """

    limit: Annotated[int, Meta(ge=1, le=4096)]
    after: U63 = 0


class ForgetSlices(_Message, tag=26):
    """The objects of these unused slices are deleted."""

    ids: Annotated[list[U63], Meta(max_length=4096)]


class MakeTemporary(_Message, tag=27):
    """Create a file without a name in a directory: an orphan, to which Link gives its first name. As MakeNode else."""

    parent: Ino
    mode: U32
    uid: U32
    gid: U32
    writing: bool = False


class Allocate(_Message, tag=28):
    """Change a range of a file: ``zero``: it reads as zeros; unless ``keep_size``, the size becomes at least its end.

    Nothing is reserved. The reply's ``done`` may be less than ``length``: send another for the rest.
    """

    ino: Ino
    offset: U63
    length: U63
    keep_size: bool
    zero: bool


class CopyRange(_Message, tag=29):
    """Make a range of a file the same as one of another, or of the same that does not overlap (else INVALID).

    What the source does not have is left out; the reply's ``done`` may be less than that: send another for the rest.
    UNSUPPORTED: the next bytes cannot be shared by the two, and have to be read and written.
    """

    source: Ino
    source_offset: U63
    ino: Ino
    offset: U63
    length: U63


class Seek(_Message, tag=30):
    """Find the first byte at or after ``offset`` that is stored, or, with ``hole``, that is not; the end is a hole."""

    ino: Ino
    offset: U63
    hole: bool


class OpenFile(_Message, tag=34):
    """As GetAttributes, of what is to be opened: NOT_FOUND for an orphan that this client had not open before.

    ``writing``: what others are told of the inode they do not keep, until this client has closed it.
    """

    ino: Ino
    writing: bool


class ClosedForWriting(_Message, tag=35):
    """This client has these inodes open for writing no more."""

    inos: Annotated[list[Ino], Meta(max_length=MAX_OPEN)]


class Sync(_Message, tag=40):
    """Make durable every change of this session that was replied to. INTERNAL, once: some of them are lost."""


class CompactSlices(_Message, tag=41):
    """Replace what makes up a chunk by fewer slices that hold the same content.

    ``seen`` and ``digest`` say what GetContent gave for the chunk that begins at ``offset``: how many slices, and the
    BLAKE2b (16 bytes) of them, each as four big-endian u64. Slices laid since stay above the new ones. BUSY: what was
    seen is not there any more, so that nothing was done.
    """

    ino: Ino
    offset: U63
    seen: U63
    digest: Annotated[bytes, Meta(min_length=16, max_length=16)]
    slices: Annotated[list[Slice], Meta(max_length=1024)]


class FollowEvents(_Message, tag=45):
    """Tell of a volume's events after version ``since``, streamed as :class:`EventPage`. Needs no session.

    ``since`` 0: of all that are kept; ``None``: of what comes from now on. EVENTS_GONE: those after it are not all
    kept. ``live``: the stream does not end; a connection carries one such at a time (BUSY).
    """

    volume: VolumeName
    since: U63 | None
    live: bool


class InspectSlices(_Message, tag=50):
    """Tell which of these slices are not in use."""

    ids: Annotated[list[U63], Meta(max_length=4096)]


class RetireSlices(_Message, tag=51):
    """Put those of these slices that were given out, and that no inode uses, among the unused ones: the reply has them.

    From then on they cannot be committed, and their objects may be deleted.
    """

    ids: Annotated[list[U63], Meta(max_length=4096)]


class TestLock(_Message, tag=100):
    """Ask for the first lock of another owner that is in the way of one."""

    #: It is no test of pytest's.
    __test__ = False

    lock: Lock


class SetLock(_Message, tag=101):
    """Take a lock, or give it up (``unlock``; its ``exclusive`` says nothing then). It is no change of the volume.

    Unless it is known at once, which is said by WAITING, the outcome comes as :class:`LockSettled`: with ``wait``, as
    soon as there is nothing in the way; without, if a server was started again, as soon as it knows who has what.
    ``number`` is of the client's choice, and rises. The same request over another connection of the session goes on
    where the first one was.
    """

    lock: Lock
    number: U63
    wait: bool = False
    unlock: bool = False


class CancelLock(_Message, tag=102):
    """Wait no more for a lock. The reply is CANCELLED; or DENIED, if nothing of that number was waited for."""

    number: U63


class HoldLocks(_Message, tag=103):
    """Tell which locks this session holds, in messages of which only the ``last`` has an effect: it has these then, and
    no others, and waits for none. A client that comes back to another run of the server sends it before it renews."""

    locks: Annotated[list[Lock], Meta(max_length=MAX_LOCKS)]
    last: bool


class Acknowledge(_Message, tag=120):
    """All that the Break of this number told has left every cache of this client. Sent with id 0; has no reply.

    ``open``: those of the inodes that are open here, perhaps: when they are unlinked they live on for this client too,
    until it reaps them.
    """

    number: U63
    open: Annotated[list[Ino], Meta(max_length=MAX_OPEN)] = []


# Replies


class Failure(_Message, tag=64):
    code: ErrorCode
    message: Annotated[str, Meta(max_length=1024)]


class Done(_Message, tag=65):
    pass


class Welcome(_Message, tag=66):
    version: U32
    software: Annotated[str, Meta(max_length=64)]
    #: Changes at each start of the server.
    server_epoch: U63


class SessionOpened(_Message, tag=67):
    session: SessionId
    lease_ms: Annotated[int, Meta(ge=100, le=3_600_000)]
    #: The volume's version at this moment: what :class:`Renew` starts from.
    version: U63
    store: str
    inline_limit: Annotated[int, Meta(ge=0, le=MAX_INLINE)]
    #: Whether ``resume`` was honoured; if not, nothing cached before may be used.
    resumed: bool
    #: Random, of the volume: names what a client keeps of it beyond its sessions.
    volume: Annotated[bytes, Meta(min_length=16, max_length=16)] = bytes(16)
    #: Replies to changes come before these are durable; :class:`Sync` makes them so.
    lazy: bool = False
    #: No other client has a session on the volume, nor gets one before a Break says ``joined``.
    alone: bool = False


class Renewed(_Message, tag=68):
    """The lease is extended by ``lease_ms`` from when the client sent its renewal.

    ``names`` and ``inodes`` are what other sessions have changed in (seen, version]: entries as (directory, name), and
    inodes whose attributes, content, xattrs or listing changed. They are to be dropped from every cache before the
    new deadline is used. ``everything``: the history does not reach back to ``seen``; drop all.
    """

    lease_ms: Annotated[int, Meta(ge=100, le=3_600_000)]
    version: U63
    names: list[tuple[Ino, Name]]
    inodes: list[Ino]
    everything: bool


class Found(_Message, tag=69):
    """One inode's attributes; ``cookie`` is that of the entry looked up, else 0. ``data`` as in DirectoryEntry."""

    attributes: Attributes
    cookie: U63 = 0


class DirectoryPage(_Message, tag=70):
    """A part of a fetch. On the ``last`` page, ``complete`` says that the listing ended there.

    ``directory`` is the directory itself; ``whole`` that this fetch began at the first entry.
    """

    directory: Attributes
    entries: list[DirectoryEntry]
    last: bool
    complete: bool
    whole: bool


class Changed(_Message, tag=71):
    """A change is committed and durable: the attributes of every inode it touched, the request's subject first.

    For Rename: the moved inode, both parents, then the replaced or exchanged inode if any. For Remove: the removed
    inode (``nlink`` 0: an orphan now), the parent. For MakeNode and Link: the inode, the parent.
    ``done``: for requests that change a range, how many of its bytes have been dealt with.
    """

    attributes: list[Attributes]
    cookie: U63 = 0
    done: U63 = 0


class TargetIs(_Message, tag=72):
    target: Target


class XattrIs(_Message, tag=73):
    value: XattrValue


class XattrNames(_Message, tag=74):
    names: list[XattrName]


class Content(_Message, tag=75):
    """``inline`` is the part asked for of an inline file (shorter where a hole ends it); else ``slices`` lists, in the
    order of laying, all that touches the range. What neither covers, up to the size, is zeros."""

    attributes: Attributes
    inline: bytes | None
    slices: list[Slice]


class SliceIds(_Message, tag=76):
    ids: list[U63]


class Statistics(_Message, tag=77):
    """Figures of the volume and of the engine's file system (``total_bytes`` and ``free_bytes``)."""

    inodes: U63
    bytes: U63
    total_bytes: U63
    free_bytes: U63


class Sought(_Message, tag=78):
    """Where what was looked for is; ``None``: there is none up to the file's end, or the file ends before.

    ``further``: it is not before ``offset``: look again from there.
    """

    offset: U63 | None
    further: bool = False


class EventPage(_Message, tag=80):
    """Some events, by rising version. All up to ``version`` have been told: the place to go on from.

    The first page comes at once, with or without events. No event is told before it is durable.
    """

    version: U63
    events: list[Event]
    last: bool
    #: As in :class:`SessionOpened`.
    volume: Annotated[bytes, Meta(min_length=16, max_length=16)]


class SlicesInspected(_Message, tag=90):
    """Of the slices asked about: those never committed, those unused, and those never given out."""

    idle: list[U63]
    unused: list[U63]
    foreign: list[U63]


class LockIs(_Message, tag=110):
    """The lock that is in the way; ``owner`` and, of another session's, ``pid`` are 0. ``None``: there is none."""

    lock: Lock | None


class LockAnswer(_Message, tag=111):
    outcome: LockOutcome


class LocksLost(_Message, tag=112):
    """Of the locks that were told, those that the session has not: indexes into all of them, from 0."""

    indexes: list[U32]


class LockSettled(_Message, tag=113):
    """What a request that was answered WAITING came to. Sent with id 0; it is lost with its connection."""

    number: U63
    outcome: LockOutcome


class Break(_Message, tag=121):
    """Drop these from every cache, kernel and maps included: entries as (directory, name), and inodes with attributes,
    content and xattrs; or all there is. Then acknowledge ``number``, unless that is 0.

    What was asked for before this came and is answered after it must not be cached under these keys. With a number of
    0 nobody waits: the keys belong to replies that follow and that are not to be cached. ``written``: others have these
    inodes open for writing, so that each request about them is to be sent; there is nothing to be dropped.
    """

    number: U63
    names: list[tuple[Ino, Name]]
    inodes: list[Ino]
    everything: bool = False
    written: list[Ino] = []
    #: Another client is about to open a session: to be acknowledged when nothing waits any more that it would not see.
    joined: bool = False


# fmt: off
Request = (
    Hello | CreateVolume | OpenSession | Renew | CloseSession | Lookup | FetchDirectory | GetAttributes | SetAttributes
    | MakeNode | Link | Remove | Rename | Reap | ReadLink | GetXattr | ListXattrs | SetXattr | RemoveXattr | GetContent
    | WriteInline | NewSlices | CommitSlices | GetStatistics | ListSlices | ForgetSlices | MakeTemporary | Allocate
    | CopyRange | Seek | OpenFile | ClosedForWriting | Sync | CompactSlices | InspectSlices | RetireSlices
    | TestLock | SetLock | CancelLock | HoldLocks | FollowEvents | Acknowledge
)
Reply = (
    Failure | Done | Welcome | SessionOpened | Renewed | Found | DirectoryPage | Changed | TargetIs | XattrIs
    | XattrNames | Content | SliceIds | Statistics | Sought | SlicesInspected | LockIs | LockAnswer | LocksLost
    | LockSettled | Break | EventPage
)
# fmt: on

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


def body_length(header: bytes | bytearray, limit: int) -> int:
    """Return the body's length that a frame header announces; raise :exc:`Malformed` if it is 0 or over ``limit``."""
    (length,) = _HEADER.unpack(header)
    if not 0 < length <= limit:
        raise Malformed(f"a frame of {length} bytes; the limit is {limit}")
    return int(length)


class FrameSplitter:
    """Cuts a stream of bytes into frame bodies.

    ``limit``, in bytes, may be changed between two bodies. A frame that announces more is refused as soon as its
    header is here, so that no more than a frame of that size is ever waited for.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = bytearray()
        self._taken = 0

    def feed(self, data: bytes) -> None:
        """Keep the next bytes of the stream."""
        if self._taken:
            del self._held[: self._taken]
            self._taken = 0
        self._held += data

    def next_body(self) -> bytes | None:
        """Return the next whole body, or ``None`` if more bytes are needed; raise :exc:`Malformed` for its length."""
        begin = self._taken + HEADER_BYTES
        if len(self._held) < begin:
            return None
        end = begin + body_length(self._held[self._taken : begin], self.limit)
        if len(self._held) < end:
            return None
        self._taken = end
        return bytes(memoryview(self._held)[begin:end])


class UnixAddress(NamedTuple):
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


class TcpAddress(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


def parse_address(text: str) -> UnixAddress | TcpAddress:
    """Return what "unix:/path" or "tcp:host:port" says (an IPv6 host in brackets); raise :exc:`ValueError`."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest.startswith("/") and "\0" not in rest:
        return UnixAddress(rest)
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and host and port.isascii() and port.isdigit() and int(port) < 65536:
        return TcpAddress(host.removeprefix("[").removesuffix("]"), int(port))
    raise ValueError(f"not an address: {text!r}; it is unix:/path or tcp:host:port")


def encode(request_id: int, message: Request | Reply) -> bytes:
    """Return the whole frame of a message."""
    body = _ENCODER.encode((request_id, message))
    return _HEADER.pack(len(body)) + body


def encode_change(request_id: int, message: Request, slot: int, sequence: int) -> bytes:
    """Return the whole frame of a request whose outcome is to be kept."""
    body = _ENCODER.encode((request_id, message, slot, sequence))
    return _HEADER.pack(len(body)) + body


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
