"""What was fetched before a change does not enter a cache after it; nothing is remembered longer than needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hypothesis import given
from hypothesis import strategies as st

from fuseclient.worker.guard import Guard, Key, Token


def test_a_fetch_without_changes_may_be_put() -> None:
    guard = Guard()
    with guard.begin() as token:
        assert guard.may_put(token, 7)
        assert guard.may_put(token, (1, b"name"))


def test_what_was_dropped_during_a_fetch_may_not_be_put() -> None:
    guard = Guard()
    with guard.begin() as token:
        guard.dropped(7)
        guard.dropped((1, b"name"))
        assert not guard.may_put(token, 7)
        assert not guard.may_put(token, (1, b"name"))
        assert guard.may_put(token, 8)
        assert guard.may_put(token, (1, b"other"))
        assert guard.may_put(token, (2, b"name"))


def test_a_fetch_is_undisturbed_until_anything_at_all_is_dropped() -> None:
    drops: list[Callable[[Guard], None]] = [
        lambda guard: guard.dropped(7),
        lambda guard: guard.dropped_names(1),
        lambda guard: guard.dropped_all(),
    ]
    for drop in drops:
        guard = Guard()
        guard.dropped(8)
        with guard.begin() as older:
            assert guard.is_undisturbed(older)
            drop(guard)
            assert not guard.is_undisturbed(older)
            with guard.begin() as younger:
                assert guard.is_undisturbed(younger)
            assert not guard.is_undisturbed(younger)


def test_a_fetch_begun_after_the_drop_may_be_put() -> None:
    guard = Guard()
    with guard.begin() as older:
        guard.dropped(7)
        with guard.begin() as younger:
            assert guard.may_put(younger, 7)
            assert not guard.may_put(older, 7)


def test_everything_dropped_stops_every_fetch_in_flight() -> None:
    guard = Guard()
    with guard.begin() as older:
        guard.dropped_all()
        assert not guard.may_put(older, 7)
        with guard.begin() as younger:
            assert guard.may_put(younger, 7)


def test_a_token_that_has_ended_may_put_nothing() -> None:
    guard = Guard()
    token = guard.begin()
    token.end()
    token.end()
    assert not guard.may_put(token, 7)


def test_drops_are_forgotten_with_the_last_fetch_they_concern() -> None:
    guard = Guard()
    guard.dropped(1)
    assert len(guard) == 0
    first = guard.begin()
    guard.dropped(2)
    second = guard.begin()
    guard.dropped(3)
    assert len(guard) == 2
    first.end()
    assert len(guard) == 1
    assert not guard.may_put(second, 3)
    second.end()
    assert len(guard) == 0


class Model:
    """The guard as it is meant: every drop kept for ever."""

    def __init__(self) -> None:
        self.log: list[Key | None] = []

    def may_put(self, since: int, key: Key) -> bool:
        return not any(dropped is None or dropped == key for dropped in self.log[since:])


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.just(0)),
        st.tuples(st.just("end"), st.integers(0, 3)),
        st.tuples(st.just("drop"), st.integers(1, 4)),
        st.tuples(st.just("drop all"), st.just(0)),
    ),
    max_size=40,
)


@given(STEPS)
def test_it_equals_a_guard_that_forgets_nothing(steps: Iterable[tuple[str, int]]) -> None:
    guard, model = Guard(), Model()
    live: list[tuple[Token, int]] = []
    for what, number in steps:
        if what == "begin":
            live.append((guard.begin(), len(model.log)))
        elif what == "end" and live:
            live.pop(number % len(live))[0].end()
        elif what == "drop":
            guard.dropped(number)
            model.log.append(number)
        elif what == "drop all":
            guard.dropped_all()
            model.log.append(None)
        for token, since in live:
            for key in range(1, 5):
                assert guard.may_put(token, key) == model.may_put(since, key)
    for token, _ in live:
        token.end()
    assert len(guard) == 0
