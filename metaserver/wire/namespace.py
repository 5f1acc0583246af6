"""Messages about inodes and names: what is asked, what is changed, xattrs."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from metaserver.wire.base import (
    MAX_ALSO,
    MAX_FETCH,
    MAX_INLINE,
    MAX_NEW_FILES,
    MAX_REMOVED,
    MAX_RESERVED,
    U32,
    U63,
    Attributes,
    DirectoryEntry,
    Inline,
    Ino,
    Message,
    Name,
    Nanoseconds,
    Target,
    XattrName,
    XattrValue,
)


class Lookup(Message, tag=6):
    parent: Ino
    name: Name


class FetchDirectory(Message, tag=7):
    """Fetch up to ``limit`` entries, attributes and small content, streamed as :class:`DirectoryPage`.

    With ``around``, a directory of more than ``limit`` entries is read from the entry of that name on; a smaller one
    whole. Without it, from the first entry after ``cookie``. ``data_limit``: content of files up to that size is
    sent; ``data_budget``: bytes of content in all, after which entries come without.

    ``also``: directories that follow, up to the first that does not fit whole into what limit and budget leave.
    """

    ino: Ino
    cookie: U63
    limit: Annotated[int, Meta(ge=1, le=MAX_FETCH)]
    data_limit: Annotated[int, Meta(ge=0, le=MAX_INLINE)]
    data_budget: U63
    around: Name | None = None
    also: Annotated[list[Ino], Meta(max_length=MAX_ALSO)] = []


class GetAttributes(Message, tag=8):
    ino: Ino


class SetAttributes(Message, tag=9):
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


class MakeNode(Message, tag=10):
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


class Link(Message, tag=11):
    ino: Ino
    parent: Ino
    name: Name


class Remove(Message, tag=12):
    """Unlink (``directory`` false) or rmdir.

    The last link leaves an orphan, kept until this client, and each that has it open, has sent Reap or ended.
    """

    parent: Ino
    name: Name
    directory: bool


class Rename(Message, tag=13):
    parent: Ino
    name: Name
    new_parent: Ino
    new_name: Name
    no_replace: bool = False
    exchange: bool = False


class Reap(Message, tag=14):
    """This client uses these unlinked inodes no more. Unknown ones, and ones with links, are passed over."""

    inos: Annotated[list[Ino], Meta(max_length=1024)]


class ReadLink(Message, tag=15):
    ino: Ino


class GetXattr(Message, tag=16):
    ino: Ino
    name: XattrName


class ListXattrs(Message, tag=17):
    ino: Ino


class SetXattr(Message, tag=18):
    ino: Ino
    name: XattrName
    value: XattrValue
    create: bool = False
    replace: bool = False


class RemoveXattr(Message, tag=19):
    ino: Ino
    name: XattrName


class MakeTemporary(Message, tag=27):
    """Create a file without a name in a directory: an orphan, to which Link gives its first name. As MakeNode else."""

    parent: Ino
    mode: U32
    uid: U32
    gid: U32
    writing: bool = False


class ReserveInodes(Message, tag=60):
    """Reserve inode numbers for :class:`MakeFiles`. A number is never given twice, to whomever."""

    count: Annotated[int, Meta(ge=1, le=MAX_RESERVED)]


class NewFile(Message):
    """A regular file as its client has made it: ``ino`` is of those reserved for it.

    ``made_ns``: when it was made, which its directory's times are not before. ``content`` is all that it holds.
    ``writing``: it is open for writing, as after :class:`OpenFile`.
    """

    parent: Ino
    name: Name
    ino: Ino
    mode: U32
    uid: U32
    gid: U32
    made_ns: Nanoseconds
    atime_ns: Nanoseconds
    mtime_ns: Nanoseconds
    ctime_ns: Nanoseconds
    content: Inline = b""
    writing: bool = False


class MakeFiles(Message, tag=61):
    """Make files that this client has made by itself, while no other client saw the volume; all or none.

    EXISTS: a name is taken. INVALID: a number was not reserved, or is in use. ``lazy`` as in :class:`MakeNode`.
    """

    files: Annotated[list[NewFile], Meta(min_length=1, max_length=MAX_NEW_FILES)]
    lazy: bool = False


class RemovedName(Message):
    """A name that its client has removed, at ``removed_ns``; it stood for ``ino``, which is no directory."""

    parent: Ino
    name: Name
    ino: Ino
    removed_ns: Nanoseconds


class RemoveNames(Message, tag=62):
    """Unlink what this client has unlinked by itself, while no other client saw the volume; all or none.

    NOT_FOUND: a name is not there, or stands for another inode. Orphans are as of :class:`Remove`.
    """

    names: Annotated[list[RemovedName], Meta(min_length=1, max_length=MAX_REMOVED)]


class Found(Message, tag=69):
    """One inode's attributes; ``cookie`` is that of the entry looked up, else 0. ``data`` as in DirectoryEntry."""

    attributes: Attributes
    cookie: U63 = 0


class DirectoryPage(Message, tag=70):
    """A part of a fetch; none follows the ``last``, which may be one more without entries of the directory before.
    ``complete``: the directory's listing ended there.

    ``directory`` is the directory itself; ``whole`` that this fetch began at the first entry.
    """

    directory: Attributes
    entries: list[DirectoryEntry]
    last: bool
    complete: bool
    whole: bool


class Changed(Message, tag=71):
    """A change is committed and durable: the attributes of every inode it touched, the request's subject first.

    For Rename: the moved inode, both parents, then the replaced or exchanged inode if any. For Remove: the removed
    inode (``nlink`` 0: an orphan now), the parent. For MakeNode and Link: the inode, the parent. For MakeFiles: the
    files, then their directories. For RemoveNames: the removed inodes, each once, then the directories.
    ``done``: for requests that change a range, how many of its bytes have been dealt with.
    """

    attributes: list[Attributes]
    cookie: U63 = 0
    done: U63 = 0


class TargetIs(Message, tag=72):
    target: Target


class XattrIs(Message, tag=73):
    value: XattrValue


class InodesReserved(Message, tag=91):
    """The numbers ``first``, ``first + step`` and so on, ``count`` of them."""

    first: Ino
    step: Annotated[int, Meta(ge=1, le=2**16)]
    count: Annotated[int, Meta(ge=1, le=MAX_RESERVED)]


class XattrNames(Message, tag=74):
    names: list[XattrName]
