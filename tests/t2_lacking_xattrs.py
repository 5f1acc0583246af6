"""Without acceleration: asking for xattrs of files that have none, as ``ls -l`` does, costs the metaserver nothing."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from worker_rig import ME, Rig, fails, rigged, spied

from metaserver import wire


@pytest_asyncio.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    async with rigged(tmp_path, monkeypatch, maps=False) as rig:
        yield rig


async def lacks(rig: Rig, ino: int, name: bytes = b"user.a") -> None:
    with fails(errno.ENODATA):
        await rig.ops.getxattr(ino, name, ME)


async def test_files_that_were_listed_are_not_asked_for(rig: Rig) -> None:
    made = [(await rig.other.make(b"%d" % number)).ino for number in range(20)]
    await rig.listing()
    log = spied(rig)
    for ino in made:
        await lacks(rig, ino, b"security.capability")
    assert log == []


async def test_xattrs_that_others_set_and_remove_are_seen_at_once(rig: Rig) -> None:
    ino = (await rig.other.make(b"file")).ino
    await rig.listing()
    await lacks(rig, ino)
    for value in (b"1", b"2"):
        await rig.other.change(wire.SetXattr(ino, b"user.a", value))
        assert await rig.ops.getxattr(ino, b"user.a", ME) == value
        await rig.listing()
        assert await rig.ops.getxattr(ino, b"user.a", ME) == value
        await rig.other.change(wire.RemoveXattr(ino, b"user.a"))
        await lacks(rig, ino)


async def test_xattrs_that_are_set_here_are_seen_at_once(rig: Rig) -> None:
    ino = (await rig.other.make(b"file")).ino
    await rig.listing()
    await rig.ops.setxattr(ino, b"user.a", b"1", ME)
    assert await rig.ops.getxattr(ino, b"user.a", ME) == b"1"
    await rig.ops.removexattr(ino, b"user.a", ME)
    await lacks(rig, ino)


async def test_without_a_lease_it_is_asked(rig: Rig) -> None:
    ino = (await rig.other.make(b"file")).ino
    await rig.listing()
    rig.ops._lease.move(0)
    log = spied(rig)
    await lacks(rig, ino)
    assert [type(each) for each in log] == [wire.GetXattr]
