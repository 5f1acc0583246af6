"""Names that a whole directory lacks: BPF says so before anybody has asked for them, and never once there is one.

Each with its twin that is not accelerated, where the same is to be seen and the daemon is asked.
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import figures
import pytest
import rig
import several_mounts
from conftest import MountFactory
from several_mounts import Cluster

pytestmark = pytest.mark.usefixtures("needs_mounts")

LONG_LEASE_S: Final = 30.0
NO_TTL: Final = ("--kernel-ttl", "0")
DIRECTORIES: Final = 12
FILES: Final = 10


def looked_up(mounted: rig.Mount) -> int:
    """Return how many lookups the daemon has answered."""
    return figures.answers(mounted, "LOOKUP").daemon


def absent(mounted: rig.Mount) -> int:
    return figures.outcome(mounted, "answered_absent")


def is_there(path: Path) -> bool:
    return os.path.lexists(path)


def pack(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(DIRECTORIES * FILES):
            member = tarfile.TarInfo(f"src/d{number % DIRECTORIES}/f{number}")
            member.size = number
            archive.addfile(member, io.BytesIO(bytes(number)))


@pytest.mark.parametrize("durability", ["commit", "interval"])
def test_a_tree_is_unpacked_without_a_lookup_at_the_daemon(
    mount: MountFactory, accel: str, durability: str, tmp_path: Path
) -> None:
    mounted = mount(accel, "--durability", durability)
    pack(tmp_path / "tree.tar")
    top = mounted.path / "top"
    top.mkdir()
    before, unasked = looked_up(mounted), absent(mounted)
    subprocess.run(["tar", "-xf", tmp_path / "tree.tar", "-C", top], check=True)
    if accel == "bpf":
        assert looked_up(mounted) == before
        assert absent(mounted) - unasked >= DIRECTORIES * (FILES + 1)
    else:
        assert looked_up(mounted) > before
    subprocess.run(["tar", "-df", tmp_path / "tree.tar", "-C", top], check=True)
    assert len(list(top.rglob("*"))) == 1 + DIRECTORIES * (FILES + 1)


def test_a_directory_that_was_fetched_is_whole(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel, *NO_TTL)
    top = mounted.path / "top"
    top.mkdir()
    for number in range(FILES):
        (top / f"f{number}").touch()
    mounted.remount()
    assert not is_there(top / "x")
    before = looked_up(mounted)
    assert not any(is_there(top / f"x{number}") for number in range(20))
    assert all(is_there(top / f"f{number}") for number in range(FILES))
    assert (looked_up(mounted) == before) == (accel == "bpf")


#: Ways to give a name in a directory, of a tree of make_other().
NAMING: Final[dict[str, Callable[[Path, Path], object]]] = {
    "create": lambda top, name: name.touch(),
    "mkdir": lambda top, name: name.mkdir(),
    "symlink": lambda top, name: name.symlink_to("target"),
    "mknod": lambda top, name: os.mkfifo(name),
    "link": lambda top, name: os.link(top.parent / "other/file", name),
    "rename": lambda top, name: (top.parent / "other/file").rename(name),
    "rename within": lambda top, name: (top / "inside").rename(name),
    "rename directory": lambda top, name: (top.parent / "other/directory").rename(name),
}


def make_other(path: Path) -> None:
    (path / "other").mkdir()
    (path / "other/file").touch()
    (path / "other/directory").mkdir()
    (path / "top").mkdir()
    (path / "top/inside").touch()


def take_away(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()


def test_a_name_given_here_is_there_at_once(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel, *NO_TTL)
    for how, give in NAMING.items():
        case = mounted.path / how
        case.mkdir()
        make_other(case)
        top = case / "top"
        assert not is_there(top / "unasked")
        give(top, top / "new")
        assert is_there(top / "new")
        assert is_there(top / "inside") == (how != "rename within")
        before = looked_up(mounted)
        assert not is_there(top / "still unasked")
        assert (looked_up(mounted) == before) == (accel == "bpf")
        take_away(top / "new")
        assert not is_there(top / "new")


@pytest.fixture
def pair(sandbox: rig.Sandbox, accel: str) -> Iterator[Cluster]:
    """A volume mounted twice, with what the kernels answer by themselves and without."""
    with several_mounts.cluster(sandbox, LONG_LEASE_S) as cluster:
        cluster.mount("a", accel)
        cluster.mount("b", accel, *NO_TTL)
        yield cluster


@pytest.mark.parametrize("watching", [0, 1])
def test_a_name_given_by_another_mount_is_there_at_once(pair: Cluster, watching: int) -> None:
    """Whether it was ever asked for where it is watched, or not; in a directory that was made there, or fetched."""
    here, there = pair.mounts[watching].path, pair.mounts[1 - watching].path
    for turn, (how, give) in enumerate(NAMING.items()):
        (pair.mounts[turn % 2].path / how).mkdir()
        make_other(pair.mounts[turn % 2].path / how)
        assert not any(is_there(here / how / "top" / name) for name in ("asked", "x", "y"))
        for name in ("asked", "unasked") if "rename" not in how else ("asked",):
            give(there / how / "top", there / how / "top" / name)
            assert is_there(here / how / "top" / name)
            take_away(there / how / "top" / name)
            assert not is_there(here / how / "top" / name)


def test_two_mounts_make_names_in_one_directory(pair: Cluster) -> None:
    """In turn: each sees all of them before and after it makes its own."""
    one, other = (mounted.path for mounted in pair.mounts)
    (one / "shared").mkdir()
    for number in range(20):
        making, seeing = (one, other) if number % 2 else (other, one)
        assert not is_there(seeing / "shared" / f"n{number}")
        (making / "shared" / f"n{number}").touch()
        assert all(is_there(seeing / "shared" / f"n{each}") for each in range(number + 1))
        assert not is_there(making / "shared" / f"n{number + 1}")


def test_what_was_given_up_is_asked_for(mount: MountFactory, accel: str) -> None:
    """A small kernel cache gives directories up: no name that is there is ever absent."""
    small = ("--kernel-cache-size", "1M") if accel == "bpf" else ()
    mounted = mount(accel, *NO_TTL, "--durability", "interval", *small)
    directories = [mounted.path / f"d{number}" for number in range(40)]
    for path in directories:
        path.mkdir()
        (path / "file").touch()
        for number in range(100 if accel == "bpf" else 5):
            assert not is_there(path / f"x{number}")
    for path in directories:
        assert is_there(path / "file")
        assert not is_there(path / "y")


def test_after_the_worker_was_replaced(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel, *NO_TTL, allowed=(several_mounts.WORKER_KILLED,))
    top = mounted.path / "top"
    top.mkdir()
    for number in range(FILES):
        (top / f"f{number}").touch()
        with (top / f"f{number}").open("rb") as file:
            os.fsync(file.fileno())
    assert not is_there(top / "x")
    several_mounts.kill(mounted, "worker")
    assert all(is_there(top / f"f{number}") for number in range(FILES))
    (top / "new").touch()
    assert is_there(top / "new")
    assert not is_there(top / "y")
    before = looked_up(mounted)
    assert not is_there(top / "z")
    assert (looked_up(mounted) == before) == (accel == "bpf")
