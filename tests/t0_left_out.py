"""What content was left out of fetched directories: against a plain set of cookies."""

from __future__ import annotations

import random

import pytest

from fuseclient.worker.left_out import LeftOut, Stretch

PARENTS, COOKIES = (3, 4), 40


@pytest.mark.parametrize("seed", range(20))
def test_stretches_are_put_taken_and_found_as_in_a_set(seed: int) -> None:
    dice = random.Random(seed)
    left, model = LeftOut(), {parent: set[int]() for parent in PARENTS}
    for _ in range(200):
        parent = dice.choice(PARENTS)
        first, last = sorted(dice.choices(range(1, COOKIES), k=2))
        between = set(range(first, last + 1))
        if dice.random() < 0.4:
            left.put(parent, Stretch(first, last, dice.random() < 0.5))
            model[parent] |= between
        elif dice.random() < 0.9:
            left.take(parent, first, last)
            model[parent] -= between
        else:
            left.forget(parent)
            model[parent] = set()
        for each in PARENTS:
            found = {cookie for cookie in range(COOKIES + 1) if left.find(each, cookie)}
            assert found == model[each]
        assert bool(left) == any(model.values())
    left.clear()
    assert not left


def test_what_has_come_in_part_is_not_whole_any_more() -> None:
    left = LeftOut()
    left.put(3, Stretch(1, 30, True))
    assert left.is_whole(3)
    assert left.find(3, 7) == Stretch(1, 30, True)
    left.take(3, 31, 40)
    assert left.is_whole(3)
    left.take(3, 10, 12)
    assert not left.is_whole(3)
    assert (left.find(3, 9), left.find(3, 11), left.find(3, 13)) == (Stretch(1, 9, False), None, Stretch(13, 30, False))
    assert not left.is_whole(4)
