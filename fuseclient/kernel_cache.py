"""The kernel cache as the worker sees it: what is put here, BPF programs answer from.

The only Python that writes the maps. All of it is synchronous and belongs to the worker's one thread; a batch is laid
out, copied and put without an await. The C side (cache_fill.c) owns the rules: versions, the ring of pages, what
happens when the kernel refuses a value.
"""

from __future__ import annotations

import struct
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from msgspec.structs import astuple

from fuseclient import native
from fuseclient._native import ffi, lib
from fuseclient.config import MapFds
from metaserver.wire import Attributes, Data, DirectoryEntry, InodeFlag

_FOREVER_NS: Final = 2**64 - 1
_NO_SIZE: Final = 2**64 - 1
_BATCH: Final[int] = lib.BPFUSE_BATCH
_PAGE: Final[int] = lib.BPFUSE_PAGE
_NO_DATA: Final[int] = lib.BPFUSE_NO_DATA

#: This part of what there is may be lost to others' use, or be free and not usable.
_RESERVED: Final = 16

_INO: Final[int] = (1 << lib.BPFUSE_FH_SERIAL_SHIFT) - 1
_HAS_XATTRS: Final = int(InodeFlag.HAS_XATTRS)
#: Inodes of which a mount without acceleration knows that they have no xattrs, at about 150 bytes each.
_BARE: Final = 1 << 16

#: Of what was given up, so much is told by one call.
_EVICTED: Final = 4096

_FORMATS: Final = {"unsigned long long": "Q", "long long": "q", "unsigned int": "I"}


def _record_format() -> str:
    """Return the format of ``struct bpfuse_record`` for :mod:`struct`, without what is not the caller's to write."""
    fields = dict(ffi.typeof("struct bpfuse_record").fields)
    del fields["first_page"]
    unused = ("reserved", "padding")
    return "=" + "".join("4x" if name in unused else _FORMATS[field.type.cname] for name, field in fields.items())


_RECORD: Final = struct.Struct(_record_format())
_RECORD_BYTES: Final[int] = ffi.sizeof("struct bpfuse_record")
_RECORD_WORDS: Final = _RECORD_BYTES // 4
_FIRST_PAGE_WORD: Final[int] = ffi.offsetof("struct bpfuse_record", "first_page") // 4


class Room(NamedTuple):
    """What fits in: entries (a name and an inode), and pages of 4096 bytes, of content and of listings."""

    entries: int
    pages: int


class Evicted(NamedTuple):
    """What was given up to make room: inodes, and directories of which nothing is left. ``all_known``: that is all.

    An inode may come twice, and may have been dropped or put again before.
    """

    inodes: array[int]
    directories: list[int]
    all_known: bool


class Cache(Protocol):
    """What the worker tells the kernel cache. Times are nanoseconds of CLOCK_BOOTTIME."""

    def put(self, parent: int, entries: Sequence[DirectoryEntry]) -> None: ...
    def put_inode(self, attributes: Attributes, data: bytes | None = None) -> None: ...
    def put_name(self, parent: int, name: bytes, ino: int) -> None: ...
    def put_absent(self, parent: int, name: bytes) -> None: ...
    def drop_name(self, parent: int, name: bytes) -> None: ...
    def losses(self, directory: int) -> int: ...
    def put_whole(self, directory: int, losses: int) -> bool: ...
    def drop_whole(self, directory: int) -> None: ...
    def drop_inode(self, ino: int) -> None: ...
    def has_all(self, inodes: array[int], *, content: bool) -> bool: ...
    def missing(self, inodes: array[int]) -> array[int]: ...
    def take_evicted(self) -> Evicted: ...
    def is_used(self, directory: int) -> bool | None: ...
    @property
    def room(self) -> Room: ...
    @property
    def listing_limit(self) -> int: ...
    def put_listing(self, ino: int, entries: bytes) -> bool: ...
    def drop_listing(self, ino: int) -> None: ...
    def put_xattrs(self, ino: int, xattrs: Mapping[bytes, bytes], *, listed: bool) -> bool: ...
    def lacks_xattrs(self, ino: int) -> bool: ...
    def renew(self, deadline_ns: int) -> None: ...
    def bump_epoch(self) -> None: ...
    @property
    def epoch(self) -> int: ...
    def put_statfs(
        self, *, bsize: int, blocks: int, bfree: int, bavail: int, files: int, ffree: int, valid_until_ns: int
    ) -> None: ...
    def drop_statfs(self) -> None: ...
    def is_open(self, ino: int) -> bool: ...
    def opened(self, ino: int) -> None: ...
    def released(self, ino: int) -> None: ...
    def locked(self, ino: int) -> None: ...
    def unlocked(self, ino: int) -> None: ...
    def set_backing(self, ino: int, backing_id: int) -> bool: ...
    def forget_backing(self, ino: int) -> None: ...
    def figures(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class KernelCache:
    """The maps of an accelerated mount. ``kernel_ttl_s`` bounds the time-to-live in replies; ``None``: the lease does.
    Files of ``worker_opens_bytes`` or more are opened by the worker unless they have a backing; ``None``: no files.
    ``opens_nothing``: the kernel is told to do without OPEN, OPENDIR and FLUSH.

    Raises :exc:`native.NativeError` if the maps cannot be mapped, :exc:`ValueError` once it is closed. Filling and
    dropping never fail: see :file:`cache_fill.c`.
    """

    def __init__(
        self,
        fds: MapFds,
        kernel_ttl_s: float | None = None,
        worker_opens_bytes: int | None = None,
        *,
        opens_nothing: bool = False,
    ) -> None:
        self._fds = fds
        self._cache: Any = None
        options = ffi.new("struct bpfuse_cache_options *")
        options.control_fd, options.names_fd, options.inodes_fd = fds.control, fds.names, fds.inodes
        options.pages_fd, options.opens_fd, options.page_count = fds.pages, fds.opens, fds.page_count
        options.xattrs_fd, options.uses_fd, options.capacity = fds.xattrs, fds.uses, fds.inode_capacity
        options.xattrs_flag = InodeFlag.HAS_XATTRS
        options.worker_opens_size = _NO_SIZE if worker_opens_bytes is None else worker_opens_bytes
        out = ffi.new("struct bpfuse_cache **")
        native.check(lib.bpfuse_cache_open(out, options), "cannot map the kernel cache")
        self._cache = out[0]
        records = ffi.buffer(lib.bpfuse_cache_records(self._cache), _BATCH * _RECORD_BYTES)
        self._records = memoryview(records)
        self._record_words = self._records.cast("B").cast("I")
        self._pages = memoryview(ffi.buffer(lib.bpfuse_cache_pages(self._cache), fds.page_count * _PAGE))
        ttl_ns = _FOREVER_NS if kernel_ttl_s is None else round(kernel_ttl_s * 1e9)
        lib.bpfuse_cache_set_ttl(self._cache, ttl_ns)
        profile = lib.BPFUSE_PROFILE_DATASET if opens_nothing else lib.BPFUSE_PROFILE_GENERAL
        lib.bpfuse_cache_set_profile(self._cache, profile)

    def put(self, parent: int, entries: Sequence[DirectoryEntry]) -> None:
        """Put entries of a directory: names, inodes, and content where ``data`` is the whole of it."""
        for start in range(0, len(entries), _BATCH):
            self._put_batch(parent, entries[start : start + _BATCH])

    def _put_batch(self, parent: int, entries: Sequence[DirectoryEntry]) -> None:
        handle = self._handle()
        pack, records = _RECORD.pack_into, self._records
        names, contents = [], []
        offset = 0
        for index, entry in enumerate(entries):
            name, data = entry.name, entry.data
            if data is None:
                data_bytes = _NO_DATA
            else:
                data_bytes = len(data)
                contents.append((index, data))
            pack(records, offset, *astuple(entry.attributes), len(name), data_bytes)
            offset += _RECORD_BYTES
            names.append(name)
        lib.bpfuse_cache_place(handle, len(names))
        self._copy(contents)
        lib.bpfuse_cache_put(handle, len(names), parent, b"".join(names))

    def _copy(self, contents: list[tuple[int, Data]]) -> None:
        """Copy content into the pages that its record was given."""
        words, pages = self._record_words, self._pages
        for index, data in contents:
            page = words[index * _RECORD_WORDS + _FIRST_PAGE_WORD]
            if page != _NO_DATA:
                offset = page * _PAGE
                pages[offset : offset + len(data)] = data

    def put_inode(self, attributes: Attributes, data: bytes | None = None) -> None:
        """Put one inode; ``data`` is the whole content of a file of at most 64 KiB, or a symlink's target.

        Without it the content that was put with the same version of the inode stays.
        """
        handle = self._handle()
        data_bytes = _NO_DATA if data is None else len(data)
        _RECORD.pack_into(self._records, 0, *astuple(attributes), 0, data_bytes)
        lib.bpfuse_cache_place(handle, 1)
        if data is not None:
            self._copy([(0, data)])
        lib.bpfuse_cache_put(handle, 1, 0, ffi.NULL)

    def put_name(self, parent: int, name: bytes, ino: int) -> None:
        """Say which inode a name leads to. The inode is put by itself."""
        lib.bpfuse_cache_put_name(self._handle(), parent, name, _name_bytes(name), ino)

    def put_absent(self, parent: int, name: bytes) -> None:
        """Say that a directory has no entry of this name."""
        lib.bpfuse_cache_put_name(self._handle(), parent, name, _name_bytes(name), 0)

    def drop_name(self, parent: int, name: bytes) -> None:
        """Forget what is known of a name, if anything."""
        lib.bpfuse_cache_drop_name(self._handle(), parent, name, _name_bytes(name))

    def losses(self, directory: int) -> int:
        """Return what changes with each name of a directory that is taken from here, or cannot be put."""
        return int(lib.bpfuse_cache_losses(self._handle(), directory))

    def put_whole(self, directory: int, losses: int) -> bool:
        """Say that all names of a directory were put since :meth:`losses` returned what is given here.

        Other names are answered as absent from now on, until one of the directory's names is dropped or given up. False
        if it cannot be relied upon that all are here.
        """
        return bool(lib.bpfuse_cache_put_whole(self._handle(), directory, losses))

    def drop_whole(self, directory: int) -> None:
        """Forget that all names of a directory are here."""
        lib.bpfuse_cache_drop_whole(self._handle(), directory)

    def drop_inode(self, ino: int) -> None:
        """Forget an inode and its content, if they are known."""
        lib.bpfuse_cache_drop_inode(self._handle(), ino)

    def has_all(self, inodes: array[int], *, content: bool) -> bool:
        """Say whether all these inodes are here, and with ``content`` that of small files and symlinks, too.

        ``inodes`` is an array of type Q, of which the low 48 bits count.
        """
        numbers = ffi.from_buffer("__u64[]", inodes)
        return bool(lib.bpfuse_cache_has_all(self._handle(), numbers, len(inodes), content))

    def missing(self, inodes: array[int]) -> array[int]:
        """Return those of these inodes, an array of type Q, that are not here."""
        found = array("Q", bytes(8 * len(inodes)))
        numbers, out = ffi.from_buffer("__u64[]", inodes), ffi.from_buffer("__u64[]", found, require_writable=True)
        return found[: lib.bpfuse_cache_missing(self._handle(), numbers, len(inodes), out)]

    def take_evicted(self) -> Evicted:
        """Return what was given up to make room, and was not returned before."""
        lost, told = ffi.new("int *"), array("Q")
        chunk = ffi.new("__u64[]", _EVICTED)
        while count := lib.bpfuse_cache_take_evicted(self._handle(), chunk, _EVICTED, lost):
            told.frombytes(ffi.buffer(chunk, count * 8))
        directories = [key & _INO for key in told if key >> lib.BPFUSE_EVICTED_DIRECTORY_BIT]
        if directories:
            told = array("Q", [key for key in told if not key >> lib.BPFUSE_EVICTED_DIRECTORY_BIT])
        return Evicted(told, directories, not lost[0])

    def is_used(self, directory: int) -> bool | None:
        """Say whether the kernel has been asked for an entry of a directory since they were put; None: none is here."""
        used = lib.bpfuse_cache_is_used(self._handle(), directory)
        return None if used < 0 else bool(used)

    @property
    def room(self) -> Room:
        """What surely fits in, beside some use by others."""
        entries = min(self._fds.name_capacity, self._fds.inode_capacity)
        return Room(entries - entries // _RESERVED, self._fds.page_count - self._fds.page_count // _RESERVED)

    @property
    def listing_limit(self) -> int:
        """The bytes that a listing may have at most."""
        return int(self._fds.page_count * _PAGE // lib.BPFUSE_LISTING_SHARE)

    def put_listing(self, ino: int, entries: bytes) -> bool:
        """Say what entries (``struct fuse_dirent``, in the order of their offsets) a directory has, all of them.

        False if that is not kept: the directory's inode is not here, or the entries are too many.
        """
        return bool(lib.bpfuse_cache_put_listing(self._handle(), ino, entries, len(entries)))

    def drop_listing(self, ino: int) -> None:
        """Forget which entries a directory has, and nothing else of it."""
        lib.bpfuse_cache_drop_listing(self._handle(), ino)

    def put_xattrs(self, ino: int, xattrs: Mapping[bytes, bytes], *, listed: bool) -> bool:
        """Say what xattrs an inode has, all of them; ``listed``: whoever asks may have the list of their names.

        False if they are too many, or too large. They are dropped with the inode.
        """
        names = b"".join(name + b"\0" for name in xattrs)
        stored = names + b"".join(xattrs.values())
        if len(xattrs) > lib.BPFUSE_XATTRS or len(stored) > lib.BPFUSE_XATTR_BYTES:
            return False
        handle = self._handle()
        key = lib.bpfuse_cache_control(handle).hash_key
        value = ffi.new("struct bpfuse_xattrs_value *", {"bytes": stored, "count": len(xattrs)})
        value.list_bytes = len(names) if listed else lib.BPFUSE_XATTRS_UNLISTED
        offset = len(names)
        for entry, (name, content) in zip(value.entries, xattrs.items(), strict=False):
            lib.bpfuse_hash_name(name, _name_bytes(name), key, entry.hash)
            entry.offset, entry.size = offset, len(content)
            offset += len(content)
        lib.bpfuse_cache_put_xattrs(handle, ino, value)
        return True

    def lacks_xattrs(self, ino: int) -> bool:
        """Say whether it is known here that an inode has no xattrs: no, the BPF programs have answered that."""
        return False

    def renew(self, deadline_ns: int) -> None:
        """Let BPF answer until then (nanoseconds of CLOCK_BOOTTIME); 0 stops it at once."""
        lib.bpfuse_cache_set_deadline(self._handle(), deadline_ns)

    def bump_epoch(self) -> None:
        """Forget everything at once, the figures of STATFS aside."""
        lib.bpfuse_cache_bump_epoch(self._handle())

    @property
    def epoch(self) -> int:
        """The epoch that values are put with."""
        return int(lib.bpfuse_cache_control(self._handle()).epoch)

    def put_statfs(
        self, *, bsize: int, blocks: int, bfree: int, bavail: int, files: int, ffree: int, valid_until_ns: int
    ) -> None:
        """Set what STATFS answers: ``blocks``, ``bfree`` and ``bavail`` in units of ``bsize`` bytes."""
        values = {
            "bsize": bsize,
            "frsize": bsize,
            "namelen": lib.BPFUSE_NAME_MAX,
            "blocks": blocks,
            "bfree": bfree,
            "bavail": bavail,
            "files": files,
            "ffree": ffree,
            "valid_until": valid_until_ns,
        }
        lib.bpfuse_cache_set_statfs(self._handle(), ffi.new("struct bpfuse_statfs *", values))

    def drop_statfs(self) -> None:
        """Leave STATFS to the worker."""
        lib.bpfuse_cache_set_statfs(self._handle(), ffi.new("struct bpfuse_statfs *"))

    def is_open(self, ino: int) -> bool:
        """Whether a handle of this inode, of BPF's or counted by :meth:`opened`, may be open. False is certain."""
        return bool(lib.bpfuse_cache_opens(self._handle(), ino))

    def opened(self, ino: int) -> None:
        """Count a handle that the worker gives out; it stays counted when this worker ends."""
        lib.bpfuse_cache_opened(self._handle(), ino)

    def released(self, ino: int) -> None:
        """Count the release, seen by the worker, of a handle that BPF gave out or :meth:`opened` has counted."""
        lib.bpfuse_cache_released(self._handle(), ino)

    def locked(self, ino: int) -> None:
        """Have the worker answer FLUSH and RELEASE of an inode, until as many calls of :meth:`unlocked`.

        That stays so when this worker ends.
        """
        lib.bpfuse_cache_locked(self._handle(), ino)

    def unlocked(self, ino: int) -> None:
        """Take one :meth:`locked` back."""
        lib.bpfuse_cache_unlocked(self._handle(), ino)

    def set_backing(self, ino: int, backing_id: int) -> bool:
        """Have BPF open an inode with this backing, 0: have the worker open it, when it is put the next time.

        False if the kernel cache knows of too many such inodes.
        """
        return int(lib.bpfuse_cache_set_backing(self._handle(), ino, backing_id)) == 0

    def forget_backing(self, ino: int) -> None:
        """Have an inode opened as its size says, when it is put the next time."""
        lib.bpfuse_cache_forget_backing(self._handle(), ino)

    def figures(self) -> dict[str, Any]:
        """Return :func:`native.figures`, and what has gone wrong or been given up since this cache was made."""
        out = ffi.new("struct bpfuse_cache_figures *")
        lib.bpfuse_cache_figures(self._handle(), out)
        filling = {name: getattr(out, name) for name, _ in ffi.typeof(out[0]).fields}
        return {**native.figures(self._fds), "filling": filling}

    def close(self) -> None:
        """Unmap the maps; what is in them stays. Twice does no harm."""
        if self._cache is None:
            return
        for view in (self._record_words, self._records, self._pages):
            view.release()
        lib.bpfuse_cache_close(self._cache)
        self._cache = None

    def _handle(self) -> Any:
        if self._cache is None:
            raise ValueError("the kernel cache is closed")
        return self._cache


def _name_bytes(name: bytes) -> int:
    if len(name) > lib.BPFUSE_NAME_MAX:
        raise ValueError(f"a name of {len(name)} bytes")
    return len(name)


class NoKernelCache:
    """The kernel cache of a mount that is not accelerated: it forgets all it is told, but for which inodes have no
    xattrs. The kernel asks for some of each file that ``ls -l`` shows and before each write, and keeps no answer."""

    epoch = 0

    def __init__(self) -> None:
        self._bare: OrderedDict[int, None] = OrderedDict()

    def put(self, parent: int, entries: Sequence[DirectoryEntry]) -> None:
        for entry in entries:
            self.put_inode(entry.attributes)

    def put_inode(self, attributes: Attributes, data: bytes | None = None) -> None:
        self._bare.pop(attributes.ino, None)
        if not attributes.flags & _HAS_XATTRS:
            self._bare[attributes.ino] = None
            if len(self._bare) > _BARE:
                self._bare.popitem(last=False)

    def lacks_xattrs(self, ino: int) -> bool:
        return ino in self._bare

    def put_name(self, parent: int, name: bytes, ino: int) -> None:
        pass

    def put_absent(self, parent: int, name: bytes) -> None:
        pass

    def drop_name(self, parent: int, name: bytes) -> None:
        pass

    def drop_inode(self, ino: int) -> None:
        self._bare.pop(ino, None)

    def losses(self, directory: int) -> int:
        return 0

    def put_whole(self, directory: int, losses: int) -> bool:
        return False

    def drop_whole(self, directory: int) -> None:
        pass

    listing_limit = 0
    room = Room(0, 0)

    def missing(self, inodes: array[int]) -> array[int]:
        return inodes

    def take_evicted(self) -> Evicted:
        return Evicted(array("Q"), [], True)

    def is_used(self, directory: int) -> bool | None:
        return None

    def has_all(self, inodes: array[int], *, content: bool) -> bool:
        return False

    def put_listing(self, ino: int, entries: bytes) -> bool:
        return False

    def drop_listing(self, ino: int) -> None:
        pass

    def put_xattrs(self, ino: int, xattrs: Mapping[bytes, bytes], *, listed: bool) -> bool:
        return False

    def renew(self, deadline_ns: int) -> None:
        pass

    def bump_epoch(self) -> None:
        self._bare.clear()

    def put_statfs(
        self, *, bsize: int, blocks: int, bfree: int, bavail: int, files: int, ffree: int, valid_until_ns: int
    ) -> None:
        pass

    def drop_statfs(self) -> None:
        pass

    def is_open(self, ino: int) -> bool:
        return False

    def opened(self, ino: int) -> None:
        pass

    def released(self, ino: int) -> None:
        pass

    def locked(self, ino: int) -> None:
        pass

    def unlocked(self, ino: int) -> None:
        pass

    def set_backing(self, ino: int, backing_id: int) -> bool:
        return False

    def forget_backing(self, ino: int) -> None:
        pass

    def figures(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass
