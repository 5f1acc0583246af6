"""Sets of inode numbers, beside Python's own."""

from __future__ import annotations

import random

from fuseclient.worker.inode_set import InodeSet


def test_it_is_a_set() -> None:
    rng = random.Random(1)
    one, other, plain, beside = InodeSet(), InodeSet(), set[int](), set[int]()
    for _ in range(3000):
        ino = rng.choice((rng.randrange(100), rng.randrange(50_000), 2**48 - 1 - rng.randrange(9)))
        which, like = rng.choice(((one, plain), (other, beside)))
        if rng.random() < 0.8:
            which.add(ino)
            like.add(ino)
        elif rng.random() < 0.3:
            some = [ino, ino + 1, ino + rng.randrange(20_000), ino]
            which.add_all(some)
            like.update(some)
        else:
            which.discard(ino)
            like.discard(ino)
        assert (ino in one, ino in other) == (ino in plain, ino in beside)
    assert (set(one), len(one)) == (plain, len(plain))
    one.subtract(other)
    assert set(one) == plain - beside
    one.update(other)
    assert set(one) == plain | beside
    one.subtract(one)
    assert not one
    assert other


def test_what_is_added_is_added_to_another_too() -> None:
    other = InodeSet([7])
    one = InodeSet([1, 2], also=other)
    taken = one.take()
    taken.add(3)
    one.add(9)
    one.discard(9)
    one.add_all([11, 11])
    one.discard(11)
    assert set(taken) == {1, 2, 3}
    assert set(other) == {1, 2, 7, 9, 11}
    assert not one
