"""What the kernel cache has given up goes back to the metaserver: when nothing here can use it, and not before."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from served import Client, until
from worker_rig import ROOT, Rig, rigged

from metaserver import wire
from metaserver.sessions import Session

DIR = stat.S_IFDIR | 0o755
LEASE_S = 1.0
FILES = 600


@pytest_asyncio.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    async with rigged(tmp_path, monkeypatch, lease_s=LEASE_S) as rig:
        yield rig


def held(rig: Rig) -> tuple[int, int]:
    """Return the directories' names and the inodes that the mount holds."""
    return rig.metaserver.server.coherence.held(_session(rig))


def _session(rig: Rig) -> Session:
    (session,) = [each for each in rig.metaserver.server.sessions.all() if each.id == rig.mount.session_id]
    return session


async def figure(rig: Rig, name: str) -> int:
    found: int = (await rig.mount.figures())["leases"][name]
    return found


async def make(rig: Rig, files: int) -> tuple[int, list[int]]:
    """Return a directory and its files, all of them looked up by the mount."""
    directory = (await rig.other.make(b"directory", DIR)).ino
    names = [b"%d" % number for number in range(files)]
    inos = []
    for name in names:
        inos.append((await rig.other.make(name, parent=directory)).ino)
        await rig.other.renew(0)
    assert await rig.ino(b"directory") == directory
    assert [await rig.ino(name, directory) for name in names] == inos
    return directory, inos


async def another(rig: Rig) -> Client:
    """Return a client whose lease has not run out."""
    return await rig.metaserver.client()


async def test_what_was_evicted_is_given_back_when_the_lease_is_over(rig: Rig) -> None:
    directory, inos = await make(rig, FILES)
    assert held(rig) == (2, FILES + 2)
    rig.maps.evict(directory)
    began = asyncio.get_running_loop().time()
    await until(lambda: held(rig) == (1, 2))
    assert asyncio.get_running_loop().time() - began >= LEASE_S, "what the kernel keeps it may use until then"
    assert await figure(rig, "returned_inodes") == FILES
    assert await figure(rig, "returned_directories") == 1
    dropped = {ino for kind, *what in rig.kernel.log if kind == "unused" for ino in what[0]}
    assert dropped == {directory, *inos}
    log = len(rig.kernel.log)
    await (await another(rig)).change(wire.SetAttributes(inos[0], mode=0o600))
    assert len(rig.kernel.log) == log, "nobody asked this client"
    assert await rig.ino(b"0", directory) == inos[0]
    assert rig.maps.inodes[inos[0]].mode == 0o100600
    assert held(rig) == (2, 3), "its directory's names, too"


async def test_what_is_used_again_is_kept(rig: Rig) -> None:
    """A file that is open, one that lies in the maps again, and one that a worker was asked for."""
    directory, inos = await make(rig, 5)
    rig.maps.evict(directory)
    rig.maps.opened(inos[0])
    assert await rig.ino(b"1", directory) == inos[1]
    await until(lambda: held(rig)[1] == 4)
    assert held(rig) == (2, 4), "and the names, since one is known"
    rig.maps.released(inos[0])
    await until(lambda: held(rig)[1] == 3)
    assert await figure(rig, "kept") >= 1
    rig.maps.evict(directory)
    await until(lambda: held(rig) == (1, 2))
    assert held(rig) == (1, 2)


async def test_a_reply_under_way_enters_no_cache(rig: Rig) -> None:
    """It was asked for before the lease was given back, and its page comes after."""
    directory, inos = await make(rig, 3)
    rig.maps.evict(directory)
    rig.kernel.gate = asyncio.Event()
    await until(lambda: rig.mount._returns.figures()["waiting_inodes"] == 3)
    await until(lambda: rig.mount._returns.figures()["waiting_inodes"] == 0)
    assert held(rig)[1] == 5, "not before the kernel has dropped its pages"
    with rig.mount._changes._feeder.begin() as token:  # type: ignore[union-attr]
        rig.kernel.gate.set()
        await until(lambda: held(rig) == (1, 2))
        feeder = rig.mount._changes._feeder  # type: ignore[union-attr]
        assert not feeder.fresh(token, directory, b"0", inos[0])
        assert not feeder.fresh(token, directory, b"never asked for", None)
        assert not feeder.same_names(token, directory)
        assert feeder.fresh(token, ROOT, b"directory", None)


async def test_nothing_goes_back_while_there_is_no_connection(rig: Rig) -> None:
    directory, _ = await make(rig, 3)
    rig.maps.evict(directory)
    returned = rig.mount._session.return_leases
    refusals = 0

    def refuse(directories: list[int], inodes: list[int]) -> bool:
        nonlocal refusals
        refusals += 1
        return False

    rig.mount._session.return_leases = refuse  # type: ignore[method-assign]
    await until(lambda: refusals)
    assert held(rig) == (2, 5)
    rig.mount._session.return_leases = returned  # type: ignore[method-assign]
    await until(lambda: held(rig) == (1, 2))
