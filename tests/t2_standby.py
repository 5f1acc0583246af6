"""Several metaservers on one engine, as processes: one serves, the others stand by, and clients find the one."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from served import DEADLINE_S, DIRECTORY, VOLUME, Client
from t2_metaserver_process import running

from fuseclient.worker import finding, rpc
from metaserver import wire

#: One address that nobody listens on.
_NOBODY = "tcp:127.0.0.1:1"


def _arguments(directory: Path) -> tuple[str, ...]:
    return ("--engine", f"lmdb://{directory}/meta", "--listen", "tcp:127.0.0.1:0", "--lease-s", "2")


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
