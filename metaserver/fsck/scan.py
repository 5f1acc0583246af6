"""One look at everything that a volume stores: its names and inodes here, slices and counters in slices.py."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from metaserver import keys
from metaserver.engine.base import Snapshot
from metaserver.fsck import content, history, slices
from metaserver.fsck.content import Holding, Holdings
from metaserver.fsck.findings import Finding, Kind, text_of
from metaserver.fsck.paths import Paths
from metaserver.fsck.rows import Stream, find_inode, rows, unknown_keys
from metaserver.fsck.sorting import Groups, Sorter
from metaserver.records import Entry, Inode, Shard, pack_listed, unpack_listed
from metaserver.volumes import Volume
from metaserver.wire import ROOT_INO

#: Directories known to hang below the root are remembered up to this many.
_KNOWN_DIRECTORIES: Final = 100_000


class Link(NamedTuple):
    """An entry's place."""

    directory: int
    cookie: int


@dataclass(slots=True)
class Below:
    """What a directory holds."""

    entries: int = 0
    subdirectories: int = 0
    last_cookie: int = 0


@dataclass(slots=True)
class Totals:
    """What was counted in a scan."""

    entries: int = 0
    inodes: int = 0
    bytes: int = 0
    slices: int = 0


class Scan:
    """A scan of one snapshot. ``report`` is called with each finding, ``tick`` with (what, done, of how many) often.

    ``links`` (inode, directory, cookie of the entry) and ``uses`` (see content.py) are full afterwards.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        volume: Volume,
        report: Callable[[Finding], None],
        tick: Callable[[str, int, int], None],
    ) -> None:
        self.links = Sorter(3)
        self.uses = Sorter(4)
        self.totals = Totals()
        self._snapshot = snapshot
        self._volume = volume
        self._report = report
        self._tick = tick
        self._holders = Sorter(3)
        self._paths = Paths(snapshot, volume)
        self._connected: set[int] = {ROOT_INO}
        self._next_inos = [0] * keys.SHARDS
        self._expected = self._shards(_ignore)[0].inodes

    def run(self) -> None:
        """Look at everything."""
        self._read_names()
        self._read_inodes()
        for key in unknown_keys(self._snapshot, self._volume):
            self._stray(key)
        self._check_counters()
        history.check(self._snapshot, self._volume, self._found, self._stray, self._tick)
        self.totals.slices = slices.check(self._snapshot, self._volume, self.uses, self._found, self._stray, self._tick)

    def close(self) -> None:
        """Remove the temporary files."""
        for sorter in (self.links, self.uses, self._holders):
            sorter.close()

    # Names first: which inode has which entries

    def _read_names(self) -> None:
        for done, (key, value) in enumerate(Stream(self._snapshot, self._volume, b"e", _ignore)):
            entry = Entry.unpack(value)
            self.links.add(entry.ino, keys.number_of(key), entry.cookie)
            self._tick("names", done, self._expected)
            self.totals.entries += 1
        for key, _ in Stream(self._snapshot, self._volume, b"o", self._stray):
            session = keys.orphan_session(key)
            self._holders.add(keys.orphan_ino(key), int.from_bytes(session[:8]), int.from_bytes(session[8:]))

    # Then everything, inode by inode

    def _read_inodes(self) -> None:
        self._inodes, self._entries, self._listings = (
            Stream(self._snapshot, self._volume, kind, self._stray) for kind in (b"i", b"e", b"l")
        )
        self._holdings = Holdings(self._snapshot, self._volume, self._stray, self.uses)
        self._links, self._sessions = Groups(self.links), Groups(self._holders)
        streams = (self._inodes, self._entries, self._listings, self._holdings, self._links, self._sessions)
        if self._inodes.number != ROOT_INO:
            self._look_at(ROOT_INO)
        while (ino := min((s.number for s in streams if s.number is not None), default=None)) is not None:
            self._look_at(ino)
            self._tick("inodes", self.totals.inodes, self._expected)

    def _look_at(self, ino: int) -> None:
        """Check all that begins with one inode's number."""
        inode = next((Inode.unpack(ino, value) for _, value in self._inodes.take(ino)), None)
        below = self._look_below(ino, inode)
        holding = self._holdings.take(ino)
        links = [Link(*link) for link in self._links.take(ino)]
        sessions = [first.to_bytes(8) + second.to_bytes(8) for first, second in self._sessions.take(ino)]
        shard = keys.shard_of(ino)
        self._next_inos[shard] = max(self._next_inos[shard], ino // keys.SHARDS + 1)
        if inode is None:
            self._missing(ino, below, holding, links)
            self._drop_orphan_records(ino, sessions, "does not exist")
            return
        self.totals.inodes += 1
        self.totals.bytes += inode.size if stat.S_ISREG(inode.mode) else 0
        if stat.S_ISDIR(inode.mode):
            self._check_directory(inode, below, links, sessions)
        else:
            self._check_file(inode, links, sessions)
        content.check(inode, holding, lambda kind, *rest: self._about(inode, links, kind, *rest))

    # Directories' entries

    def _look_below(self, ino: int, inode: Inode | None) -> Below:
        """Check a directory's entries and their listing; those of what is no directory are strays."""
        below = Below()
        if inode is not None and not stat.S_ISDIR(inode.mode):
            for key, _ in (*self._entries.take(ino), *self._listings.take(ino)):
                self._stray(key)
            return below
        right = 0
        for key, value in self._entries.take(ino):
            right += self._look_at_entry(below, ino, keys.entry_name(key), Entry.unpack(value))
        if sum(1 for _ in self._listings.take(ino)) != right:
            self._find_stray_listings(ino)
        return below

    def _look_at_entry(self, below: Below, directory: int, name: bytes, entry: Entry) -> bool:
        """Count an entry; say whether the listing has it."""
        below.entries += 1
        below.last_cookie = max(below.last_cookie, entry.cookie)
        child = find_inode(self._snapshot, self._volume, entry.ino)
        below.subdirectories += child is not None and stat.S_ISDIR(child.mode)
        listed = self._snapshot.get(keys.listing(self._volume.id, directory, entry.cookie))
        if listed == pack_listed(entry.ino, name):
            return True
        what = "is not in its directory's listing" if listed is None else "is another one in its directory's listing"
        where = self._paths.below(directory, name)
        self._report(Finding(Kind.WRONG_LISTING, entry.ino, where, what, "write_listing", [directory, name]))
        return False

    def _find_stray_listings(self, directory: int) -> None:
        for key, value in rows(self._snapshot, keys.listing_from(self._volume.id, directory, 0)):
            ino, name = unpack_listed(value)
            cookie = keys.listing_cookie(key)
            entry = self._snapshot.get(keys.entry(self._volume.id, directory, name))
            if entry != Entry(ino, cookie).pack():
                where = self._paths.below(directory, name)
                what = "is in its directory's listing, and there is no such entry"
                self._report(Finding(Kind.STRAY_LISTING, ino, where, what, "drop_listing", [directory, cookie]))

    # Inodes

    def _missing(self, ino: int, below: Below, holding: Holding, links: list[Link]) -> None:
        """An inode that does not exist, and perhaps should."""
        if ino == ROOT_INO or below.entries or (holding.has_content and not holding.is_given_up):
            kind = Kind.ENTRY_WITHOUT_INODE if links or ino == ROOT_INO else Kind.CONTENT_WITHOUT_INODE
            is_directory = ino == ROOT_INO or below.entries > 0
            what = f"has no inode; {'its entries are' if is_directory else 'its content is'} still there"
            arguments = [ino, is_directory, *_made_up(ino, below, holding, links)]
            self._report(Finding(kind, ino, self._where(ino, links), what, "make_inode", arguments))
            return
        for link in links:
            where = self._where(ino, [link])
            what = f"names inode {ino}, which does not exist"
            self._report(Finding(Kind.ENTRY_WITHOUT_INODE, ino, where, what, "drop_entry", [ino, *link]))
        if (holding.has_xattrs or holding.stored is not None) and not holding.is_given_up:
            what = "does not exist, and has extended attributes or empty content"
            self._report(Finding(Kind.STRAY_CONTENT, ino, self._where(ino, links), what, "give_up_content", [ino]))

    def _check_directory(self, inode: Inode, below: Below, links: list[Link], sessions: list[bytes]) -> None:
        nlink = 2 + below.subdirectories
        if below.last_cookie > inode.version:
            what = f"is of version {inode.version}, and has an entry of version {below.last_cookie}"
            self._about(inode, links, Kind.WRONG_VERSION, what, "set_version", [inode.ino, below.last_cookie])
        if inode.ino == ROOT_INO:
            self._drop_links(inode, links)
            if inode.parent != ROOT_INO:
                what = f"is said to be in directory {inode.parent}"
                self._about(inode, [], Kind.WRONG_PARENT, what, "set_parent", [ROOT_INO, ROOT_INO])
        elif links:
            self._check_place(inode, links)
        elif inode.nlink == 0 and below.entries == 0:
            self._check_unlinked(inode, sessions)
            return
        else:
            what = "is a directory that no entry names"
            self._about(inode, links, Kind.INODE_WITHOUT_ENTRY, what, "attach", [inode.ino, nlink])
        self._check_links(inode, nlink, links, sessions)

    def _check_file(self, inode: Inode, links: list[Link], sessions: list[bytes]) -> None:
        if inode.parent and all(link.directory != inode.parent for link in links):
            what = f"has no name in directory {inode.parent}, in which it is said to be"
            parent = links[0].directory if links else 0
            self._about(inode, links, Kind.WRONG_PARENT, what, "set_parent", [inode.ino, parent])
        if not links and inode.nlink == 0:
            self._check_unlinked(inode, sessions)
            return
        if not links:
            self._about(inode, links, Kind.INODE_WITHOUT_ENTRY, "has no entry", "attach", [inode.ino, 1])
        self._check_links(inode, len(links) or inode.nlink, links, sessions)

    def _check_unlinked(self, inode: Inode, sessions: list[bytes]) -> None:
        """An inode without links is kept for sessions; all of them have ended."""
        if not sessions:
            what = "has no links, and no session keeps it"
            self._about(inode, [], Kind.LEAKED_INODE, what, "delete_inode", [inode.ino])
        for session in sessions:
            what = f"is unlinked, and kept for session {session.hex()[:8]}, which has ended"
            self._about(inode, [], Kind.ORPHAN, what, "reap", [session, inode.ino])

    def _check_links(self, inode: Inode, nlink: int, links: list[Link], sessions: list[bytes]) -> None:
        if inode.nlink != nlink:
            what = f"counts {inode.nlink} links instead of {nlink}"
            self._about(inode, links, Kind.WRONG_NLINK, what, "set_nlink", [inode.ino, nlink])
        self._drop_orphan_records(inode.ino, sessions, "has links")

    def _drop_orphan_records(self, ino: int, sessions: list[bytes], why: str) -> None:
        for session in sessions:
            what = f"is kept as unlinked for session {session.hex()[:8]}, and {why}"
            arguments = [keys.orphan(self._volume.id, session, ino)]
            self._report(Finding(Kind.STRAY_ORPHAN, ino, f"inode {ino}", what, "delete_key", arguments))

    # The tree

    def _check_place(self, inode: Inode, links: list[Link]) -> None:
        """A directory has one entry, in its parent, and hangs below the root."""
        kept = next((link for link in links if link.directory == inode.parent), links[0])
        self._drop_links(inode, [link for link in links if link is not kept])
        if kept.directory != inode.parent:
            what = f"is in directory {kept.directory}, and is said to be in {inode.parent}"
            self._about(inode, [kept], Kind.WRONG_PARENT, what, "set_parent", [inode.ino, kept.directory])
        elif inode.ino == min(self._loop(inode), default=0):
            self._about(inode, [kept], Kind.DIRECTORY_LOOP, "is below itself", "break_loop", [inode.ino, *kept])

    def _drop_links(self, inode: Inode, links: list[Link]) -> None:
        for link in links:
            what = "is the root" if inode.ino == ROOT_INO else f"is a directory with another place, in {inode.parent}"
            self._about(inode, [link], Kind.DIRECTORY_LINKED, what, "drop_entry", [inode.ino, *link])

    def _loop(self, inode: Inode) -> list[int]:
        """Return the loop of parents that a directory is above of, or nothing."""
        way: dict[int, None] = {}
        ino = inode.ino
        while ino not in self._connected:
            if ino in way:
                passed = list(way)
                return passed[passed.index(ino) :]
            way[ino] = None
            above = find_inode(self._snapshot, self._volume, ino)
            if above is None:
                return []
            ino = above.parent
        if len(self._connected) > _KNOWN_DIRECTORIES:
            self._connected = {ROOT_INO}
        self._connected.update(way)
        return []

    # Counters

    def _check_counters(self) -> None:
        total, following = self._shards(self._stray)
        wrong = self.totals.inodes - total.inodes, self.totals.bytes - total.total_bytes
        if wrong != (0, 0):
            what = (
                f"count {total.inodes} inodes and {total.total_bytes} bytes"
                f" instead of {self.totals.inodes} and {self.totals.bytes}"
            )
            self._found(Kind.WRONG_COUNTER, "the statistics", what, "add_to_statistics", list(wrong))
        for shard, least in enumerate(self._next_inos):
            if following[shard] < least:
                what = f"comes after numbers that are in use, up to {(least - 1) * keys.SHARDS + shard}"
                where = f"the next inode number of shard {shard}"
                self._found(Kind.WRONG_COUNTER, where, what, "raise_inodes", [shard, least])

    def _shards(self, stray: Callable[[bytes], None]) -> tuple[Shard, list[int]]:
        """Return the sums of all shards, and the number each gives out next."""
        total, following = Shard(), [1] * keys.SHARDS
        for key, value in Stream(self._snapshot, self._volume, b"s", stray):
            shard = Shard.unpack(value)
            following[key[-1]] = shard.next
            total.inodes += shard.inodes
            total.total_bytes += shard.total_bytes
        return total, following

    # Reporting

    def _about(self, inode: Inode, links: list[Link], kind: Kind, what: str, repair: str, arguments: list[Any]) -> None:
        self._report(Finding(kind, inode.ino, self._where(inode.ino, links), what, repair, arguments))

    def _found(self, kind: Kind, where: str, what: str, repair: str, arguments: list[Any]) -> None:
        self._report(Finding(kind, 0, where, what, repair, arguments))

    def _stray(self, key: bytes) -> None:
        where = f"key {text_of(keys.kind_of(key))} {key[len(keys.next_slice(0)) :].hex()}"
        self._found(Kind.STRAY_KEY, where, "is of no known form", "delete_key", [key])

    def _where(self, ino: int, links: list[Link]) -> str:
        return self._paths.of(ino, links[0].directory, links[0].cookie) if links else self._paths.of_directory(ino)


def _made_up(ino: int, below: Below, holding: Holding, links: list[Link]) -> list[int]:
    """Return parent, links, size, version and whether it is inline, for an inode made anew."""
    parent = links[0].directory if links else ROOT_INO
    if ino == ROOT_INO or below.entries:
        return [parent, 2 + below.subdirectories, 0, max(1, below.last_cookie), 0]
    is_inline = not holding.has_slices
    size = (holding.stored or 0) if is_inline else holding.end
    return [links[0].directory if links else 0, max(1, len(links)), size, max(1, holding.version), int(is_inline)]


def _ignore(_key: bytes) -> None:
    """What is of a wrong form is told of elsewhere."""
