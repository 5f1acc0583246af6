"""Short dealings of the command line with a metaserver: start one for a moment, make or look for a volume."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

from fuseclient.errors import UserError
from fuseclient.volumes import Embedded, Remote
from fuseclient.worker import finding, rpc
from metaserver import wire

_T = TypeVar("_T")

_READY_TIMEOUT_S: Final = 20.0
_STOP_TIMEOUT_S: Final = 20.0
_READY_LINE_MAX: Final = 4096
#: How much of a log's end is looked at, in bytes.
_LOG_TAIL: Final = 8192


class EngineInUse(UserError):
    """Another metaserver has the engine."""


def create_volume(address: str, request: wire.CreateVolume) -> bytes:
    """Make a volume on the metaserver at ``address`` and return its identity; raise :exc:`UserError`."""

    async def body(connection: rpc.Connection) -> bytes:
        await connection.call(request, wire.Done)
        return (await _look_at(connection, request.name)).volume

    try:
        return talk(address, body)
    except rpc.Refused as refused:
        if refused.code is wire.ErrorCode.VOLUME_EXISTS:
            raise _exists(address, request.name) from None
        raise UserError(f"the metaserver at {address} refused to make the volume: {refused}") from None


def must_be_new(volume: Remote) -> None:
    """Raise :exc:`UserError` if the volume's metaserver does not answer, or has it already."""
    try:
        talk(volume.address, lambda connection: _look_at(connection, volume.name))
    except rpc.Refused as refused:
        if refused.code is wire.ErrorCode.NO_SUCH_VOLUME:
            return
        raise UserError(f"{volume.url}: {refused}") from None
    raise _exists(volume.address, volume.name)


def _exists(address: str, name: str) -> UserError:
    return UserError(f"the metaserver at {address} has a volume {name!r} already")


async def _look_at(connection: rpc.Connection, name: str) -> wire.SessionOpened:
    """Return what a metaserver tells of a volume."""
    client = f"{socket.gethostname()} check"
    opened = await connection.call(wire.OpenSession(name, client), wire.SessionOpened)
    await connection.call(wire.CloseSession(), wire.Done)
    return opened


def check_volume(volume: Remote) -> wire.SessionOpened:
    """Return what a volume's metaserver tells of it; raise :exc:`UserError` if it does not answer or has it not."""
    try:
        return talk(volume.address, lambda connection: _look_at(connection, volume.name))
    except rpc.Refused as refused:
        if refused.code is wire.ErrorCode.NO_SUCH_VOLUME:
            raise UserError(
                f"the metaserver at {volume.places} has no volume {volume.name!r};"
                f" make one with: bpfuse format {volume.url} --store file:///directory"
            ) from None
        raise UserError(f"{volume.url}: {refused}") from None


@contextlib.contextmanager
def embedded_server(volume: Embedded, *options: str) -> Iterator[str]:
    """Run a metaserver on an embedded volume's metadata for as long as the body runs, and give its address.

    Raises :exc:`UserError`; :exc:`EngineInUse` if the volume is mounted or otherwise in use just now.
    """
    with tempfile.TemporaryDirectory(prefix="bpfuse-") as directory:
        log = Path(directory) / "log"
        reading, writing = os.pipe()
        with open(reading, "rb", buffering=0) as ready:
            server = _start(volume, log, writing, options)
            os.close(writing)
            try:
                yield _wait_ready(server, ready.fileno(), log)
            finally:
                _stop(server)


def read_line(descriptor: int, timeout_s: float) -> bytes | None:
    """Read a line from a pipe: without its newline; ``None`` if the pipe ends or ``timeout_s`` passes before."""
    received = bytearray()
    deadline = time.monotonic() + timeout_s
    while not received.endswith(b"\n"):
        left_s = max(0.0, deadline - time.monotonic())
        readable, _, _ = select.select([descriptor], [], [], left_s)
        piece = os.read(descriptor, _READY_LINE_MAX) if readable else b""
        if not piece:
            return None
        received += piece
    return bytes(received[:-1])


def talk(address: str, body: Callable[[rpc.Connection], Awaitable[_T]]) -> _T:
    """Run ``body`` on a connection of its own; raise :exc:`UserError` if there is none, or it is lost."""

    async def connected() -> _T:
        connection = await finding.connect(address)
        try:
            return await body(connection)
        finally:
            connection.abort()

    try:
        return asyncio.run(connected())
    except rpc.Disconnected as error:
        raise UserError(f"no metaserver to talk to: {error}") from None


def _start(volume: Embedded, log: Path, ready: int, options: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "metaserver", "--engine", volume.engine_url]
    command += ["--listen", f"unix:{log.with_name('metaserver.sock')}", "--ready-fd", str(ready)]
    command += ["--no-grace", "--alone", *options]
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=(ready,), start_new_session=True
        )


def _wait_ready(server: subprocess.Popen[bytes], ready: int, log: Path) -> str:
    """Return the address that the server gives when it listens; raise :exc:`UserError` if it gives up."""
    said, _, text = (read_line(ready, _READY_TIMEOUT_S) or b"").decode(errors="replace").partition(" ")
    if said == "ready":
        return text
    server.kill()
    server.wait()
    kind = EngineInUse if said == "busy" else UserError
    raise kind(f"the metaserver did not start: {text or last_line(log) or 'it said nothing'}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
        raise UserError(f"the metaserver did not end within {_STOP_TIMEOUT_S:g} s and was killed") from None


def last_line(log: Path) -> str:
    """Return the last line of a log that says anything; "" if there is none."""
    try:
        lines = log.read_bytes()[-_LOG_TAIL:].decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "").removeprefix("metaserver: ")
