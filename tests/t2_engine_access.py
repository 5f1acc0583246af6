"""Engines on servers that ask for passwords or certificates and speak TLS: who is let in, and what is not shown."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import Authority
from databases import Unavailable
from secured_databases import PASSWORD, SECURED, CertificateEtcd, PasswordEtcd, Secured
from served import DIRECTORY
from t2_metaserver_process import running
from t2_standby import _names as names

from metaserver.engine import Snapshot, Transaction, open_engine
from metaserver.errors import EngineUnusable

_DEADLINE_S = 30.0


@pytest.fixture(scope="module", params=SECURED)
def server(request: pytest.FixtureRequest, authority: Authority) -> Iterator[Secured]:
    with contextlib.ExitStack() as stack:
        try:
            made = SECURED[request.param](authority)
        except Unavailable as error:
            pytest.skip(str(error))
        stack.callback(made.close)
        made.start()
        yield made


def put(txn: Transaction) -> None:
    txn.put(b"key", b"value")


def get(snapshot: Snapshot) -> bytes | None:
    return snapshot.get(b"key")


async def test_a_metaserver_is_let_in(server: Secured, tmp_path: Path) -> None:
    """It serves, comes back when the server was killed, and a standby takes over; its password is nowhere."""
    arguments = (
        "--engine",
        server.url(),
        "--listen",
        f"unix:{tmp_path}/socket",
        "--log-level",
        "DEBUG",
        "--lease-s",
        "2",
    )
    async with running(*arguments) as one:
        client = await one.client()
        await client.make(b"first", DIRECTORY)
        await asyncio.to_thread(server.kill)
        making = asyncio.create_task(client.make(b"second", DIRECTORY))
        await asyncio.to_thread(server.start)
        with contextlib.suppress(Exception):  # if the authority lapsed, the next one is asked
            await making
        seen = _command_line(one.process.pid)
        await one.end(signal.SIGTERM)
    async with running(*arguments) as two:
        client = await two.client()
        assert b"first" in await names(client)
        await two.end(signal.SIGTERM)
    assert one.errors
    assert PASSWORD not in one.errors + two.errors + seen


def _command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


async def test_who_shows_nothing_is_refused_at_once(server: Secured) -> None:
    """In one line, without waiting for a server that is there: no password, a wrong one, no certificate."""
    wrong = server.secret("wrong", "another secret")
    refused = [server.certified_url()]
    if not isinstance(server, CertificateEtcd):
        refused.append(f"{server.certified_url()}&password_file={wrong}")
    if isinstance(server, PasswordEtcd):
        refused.append(server.certified_url().replace("bpfuse@", ""))
    for url in refused:
        engine = open_engine(url)
        async with asyncio.timeout(_DEADLINE_S):
            with pytest.raises(EngineUnusable) as error:
                await engine.write(put)
        said = str(error.value)
        assert "does not answer" not in said, url
        assert "another secret" not in said
        assert "\n" not in said
        await engine.close()


async def test_a_server_that_another_authority_vouches_for(server: Secured, tmp_path: Path) -> None:
    engine = open_engine(server.url().replace(server.authority.path, Authority(tmp_path).path))
    with pytest.raises(EngineUnusable, match="certificate") as error:
        await engine.write(put)
    assert "\n" not in str(error.value)
    await engine.close()


@pytest.mark.parametrize("server", ["etcd with passwords"], indirect=True)
async def test_what_is_for_others(server: Secured) -> None:
    """A user who may use only some of the keys, as in a cluster that others share."""
    engine = open_engine(server.url().replace("/test/", "/other/"))
    with pytest.raises(EngineUnusable, match="permission denied"):
        await engine.write(put)
    await engine.close()
