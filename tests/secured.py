"""A metaserver on TLS in the test's own process, and identities of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from served import VOLUME, Client, Metaserver, serving

from metaserver import wire
from metaserver.connection import Limits
from metaserver.gate import Access
from metaserver.tls import Tls

TCP: Final = "tcp:127.0.0.1:0"


@contextlib.asynccontextmanager
async def secured(directory: Path, tls: Tls, limits: Limits | None = None) -> AsyncIterator[Metaserver]:
    """A metaserver on TLS, with a volume, and ``local``: an administrator's connection over a unix socket."""
    async with serving(directory, address=f"unix:{directory}/socket", limits=limits, access=Access(tls)) as metaserver:
        await (await metaserver.connect()).call(wire.CreateVolume(VOLUME, "file:///blocks", 65536), wire.Done)
        await metaserver.stop()
        await metaserver.start_on(f"unix:{directory}/socket", TCP)
        yield metaserver


async def identity(metaserver: Metaserver, name: str, directory: Path, **more: object) -> str:
    """Make an identity for the volume and return the query that shows it: its token, or nothing but its name."""
    admin = await metaserver.connect()
    made = wire.Identity(name, **{"volumes": [VOLUME], **more})  # type: ignore[arg-type]
    if made.by_certificate:
        await admin.call(wire.CreateIdentity(made, b""), wire.Done)
        return ""
    token = wire.make_token(name)
    await admin.call(wire.CreateIdentity(made, wire.digest(wire.split_token(token)[1])), wire.Done)
    path = directory / f"{name}.token"
    path.touch(mode=0o600)
    path.write_text(token)
    return f"token={path}"


async def enter(metaserver: Metaserver, query: str, volume: str = VOLUME) -> Client:
    """Connect over TCP, with these credentials, and open a session."""
    client = Client(await metaserver.connect_to(f"{metaserver.tcp}?{query}"))
    await client.open(volume)
    return client
