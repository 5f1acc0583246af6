"""What one mount does to a directory, another one's next listing shows, though its kernel keeps listings and is asked
nothing as long as nothing changes.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import figures
import pytest
import rig
import several_mounts
from several_mounts import Cluster
from t3_listings import know, listed, names, opened, rest

pytestmark = pytest.mark.usefixtures("needs_mounts", "needs_uring")

#: Seconds: nothing here is right because something ran out.
LONG_LEASE_S: Final = 30.0


@pytest.fixture(scope="module")
def both() -> Iterator[Cluster]:
    """One volume, mounted accelerated as "a" and "b", and not as "off"."""
    sandbox = rig.Sandbox()
    try:
        with several_mounts.cluster(sandbox, LONG_LEASE_S) as cluster:
            for name, accel in (("a", "bpf"), ("b", "bpf"), ("off", "off")):
                cluster.mount(name, accel)
            yield cluster
        sandbox.assert_nothing_runs()
    finally:
        sandbox.close()


def _unlink(path: Path) -> None:
    (path / "old").unlink()


CHANGES: Final[dict[str, tuple[Callable[[Path], object], set[str]]]] = {
    "create": (lambda top: (top / "new").write_bytes(b"new"), {"old", "dir", "new"}),
    "mkdir": (lambda top: (top / "new").mkdir(), {"old", "dir", "new"}),
    "symlink": (lambda top: (top / "new").symlink_to("x"), {"old", "dir", "new"}),
    "link": (lambda top: os.link(top / "old", top / "new"), {"old", "dir", "new"}),
    "unlink": (_unlink, {"dir"}),
    "rmdir": (lambda top: (top / "dir").rmdir(), {"old"}),
    "rename": (lambda top: (top / "old").rename(top / "new"), {"new", "dir"}),
    "rename out": (lambda top: (top / "old").rename(top.parent / f"{top.name}-out"), {"dir"}),
    "rename over": (lambda top: (top / "dir").rename(top / "sub"), {"old", "sub"}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("changer", ["b", "off"])
def test_a_change_elsewhere_is_listed_at_once(both: Cluster, changer: str, change: str) -> None:
    """By the program that opens the directory anew, and by one that has it open and begins again."""
    here, there = both.mounts[0], next(each for each in both.mounts if each.path.name == changer)
    make, expected = CHANGES[change]
    top = here.path / f"{changer}-{change}"
    (top / "dir").mkdir(parents=True)
    (top / "old").write_bytes(b"old")
    with opened(top) as fd:
        for _ in range(2):
            assert set(os.listdir(top)) == {"old", "dir"}
            os.lseek(fd, 0, os.SEEK_SET)
            assert set(names(rest(fd))) == {b"old", b"dir"}
        before = listed(here)
        os.listdir(top)
        assert listed(here) == before, "the kernel keeps no listing"
        make(there.path / top.name)
        os.lseek(fd, 0, os.SEEK_SET)
        assert set(map(os.fsdecode, names(rest(fd)))) == expected
        assert set(os.listdir(top)) == expected
        assert {entry.name for entry in os.scandir(top) if entry.stat(follow_symlinks=False)} == expected


def test_a_listing_that_bpf_answers_is_of_now(both: Cluster) -> None:
    here, there = both.mounts[0], both.mounts[1]
    top, other = here.path / "bpf", there.path / "bpf"
    top.mkdir()
    expected: set[str] = set()
    answered = listed(here).kernel
    for step in range(20):
        (other / f"file{step}").write_bytes(b"x")
        expected.add(f"file{step}")
        if step % 4 == 3:
            (other / f"file{step - 2}").unlink()
            expected.discard(f"file{step - 2}")
        know(top)
        assert set(os.listdir(top)) == expected
    assert listed(here).kernel > answered


def test_listers_beside_a_changer(both: Cluster) -> None:
    """Whatever was made before a listing began is in it, whatever was removed before is not."""
    here, there = both.mounts[0], both.mounts[1]
    top, other = here.path / "race", there.path / "race"
    top.mkdir()
    made: set[str] = set()
    ended = threading.Event()
    faults: list[str] = []
    listings = 0

    def lister(seed: int) -> None:
        nonlocal listings
        chance = random.Random(seed)
        with opened(top) as fd:
            while not ended.is_set():
                before = set(made)
                if chance.random() < 0.5:
                    found = set(os.listdir(top))
                else:
                    os.lseek(fd, 0, os.SEEK_SET)
                    found = set(map(os.fsdecode, names(rest(fd))))
                if not before <= found | removing:
                    faults.append(f"not listed: {before - found}")
                if gone := {name for name in found if int(name) < lowest_before(before)}:
                    faults.append(f"still listed: {gone}")
                listings += 1

    removing: set[str] = set()

    def lowest_before(before: set[str]) -> int:
        return min(map(int, before), default=0)

    threads = [threading.Thread(target=lister, args=(seed,), daemon=True) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        for step in range(200):
            os.mknod(other / str(step))
            made.add(str(step))
            if step >= 10:
                removing.add(str(step - 10))
                (other / str(step - 10)).unlink()
                made.discard(str(step - 10))
    finally:
        ended.set()
        for thread in threads:
            thread.join(rig.WAIT_S)
    assert not faults, faults[:5]
    assert listings > 20


def test_every_listing_goes_with_the_session(sandbox: rig.Sandbox) -> None:
    """A mount that stood still for longer than its lease lists what others made meanwhile, also where it is open."""
    with several_mounts.cluster(sandbox, 1.0) as cluster:
        here, there = cluster.pair("bpf", allowed=(r"the session", r"lease"))
        top = here.path / "top"
        top.mkdir()
        os.mknod(top / "old")
        with opened(top) as fd:
            assert names(rest(fd)) == [b"old"]
            assert os.listdir(top) == ["old"]
            with several_mounts.stopped(here.process("worker").pid):
                os.mknod(there.path / "top" / "new")
            rig.wait_for(lambda: figures.stats(here)["lease_remaining_s"], "there is a lease again")
            assert sorted(os.listdir(top)) == ["new", "old"]
            os.lseek(fd, 0, os.SEEK_SET)
            assert sorted(names(rest(fd))) == [b"new", b"old"]
