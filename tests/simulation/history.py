"""What the programs on the clients did and saw, and what the engine committed.

A register is one thing that can be read by itself: what a name stands for (``"name"``, directory, name), an inode's
owner, permissions, time of access and number of links (``"owner"``, ``"mode"``, ``"atime"``, ``"links"``), an extended
attribute (``"xattr"``, inode, name), and a small file's content or a symlink's target (``"data"``). Of a log, to which
programs append, it is how often each record is in it (``"record"``, inode, record).
"""

from __future__ import annotations

import contextlib
import enum
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from simulation.loop import Node, VirtualLoop, current_node

Register = tuple[str, int, bytes]
RECORD_BYTES: Final = 16

#: Seconds that a worker that is new, or whose machine was suspended, has to clear the kernel's caches.
_SETTLING_S: Final = 0.5


class Any_(enum.Enum):
    """Values that stand for many."""

    PRESENT = "present"


#: Of a name: any inode.
PRESENT: Final = Any_.PRESENT
Value = int | bytes | Any_


def name_of(parent: int, name: bytes) -> Register:
    return "name", parent, name


def owner_of(ino: int) -> Register:
    return "owner", ino, b""


def links_of(ino: int) -> Register:
    return "links", ino, b""


def mode_of(ino: int) -> Register:
    return "mode", ino, b""


def atime_of(ino: int) -> Register:
    return "atime", ino, b""


def xattr_of(ino: int, name: bytes) -> Register:
    return "xattr", ino, name


def record_of(ino: int, record: bytes) -> Register:
    return "record", ino, record


def data_of(ino: int) -> Register:
    return "data", ino, b""


def records_in(content: bytes) -> Counter[bytes]:
    """Return how often each record is in a log."""
    return Counter(content[at : at + RECORD_BYTES] for at in range(0, len(content), RECORD_BYTES))


def agrees(expected: Value, actual: Value) -> bool:
    """Say whether a value is what was seen of it."""
    if PRESENT in (expected, actual):
        return actual != 0 and expected != 0
    return expected == actual


class Stamp(NamedTuple):
    """A moment: ``order`` among all moments of the run, and virtual time in seconds."""

    order: int
    time: float


class Outcome(enum.Enum):
    """What a program was told. UNKNOWN: it may have happened, or happen later."""

    OK = "ok"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Read(NamedTuple):
    """A client saw this value, at some moment between two; ``source`` is who answered."""

    client: int
    register: Register
    value: Value
    invoked: Stamp
    returned: Stamp
    source: str


@dataclass(eq=False)
class Change:
    """A client changed registers, all at once."""

    client: int
    what: str
    effect: dict[Register, Value]
    invoked: Stamp
    returned: Stamp | None = None
    outcome: Outcome = Outcome.UNKNOWN
    #: When its own client must know what came of it, if that is later than its return: its worker died meanwhile.
    known: float = -math.inf
    #: It was promised that it survives a crash of the server.
    durable: bool = False
    #: Its program was told that it may be lost.
    doubted: bool = False
    #: It is the making of a file, or the removal of one, which its client may keep to itself: up to ``due``, if it has
    #: come to that.
    held: bool = False
    due: Stamp | None = None
    #: What was changed of the file meanwhile.
    along: list[Change] = field(default_factory=list)
    #: It made or renamed a file that nobody else knew of when this gave it another name.
    moved_by: Change | None = None
    #: Since when it may be gone with the worker that kept it.
    gone: float = math.inf
    #: Its client lost its session before others knew of it, so that they may learn of it late.
    parted: bool = False

    def __str__(self) -> str:
        return f"client {self.client}'s {self.what} ({self.outcome.value})"


class Commit(NamedTuple):
    """What a transaction of the engine changed, for which session. ``undoes``: it is a crash, which took these back."""

    at: Stamp
    changes: dict[Register, Value]
    session: bytes = b""
    undoes: tuple[int, ...] | None = None


@dataclass
class History:
    """Everything of one run. ``pending`` are the operations that have not returned, with when they began."""

    loop: VirtualLoop
    reads: list[Read] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    pending: dict[int, tuple[Node, str]] = field(default_factory=dict)
    #: Up to when each client knows that what it did may be lost.
    told: dict[int, int] = field(default_factory=dict)
    #: The making of files, by inode.
    makers: dict[int, Change] = field(default_factory=dict)
    #: When a client's worker must have noticed that its machine was suspended.
    awake: dict[int, float] = field(default_factory=dict)

    def now(self) -> Stamp:
        return Stamp(self.loop.stamp(), self.loop.now)

    def read(self, client: int, register: Register, value: Value, invoked: Stamp, source: str) -> None:
        """A read has returned. What the kernel answers before the worker knows of a suspend is not held against it."""
        if invoked.time < self.awake.get(client, 0.0):
            return
        self.reads.append(Read(client, register, value, invoked, self.now(), source))

    def records(self, ino: int) -> list[Register]:
        """Return all that anybody has begun to append to a log."""
        return [register for each in self.changes for register in each.effect if register[:2] == ("record", ino)]

    def begin(self, client: int, what: str, effect: dict[Register, Value]) -> Change:
        """A change begins."""
        change = Change(client, what, effect, self.now())
        self.changes.append(change)
        return change

    def end(
        self,
        change: Change,
        outcome: Outcome,
        effect: dict[Register, Value] | None = None,
        *,
        durable: bool = False,
    ) -> None:
        """A change has returned; ``effect`` is what it turned out to be."""
        change.returned, change.outcome, change.durable = self.now(), outcome, durable
        if effect is not None:
            change.effect = effect

    def made(self, change: Change, ino: int, *, held: bool) -> None:
        """A file was made, and is open: if ``held``, others may come to know of it when it is closed, not later."""
        change.held = held
        self.makers[ino] = change

    def moved(self, change: Change, ino: int, name: Register) -> None:
        """A file that its client keeps to itself was renamed: others come to know of it by its new name."""
        last = self.makers[ino]
        while last.moved_by is not None:
            last = last.moved_by
        last.moved_by, change.held = change, True
        change.effect = {**change.effect, name: ino}

    def along(self, change: Change, ino: int) -> None:
        """An inode was changed; if its making may still be its client's own business, so may this be."""
        maker = self.makers.get(ino)
        if maker is not None and maker.client == change.client and maker.due is None:
            change.held = True
            maker.along.append(change)

    def due(self, change: Change, *, durable: bool) -> None:
        """A file that was made is closed; if that makes it ``durable``, everybody can know of it."""
        change.durable, change.doubted = durable and change.gone == math.inf, False
        if change.durable or not change.held:
            change.due = self.now()
            for each in change.along:
                each.due = change.due

    def synced(self, client: int, invoked: Stamp) -> None:
        """All that a client had done before it began to sync is durable, but for what it was told may be lost."""
        since = self.told.get(client, 0)
        for change in self.changes:
            returned = change.returned
            if change.client == client and returned is not None and since < returned.order < invoked.order:
                is_lost = change.held and change.gone < math.inf
                change.durable |= change.outcome is Outcome.OK and not change.doubted and not is_lost
                if change.held and change.due is None and change.durable:
                    change.due = self.now()

    def sync_failed(self, client: int) -> None:
        """A client was told by a sync that what it had done may be lost; or it is started anew, and cannot be told."""
        self.told[client] = self.now().order

    def lose_held(self, client: int) -> None:
        """A client's worker has died, with what it kept to itself."""
        for change in self.changes:
            if change.client == client and change.held and change.due is None:
                change.gone = min(change.gone, self.loop.now)

    def session_lost(self, client: int) -> None:
        """A client has lost its session, and with it the right to keep anything to itself."""
        for change in self.changes:
            change.parted |= change.client == client and change.held and change.due is None

    def worker_died(self, client: int) -> None:
        """What a client's worker had in hand is not known to the client until there is another worker."""
        for change in self.changes:
            if change.client == client and change.returned is None:
                change.known = math.inf

    def worker_ready(self, client: int) -> None:
        """A client's new worker has its session; it has told the kernel what to drop in a moment."""
        for change in self.changes:
            if change.client == client and change.known == math.inf:
                change.known = self.loop.now + _SETTLING_S

    def woken(self, client: int) -> None:
        """A client's machine was suspended."""
        self.awake[client] = self.loop.now + _SETTLING_S

    @contextlib.contextmanager
    def operation(self, what: str) -> Iterator[None]:
        """An operation of a program, which is to end."""
        number = self.loop.stamp()
        self.pending[number] = current_node(), f"{what}, begun at {self.loop.now:.3f} s"
        try:
            yield
        finally:
            self.pending.pop(number, None)

    def abandon(self, node: Node) -> None:
        """A machine is gone, with the programs on it."""
        self.pending = {number: each for number, each in self.pending.items() if each[0] is not node}
