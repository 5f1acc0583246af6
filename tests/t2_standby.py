"""Several metaservers on one engine, as processes: one serves, the others stand by, and clients find the one."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from served import DEADLINE_S, DIRECTORY, VOLUME, Client, until
from t2_metaserver_process import running

from fuseclient.worker import finding, rpc
from fuseclient.worker.known import Known
from metaserver import wire

#: One address that nobody listens on.
_NOBODY = "tcp:127.0.0.1:1"


def _arguments(directory: Path) -> tuple[str, ...]:
    return ("--engine", f"lmdb://{directory}/meta", "--listen", "tcp:127.0.0.1:0", "--lease-s", "10")


async def _find(addresses: str) -> rpc.Connection:
    return await finding.connect(addresses, timeout_s=DEADLINE_S)


async def _next(addresses: str, before: Client, name: bytes) -> Client:
    """Go over to the next authority, where the session lives on, and make a directory."""
    connection = await _find(addresses)
    assert connection.welcome.server_epoch > before.connection.welcome.server_epoch
    client = Client(connection)
    assert (await client.open(VOLUME, before.session.session)).resumed
    await client.make(name, DIRECTORY)
    return client


async def _names(client: Client) -> set[bytes]:
    pages = client.connection.stream(wire.FetchDirectory(wire.ROOT_INO, 0, 100, 0, 0))
    return {entry.name async for page in pages for entry in page.entries}


async def test_one_serves_and_the_others_stand_by(tmp_path: Path) -> None:
    """Killed, ended in order, and hung: the next one has all that was acknowledged, and the session goes on."""
    async with running(*_arguments(tmp_path)) as one:
        client = await one.client()
        await client.make(b"first", DIRECTORY)
        async with running(*_arguments(tmp_path)) as two:
            told = await rpc.connect(two.address)
            assert (told.welcome.server_epoch, told.welcome.elsewhere) == (0, one.address)
            with pytest.raises(rpc.Refused, match=f"standby; the authority is at {one.address}"):
                await told.call(wire.OpenSession(VOLUME, "test"), wire.SessionOpened)
            for addresses in (two.address, f"{_NOBODY},{two.address}", f"{two.address},{one.address}"):
                found = await _find(addresses)
                assert found.welcome.server_epoch == client.connection.welcome.server_epoch
                found.abort()

            await one.end(signal.SIGKILL)
            client = await _next(f"{one.address},{two.address}", client, b"second")
            assert told.lost, "it had been told otherwise"
            async with running(*_arguments(tmp_path)) as three:
                both = f"{two.address},{three.address}"
                await two.end(signal.SIGTERM)
                client = await _next(both, client, b"third")
                async with running(*_arguments(tmp_path)) as four:
                    three.process.send_signal(signal.SIGSTOP)
                    client = await _next(f"{three.address},{four.address}", client, b"fourth")
                    assert await _names(client) == {b"first", b"second", b"third", b"fourth"}
                    assert await three.process.wait() == -signal.SIGKILL
                    client.connection.abort()
                    assert await four.end(signal.SIGTERM) == 0
                    assert f"process, {three.process.pid}, is killed" in four.errors


async def _told(connection: rpc.Connection) -> list[str]:
    return (await connection.call(wire.GetStatus(None), wire.Status)).metaservers


async def test_clients_are_told_of_all(tmp_path: Path) -> None:
    """Who has the authority tells of those that stand by, in each way that a client asks; the dead are not told of."""
    async with running(*_arguments(tmp_path)) as one, running(*_arguments(tmp_path)) as two:
        client = await one.client()
        both = sorted((one.address, two.address))

        async def knows_both() -> bool:
            return (await client.renew(0)).metaservers == both

        await until(knows_both)
        assert await _told(client.connection) == both
        found = await _find(two.address)
        assert (found.place, found.welcome.metaservers) == (one.address, both)
        await two.end(signal.SIGKILL)

        async def knows_one() -> bool:
            return await _told(client.connection) == [one.address]

        await until(knows_one)


def test_what_is_told_is_added_to_the_url_s(tmp_path: Path) -> None:
    memory = os.memfd_create("test")
    known = Known("tcp:a:1,tcp:b:2?token=/token", memory)
    known.learn("tcp:a:1", ["tcp:b:2", "tcp:c:3", "tcp:[::2]:4", "nonsense", "unix:/socket"])
    assert known.address == "tcp:a:1,tcp:b:2,tcp:c:3,tcp:[::2]:4?token=/token"
    known.learn("tcp:a:1", [])
    assert known.told == ["tcp:c:3", "tcp:[::2]:4"], "who knows of nobody says nothing"
    known.learn("tcp:c:3", ["tcp:c:3"])
    assert known.told == ["tcp:c:3"]
    assert Known("tcp:a:1", memory).told == ["tcp:c:3"], "the next worker knows them"
    os.close(memory)


@pytest.mark.parametrize(
    ("query", "teller", "place", "may"),
    [
        ("", "tcp:127.0.0.1:1", "tcp:127.0.0.1:2", True),
        ("", "tcp:127.0.0.1:1", "tcp:other:2", True),
        ("", "tcp:other:1", "tcp:127.0.0.1:2", False),
        ("token=/token", "tcp:other:1", "tcp:localhost:2", False),
        ("token=/token&ca=/ca", "tcp:other:1", "tcp:localhost:2", True),
        ("tls", "tcp:other:1", "tcp:[::1]:2", True),
        ("insecure", "tcp:other:1", "tcp:127.0.0.1:2", True),
        ("", "tcp:other:1", "unix:/socket", False),
        ("", "unix:/socket", "unix:/another", True),
        ("", "unix:/socket", "tcp:127.0.0.1:1", True),
    ],
)
def test_nobody_sends_a_client_to_where_it_would_speak_in_plaintext(
    query: str, teller: str, place: str, may: bool
) -> None:
    known = Known(f"{teller}?{query}")
    known.learn(teller, [place])
    assert known.told == ([place] if may else [])


async def test_nobody_has_the_authority(tmp_path: Path) -> None:
    with pytest.raises(rpc.Disconnected, match="cannot connect"):
        await finding.connect(f"{_NOBODY},unix:{tmp_path}/none")
    with pytest.raises(ValueError, match="not an address"):
        await finding.connect("tcp:127.0.0.1:1,,")


async def test_one_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A standby is asked again and again while another address accepts connections and says nothing."""

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    monkeypatch.setattr(rpc.connect, "__kwdefaults__", {"timeout_s": 3600.0})
    hung = await asyncio.start_unix_server(hang, f"{tmp_path}/hung")
    async with running(*_arguments(tmp_path)) as one, running(*_arguments(tmp_path)) as two:
        finding_it = asyncio.create_task(_find(f"unix:{tmp_path}/hung,{two.address}"))
        while not (await rpc.connect(two.address)).welcome.elsewhere:  # noqa: ASYNC110 - it stands by
            await asyncio.sleep(0.01)
        await one.end(signal.SIGTERM)
        found = await finding_it
        assert found.welcome.server_epoch == 2
        found.abort()
    hung.close()
