"""What operators are told of metaservers and sessions, and the eviction of a session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from served import DIRECTORY, VOLUME, Client, Metaserver, serving, until
from t2_coherence import holder, refused

from fuseclient.errors import UserError
from fuseclient.observe import status as observed
from metaserver.wire import ErrorCode


@pytest.fixture
async def metaserver(tmp_path: Path) -> AsyncIterator[Metaserver]:
    async with serving(tmp_path, address="tcp:127.0.0.1:0", lease_s=20.0) as server:
        yield server


def _url(metaserver: Metaserver, *more: str) -> str:
    places = ",".join([metaserver.address.removeprefix("tcp:"), *more])
    return f"bpfuse://{places}/{VOLUME}"


async def _read(url: str) -> dict[str, Any]:
    return await asyncio.to_thread(observed.read, url)


async def test_sessions_and_metaservers(metaserver: Metaserver) -> None:
    one, two = await holder(metaserver), await metaserver.client()
    directory = await one.make(b"directory", DIRECTORY)
    await two.attributes(directory.ino)
    status = await _read(_url(metaserver, "127.0.0.1:1"))
    assert status["authority"] == metaserver.address
    assert status["epoch"] == one.connection.welcome.server_epoch
    assert (status["lease_s"], status["grace_s"], status["missing"]) == (20, 0, 0)
    serving_one, nobody = status["metaservers"]
    assert (serving_one["state"], serving_one["role"]) == ("online", "authority")
    assert serving_one["software"].startswith("bpfuse-metaserver ")
    assert (nobody["state"], nobody["role"]) == ("offline", None)
    assert "cannot connect" in nobody["why"]
    listed = {each["session"]: each for each in status["sessions"]}
    assert len(listed) == 3
    mine = listed[one.session.session.hex()]
    assert (mine["host"], mine["state"], mine["pending_breaks"], mine["writing"]) == ("test", "online", 0, 0)
    assert mine["leases"] == {"directories": 2, "inodes": 2}, "of the root, and of the new one, which is empty"
    assert listed[two.session.session.hex()]["leases"] == {"directories": 0, "inodes": 1}
    assert 0 < mine["left_s"] <= 20

    one.connection.abort()
    await until(lambda: len(metaserver.server.connections) == 2)
    states = {each["session"]: each["state"] for each in (await _read(_url(metaserver)))["sessions"]}
    assert states.pop(one.session.session.hex()) == "unstable"
    assert set(states.values()) == {"online"}

    with pytest.raises(UserError, match="has no volume 'none'"):
        await _read(_url(metaserver).replace(VOLUME, "none"))


async def test_who_has_not_come_back_is_offline(metaserver: Metaserver) -> None:
    client = await metaserver.client()
    metaserver.abort_clients()
    await metaserver.stop()
    await metaserver.start(metaserver.address)
    status = await _read(_url(metaserver))
    assert status["missing"] == 1
    assert 0 < status["grace_s"] <= 20
    assert [(each["session"], each["state"]) for each in status["sessions"]] == [
        (client.session.session.hex(), "offline")
    ]


async def test_an_evicted_session_is_refused_and_holds_others_up_until_it_has_dropped_everything(
    metaserver: Metaserver,
) -> None:
    one, two = await holder(metaserver, silent=True), await metaserver.client()
    await one.attributes()
    session = one.session.session
    with pytest.raises(UserError, match="no session is"):
        await asyncio.to_thread(observed.evict, _url(metaserver), "nobody:/")
    assert await asyncio.to_thread(observed.evict, _url(metaserver), session.hex()[:8]) == session.hex()
    assert await refused(one.make(b"late", DIRECTORY)) is ErrorCode.STALE_SESSION
    assert await refused(one.renew(0)) is ErrorCode.STALE_SESSION
    again = Client(await metaserver.connect())
    assert not (await again.open(VOLUME, session)).resumed
    (told,) = [each for each in one.told if each.everything]
    making = asyncio.create_task(two.make(b"directory", DIRECTORY))
    status = await _read(_url(metaserver))
    listed = {each["session"]: each for each in status["sessions"]}
    assert listed[session.hex()]["state"] == "evicted"
    assert listed[session.hex()]["pending_breaks"] > 0
    assert not making.done(), "it may answer from what it has cached"
    for number in [told.number, *(each.number for each in one.told)]:
        one.connection.acknowledge(number)
    await making


async def test_one_that_was_alone_comes_back_at_once(metaserver: Metaserver) -> None:
    client = await metaserver.client()
    assert client.session.alone
    await asyncio.to_thread(observed.evict, _url(metaserver), client.session.session.hex())
    again = Client(await metaserver.connect())
    async with asyncio.timeout(10):  # half of its lease
        assert not (await again.open(VOLUME, client.session.session)).resumed
    await again.make(b"directory", DIRECTORY)


async def test_evictions_are_remembered(tmp_path: Path) -> None:
    async with serving(tmp_path, address="tcp:127.0.0.1:0", lease_s=0.3) as metaserver:
        client = await metaserver.client()
        await until(lambda: not metaserver.server.sessions.all())
        (evicted,) = (await _read(_url(metaserver)))["evicted"]
        assert evicted["session"] == client.session.session.hex()
        assert (evicted["host"], evicted["why"]) == ("test", "its lease had run out")


async def test_a_standby_and_nobody(tmp_path: Path) -> None:
    """One metaserver of a volume that does not answer leaves no authority: the command says so by its exit code."""
    status = await _read(f"bpfuse://127.0.0.1:1/{VOLUME}")
    assert (status["authority"], status["sessions"]) == (None, [])
    with pytest.raises(UserError, match="is not mounted"):
        await asyncio.to_thread(observed.read, f"file://{tmp_path}/volume")
