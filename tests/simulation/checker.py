"""Checks a history against the order of commits: the promise of shared coherence, for each register by itself.

1. Each commit is some program's change, and made between that change's begin and its end; a change that was reported
   done was committed, once; one that failed was not. One of unknown outcome may be committed at any time, or never.
2. A read returns a value that was current at some moment between its begin and its end, where a value is current from
   its commit until the change that replaced it has *returned* to its program, or anybody has seen the new one.
3. The exception to the last: while a change is under way, its own client may still see what was before, though others
   have seen the new value. If its worker died over it, this lasts until the next worker has its session.
4. What a program writes is seen at once by all on its machine; by others when it is committed.

Writes are told apart by the commits that they match, so nothing is searched: each read is given the oldest version that
is allowed, which leaves most room for those after it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from simulation.history import Change, Commit, History, Outcome, Read, Register, Stamp, Value, agrees

_PRIMARY: Final = ("name", "owner", "data")
_BEGINNING: Final = Stamp(0, -math.inf)


@dataclass
class Version:
    """A value that a register had. ``change`` is whose it is; None for what was there at the beginning."""

    value: Value
    committed: Stamp
    change: Change | None = None


def check(history: History, commits: Sequence[Commit], given: int = 0) -> list[str]:
    """Return what is wrong, a line each. The first ``given`` commits are what was there at the beginning."""
    complaints: list[str] = []
    authors = _attribute(history.changes, commits, given, complaints)
    registers = _versions(commits, authors)
    done = set(map(id, authors.values()))
    for change in history.changes:
        if change.outcome is not Outcome.OK or id(change) in done:
            continue
        if not _is_idle(change, registers) and not _is_overwritten(change, registers):
            complaints.append(f"{change} was acknowledged and never committed")
    by_register: defaultdict[Register, list[Read]] = defaultdict(list)
    for read in history.reads:
        by_register[read.register].append(read)
    writes: defaultdict[Register, list[Change]] = defaultdict(list)
    for change in history.changes:
        for register in change.effect:
            if register[0] == "data":
                writes[register].append(change)
    for register, reads in by_register.items():
        versions = registers.get(register) or [Version(0, _BEGINNING)]
        complaints += _Register(versions, writes[register]).check(reads)
    return complaints


# Whose a commit is


def primary(commit: Commit) -> dict[Register, Value]:
    """Return those of a commit's changes that say what it was: names, else an owner, else content."""
    for kind in _PRIMARY:
        if found := {register: value for register, value in commit.changes.items() if register[0] == kind}:
            return found
    return {}


def _attribute(
    changes: Iterable[Change], commits: Sequence[Commit], given: int, complaints: list[str]
) -> dict[int, Change]:
    """Return the change of each commit, by the commit's place."""
    waiting: defaultdict[frozenset[Register], list[Change]] = defaultdict(list)
    for change in changes:
        waiting[frozenset(change.effect)].append(change)
    authors: dict[int, Change] = {}
    for index, commit in enumerate(commits):
        if index < given or not (effect := primary(commit)):
            continue
        author = _author(waiting[frozenset(effect)], commit, effect)
        if author is None:
            complaints.append(f"a commit at {commit.at.time:.4f} that nobody asked for: {effect}")
        else:
            authors[index] = author
            if not _is_retried(author):
                waiting[frozenset(effect)].remove(author)
    return authors


def _is_retried(change: Change) -> bool:
    """Say whether a change may be committed again: content of which that failed is kept, and written anew."""
    return change.outcome is Outcome.UNKNOWN and all(kind == "data" for kind, *_ in change.effect)


def _author(candidates: list[Change], commit: Commit, effect: dict[Register, Value]) -> Change | None:
    """Return the change that must be committed soonest: the first to end, before those that need not be."""
    possible = [each for each in candidates if _may_be(each, commit, effect)]
    return min(possible, key=_urgency, default=None)


def _may_be(change: Change, commit: Commit, effect: dict[Register, Value]) -> bool:
    if change.outcome is Outcome.FAILED or change.invoked.order > commit.at.order:
        return False
    if change.outcome is Outcome.OK and change.returned is not None and change.returned.order < commit.at.order:
        return False
    return all(agrees(change.effect[register], value) for register, value in effect.items())


def _urgency(change: Change) -> float:
    return change.returned.order if change.outcome is Outcome.OK and change.returned is not None else math.inf


def _is_idle(change: Change, registers: dict[Register, list[Version]]) -> bool:
    """Say whether a change had nothing to do: a rename between two names of one inode."""
    if len(change.effect) < 2 or change.returned is None:
        return False
    old, new = (registers.get(register, []) for register in change.effect)
    moments = {each.committed for each in old + new if each.committed.order < change.returned.order}
    moments = {each for each in moments if each.order > change.invoked.order} | {change.invoked}
    return any(_value_at(old, moment) == _value_at(new, moment) != 0 for moment in moments)


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


def _versions(commits: Sequence[Commit], authors: dict[int, Change]) -> dict[Register, list[Version]]:
    registers: dict[Register, list[Version]] = {}
    for index, commit in enumerate(commits):
        for register, value in commit.changes.items():
            versions = registers.setdefault(register, [Version(0, _BEGINNING)] if register[0] == "name" else [])
            versions.append(Version(value, commit.at, authors.get(index)))
    return registers


@dataclass
class _Register:
    """The check of one register. ``seen``: reads that have been given a version, with its place."""

    versions: list[Version]
    writes: list[Change]
    seen: list[tuple[Read, int]] = field(default_factory=list)

    def check(self, reads: list[Read]) -> list[str]:
        complaints = []
        for read in sorted(reads, key=lambda each: each.invoked.order):
            oldest = max(self._replaced(read), self._seen_before(read))
            found = self._first(read, oldest)
            if found is None and not self._is_being_written(read):
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
            and (each.returned is None or read.invoked.order < each.returned.order)
            for each in self.writes
        )

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
            if change is None or change.outcome is not Outcome.OK or change.returned is None:
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
        """Say whether the read's own client has the version's change still under way."""
        change = self.versions[index].change
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
