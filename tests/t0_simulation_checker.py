"""The checker of the simulation: it passes good histories, and rejects each kind of bad one."""

from __future__ import annotations

import random

import pytest
from simulation.checker import check
from simulation.history import (
    PRESENT,
    Change,
    Commit,
    History,
    Outcome,
    Read,
    Register,
    Stamp,
    Value,
    data_of,
    name_of,
    owner_of,
)
from simulation.loop import VirtualLoop
from simulation.tree import check_tree

from metaserver.records import Inode

NAME = name_of(1, b"a")
OTHER = name_of(2, b"b")
OWNER = owner_of(7)
DATA = data_of(7)


class Story:
    """A history written by hand. Times are whole numbers, each given once."""

    def __init__(self) -> None:
        self.history = History(VirtualLoop(random.Random(0)))
        self.commits: list[Commit] = []

    def change(
        self,
        client: int,
        effect: dict[Register, Value],
        invoked: int,
        committed: int | None,
        returned: int | None,
        outcome: Outcome = Outcome.OK,
    ) -> Story:
        change = Change(client, "change", effect, Stamp(invoked, invoked), None, outcome)
        if returned is not None:
            change.returned = Stamp(returned, returned)
        self.history.changes.append(change)
        if committed is not None:
            self.commits.append(Commit(Stamp(committed, committed), dict(effect)))
        return self

    def read(self, client: int, register: Register, value: Value, invoked: int, returned: int) -> Story:
        self.history.reads.append(
            Read(client, register, value, Stamp(invoked, invoked), Stamp(returned, returned), "a test")
        )
        return self

    def complaints(self) -> list[str]:
        self.commits.sort(key=lambda commit: commit.at.order)
        return check(self.history, self.commits, settling_s=10)


def created() -> Story:
    """Client 0 gave the name to inode 7 from 10 to 14, committed at 12."""
    return Story().change(0, {NAME: 7}, 10, 12, 14)


@pytest.mark.parametrize(
    ("client", "value", "invoked", "returned"),
    [
        (1, 0, 1, 2),
        (1, 0, 9, 20),
        (1, 0, 13, 20),
        (1, 7, 11, 13),
        (1, 7, 13, 15),
        (1, 7, 20, 21),
        (1, PRESENT, 20, 21),
        (0, 0, 13, 20),
    ],
)
def test_what_may_be_seen(client: int, value: Value, invoked: int, returned: int) -> None:
    assert created().read(client, NAME, value, invoked, returned).complaints() == []


@pytest.mark.parametrize(
    ("client", "value", "invoked", "returned", "why"),
    [
        (1, 0, 15, 16, "the state before, after the change returned"),
        (0, 0, 15, 16, "the same on the client that changed it"),
        (1, 7, 1, 11, "the state after, before it was committed"),
        (1, 8, 15, 16, "what never was"),
        (1, PRESENT, 1, 11, "EEXIST before anything existed"),
    ],
)
def test_what_may_not_be_seen(client: int, value: Value, invoked: int, returned: int, why: str) -> None:
    assert created().read(client, NAME, value, invoked, returned).complaints(), why


def test_once_seen_the_new_value_is_seen_by_all() -> None:
    story = created().read(1, NAME, 7, 12, 13)
    assert story.read(2, NAME, 0, 14, 15).complaints()
    story = Story().change(0, {NAME: 7}, 10, 12, 30).read(1, NAME, 7, 13, 14)
    assert story.read(0, NAME, 0, 15, 16).complaints() == [], "its own client has not heard of it"
    assert story.read(2, NAME, 0, 15, 16).complaints()


def test_values_that_come_back_are_told_apart_by_order() -> None:
    story = created().change(1, {NAME: 0}, 20, 22, 24).change(0, {NAME: 7}, 30, 32, 34)
    assert story.read(2, NAME, 7, 40, 41).complaints() == []
    assert story.read(2, NAME, 0, 26, 27).complaints() == []
    assert story.read(2, NAME, 7, 26, 27).complaints(), "between the two"


def test_reads_of_one_program_do_not_go_back() -> None:
    story = Story().change(0, {OWNER: 5}, 1, 2, 3).change(0, {OWNER: 6}, 10, 12, 40)
    story.read(1, OWNER, 6, 13, 14).read(1, OWNER, 5, 15, 16)
    assert story.complaints()


def test_acknowledged_and_lost() -> None:
    assert Story().change(0, {NAME: 7}, 10, None, 14).complaints()
    assert Story().change(0, {DATA: b"x"}, 10, None, 14).complaints()


def test_committed_outside_its_time() -> None:
    assert Story().change(0, {NAME: 7}, 10, 15, 14).complaints()
    assert Story().change(0, {NAME: 7}, 10, 9, 14).complaints()


def test_unknown_outcomes_may_come_late_or_never() -> None:
    assert Story().change(0, {NAME: PRESENT}, 10, None, 14, Outcome.UNKNOWN).complaints() == []
    story = Story().change(0, {NAME: PRESENT}, 10, None, None, Outcome.UNKNOWN)
    story.commits.append(Commit(Stamp(99, 99), {NAME: 7}))
    assert story.complaints() == []
    story.commits.append(Commit(Stamp(100, 100), {NAME: 0}))
    assert len(story.complaints()) == 1, "nobody removed it"


def test_what_failed_must_not_be_committed() -> None:
    assert Story().change(0, {NAME: 7}, 10, 12, 14, Outcome.FAILED).complaints()


def test_done_twice() -> None:
    story = created()
    story.commits.append(Commit(Stamp(13, 13), {NAME: 7}))
    assert story.complaints()


def test_the_change_that_ends_first_gets_the_first_commit() -> None:
    story = Story().change(0, {NAME: 0}, 1, 4, 30).change(1, {NAME: 0}, 2, 10, 5)
    assert story.complaints() == []


def test_a_rename_between_names_of_one_inode_does_nothing() -> None:
    story = created().change(0, {OTHER: 7}, 15, 16, 17)
    story.change(1, {NAME: 0, OTHER: PRESENT}, 20, None, 21)
    assert story.complaints() == []
    story.change(1, {NAME: 0, name_of(2, b"c"): PRESENT}, 22, None, 23)
    assert len(story.complaints()) == 1


def test_a_write_may_be_overwritten_before_it_is_committed_by_its_own_client_only() -> None:
    story = Story().change(0, {DATA: b"x"}, 1, None, 10).change(0, {DATA: b"y"}, 2, 5, 9)
    assert story.complaints() == []
    story = Story().change(0, {DATA: b"x"}, 1, None, 10).change(1, {DATA: b"y"}, 2, 5, 9)
    assert story.complaints()


def test_what_is_being_written_is_seen_on_its_own_machine_only() -> None:
    def story() -> Story:
        return Story().change(0, {DATA: b"x"}, 1, 2, 3).change(0, {DATA: b"y"}, 10, 20, 21)

    assert story().read(0, DATA, b"y", 12, 13).complaints() == []
    assert story().read(1, DATA, b"y", 12, 13).complaints()
    assert story().read(0, DATA, b"y", 8, 9).complaints(), "before it was written"
    assert story().read(0, DATA, b"x", 12, 13).complaints() == []


def test_what_a_crash_takes_back() -> None:
    def story(*, durable: bool) -> Story:
        crashed = created()
        crashed.history.changes[0].durable = durable
        crashed.commits.append(Commit(Stamp(20, 20), {NAME: 0}, undoes=(0,)))
        return crashed

    assert story(durable=False).complaints() == []
    assert story(durable=True).complaints()
    assert story(durable=False).read(1, NAME, 0, 22, 23).read(2, NAME, 7, 24, 25).complaints() == []
    assert story(durable=False).read(1, NAME, 7, 32, 33).complaints(), "by now everybody knows"
    again = story(durable=True)
    again.history.changes[0].returned = Stamp(30, 30)
    again.commits.append(Commit(Stamp(25, 25), {NAME: 7}))
    assert again.complaints() == [], "it was not told before it was made again"


def test_content_is_committed_again_for_another_session_only() -> None:
    def story(session: bytes) -> Story:
        twice = Story().change(0, {DATA: b"x"}, 1, None, 30, Outcome.UNKNOWN)
        twice.commits += [Commit(Stamp(at, at), {DATA: b"x"}, each) for at, each in ((2, b"one"), (20, session))]
        return twice

    assert story(b"two").complaints() == []
    assert story(b"one").complaints()


# The tree


def _tree() -> tuple[dict[int, dict[bytes, int]], dict[int, Inode]]:
    inodes = {
        1: Inode.made(1, 0o040755, 0, 0, 0, 0, parent=1),
        2: Inode.made(2, 0o040755, 0, 0, 0, 0, parent=1),
        3: Inode.made(3, 0o100644, 0, 0, 0, 0),
    }
    inodes[1].nlink = 3
    return {1: {b"d": 2}, 2: {b"f": 3}}, inodes


def test_a_good_tree() -> None:
    assert check_tree(*_tree()) == []


def test_bad_trees() -> None:
    entries, inodes = _tree()
    inodes[3].nlink = 2
    assert check_tree(entries, inodes)
    entries, inodes = _tree()
    del inodes[3]
    assert check_tree(entries, inodes)
    entries, inodes = _tree()
    entries[2] = {b"f": 3, b"up": 2}
    assert check_tree(entries, inodes), "a directory in itself"
    entries, inodes = _tree()
    entries[1] = {}
    assert check_tree(entries, inodes), "a directory that cannot be reached"
