"""Who is let in to a metaserver, over what, and as whom: on real sockets, with real TLS."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import psutil
import pytest
from certificates import Authority
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from secured import TCP, enter, identity, secured
from served import VOLUME, Client, Metaserver, Raw, serving, until
from t2_metaserver_process import running

from fuseclient.worker import rpc
from metaserver import gate, wire
from metaserver.connection import Limits
from metaserver.tls import BadCertificate, Files, Tls
from metaserver.wire import ErrorCode


async def test_who_is_let_in_and_who_is_not(
    tmp_path: Path, tls: Tls, authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    parsed: list[wire.Request] = []
    decode = wire.decode_frame

    def noting(body: bytes | memoryview) -> wire.Frame:
        frame = decode(body)
        parsed.append(frame.request)
        return frame

    async with secured(tmp_path, tls) as metaserver:
        ca = f"ca={authority.path}"
        token = await identity(metaserver, "token", tmp_path)
        await identity(metaserver, "certificate", tmp_path, by_certificate=True)
        over = await identity(metaserver, "over", tmp_path, expires_s=1)
        none = tmp_path / "none.token"
        none.touch(mode=0o600)
        none.write_text(wire.make_token("nobody"))
        forged = tmp_path / "forged.token"
        forged.touch(mode=0o600)
        forged.write_text(wire.make_token("token"))
        shown = authority.sign("certificate")
        cut_off = "(?i)alert|closed|reset"

        for query in (f"{ca}&{token}", f"{ca}&{shown.query}", f"{ca}&{authority.sign('another').query}&{token}"):
            client = await enter(metaserver, query)
            await client.make(b"file %d" % time.time_ns())

        monkeypatch.setattr(wire, "decode_frame", noting)
        elsewhere = Authority(tmp_path, "elsewhere")
        address = metaserver.tcp
        for query, error, what in [
            ("", rpc.Disconnected, cut_off),
            ("tls", rpc.Disconnected, "self-signed certificate in certificate chain|unable to get local issuer"),
            (f"ca={elsewhere.path}", rpc.Disconnected, "certificate is not to be believed"),
            (ca, rpc.Refused, "NOT_AUTHENTICATED"),
            (f"{ca}&token={none}", rpc.Refused, "NOT_AUTHENTICATED"),
            (f"{ca}&token={forged}", rpc.Refused, "NOT_AUTHENTICATED"),
            (f"{ca}&{over}", rpc.Refused, "NOT_AUTHENTICATED"),
            (f"{ca}&{authority.sign('unknown').query}", rpc.Refused, "NOT_AUTHENTICATED"),
            (f"{ca}&{authority.sign('token').query}", rpc.Refused, "NOT_AUTHENTICATED"),
            (f"{ca}&{elsewhere.sign('certificate').query}", rpc.Disconnected, cut_off),
            (f"{ca}&{authority.sign('certificate', file='expired', expired=True).query}", rpc.Disconnected, cut_off),
            (
                f"{ca}&{authority.sign('certificate', file='self', by_itself=True).query}",
                rpc.Disconnected,
                cut_off,
            ),
        ]:
            with pytest.raises(error, match=what):
                await rpc.connect(f"{address}?{query}" if query else address)
        assert {type(request) for request in parsed} == {wire.Hello}

        parsed.clear()
        older = ssl.create_default_context(cafile=authority.path)
        older.maximum_version = ssl.TLSVersion.TLSv1_2
        host, port = address.removeprefix("tcp:").split(":")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection(host, int(port), ssl=older)
        assert parsed == []
    for reason in (
        "unable to get local issuer",
        "has expired",
        "self-signed",
        "UNSUPPORTED_PROTOCOL",
        "is turned away",
    ):
        assert reason in caplog.text
    for path in (none, forged, tmp_path / "token.token", tmp_path / "over.token"):
        assert path.read_text().partition(":")[2] not in caplog.text


async def test_a_metaserver_that_is_not_the_one_it_says_is_told_nothing(tmp_path: Path, authority: Authority) -> None:
    """Nor is one that was replaced by one without TLS."""
    pair = authority.sign("elsewhere", host="192.0.2.1")
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(wire.make_token("name"))
    async with secured(tmp_path, Tls(Files(*pair))) as metaserver:
        with pytest.raises(rpc.Disconnected, match="IP address mismatch"):
            await rpc.connect(f"{metaserver.tcp}?ca={authority.path}&token={token}")
    heard = bytearray()

    def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def hear() -> None:
            heard.extend(await reader.read(4096))
            writer.write(wire.encode(1, wire.Welcome(wire.PROTOCOL_VERSION, "plain", 1)))
            writer.close()

        tasks.append(asyncio.create_task(hear()))

    tasks: list[asyncio.Task[None]] = []
    async with await asyncio.start_server(listen, "127.0.0.1", 0) as plain:
        port = plain.sockets[0].getsockname()[1]
        with pytest.raises(rpc.Disconnected, match="TLS was not agreed on"):
            await rpc.connect(f"tcp:127.0.0.1:{port}?ca={authority.path}&token={token}")
        await asyncio.gather(*tasks)
    assert heard
    assert token.read_text().encode() not in heard


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_files_of_secrets_are_their_owners(tmp_path: Path, authority: Authority, mode: int) -> None:
    pair = authority.sign("careless")
    os.chmod(pair.key, mode)
    with pytest.raises(BadCertificate, match="chmod 600"):
        Tls(Files(*pair))
    os.chmod(pair.key, 0o600)
    os.chown(pair.key, 1234, -1)
    with pytest.raises(BadCertificate, match="belongs to uid 1234"):
        Tls(Files(*pair))
    os.chown(pair.key, 0, -1)
    token = tmp_path / "token"
    token.write_text(wire.make_token("name"))
    token.chmod(mode)
    with pytest.raises(wire.NotPrivate, match="chmod 600"):
        wire.read_token(str(token))


async def test_a_session_is_its_identitys(tmp_path: Path, tls: Tls, authority: Authority) -> None:
    """Another can neither resume it, nor, when the metaserver was started again, reclaim it; its owner can."""
    async with secured(tmp_path, tls) as metaserver:
        ca = f"ca={authority.path}"
        one, two = [await identity(metaserver, name, tmp_path) for name in ("one", "two")]
        client = await enter(metaserver, f"{ca}&{one}")
        session = client.session.session
        for _ in range(2):
            other = Client(await metaserver.connect_to(f"{metaserver.tcp}?{ca}&{two}"))
            local = Client(await metaserver.connect())
            for each in (other, local):
                with pytest.raises(rpc.Refused, match="ACCESS_DENIED"):
                    await each.open(VOLUME, resume=session)
            await metaserver.stop()
            await metaserver.start_on(metaserver.address, TCP)
        back = Client(await metaserver.connect_to(f"{metaserver.tcp}?{ca}&{one}"))
        assert (await back.open(VOLUME, resume=session)).resumed


async def test_other_tenants_volumes_are_not_there(tmp_path: Path, tls: Tls, authority: Authority) -> None:
    async with secured(tmp_path, tls) as metaserver:
        admin = await metaserver.connect()
        await admin.call(wire.CreateVolume("other", "file:///blocks", 0), wire.Done)
        query = f"ca={authority.path}&{await identity(metaserver, 'tenant', tmp_path)}"
        connection = await metaserver.connect_to(f"{metaserver.tcp}?{query}")
        requests: list[tuple[wire.Request, ErrorCode]] = [
            (wire.OpenSession("other", "test"), ErrorCode.NO_SUCH_VOLUME),
            (wire.CreateVolume("third", "file:///blocks", 0), ErrorCode.ACCESS_DENIED),
            (wire.CreateIdentity(wire.Identity("friend"), bytes(32)), ErrorCode.ACCESS_DENIED),
            (wire.RevokeIdentity("tenant"), ErrorCode.ACCESS_DENIED),
            (wire.ListIdentities(), ErrorCode.ACCESS_DENIED),
        ]
        for request, kind in requests:
            with pytest.raises(rpc.Refused) as refused:
                await connection.call(request, wire.Done)
            assert refused.value.code is kind
        with pytest.raises(rpc.Refused, match="NO_SUCH_VOLUME"):
            await anext(connection.follow(wire.FollowEvents("other", 0, False)))


async def test_revocation_is_at_once(tmp_path: Path, tls: Tls, authority: Authority) -> None:
    """What is under way is not committed, though its client may be gone by then; nobody else is touched."""
    async with secured(tmp_path, tls) as metaserver:
        ca = f"ca={authority.path}"
        one, two = [f"{ca}&{await identity(metaserver, name, tmp_path)}" for name in ("one", "two")]
        client, other = await enter(metaserver, one), await enter(metaserver, two)
        admin = await metaserver.client()
        await admin.attributes()
        # The change waits for the administrator's session, which has cached the root, to drop it.
        held = asyncio.Event()
        admin.connection.on_break(lambda told: held.set())
        change = asyncio.create_task(client.make(b"late"))
        await held.wait()
        await admin.connection.call(wire.RevokeIdentity("one"), wire.Done)
        with pytest.raises(rpc.Disconnected):
            await change
        with pytest.raises(rpc.Refused, match="NOT_AUTHENTICATED"):
            await enter(metaserver, one)
        for session in metaserver.server.sessions.all():
            for breaking in list(session.pending.values()):
                breaking.settle(session, dropped=True)
        await other.make(b"of another")
        with pytest.raises(rpc.Refused, match="NOT_FOUND"):
            await other.connection.call(wire.Lookup(1, b"late"), wire.Found)


async def test_an_identity_expires_while_it_is_used(tmp_path: Path, tls: Tls, authority: Authority) -> None:
    async with secured(tmp_path, tls) as metaserver:
        query = await identity(metaserver, "short", tmp_path, expires_s=int(time.time()) + 2)
        client = await enter(metaserver, f"ca={authority.path}&{query}")
        await until(lambda: client.connection.lost)


async def test_certificates_are_read_again(tmp_path: Path, authority: Authority) -> None:
    files = authority.sign("renewed", host="192.0.2.1")
    tls = Tls(Files(*files))
    async with secured(tmp_path, tls) as metaserver:
        query = f"ca={authority.path}&{await identity(metaserver, 'one', tmp_path)}"
        with pytest.raises(rpc.Disconnected, match="mismatch"):
            await enter(metaserver, query)
        authority.sign("renewed")
        tls.reload()
        await enter(metaserver, query)
        os.truncate(files.certificate, 100)
        tls.reload()
        await enter(metaserver, query)


async def test_sighup_has_a_process_read_its_certificates_again(tmp_path: Path, authority: Authority) -> None:
    """Those that are connected stay so; an identity that is revoked meanwhile is cut off as ever."""
    files = authority.sign("process", host="192.0.2.1")
    arguments = ("--engine", f"lmdb://{tmp_path}/meta", "--listen", f"unix:{tmp_path}/socket", "--listen", TCP)
    certificate = ("--tls-cert", files.certificate, "--tls-key", files.key, "--advertise", "tcp:127.0.0.1:1")
    async with running(*arguments, *certificate) as process:
        admin = await process.client()
        (port,) = [each.laddr.port for each in psutil.Process(process.process.pid).net_connections("tcp")]
        token = wire.make_token("one")
        digest = wire.digest(wire.split_token(token)[1])
        made = wire.CreateIdentity(wire.Identity("one", volumes=[VOLUME]), digest)
        await admin.connection.call(made, wire.Done)
        (tmp_path / "token").touch(mode=0o600)
        (tmp_path / "token").write_text(token)
        address = f"tcp:127.0.0.1:{port}?ca={authority.path}&token={tmp_path}/token"
        with pytest.raises(rpc.Disconnected, match="mismatch"):
            await rpc.connect(address)
        authority.sign("process")
        process.process.send_signal(signal.SIGHUP)

        async def is_let_in() -> rpc.Connection | None:
            with contextlib.suppress(rpc.Disconnected):
                return await rpc.connect(address)
            return None

        await until(is_let_in)
        client = await rpc.connect(address)
        await client.call(wire.OpenSession(VOLUME, "test"), wire.SessionOpened)
        assert not admin.connection.lost
        await admin.connection.call(wire.RevokeIdentity("one"), wire.Done)
        await until(lambda: client.lost)
        with pytest.raises(rpc.Refused, match="NOT_AUTHENTICATED"):
            await rpc.connect(address)
        assert await process.end(signal.SIGTERM) == 0


async def test_a_local_process_of_another_user_may_not_use_the_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as metaserver:
        (await metaserver.connect()).abort()
        credentials = gate._CREDENTIALS.pack(1, 1234, 1234)
        monkeypatch.setattr(gate, "_peer_credentials", lambda sock: credentials)
        with pytest.raises(rpc.Refused, match="uid 1234"):
            await metaserver.connect()


async def test_a_thousand_half_open_connections_leave_others_served(
    tmp_path: Path, tls: Tls, authority: Authority
) -> None:
    """They hang before TLS, in it, or before their Hello. The oldest give way; those that were let in stay."""
    async with secured(tmp_path, tls, Limits(half_open=100)) as metaserver:
        query = f"ca={authority.path}&{await identity(metaserver, 'one', tmp_path)}"
        before = await enter(metaserver, query)
        host, port = metaserver.tcp.removeprefix("tcp:").split(":")
        with _sockets(1000) as sockets:
            for number, sock in enumerate(sockets):
                with contextlib.suppress(BlockingIOError):
                    sock.connect((host, int(port)))
                if number % 3 == 1:
                    with contextlib.suppress(OSError):
                        sock.send(b"\x16\x03\x01\x02\x00\x01")
                if number % 50 == 0:
                    await asyncio.sleep(0)
            after = await enter(metaserver, query)
            await before.make(b"before")
            await after.make(b"after")
            assert len(metaserver.server.gate.halves) + len(metaserver.front.halves) <= 200


@contextlib.contextmanager
def _sockets(count: int) -> Iterator[list[socket.socket]]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.setblocking(False)
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


async def test_limits_of_an_identity(tmp_path: Path, tls: Tls, authority: Authority) -> None:
    limits = Limits(identity_connections=2, identity_in_flight=1, identity_sessions=1, idle_s=0.0)
    async with secured(tmp_path, tls, limits) as metaserver:
        ca = f"ca={authority.path}"
        query = f"{ca}&{await identity(metaserver, 'one', tmp_path)}"
        client = await enter(metaserver, query)
        with pytest.raises(rpc.Refused, match="1 sessions"):
            await enter(metaserver, query)
        with pytest.raises(rpc.Refused, match="too many connections"):
            await rpc.connect(f"{metaserver.tcp}?{query}")
        metaserver.engine.hold()
        calls = [asyncio.create_task(client.attributes()) for _ in range(20)]
        await until(lambda: metaserver.engine.waiting == 1)
        other = await enter_held(metaserver)
        metaserver.engine.let_go()
        assert len(await asyncio.gather(*calls)) == 20
        await until(lambda: other.lost)  # it is idle, and has no session
        assert not client.connection.lost


async def enter_held(metaserver: Metaserver) -> rpc.Connection:
    """Connect while the engine answers nothing, as somebody that it is not asked about."""
    connection = await metaserver.connect()
    assert metaserver.engine.waiting == 1
    return connection


_ANY_HANDSHAKE: Final = st.one_of(
    st.binary(max_size=5000),
    st.builds(wire.Hello, st.integers(0, 9), st.text(max_size=64), st.text(max_size=128)),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_ANY_HANDSHAKE)
async def test_any_handshake(any_handshake: Metaserver, sent: bytes | wire.Hello) -> None:
    """Whatever comes first is refused, in a frame or by the end of the connection; and the next one is served."""
    raw = await Raw.connect(any_handshake.address)
    raw.send(sent if isinstance(sent, bytes) else wire.encode(1, sent))
    raw.writer.write_eof()
    replies = await raw.until_closed()
    raw.abort()
    assert all(isinstance(reply, wire.Failure) for reply in replies)
    (await rpc.connect(any_handshake.address)).abort()


@pytest.fixture
async def any_handshake(tmp_path: Path) -> AsyncIterator[Metaserver]:
    async with serving(tmp_path) as metaserver:
        yield metaserver
