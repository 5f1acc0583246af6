"""The lock table against a naive model, byte by byte; its queues, its deadlocks and its bounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaserver.locks import Claim, LockTable, Owner, Span, Wait
from metaserver.wire import LAST_BYTE
from metaserver.wire import LockOutcome as Outcome

A, B, C, D = (Owner(session, False, 1) for session in "abcd")
FILE, OTHER, THIRD = 1, 2, 3
BYTES = 8


def shared(start: int = 0, end: int = LAST_BYTE) -> Span:
    return Span(start, end, False)


def exclusive(start: int = 0, end: int = LAST_BYTE) -> Span:
    return Span(start, end, True)


def flock(owner: Owner) -> Owner:
    return owner._replace(flock=True)


class Table(LockTable):
    """A table that remembers what it said."""

    def __init__(self, **limits: int) -> None:
        self.said: list[tuple[Owner, int, Outcome]] = []
        #: The accounts of sessions that have one in common.
        self.accounts: dict[object, object] = {}
        super().__init__(self._say, lambda session: self.accounts.get(session, session), **limits)

    def _say(self, wait: Wait, outcome: Outcome) -> None:
        self.said.append((wait.owner, wait.number, outcome))

    def take(self) -> list[tuple[Owner, Outcome]]:
        said, self.said = self.said, []
        return [(owner, outcome) for owner, _, outcome in said]


# The model

owners = st.builds(Owner, st.sampled_from("ab"), st.booleans(), st.integers(1, 2))
ranges = st.tuples(st.integers(0, BYTES - 1), st.integers(0, BYTES - 1)).map(sorted)
steps = st.tuples(
    st.sampled_from(["shared", "exclusive", "unlock", "wait shared", "wait exclusive", "cancel", "tick", "end"]),
    owners,
    st.integers(1, 2),
    ranges,
)


class Model:
    """Each byte of each file, and who has it how."""

    def __init__(self) -> None:
        self.bytes: dict[tuple[int, Owner, int], bool] = {}

    def blocked(self, owner: Owner, ino: int, span: Span) -> bool:
        return any(
            file == ino and other != owner and other.flock == owner.flock
            and span.start <= byte <= span.end and (held or span.exclusive)
            for (file, other, byte), held in self.bytes.items()
        )  # fmt: skip

    def lock(self, owner: Owner, ino: int, span: Span) -> None:
        for byte in range(span.start, span.end + 1):
            self.bytes[ino, owner, byte] = span.exclusive

    def unlock(self, owner: Owner, ino: int, start: int, end: int) -> None:
        for byte in range(start, end + 1):
            self.bytes.pop((ino, owner, byte), None)

    def has(self, owner: Owner, ino: int) -> list[bool]:
        return [held for (file, other, _), held in self.bytes.items() if (file, other) == (ino, owner)]


class Pair:
    """The table and the model, which do the same."""

    def __init__(self) -> None:
        self.table = LockTable(self._settled)
        self.model = Model()
        self.waits: dict[int, tuple[Owner, int, Span]] = {}
        self.number = 0

    def _settled(self, wait: Wait, outcome: Outcome) -> None:
        owner, ino, span = self.waits.pop(wait.number)
        if outcome is Outcome.GRANTED:
            self.model.lock(owner, ino, span)

    def step(self, what: str, owner: Owner, ino: int, start: int, end: int) -> None:
        if owner.flock:
            start, end = 0, BYTES - 1
        if what == "tick":
            self.table.tick()
        elif what == "end":
            self._end(owner)
        elif what == "cancel":
            self._cancel(owner)
        elif any(each[0] == owner for each in self.waits.values()):
            return  # it has one thread, which waits
        elif what == "unlock":
            self.model.unlock(owner, ino, start, end)
            assert self.table.unlock(owner, ino, start, end) is Outcome.GRANTED
        else:
            self._lock(owner, ino, Span(start, end, "exclusive" in what), may_wait="wait" in what)

    def _end(self, owner: Owner) -> None:
        for key in [key for key in self.model.bytes if key[1].session == owner.session]:
            del self.model.bytes[key]
        self.table.end(owner.session)

    def _cancel(self, owner: Owner) -> None:
        for number, (other, _, _) in list(self.waits.items()):
            if other == owner:
                assert self.table.cancel(owner.session, number)
                del self.waits[number]

    def _lock(self, owner: Owner, ino: int, span: Span, *, may_wait: bool) -> None:
        if owner.flock and set(self.model.has(owner, ino)) - {span.exclusive}:
            self.model.unlock(owner, ino, 0, BYTES)
        self.number += 1
        number = self.number
        self.waits[number] = owner, ino, span
        outcome = self.table.set(owner, ino, span, number if may_wait else None)
        if outcome is not Outcome.WAITING:
            self.waits.pop(number)
        if outcome is Outcome.GRANTED:
            self.model.lock(owner, ino, span)
        elif not may_wait:
            assert outcome is Outcome.DENIED
            assert self.model.blocked(owner, ino, span)
        else:
            assert outcome in (Outcome.WAITING, Outcome.DEADLOCK)

    def check(self) -> None:
        for owner in {key[1] for key in self.model.bytes} | {wait[0] for wait in self.waits.values()}:
            for ino in (1, 2):
                for byte in range(BYTES):
                    probe = Owner("nobody", owner.flock, 0)
                    alone = self.model.blocked(probe, ino, Span(byte, byte, True))
                    assert (self.table.conflict(probe, ino, Span(byte, byte, True)) is not None) == alone
        held = {
            (claim.ino, Owner(session, claim.flock, claim.number), byte): claim.span.exclusive
            for session in "ab"
            for claim in self.table.held(session)
            for byte in range(claim.span.start, claim.span.end + 1)
        }
        assert held == self.model.bytes
        for (ino, owner, byte), how in held.items():
            assert not self.model.blocked(owner, ino, Span(byte, byte, how))
        self._check_nobody_waits_for_ever()

    def _check_nobody_waits_for_ever(self) -> None:
        """Of the owners of ranges that wait, one waits for somebody who does not."""
        waiting = {owner for owner, _, _ in self.waits.values() if not owner.flock}
        while waiting:
            free = {owner for owner in waiting if not self._waits_for(owner) & waiting}
            assert free, "a circle"
            waiting -= free

    def _waits_for(self, owner: Owner) -> set[Owner]:
        mine = [(ino, span) for other, ino, span in self.waits.values() if other == owner]
        return {
            other
            for (file, other, byte), held in self.model.bytes.items()
            for ino, span in mine
            if file == ino and other != owner and not other.flock
            and span.start <= byte <= span.end and (held or span.exclusive)
        }  # fmt: skip

    def check_nobody_waits_for_nothing(self) -> None:
        for _ in range(3):
            self.table.tick()
        assert all(self.model.blocked(*wait) for wait in self.waits.values())


@settings(max_examples=400)
@given(st.lists(steps, max_size=40))
def test_it_does_what_the_model_does(script: list[tuple[str, Owner, int, tuple[int, int]]]) -> None:
    pair = Pair()
    for what, owner, ino, (start, end) in script:
        pair.step(what, owner, ino, start, end)
        pair.check()
    pair.check_nobody_waits_for_nothing()
    for session in "ab":
        pair.step("end", Owner(session, False, 1), 1, 0, 0)
    assert pair.table.is_empty
    assert not pair.waits


# Ranges


def test_spans_are_split_merged_and_converted() -> None:
    table = Table()
    table.set(A, FILE, exclusive(0, 9))
    table.set(A, FILE, shared(4, 5))
    assert [claim.span[:3] for claim in table.held("a")] == [(0, 3, True), (4, 5, False), (6, 9, True)]
    table.set(A, FILE, exclusive(4, 5))
    assert [claim.span[:3] for claim in table.held("a")] == [(0, 9, True)]
    table.unlock(A, FILE, 3, 3)
    assert [claim.span[:3] for claim in table.held("a")] == [(0, 2, True), (4, 9, True)]
    assert table.set(B, FILE, exclusive(3, 3)) is Outcome.GRANTED
    assert table.set(B, FILE, exclusive(2, 3)) is Outcome.DENIED


def test_the_conflict_that_is_told_is_the_first() -> None:
    table = Table()
    table.set(A, FILE, shared(5, 6))
    table.set(B, FILE, exclusive(2, 3))
    assert table.conflict(C, FILE, shared()) == (B, exclusive(2, 3))
    assert table.conflict(C, FILE, exclusive(4)) == (A, shared(5, 6))
    assert table.conflict(C, FILE, shared(4)) is None


def test_the_two_kinds_know_nothing_of_each_other() -> None:
    table = Table()
    assert table.set(A, FILE, exclusive()) is Outcome.GRANTED
    assert table.set(flock(B), FILE, exclusive()) is Outcome.GRANTED
    assert table.set(flock(A), FILE, shared()) is Outcome.DENIED


def test_a_flock_that_cannot_be_converted_is_gone() -> None:
    table = Table()
    for each in (A, B):
        table.set(flock(each), FILE, shared())
    assert table.set(flock(A), FILE, exclusive()) is Outcome.DENIED
    assert table.held("a") == []
    assert table.set(flock(B), FILE, exclusive()) is Outcome.GRANTED


def test_a_range_that_cannot_be_converted_stays() -> None:
    table = Table()
    for each in (A, B):
        table.set(each, FILE, shared())
    assert table.set(A, FILE, exclusive()) is Outcome.DENIED
    assert table.set(B, FILE, exclusive()) is Outcome.DENIED


# Queues


def test_waiters_come_in_their_order() -> None:
    table = Table()
    table.set(A, FILE, exclusive())
    for each in (B, C, D):
        assert table.set(each, FILE, exclusive(), 1) is Outcome.WAITING
    for before, after in ((A, B), (B, C), (C, D)):
        table.unlock(before, FILE)
        assert table.take() == [(after, Outcome.GRANTED)]


def test_readers_get_it_together() -> None:
    table = Table()
    table.set(A, FILE, exclusive())
    for each in (B, C):
        table.set(each, FILE, shared(), 1)
    table.unlock(A, FILE)
    assert table.take() == [(B, Outcome.GRANTED), (C, Outcome.GRANTED)]


def test_a_reader_that_comes_later_does_not_keep_a_writer_out() -> None:
    table = Table()
    table.set(A, FILE, shared())
    table.set(B, FILE, exclusive(), 1)
    assert table.set(C, FILE, shared(), 1) is Outcome.WAITING
    table.unlock(A, FILE)
    assert table.take() == [(B, Outcome.GRANTED)]


def test_but_not_for_ever() -> None:
    """A process that has the lock may wait for another one that wants it too."""
    table = Table()
    table.set(A, FILE, shared())
    table.set(B, FILE, exclusive(), 1)
    table.set(C, FILE, shared(), 1)
    table.tick()
    assert table.take() == []
    table.tick()
    assert table.take() == [(C, Outcome.GRANTED)]


def test_who_does_not_wait_or_has_some_of_it_stands_behind_nobody() -> None:
    table = Table()
    table.set(A, FILE, shared(0, 1))
    table.set(B, FILE, exclusive(), 1)
    assert table.set(C, FILE, shared()) is Outcome.GRANTED
    assert table.set(A, FILE, shared(5, 6), 1) is Outcome.GRANTED


def test_a_wait_that_is_cancelled_lets_others_pass() -> None:
    table = Table()
    table.set(A, FILE, shared())
    table.set(B, FILE, exclusive(), 7)
    table.set(C, FILE, shared(), 1)
    assert table.cancel("b", 7)
    assert table.take() == [(C, Outcome.GRANTED)]
    assert not table.cancel("b", 7)


def test_the_same_wait_again_goes_on() -> None:
    table = Table()
    table.set(A, FILE, exclusive())
    assert [table.set(B, FILE, shared(), 4) for _ in range(2)] == [Outcome.WAITING] * 2
    table.unlock(A, FILE)
    assert table.take() == [(B, Outcome.GRANTED)]
    assert table.set(B, FILE, shared(), 4) is Outcome.GRANTED


def test_a_lock_that_becomes_shared_lets_readers_in() -> None:
    table = Table()
    table.set(A, FILE, exclusive())
    table.set(B, FILE, shared(), 1)
    table.set(A, FILE, shared(3, 5))
    assert table.take() == []
    table.set(A, FILE, shared())
    assert table.take() == [(B, Outcome.GRANTED)]


# Circles


def test_two_that_wait_for_each_other_on_two_files() -> None:
    table = Table()
    table.set(A, FILE, exclusive())
    table.set(B, OTHER, exclusive())
    assert table.set(A, OTHER, shared(), 1) is Outcome.WAITING
    assert table.set(B, FILE, shared(), 1) is Outcome.DEADLOCK
    table.unlock(B, OTHER)
    assert table.take() == [(A, Outcome.GRANTED)]


def test_a_circle_of_three_through_ranges() -> None:
    table = Table()
    for place, each in enumerate((A, B, C)):
        table.set(each, FILE, exclusive(place, place))
    assert table.set(A, FILE, exclusive(1, 1), 1) is Outcome.WAITING
    assert table.set(B, FILE, exclusive(2, 2), 1) is Outcome.WAITING
    assert table.set(C, FILE, exclusive(0, 0), 1) is Outcome.DEADLOCK


def test_two_that_convert() -> None:
    table = Table()
    for each in (A, B):
        table.set(each, FILE, shared())
    assert table.set(A, FILE, exclusive(), 1) is Outcome.WAITING
    assert table.set(B, FILE, exclusive(), 1) is Outcome.DEADLOCK


def test_a_chain_is_no_circle() -> None:
    table = Table()
    table.set(A, FILE, exclusive())
    table.set(B, OTHER, exclusive())
    assert table.set(B, FILE, exclusive(), 1) is Outcome.WAITING
    assert table.set(C, OTHER, exclusive(), 1) is Outcome.WAITING
    assert table.set(A, THIRD, exclusive(), 1) is Outcome.GRANTED


def test_flocks_wait_for_each_other_as_long_as_they_like() -> None:
    table = Table()
    table.set(flock(A), FILE, exclusive())
    table.set(flock(B), OTHER, exclusive())
    assert table.set(flock(A), OTHER, exclusive(), 1) is Outcome.WAITING
    assert table.set(flock(B), FILE, exclusive(), 1) is Outcome.WAITING


def test_a_lock_that_closes_a_circle_when_it_is_granted() -> None:
    """An owner with two threads: one waits, the other gets what somebody waits for that the first one waits for."""
    table = Table()
    table.set(A, FILE, shared())
    table.set(B, OTHER, exclusive())
    assert table.set(B, FILE, exclusive(), 1) is Outcome.WAITING
    assert table.set(C, OTHER, exclusive(), 1) is Outcome.WAITING
    assert table.set(C, FILE, shared()) is Outcome.GRANTED
    assert table.take() == [(B, Outcome.DEADLOCK)]


# Sessions


def test_what_a_session_held_is_free_when_it_ends() -> None:
    table = Table()
    table.set(A, FILE, exclusive())
    table.set(A._replace(number=2), OTHER, shared())
    table.set(B, FILE, exclusive(), 1)
    table.set(C, OTHER, exclusive(), 1)
    table.end("a")
    assert sorted(table.take()) == [(B, Outcome.GRANTED), (C, Outcome.GRANTED)]
    table.end("b")
    table.end("c")
    assert table.is_empty


def test_the_waits_of_a_session_that_ends_are_over() -> None:
    table = Table()
    table.set(A, FILE, exclusive())
    table.set(B, FILE, exclusive(), 1)
    table.end("b")
    assert table.take() == [(B, Outcome.CANCELLED)]
    table.unlock(A, FILE)
    assert table.is_empty


def test_a_session_has_what_it_says_if_nobody_else_has() -> None:
    table = Table()
    table.set(B, FILE, exclusive(0, 9))
    table.set(A, OTHER, exclusive())
    table.set(B, OTHER, exclusive(), 1)
    claims = [
        Claim(FILE, False, 1, shared(5, 20)),
        Claim(FILE, False, 1, shared(10, 20)),
        Claim(THIRD, True, 2, shared()),
    ]
    assert table.restore("a", claims) == [0]
    assert set(table.held("a")) == set(claims[1:])
    assert table.take() == [(B, Outcome.GRANTED)]


@pytest.mark.parametrize("claims", [0, 3])
def test_restoring_leaves_nothing_else(claims: int) -> None:
    table = Table()
    table.set(B, FILE, exclusive())
    assert table.restore("a", [Claim(FILE, False, 1, shared())] * claims) == list(range(claims))
    table.end("b")
    assert table.is_empty


# Bounds


def holes(count: int) -> Iterator[Span]:
    return (exclusive(2 * each, 2 * each) for each in range(count))


def test_a_session_holds_so_many_spans() -> None:
    table = Table(session_locks=10)
    assert {table.set(A, FILE, span) for span in holes(10)} == {Outcome.GRANTED}
    assert table.set(A, FILE, exclusive(100, 100)) is Outcome.FULL
    assert table.set(A._replace(number=2), OTHER, exclusive()) is Outcome.FULL
    assert table.set(A, FILE, exclusive(1, 1)) is Outcome.GRANTED
    assert table.set(A, OTHER, exclusive(0, 9)) is Outcome.GRANTED
    assert table.set(B, OTHER, exclusive(20, 30)) is Outcome.GRANTED


def test_unlocking_makes_no_more_pieces_than_that() -> None:
    table = Table(session_locks=2)
    table.set(A, FILE, exclusive(0, 100))
    assert table.unlock(A, FILE, 10, 10) is Outcome.GRANTED
    assert table.unlock(A, FILE, 20, 20) is Outcome.FULL
    assert table.unlock(A, FILE) is Outcome.GRANTED
    assert table.is_empty


def test_a_session_waits_for_so_many() -> None:
    table = Table(session_waits=2)
    table.set(A, FILE, exclusive())
    outcomes = [table.set(Owner("b", False, number), FILE, exclusive(), number) for number in range(3)]
    assert outcomes == [Outcome.WAITING, Outcome.WAITING, Outcome.FULL]


def test_the_sessions_of_an_account_hold_so_many_together() -> None:
    """Whatever becomes of their locks: replaced, cut, given up, told of anew, and ended."""
    table = Table(account_locks=4)
    table.accounts = {"a": 1, "b": 1}
    assert [table.set(A, FILE, span) for span in holes(3)] == 3 * [Outcome.GRANTED]
    assert [table.set(B, OTHER, span) for span in holes(2)] == [Outcome.GRANTED, Outcome.FULL]
    assert table.set(B, OTHER, exclusive(0, 9)) is Outcome.GRANTED, "it is one instead of one"
    assert table.unlock(B, OTHER, 5, 5) is Outcome.FULL
    assert table.set(C, THIRD, exclusive()) is Outcome.GRANTED, "another account has room"
    assert table.unlock(A, FILE, 0, 0) is Outcome.GRANTED
    assert table.unlock(B, OTHER, 5, 5) is Outcome.GRANTED
    table.end("a")
    assert table.restore("b", [Claim(OTHER, False, 1, span) for span in holes(6)]) == [4, 5]
    assert table.restore("a", [Claim(FILE, False, 1, exclusive())]) == [0]
    table.end("b")
    assert table.restore("a", [Claim(FILE, False, 1, exclusive())]) == []
    table.end("a")
    table.end("c")
    assert table.is_empty
    assert not table._totals


def test_the_sessions_of_an_account_wait_for_so_many_together() -> None:
    table = Table(account_waits=2)
    table.accounts = {"a": 1, "b": 1}
    assert table.set(C, FILE, exclusive()) is Outcome.GRANTED
    owners = [A, A._replace(number=2), B]
    waiting, full = Outcome.WAITING, Outcome.FULL
    assert [table.set(owner, FILE, exclusive(), owner.number) for owner in owners] == [waiting, waiting, full]
    assert table.cancel("a", 1)
    assert table.set(B, FILE, exclusive(), 1) is waiting
    assert table.set(D, FILE, exclusive(), 1) is waiting, "another account has room"
    table.end("c")
    assert [owner for owner, outcome in table.take() if outcome is Outcome.GRANTED] == [owners[1]]
    assert table.set(A, FILE, exclusive(), 3) is waiting, "of which one waits no more"
    for session in "abd":
        table.end(session)
    assert not table._totals


def test_what_is_refused_leaves_nothing() -> None:
    table = Table(session_locks=0)
    assert table.set(A, FILE, exclusive()) is Outcome.FULL
    assert table.is_empty
    assert not table._parties
    assert not table.waiting
