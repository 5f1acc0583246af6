"""What goes into the kernel's maps, and what must not.

Every put is either of a reply to a read, under a token taken before the read was sent, so that what was dropped
meanwhile is not put back; or of a reply to a change made here, which is newer than all reads sent before it. Of inodes
that are open for writing only their names are put, but for one that was just made and is as it was.

Everything here is synchronous: between a reply and its put there is no await.
"""

from __future__ import annotations

import stat
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from fuseclient.data.writer import Closed
from fuseclient.worker.guard import Guard, Token
from fuseclient.worker.inode_set import InodeSet
from fuseclient.worker.listings import Entry, Listings
from fuseclient.worker.warm_directories import WarmDirectories
from fuseclient.worker.whole import WholeDirectories
from metaserver import wire

if TYPE_CHECKING:
    from fuseclient.kernel_cache import Cache

#: As a plain integer, which is a hundred times as fast: it is asked of each entry of a listing.
_INLINE: Final = int(wire.InodeFlag.INLINE)
#: The bits of a mode that say what an inode is.
_TYPE: Final = 0o170000
#: Inodes changed here of which the newest version is remembered.
_RECENT: Final = 1024


class Feeder:
    """The one way into the maps. ``is_written`` says whether an inode is open for writing, or its pages are on the way
    out of the kernel; ``writes_any`` whether there may be any of which it does.

    ``inherits``: the kernel may hold pages of files that an earlier worker knew of. Once everything is dropped, a file
    is not put before the kernel has dropped its pages, which ``on_old_pages`` is to see to.
    """

    def __init__(
        self,
        cache: Cache,
        is_written: Callable[[int], bool],
        *,
        writes_any: Callable[[], bool] = lambda: True,
        inherits: bool = False,
        on_old_pages: Callable[[int], None] = lambda ino: None,
    ) -> None:
        self._cache = cache
        self._is_written = is_written
        self._writes_any = writes_any
        self._inherits = inherits
        self._on_old_pages = on_old_pages
        self._distrusts_pages = False
        self._guard = Guard()
        self._listings = Listings(cache)
        self._recent: OrderedDict[int, int] = OrderedDict()
        #: Rises with everything that is dropped.
        self.generation = 0
        #: Inodes of which the kernel was told anything, and directories of whose names, since :meth:`untouched`.
        self.touched = InodeSet()
        self.touched_names = InodeSet()
        #: The files that the kernel may hold pages of, whoever answered its requests.
        self.paged = InodeSet(also=self.touched)
        #: The directories that it may hold listings of.
        self.listed = InodeSet(also=self.touched_names)
        #: What else it may hold attributes of, which outlive the names that lead there: of directories, links, devices.
        self.told = InodeSet(also=self.touched)
        #: What is known of whole directories, to be used while there is a lease.
        self.whole = WholeDirectories()
        #: What was put whole into the maps, and may have been evicted since.
        self.warm = WarmDirectories()
        #: Told of what an inode has become by a change made here.
        self.on_changed: Callable[[wire.Attributes], object] = lambda attributes: None
        #: The same, if something else has changed it meanwhile, here or elsewhere: it may be newer than this.
        self.on_overtaken: Callable[[wire.Attributes], object] = lambda attributes: None
        #: Says of an inode that is open for writing whether it is nevertheless what these attributes say.
        self.is_shown: Callable[[wire.Attributes], bool] = lambda attributes: False
        #: Says what a directory's attributes are with all that was made in it and is not committed.
        self.overlay: Callable[[wire.Attributes], wire.Attributes] = lambda attributes: attributes
        #: Told of each inode that is dropped; ``None`` is all of them.
        self.on_drop: Callable[[int | None], None] = lambda ino: None
        #: Told of each part of a directory that was fetched.
        self.on_pages: list[Callable[[wire.DirectoryPage], None]] = []

    def begin(self) -> Token:
        """Return the token of a read that is about to be sent: a context that ends when its reply has been put."""
        return self._guard.begin()

    def unchanged(self, token: Token, ino: int) -> bool:
        """Say whether an inode was not dropped since the token was taken."""
        return self._guard.may_put(token, ino)

    # Replies to reads

    def fresh(self, token: Token, parent: int, name: bytes, ino: int | None) -> bool:
        """Say whether neither the name nor the inode was dropped since the token was taken."""
        return self._guard.may_put(token, (parent, name)) and (ino is None or self._guard.may_put(token, ino))

    def page(self, token: Token, page: wire.DirectoryPage) -> None:
        """Put a part of a directory."""
        parent = page.directory.ino
        self.inode(token, page.directory)
        whole, named = self._may_be_put(token, parent, page.entries)
        for entry in named:
            self._put_name(parent, entry.name, entry.attributes.ino)
        self.tells_all(entry.attributes for entry in whole)
        self.touched_names.add(parent)
        self._cache.put(parent, whole)
        for told in self.on_pages:
            told(page)

    def _may_be_put(
        self, token: Token, parent: int, entries: Iterable[wire.DirectoryEntry]
    ) -> tuple[list[wire.DirectoryEntry], list[wire.DirectoryEntry]]:
        """Return the entries of a directory that may be put, and those of which only the names may be."""
        if not self._guard.is_undisturbed(token):
            entries = [entry for entry in entries if self._guard.may_put(token, (parent, entry.name))]
            wanted = [self._may_put_inode(token, entry.attributes) for entry in entries]
        else:  # nearly always, and then no entry takes a look at the guard
            entries = list(entries)
            if self._all_wanted():
                return entries, []
            wanted = [self._wanted(entry.attributes) for entry in entries]
        if all(wanted):
            return entries, []
        both = list(zip(entries, wanted, strict=True))
        return [entry for entry, may in both if may], [entry for entry, may in both if not may]

    def _all_wanted(self) -> bool:
        """Say whether :meth:`_wanted` holds of every inode that has a name: there is nothing that could be against."""
        return not (self._recent or self._distrusts_pages or self._writes_any())

    def same_names(self, token: Token, ino: int) -> bool:
        """Say whether no name of a directory was dropped, made or removed since the token was taken."""
        return self._guard.may_put(token, _listing(ino))

    def losses(self, ino: int) -> int:
        """To be taken before the names of a whole directory are put, for :meth:`know_whole`."""
        return self._cache.losses(ino)

    def know_whole(self, token: Token, ino: int, names: Mapping[bytes, int], losses: int) -> None:
        """All names of a directory were put, and these are they, with what they stand for, if none was dropped, made or
        removed since the token.

        What it lacks is absent from now on, until one of its names is dropped.
        """
        if self.same_names(token, ino):
            self.whole.know(ino, names)
            self.put_whole(token, ino, losses)

    def put_whole(self, token: Token, ino: int, losses: int) -> None:
        """As :meth:`know_whole`, of a directory whose names are not to be remembered here."""
        if self.same_names(token, ino):
            self.touched_names.add(ino)
            self._cache.put_whole(ino, losses)

    def forget_whole(self, ino: int) -> None:
        """A directory is no more."""
        self.whole.forget(ino)
        self._cache.drop_whole(ino)

    def listing(
        self, token: Token, ino: int, after: int, entries: Sequence[Entry | wire.DirectoryEntry], *, complete: bool
    ) -> None:
        """Put the entries of a directory that follow a cookie; see :meth:`Listings.fetched`."""
        if self._guard.may_put(token, _listing(ino)):
            self.listed.add(ino)
            self._listings.fetched(ino, after, entries, complete=complete)

    def found(self, token: Token, parent: int, name: bytes, attributes: wire.Attributes) -> bool:
        """Put what a lookup found; say whether it was fresh."""
        self.inode(token, attributes)
        if self._guard.may_put(token, (parent, name)):
            self._put_name(parent, name, attributes.ino)
        return self.fresh(token, parent, name, attributes.ino)

    def absent(self, token: Token, parent: int, name: bytes) -> bool:
        """Put that a lookup found nothing; say whether it was fresh."""
        fresh = self._guard.may_put(token, (parent, name))
        if fresh:
            self._put_name(parent, name, 0)
        return fresh

    def inode(self, token: Token, attributes: wire.Attributes, content: bytes | None = None) -> bool:
        """Put attributes, with the whole content of a small file; say whether they were fresh."""
        if self._may_put_inode(token, attributes):
            self._put_inode(attributes, content)
        return self._guard.may_put(token, attributes.ino)

    def may_keep(self, token: Token, attributes: wire.Attributes) -> bool:
        """Say whether what was fetched of an inode is what it is, and nobody is changing it here."""
        return self._may_put_inode(token, attributes)

    def _may_put_inode(self, token: Token, attributes: wire.Attributes) -> bool:
        return self._guard.may_put(token, attributes.ino) and self._wanted(attributes)

    def _wanted(self, attributes: wire.Attributes) -> bool:
        """Say whether an inode may lie in the maps: it has links, nobody writes it, and nothing newer is known."""
        return (
            attributes.nlink > 0
            and not self._is_written(attributes.ino)
            and attributes.version >= self._recent.get(attributes.ino, 0)
            and not self._has_old_pages(attributes)
        )

    def _has_old_pages(self, attributes: wire.Attributes) -> bool:
        """Say whether the kernel may hold pages of an inode that nobody here knows of; they are to go then."""
        if not self._distrusts_pages:
            return False
        known = {stat.S_IFREG: self.paged, stat.S_IFDIR: self.listed}.get(stat.S_IFMT(attributes.mode))
        if known is None or attributes.ino in known:
            return False
        self._on_old_pages(attributes.ino)
        return True

    def pages_dropped(self, token: Token, ino: int) -> None:
        """The kernel has dropped an inode's pages, which it was told to after the token was taken."""
        if self._guard.may_put(token, ino):
            self.paged.add(ino)
            self.listed.add(ino)

    def _put_inode(self, attributes: wire.Attributes, content: bytes | None) -> None:
        self.tells(attributes)
        self._cache.put_inode(self.overlay(attributes), content)

    def _put_name(self, parent: int, name: bytes, ino: int) -> None:
        """Put what a name stands for; 0: nothing."""
        self.touched_names.add(parent)
        if ino:
            self._cache.put_name(parent, name, ino)
        else:
            self._cache.put_absent(parent, name)

    def tells(self, attributes: wire.Attributes) -> None:
        """The kernel may keep these, from the maps or from a reply that says so."""
        (self.paged if stat.S_ISREG(attributes.mode) else self.told).add(attributes.ino)

    def tells_all(self, inodes: Iterable[wire.Attributes]) -> None:
        """As :meth:`tells`, of many at once."""
        files: list[int] = []
        others: list[int] = []
        for attributes in inodes:
            (files if attributes.mode & _TYPE == stat.S_IFREG else others).append(attributes.ino)
        self.paged.add_all(files)
        self.told.add_all(others)

    # Changes made through this mount

    def changed(self, token: Token, attributes: Iterable[wire.Attributes]) -> None:
        """Replace the inodes that a change made here touched; drop those that others have changed meanwhile."""
        for each in attributes:
            fresh = self._guard.may_put(token, each.ino)
            self.drop_inode(each.ino)
            self._remember(each)
            (self.on_changed if fresh else self.on_overtaken)(each)
            if fresh and self._wanted(each):
                self._put_inode(each, None)
            elif fresh and self._is_written(each.ino) and each.nlink > 0 and self.is_shown(each):
                self._cache.put_inode(each)
            elif fresh:
                self.written(each)

    def written(self, attributes: wire.Attributes) -> None:
        """Put of an inode that is open for writing only whether it has xattrs: the kernel asks before each write."""
        if attributes.nlink > 0 and self._is_written(attributes.ino):
            self._cache.put_inode(msgspec.structs.replace(attributes, mode=0, size=0))

    def named(self, token: Token, parent: int, name: bytes, ino: int) -> None:
        """A name was given to an inode."""
        if not self._guard.may_put(token, (parent, name)):
            self.drop_name(parent, name)
            return
        self._renew_name(parent, name)
        self.whole.named(parent, name, ino)
        self._put_name(parent, name, ino)

    def made(
        self, parent: int, name: bytes, attributes: wire.Attributes, directory: wire.Attributes | None = None
    ) -> None:
        """A file was made here, with a number that was never used before, and is open for writing.

        ``directory``: what the directory was before, if that is known.
        """
        self._renew_name(parent, name)
        self.whole.named(parent, name, attributes.ino)
        self._put_name(parent, name, attributes.ino)
        if self.is_shown(attributes):
            self._cache.put_inode(attributes)
        else:
            self.written(attributes)
        self._names_changed(parent, directory)

    def renamed(
        self, parent: int, name: bytes, new_name: bytes, file: Closed, directory: wire.Attributes | None = None
    ) -> None:
        """A file that nobody else knows of was given another name in its directory, of which see :meth:`made`."""
        with self.begin() as token:
            self.closed(file)
            self.unnamed(token, parent, name)
            self.named(token, parent, new_name, file.attributes.ino)
        self._names_changed(parent, directory)

    def _names_changed(self, parent: int, directory: wire.Attributes | None) -> None:
        self._drop_attributes(parent)
        if directory is not None and self._wanted(directory):
            self._put_inode(directory, None)

    def unnamed(self, token: Token, parent: int, name: bytes) -> None:
        """A name was removed."""
        if not self._guard.may_put(token, (parent, name)):
            self.drop_name(parent, name)
            return
        self._renew_name(parent, name)
        self.whole.unnamed(parent, name)
        self._put_name(parent, name, 0)

    def removed(self, parent: int, name: bytes, ino: int, directory: wire.Attributes | None = None) -> None:
        """A name of a file was removed here, which the metaserver is told later. ``directory``: as of :meth:`made`."""
        self._renew_name(parent, name)
        self.whole.unnamed(parent, name)
        self._put_name(parent, name, 0)
        self.drop_inode(ino)
        self._names_changed(parent, directory)

    def closed(self, closed: Closed) -> None:
        """The last writer of a file has gone; what is known of it is as new as its last change or break."""
        self.drop_inode(closed.attributes.ino)
        if self._wanted(closed.attributes):
            self._put_inode(closed.attributes, closed.content)

    def content(self, attributes: wire.Attributes, content: bytes) -> None:
        """Put a new inode's content (a symlink's target), if :meth:`changed` may put its attributes."""
        if self._wanted(attributes):
            self._put_inode(attributes, content)

    def _remember(self, attributes: wire.Attributes) -> None:
        self._recent[attributes.ino] = max(attributes.version, self._recent.get(attributes.ino, 0))
        self._recent.move_to_end(attributes.ino)
        if len(self._recent) > _RECENT:
            self._recent.popitem(last=False)

    # Dropping

    def drop_name(self, parent: int, name: bytes) -> None:
        """Forget a name, and that it is absent."""
        self.whole.forget(parent)
        self.warm.forget(parent)
        self._drop_name(parent, name)

    def _drop_name(self, parent: int, name: bytes) -> None:
        self._renew_name(parent, name)
        self._cache.drop_name(parent, name)

    def _renew_name(self, parent: int, name: bytes) -> None:
        """What is known of a name, but for what is about to be put in its place, is out of date."""
        self.generation += 1
        self._guard.dropped((parent, name))
        self._guard.dropped(_listing(parent))
        self._listings.forget(parent)

    def drop_inode(self, ino: int) -> None:
        """Forget an inode's attributes and content."""
        self._drop_attributes(ino)
        self.on_drop(ino)

    def _drop_attributes(self, ino: int) -> None:
        self.generation += 1
        self._guard.dropped(ino)
        self._cache.drop_inode(ino)

    def drop_names(self, ino: int) -> None:
        """Forget what is known of a directory's names, none of which are in the maps, and its listing."""
        self.generation += 1
        self.whole.forget(ino)
        self.warm.forget(ino)
        self._cache.drop_whole(ino)
        self._guard.dropped_names(ino)
        self._listings.forget(ino)

    def untouched(self, inodes: InodeSet, directories: Iterable[int]) -> None:
        """From now on it is noted if the kernel is told anything of these inodes, or of names in these directories, of
        which none is in the maps.
        """
        self.touched.subtract(inodes)
        for ino in directories:
            self.touched_names.discard(ino)
            self._guard.dropped(_listing(ino))
            self._listings.forget(ino)

    def drop_everything(self) -> None:
        """Forget all there is."""
        self.generation += 1
        self._distrusts_pages = self._inherits
        self._guard.dropped_all()
        self._recent.clear()
        self.whole.clear()
        self.warm.clear()
        self._listings.clear()
        self._cache.bump_epoch()
        self._cache.drop_statfs()
        self.on_drop(None)


def comes_with_directory(attributes: wire.Attributes) -> bool:
    """Say whether a fetch of its directory brings the content of a file, within the budget; empty ones have none."""
    return bool(0 < attributes.size <= wire.MAX_INLINE and attributes.flags & _INLINE and stat.S_ISREG(attributes.mode))


def _listing(ino: int) -> tuple[int, bytes]:
    """Return what a directory's listing is guarded by."""
    return ino, b""
