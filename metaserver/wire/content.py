"""Messages about what files hold: inline bytes, slices, allocation, holes."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from metaserver.wire.base import U63, Attributes, Inline, Ino, Message, Nanoseconds, Slice
from metaserver.wire.namespace import SetAttributes


class GetContent(Message, tag=20):
    """Where the bytes [offset, offset + length) of a file are: inline, or the slices that cover them."""

    ino: Ino
    offset: U63
    length: U63


class WriteInline(Message, tag=21):
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


class NewSlices(Message, tag=22):
    """Reserve slice ids. An id is never given twice, to whomever."""

    count: Annotated[int, Meta(ge=1, le=4096)]


class CommitSlices(Message, tag=23):
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


class ListSlices(Message, tag=25):
    """The slice ids above ``after`` that no inode uses any more and whose objects are to be deleted.

    At most ``limit``, by rising id; none: there are no more.
    """

    limit: Annotated[int, Meta(ge=1, le=4096)]
    after: U63 = 0


class ForgetSlices(Message, tag=26):
    """The objects of these unused slices are deleted."""

    ids: Annotated[list[U63], Meta(max_length=4096)]


class Allocate(Message, tag=28):
    """Change a range of a file: ``zero``: it reads as zeros; unless ``keep_size``, the size becomes at least its end.

    Nothing is reserved. The reply's ``done`` may be less than ``length``: send another for the rest.
    """

    ino: Ino
    offset: U63
    length: U63
    keep_size: bool
    zero: bool


class CopyRange(Message, tag=29):
    """Make a range of a file the same as one of another, or of the same that does not overlap (else INVALID).

    What the source does not have is left out; the reply's ``done`` may be less than that: send another for the rest.
    UNSUPPORTED: the next bytes cannot be shared by the two, and have to be read and written.
    """

    source: Ino
    source_offset: U63
    ino: Ino
    offset: U63
    length: U63


class Seek(Message, tag=30):
    """Find the first byte at or after ``offset`` that is stored, or, with ``hole``, that is not; the end is a hole."""

    ino: Ino
    offset: U63
    hole: bool


class CompactSlices(Message, tag=41):
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


class InspectSlices(Message, tag=50):
    """Tell which of these slices are not in use."""

    ids: Annotated[list[U63], Meta(max_length=4096)]


class RetireSlices(Message, tag=51):
    """Put those of these slices that were given out, and that no inode uses, among the unused ones: the reply has them.

    From then on they cannot be committed, and their objects may be deleted.
    """

    ids: Annotated[list[U63], Meta(max_length=4096)]


class Content(Message, tag=75):
    """``inline`` is the part asked for of an inline file (shorter where a hole ends it); else ``slices`` lists, in the
    order of laying, all that touches the range. What neither covers, up to the size, is zeros."""

    attributes: Attributes
    inline: bytes | None
    slices: list[Slice]


class SliceIds(Message, tag=76):
    ids: list[U63]


class Sought(Message, tag=78):
    """Where what was looked for is; ``None``: there is none up to the file's end, or the file ends before.

    ``further``: it is not before ``offset``: look again from there.
    """

    offset: U63 | None
    further: bool = False


class SlicesInspected(Message, tag=90):
    """Of the slices asked about: those never committed, those unused, and those never given out."""

    idle: list[U63]
    unused: list[U63]
    foreign: list[U63]
