"""The BPF maps of one client, and what the programs answer from them: ``bpf/*.bpf.h`` in a few lines.

The maps outlive workers. Answers are given by the kernel's node, whatever state the worker is in; they check the
deadline and the epoch of each value as the programs do. At random the maps give up a directory, as full ones do.
"""

from __future__ import annotations

import random
import stat
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from fuseclient.kernel_cache import Evicted, Room
from metaserver import wire
from simulation.clocks import boottime_ns
from simulation.loop import VirtualLoop

_FORGETTING: Final = 0.02


class _Name(NamedTuple):
    ino: int
    epoch: int


class _Inode(NamedTuple):
    attributes: wire.Attributes
    data: bytes | None
    epoch: int


class Answer(NamedTuple):
    """A reply. ``attributes`` None: the name is absent. ``ttl_s`` is for the kernel's caches."""

    attributes: wire.Attributes | None
    ttl_s: float


class Maps:
    """The maps: the worker's side is :class:`fuseclient.kernel_cache.Cache`, the programs' are the ``answer_`` methods.

    ``checks_deadline`` and ``forgets_wholes`` False are rules switched off, for tests that show that they are needed.
    """

    checks_deadline = True
    forgets_wholes = True

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        self._loop = loop
        self._rng = rng
        self._names: dict[tuple[int, bytes], _Name] = {}
        #: Directories all of whose names are here, with the epoch.
        self._wholes: dict[int, int] = {}
        self._losses: Counter[int] = Counter()
        self._inodes: dict[int, _Inode] = {}
        self._opens: dict[int, int] = {}
        #: What was given up, and is not told yet.
        self._evicted: list[int] = []
        self._given_up: list[int] = []
        self.locks: dict[int, int] = {}
        self.deadline_ns = 0
        self.epoch = 0
        self.answers = 0

    # The worker's side

    def put(self, parent: int, entries: Sequence[wire.DirectoryEntry]) -> None:
        for entry in entries:
            self.put_name(parent, entry.name, entry.attributes.ino)
            self.put_inode(entry.attributes, None if entry.data is None else bytes(entry.data))

    def put_inode(self, attributes: wire.Attributes, data: bytes | None = None) -> None:
        old = self._inodes.get(attributes.ino)
        if data is None and old is not None and old.epoch == self.epoch:
            same = (old.attributes.version, old.attributes.size) == (attributes.version, attributes.size)
            data = old.data if same else None
        self._inodes[attributes.ino] = _Inode(attributes, data, self.epoch)

    def put_name(self, parent: int, name: bytes, ino: int) -> None:
        self._evict()
        self._names[parent, name] = _Name(ino, self.epoch)

    def put_absent(self, parent: int, name: bytes) -> None:
        self.put_name(parent, name, 0)

    def _evict(self) -> None:
        here = [*(parent for parent, _ in self._names), *self._wholes]
        if here and self._rng.random() < _FORGETTING:
            self.give_up(self._rng.choice(here))

    def give_up(self, directory: int) -> None:
        """Evict a directory's entries."""
        self._lose(directory)
        for key in [key for key in self._names if key[0] == directory]:
            ino = self._names.pop(key).ino
            if self._inodes.pop(ino, None) is not None:
                self._evicted.append(ino)
        self._given_up.append(directory)

    def missing(self, inodes: array[int]) -> array[int]:
        return array("Q", [ino for ino in inodes if not self.has_all(array("Q", [ino]), content=False)])

    def take_evicted(self) -> Evicted:
        directories = [each for each in self._given_up if self.is_used(each) is None]
        taken = Evicted(array("Q", self._evicted), directories, True)
        self._evicted, self._given_up = [], []
        return taken

    def is_used(self, directory: int) -> bool | None:
        held = directory in self._wholes or any(parent == directory for parent, _ in self._names)
        return True if held else None

    def drop_name(self, parent: int, name: bytes) -> None:
        self._lose(parent)
        self._names.pop((parent, name), None)

    def _lose(self, directory: int) -> None:
        """A name is about to be taken away."""
        if self.forgets_wholes:
            self._losses[directory] += 1
            self.drop_whole(directory)

    def put_whole(self, directory: int, losses: int) -> bool:
        self._evict()
        if losses == self.losses(directory):
            self._wholes[directory] = self.epoch
        return losses == self.losses(directory)

    def losses(self, directory: int) -> int:
        return self.epoch << 32 | self._losses[directory]

    def drop_whole(self, directory: int) -> None:
        self._wholes.pop(directory, None)

    def drop_inode(self, ino: int) -> None:
        self._inodes.pop(ino, None)

    def has_all(self, inodes: array[int], *, content: bool) -> bool:
        found = [self._inodes.get(ino) for ino in inodes]
        return all(each and each.epoch == self.epoch and not (content and each.data is None) for each in found)

    room = Room(0, 0)
    #: The model's kernel lists through the worker.
    listing_limit = 0

    def put_listing(self, ino: int, entries: bytes) -> bool:
        return False

    def put_xattrs(self, ino: int, xattrs: Mapping[bytes, bytes], *, listed: bool) -> bool:
        return False

    def drop_listing(self, ino: int) -> None:
        pass

    def lacks_xattrs(self, ino: int) -> bool:
        return False

    def renew(self, deadline_ns: int) -> None:
        self.deadline_ns = deadline_ns

    def bump_epoch(self) -> None:
        self.epoch += 1

    def put_statfs(self, **figures: int) -> None:
        pass

    def drop_statfs(self) -> None:
        pass

    def is_open(self, ino: int) -> bool:
        return self._opens.get(ino, 0) > 0

    def opened(self, ino: int) -> None:
        self._opens[ino] = self._opens.get(ino, 0) + 1

    def locked(self, ino: int) -> None:
        self.locks[ino] = self.locks.get(ino, 0) + 1

    def unlocked(self, ino: int) -> None:
        self.locks[ino] -= 1

    def released(self, ino: int) -> None:
        self._opens[ino] -= 1

    def set_backing(self, ino: int, backing_id: int) -> bool:
        return False

    def forget_backing(self, ino: int) -> None:
        pass

    def figures(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass

    # The programs' side

    def _left_s(self) -> float:
        left_s = (self.deadline_ns - boottime_ns(self._loop)) / 1e9
        return left_s if self.checks_deadline else max(left_s, 3600.0)

    def _peek(self, ino: int) -> _Inode | None:
        """Return what may be answered of an inode: nothing of one with a mode of 0, which is being written."""
        inode = self._inodes.get(ino)
        if inode is None or inode.epoch != self.epoch or self._left_s() <= 0 or not inode.attributes.mode:
            return None
        return inode

    def answer_lookup(self, parent: int, name: bytes) -> Answer | None:
        """Answer LOOKUP, or None: a miss."""
        found = self._names.get((parent, name))
        if found is None and parent in self._wholes:
            found = _Name(0, self._wholes[parent])
        if found is None or found.epoch != self.epoch or self._left_s() <= 0:
            return None
        if not found.ino:
            self.answers += 1
            return Answer(None, self._left_s())
        return self.answer_getattr(found.ino)

    def answer_getattr(self, ino: int) -> Answer | None:
        """Answer GETATTR."""
        inode = self._peek(ino)
        if inode is None:
            return None
        self.answers += 1
        return Answer(inode.attributes, self._left_s())

    def answer_open(self, ino: int) -> bool:
        """Answer OPEN for reading: the pages may be kept."""
        inode = self._peek(ino)
        if inode is None or not stat.S_ISREG(inode.attributes.mode):
            return False
        self._opens[ino] = self._opens.get(ino, 0) + 1
        return True

    def answer_content(self, ino: int) -> bytes | None:
        """Answer READ of the whole file, or READLINK."""
        inode = self._peek(ino)
        if inode is None or stat.S_ISDIR(inode.attributes.mode) or inode.data is None:
            return None
        self.answers += 1
        return inode.data

    def answer_getxattr(self, ino: int) -> bool:
        """Answer GETXATTR of an inode that has none; of one that is being written, too."""
        inode = self._inodes.get(ino)
        if inode is None or inode.epoch != self.epoch or self._left_s() <= 0:
            return False
        has_none = not inode.attributes.flags & wire.InodeFlag.HAS_XATTRS
        self.answers += has_none
        return has_none

    def answer_release(self, ino: int) -> None:
        """Answer RELEASE of a handle that was given out here."""
        self._opens[ino] = max(0, self._opens.get(ino, 0) - 1)
