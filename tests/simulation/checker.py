"""Checks a history against the order of commits: the promise of shared coherence, for each register by itself.

1. Each commit is some program's change, and made between that change's begin and its end; a change that was reported
   done was committed, once; one that failed was not. One of unknown outcome may be committed at any time, or never.
2. A read returns a value that was current at some moment between its begin and its end, where a value is current from
   its commit until the change that replaced it has *returned* to its program, or anybody has seen the new one.
3. The exception to the last: while a change is under way, its own client may still see what was before, though others
   have seen the new value. If its worker died over it, this lasts until the next worker has its session.
4. A crash takes back no commit of a change that was promised to be durable. What was there before comes back; for some
   time both that and what was lost may be seen.
5. What a program writes is seen at once by all on its machine; by others when it is committed.
6. So is a file that it makes, with its attributes. That is committed when it is closed, if it is promised to be durable
   then; until then it may be gone with the worker. Its commit may hold what was changed of it meanwhile.
   If it was renamed before, it is committed by its new name.
7. So is the removal of a file's name, if it is not promised to be durable; several may be committed at once.

Changes are told apart by the commits that they match, so nothing is searched: each read is given the oldest version
that is allowed, which leaves most room for those after it. Content may be committed a second time for another session
of its client: what a session that ended left uncommitted, as far as is known, is written by the next. What is appended
may be there twice only if its program was told of an error.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from simulation.history import PRESENT, Change, Commit, History, Outcome, Read, Register, Stamp, Value, agrees

#: What a change of an inode is known by, beside names.
_KINDS: Final = ("owner", "mode", "atime", "xattr", "data", "record")
#: Of these a change may find that there is nothing to do.
_IDLE: Final = ("mode", "xattr", "data")
#: And these are written, so they may be committed once for each session of their client.
_WRITTEN: Final = ("data", "record")
#: The mode of a symlink, whose content comes with its name always.
_SYMLINK: Final = 0o777
_BEGINNING: Final = Stamp(0, -math.inf)
#: What registers are before anybody has changed them; others do not exist.
_ABSENT: Final[dict[str, Value]] = {"name": 0, "xattr": b"", "record": 0}


@dataclass
class Version:
    """A value that a register had. ``change`` is whose it is; None for what was there at the beginning.

    ``settled``: when it, having come back after a crash, must have reached everybody; 0 for all others.
    """

    value: Value
    committed: Stamp
    change: Change | None = None
    settled: float = 0.0


#: The changes that a commit made, by register.
Authors = dict[Register, Change]


def check(
    history: History, commits: Sequence[Commit], given: int = 0, settling_s: float = 0.0, *, faults: bool = True
) -> list[str]:
    """Return what is wrong, a line each. The first ``given`` commits are what was there at the beginning.

    ``settling_s`` seconds after a crash everybody must know what was lost, and after a failed close its machine must
    have dropped what could not be written. Without ``faults`` nothing that was told to be done may be lost.
    """
    complaints: list[str] = []
    authors = _attribute(history.changes, commits, given, complaints)
    registers = _versions(commits, authors, settling_s)
    lost = {number for commit in commits for number in commit.undoes or ()}
    complaints += _unmade(history.changes, authors, registers, lost, history.makers, faults)
    by_register: defaultdict[Register, list[Read]] = defaultdict(list)
    for read in history.reads:
        by_register[read.register].append(read)
    writes: defaultdict[Register, list[Change]] = defaultdict(list)
    for change in history.changes:
        for register in change.effect:
            if register[0] in _WRITTEN or change.held:
                writes[register].append(change)
    for register, reads in by_register.items():
        versions = registers.get(register) or [Version(_ABSENT.get(register[0], 0), _BEGINNING)]
        maker = history.makers.get(register[1]) if register[0] != "name" else None
        complaints += _Register(versions, writes[register], settling_s, maker).check(reads)
    return complaints


def _unmade(
    changes: Iterable[Change],
    authors: dict[int, Authors],
    registers: dict[Register, list[Version]],
    lost: set[int],
    held: dict[int, Change],
    faults: bool,
) -> list[str]:
    """Return what was acknowledged and is not there."""
    made = {id(change) for number, each in authors.items() if number not in lost for change in each.values()}
    taken_back = {id(change) for number in lost for change in authors.get(number, {}).values()} - made
    complaints = []
    for change in changes:
        if change.outcome is not Outcome.OK or id(change) in made:
            continue
        if id(change) in taken_back:
            if change.durable:
                complaints.append(f"{change} was durable, and a crash took it back")
            continue
        if _was_moved(change, made | taken_back):
            continue
        if change.held and not change.durable and (faults or change.doubted or change.gone < math.inf):
            continue
        if _came_with(change, held, registers):
            continue
        if not _is_idle(change, registers) and not _is_overwritten(change, registers):
            complaints.append(f"{change} was acknowledged and never committed")
    return complaints


def _was_moved(change: Change, made: set[int]) -> bool:
    """Say whether a file came to be known by a name that it was given later."""
    while change.moved_by is not None:
        change = change.moved_by
        if id(change) in made:
            return True
    return False


def _came_with(change: Change, held: dict[int, Change], registers: dict[Register, list[Version]]) -> bool:
    """Say whether a change is of a file that its client had made and kept to itself when it began."""
    register = next(iter(change.effect))
    maker = held.get(register[1]) if register[0] != "name" else None
    if maker is None or maker.client != change.client:
        return False
    versions = registers.get(register, [])
    return change.invoked.order < versions[0].committed.order if versions else not change.durable


# Whose a commit is


def efforts(commit: Commit) -> list[dict[Register, Value]]:
    """Return what of a commit tells whose it was, for each change that it may hold: all names, or each of the rest.

    New files may come several at once, each with what was written to it; so may names that were removed.
    """
    changes = commit.changes
    if names := {register: value for register, value in changes.items() if register[0] == "name"}:
        made = {register: value for register, value in names.items() if ("owner", value, b"") in changes}
        written = [register for register in changes if register[0] == "data" and register[1] in made.values()]
        others = {register: value for register, value in names.items() if register not in made}
        efforts = [{register: value} for register, value in made.items()]
        written = [register for register in written if changes["mode", register[1], b""] != _SYMLINK]
        efforts += [{register: changes[register]} for register in written if changes[register]]
        if any(others.values()):
            return [*efforts, others]
        return [*efforts, *({register: value} for register, value in others.items())]
    return [{register: changes[register]} for kind in _KINDS for register in changes if register[0] == kind]


def _attribute(
    changes: Iterable[Change], commits: Sequence[Commit], given: int, complaints: list[str]
) -> dict[int, Authors]:
    """Return the changes of each commit, by the commit's number."""
    waiting: defaultdict[frozenset[Register], list[Change]] = defaultdict(list)
    for change in changes:
        waiting[frozenset(_told_names(change))].append(change)
    lost = {number for commit in commits for number in commit.undoes or ()}
    sessions: dict[int, bytes] = {}
    authors: dict[int, Authors] = {}
    for number, commit in enumerate(commits):
        if number < given or commit.undoes is not None:
            continue
        for effect in efforts(commit):
            candidates = waiting[frozenset(effect)]
            possible = [each for each in candidates if _may_be_again(each, sessions.get(id(each)), commit)]
            # What a crash took back is made again, of another inode.
            told: dict[Register, Value] = {register: PRESENT if value else value for register, value in effect.items()}
            possible = [each for each in possible if _may_be(each, commit, told if number in lost else effect)]
            author = min(possible, key=lambda change: (id(change) in sessions, _urgency(change)), default=None)
            if author is None:
                complaints.append(f"a commit at {commit.at.time:.4f} that nobody asked for: {effect}")
                continue
            authors.setdefault(number, {}).update(dict.fromkeys(effect, author))
            if number in lost:
                continue
            if next(iter(effect))[0] in _WRITTEN:
                sessions[id(author)] = commit.session
            else:
                candidates.remove(author)
    return authors


def _told_names(change: Change) -> list[Register]:
    """Return the registers that a commit of a change has: of the renaming of what nobody knew of, only the new name."""
    is_rename = change.held and len(change.effect) > 1
    return [register for register, value in change.effect.items() if value or not is_rename]


def _may_be_again(change: Change, session: bytes | None, commit: Commit) -> bool:
    """Say whether a change that was committed for a session, or for none yet, may be in a commit."""
    if session != commit.session:
        return True
    return change.outcome is Outcome.UNKNOWN and next(iter(change.effect))[0] == "record"


def _may_be(change: Change, commit: Commit, effect: dict[Register, Value]) -> bool:
    if change.outcome is Outcome.FAILED or change.invoked.order > commit.at.order:
        return False
    last = change.returned if not change.held else change.due
    if change.outcome is Outcome.OK and last is not None and last.order < commit.at.order:
        return False
    return all(agrees(value, change.effect[register]) for register, value in effect.items())


def _urgency(change: Change) -> tuple[float, bool]:
    """Return when a change must be committed: the first to end must be first, before those that need not be at all.

    The last of these are those that were kept by a worker or under a session that is no more.
    """
    last = change.returned if not change.held else change.due
    moment = last.order if change.outcome is Outcome.OK and last is not None else math.inf
    return moment, change.parted or change.gone < math.inf


def _is_idle(change: Change, registers: dict[Register, list[Version]]) -> bool:
    """Say whether a change had nothing to do: it was so already, or a rename between two names of one inode."""
    if change.returned is None:
        return False
    histories = [registers.get(register, []) for register in change.effect]
    moments = {each.committed for versions in histories for each in versions}
    moments = {each for each in moments if change.invoked.order < each.order < change.returned.order}
    for moment in moments | {change.invoked}:
        values = [_value_at(versions, moment) for versions in histories]
        if len(values) == 2 and values[0] == values[1] != 0:
            return True
        if next(iter(change.effect))[0] in _IDLE and values == list(change.effect.values()):
            return True
    return False


def _is_overwritten(change: Change, registers: dict[Register, list[Version]]) -> bool:
    """Say whether a write was never seen because another one of its client lay over it before both were committed."""
    register = next(iter(change.effect))
    if register[0] != "data" or change.returned is None:
        return False
    return any(
        each.change is not None
        and each.change.client == change.client
        and change.invoked.order < each.committed.order < change.returned.order
        for each in registers.get(register, [])
    )


def _value_at(versions: list[Version], moment: Stamp) -> Value:
    current = [each.value for each in versions if each.committed.order <= moment.order]
    return current[-1] if current else 0


# What was current when


def _versions(
    commits: Sequence[Commit], authors: dict[int, Authors], settling_s: float
) -> dict[Register, list[Version]]:
    registers: dict[Register, list[Version]] = {}
    for number, commit in enumerate(commits):
        changes = authors.get(number, {})
        settled = commit.at.time + settling_s if commit.undoes is not None else 0.0
        for register, value in commit.changes.items():
            absent = _ABSENT.get(register[0])
            versions = registers.setdefault(register, [Version(absent, _BEGINNING)] if absent is not None else [])
            change = changes.get(register) or next(iter(changes.values()), None)
            versions.append(Version(value, commit.at, change, settled))
    return registers


@dataclass
class _Register:
    """The check of one register. ``seen``: reads that have been given a version, with its place."""

    versions: list[Version]
    writes: list[Change]
    settling_s: float
    #: Of an inode: the making of it.
    maker: Change | None = None
    seen: list[tuple[Read, int]] = field(default_factory=list)

    def check(self, reads: list[Read]) -> list[str]:
        complaints = []
        for read in sorted(reads, key=lambda each: each.invoked.order):
            oldest = max(self._replaced(read), self._seen_before(read))
            found = self._first(read, oldest)
            if found is None and not self._is_being_written(read) and not self._is_held(read):
                complaints.append(self._complaint(read, oldest))
            elif found is not None:
                self.seen.append((read, found))
        return complaints

    def _is_being_written(self, read: Read) -> bool:
        """Say whether the read's own machine was writing what it saw."""
        return any(
            each.client == read.client
            and agrees(read.value, each.effect[read.register])
            and each.invoked.order < read.returned.order
            and self._may_be_left(each, read)
            for each in self.writes
        )

    def _is_held(self, read: Read) -> bool:
        """Say whether a read of an inode's machine was of what it kept to itself."""
        maker = self.maker
        if (
            maker is None
            or not maker.held
            or maker.client != read.client
            or read.invoked.time > maker.gone + self.settling_s
        ):
            return False
        return self.versions[0].committed is _BEGINNING or read.invoked.order < self.versions[0].committed.order

    def _may_be_left(self, write: Change, read: Read) -> bool:
        """Say whether a write of the read's machine was under way, or had just failed."""
        if write.held:
            return read.invoked.time <= write.gone + self.settling_s
        if write.returned is None or read.invoked.order < write.returned.order:
            return True
        return write.outcome is Outcome.UNKNOWN and read.invoked.time < write.returned.time + self.settling_s

    def _first(self, read: Read, oldest: int) -> int | None:
        """Return the oldest version from ``oldest`` on that the read can have seen."""
        for index in range(oldest, len(self.versions)):
            version = self.versions[index]
            if version.committed.order > read.returned.order:
                return None
            if agrees(read.value, version.value):
                return index
        return None

    def _replaced(self, read: Read) -> int:
        """Return the last version whose change had returned when the read began: nothing older may be seen."""
        for index in range(len(self.versions) - 1, -1, -1):
            change = self.versions[index].change
            if 0.0 < self.versions[index].settled < read.invoked.time:
                return index
            if change is None or change.outcome is not Outcome.OK or change.returned is None:
                continue
            if change.parted and read.invoked.order < self.versions[index].committed.order:
                continue
            if change.returned.order < read.invoked.order:
                return index
        return 0

    def _seen_before(self, read: Read) -> int:
        """Return the newest version that a read saw which had returned when this one began."""
        newest = 0
        for earlier, index in self.seen:
            if index > newest and earlier.returned.order < read.invoked.order and not self._excused(read, index):
                newest = index
        return newest

    def _excused(self, read: Read, index: int) -> bool:
        """Say whether the read's own client has the version's change still under way, or all learn of a loss still."""
        change = self.versions[index].change
        if read.invoked.time < self.versions[index].settled:
            return True
        if change is None or change.client != read.client:
            return False
        return change.returned is None or read.invoked.order < change.returned.order or read.invoked.time < change.known

    def _complaint(self, read: Read, oldest: int) -> str:
        version = self.versions[oldest]
        kind, number, name = read.register
        near = [(each.value, round(each.committed.time, 4)) for each in self.versions[max(0, oldest - 2) : oldest + 3]]
        returned = version.change.returned if version.change is not None else None
        return (
            f"client {read.client} saw {kind} {number} {name!r} = {read.value!r} (from {read.source}) in"
            f" [{read.invoked.time:.4f}, {read.returned.time:.4f}]; it was {version.value!r} by {version.change},"
            f" committed at {version.committed.time:.4f}, returned at {returned.time if returned else math.inf:.4f};"
            f" versions {near}"
        )
