"""The worker as a process on its socket: how it starts, says that it is ready, and ends without losing anything."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from served import DEADLINE_S, Client, Metaserver, serving
from worker_rig import config

from fuseclient import questions
from fuseclient.worker.process import Status, Worker
from metaserver import wire

pytest.importorskip("fuseclient._native", reason="the native module is not built")

_IN = struct.Struct("=IIQQIIIHH")
_OUT = struct.Struct("=IiQ")
_INIT, _CREATE, _WRITE = 26, 35, 16
#: A capability that pyfuse3 insists on.
_READDIRPLUS = 1 << 13


class Channel:
    """The channel's end of a worker's descriptors, speaking for the kernel."""

    def __init__(self, directory: Path, address: str, *, maps: bool = False) -> None:
        self.fuse, fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.extra, extra = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.notify, notify = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.status, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        config_fd, config_writer = os.pipe()
        self.log = directory / "worker.log"
        given = msgspec.structs.replace(
            config(address, maps=maps),
            fuse_fd=fuse.fileno(),
            extra_fd=extra.fileno(),
            notify_fd=notify.fileno(),
            status_fd=status.fileno(),
        )
        os.write(config_writer, msgspec.json.encode(given))
        os.close(config_writer)
        inherited = (config_fd, *(each.fileno() for each in (fuse, extra, notify, status)))
        with self.log.open("wb") as log:
            self.worker = subprocess.Popen(
                [sys.executable, "-m", "fuseclient.worker", str(config_fd)],
                cwd=Path(__file__).parent.parent,
                pass_fds=inherited,
                stderr=log,
            )
        os.close(config_fd)
        for theirs in (fuse, extra, notify, status):
            theirs.close()
        for mine in (self.fuse, self.extra, self.notify, self.status):
            mine.settimeout(DEADLINE_S)
        self._lines = self.status.makefile("rb")
        self._unique = 0

    async def said(self) -> dict[str, Any]:
        """Return the next object that the worker says."""
        async with asyncio.timeout(DEADLINE_S):
            line = await asyncio.to_thread(self._lines.readline)
        said: dict[str, Any] = json.loads(line)
        return said

    async def request(self, opcode: int, nodeid: int, body: bytes) -> bytes:
        """Send a request as the kernel does, and return its reply's body."""
        self._unique += 2
        header = _IN.pack(_IN.size + len(body), opcode, self._unique, nodeid, 0, 0, os.getpid(), 0, 0)
        self.fuse.send(header + body)
        reply = await asyncio.to_thread(self.fuse.recv, 1 << 20)
        length, error, unique = _OUT.unpack_from(reply)
        assert (length, error, unique) == (len(reply), 0, self._unique)
        return reply[_OUT.size :]

    async def write_a_file(self) -> None:
        """Go as far as two WRITEs that nobody flushes: the worker commits the first itself, and perhaps the second."""
        await self.request(_INIT, 0, struct.pack("=4I", 7, 38, 1 << 17, _READDIRPLUS) + bytes(48))
        made = await self.request(_CREATE, 1, struct.pack("=4I", os.O_RDWR, 0o100644, 0, 0) + b"file\0")
        ino, handle = struct.unpack_from("=Q", made)[0], struct.unpack_from("=Q", made, 128)[0]
        for offset, data in ((0, b"con"), (3, b"tent")):
            write = struct.pack("=QQIIQII", handle, offset, len(data), 0, 0, 0, 0)
            await self.request(_WRITE, ino, write + data)

    async def exit_code(self) -> int:
        async with asyncio.timeout(DEADLINE_S):
            return await asyncio.to_thread(self.worker.wait)

    def close(self) -> None:
        for each in (self._lines, self.fuse, self.extra, self.notify, self.status):
            each.close()
        if self.worker.poll() is None:
            self.worker.kill()
            self.worker.wait()


@pytest_asyncio.fixture
async def metaserver(tmp_path: Path) -> AsyncIterator[Metaserver]:
    async with serving(tmp_path) as metaserver:
        yield metaserver


async def _client(metaserver: Metaserver, store: str) -> Client:
    connection = await metaserver.connect()
    await connection.call(wire.CreateVolume("volume", store, 65536), wire.Done)
    client = Client(connection)
    await client.open("volume")
    return client


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "hang-up", "unmounted"])
async def test_a_clean_end_commits_what_was_written(metaserver: Metaserver, tmp_path: Path, how: str) -> None:
    """The session is ended with the mount only: else the kernel may answer under its lease, or a worker follow."""
    client = await _client(metaserver, f"file://{tmp_path}/blocks")
    channel = Channel(tmp_path, metaserver.address)
    try:
        ready = await channel.said()
        assert ready["ready"] is True
        assert len(metaserver.server.sessions) == 2
        await channel.write_a_file()
        found = await client.connection.call(wire.Lookup(1, b"file"), wire.Found)
        assert found.attributes.size in (0, 3, 7)
        if how == "hang-up":
            channel.fuse.close()
            channel.status.shutdown(socket.SHUT_WR)
        elif how == "unmounted":
            channel.fuse.close()
            channel.status.send(questions.encode(questions.UNMOUNTED))
        else:
            channel.worker.send_signal(signal.Signals[how])
        assert await channel.exit_code() == 0
    finally:
        channel.close()
    content = await client.connection.call(wire.GetContent(found.attributes.ino, 0, 100), wire.Content)
    assert content.inline == b"content"
    assert len(metaserver.server.sessions) == (1 if how == "unmounted" else 2)
    log = channel.log.read_text()
    assert "Traceback" not in log
    assert "never retrieved" not in log
    client.connection.abort()


@pytest.mark.parametrize("ending", [True, False])
async def test_a_request_in_the_turn_of_the_end_is_no_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ending: bool
) -> None:
    """pyfuse3's wait for requests was ended already when its reader comes; at any other time that is a defect."""
    mine, theirs = socket.socketpair()
    worker = Worker(config("unix:/none"), Status(theirs.fileno()))
    monkeypatch.setattr("pyfuse3.terminate", lambda: None)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(worker._on_loop_error)
    if ending:
        worker._end("a test")
        signal.alarm(0)
    wait = loop.create_future()
    wait.set_result(None)
    loop.call_soon(wait.set_result, None)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    loop.set_exception_handler(None)
    assert ("invalid state" in caplog.text.lower()) == (not ending)
    mine.close()
    theirs.close()


async def test_figures_are_given_when_they_are_asked_for(metaserver: Metaserver, tmp_path: Path) -> None:
    client = await _client(metaserver, f"file://{tmp_path}/blocks")
    channel = Channel(tmp_path, metaserver.address)
    try:
        ready = await channel.said()
        await channel.write_a_file()
        for number in range(1, 4):
            channel.status.send(questions.encode(questions.Question(name="figures", id=number)))
            said = await channel.said()
            assert said["id"] == number
        figures = said["answer"]
        assert figures["session"] == ready["session"]
        assert figures["uncommitted_bytes"] in (0, 4, 7)
        assert figures["files_being_written"] == 1
        assert 25 < figures["lease_remaining_s"] <= 30
    finally:
        channel.close()
    client.connection.abort()


async def test_a_store_that_cannot_be_used_is_said_in_one_line(metaserver: Metaserver, tmp_path: Path) -> None:
    client = await _client(metaserver, "gs://bucket")
    await _assert_refused(tmp_path, metaserver.address, "file:///directory")
    client.connection.abort()


async def test_a_missing_volume_is_said_in_one_line(metaserver: Metaserver, tmp_path: Path) -> None:
    await _assert_refused(tmp_path, metaserver.address, "NO_SUCH_VOLUME")


async def test_a_missing_metaserver_is_said_in_one_line(tmp_path: Path) -> None:
    await _assert_refused(tmp_path, f"unix:{tmp_path}/none", "cannot connect")


async def test_maps_that_are_none_are_said_in_one_line(metaserver: Metaserver, tmp_path: Path) -> None:
    await _assert_refused(tmp_path, metaserver.address, "kernel cache", maps=True)


async def _assert_refused(directory: Path, address: str, text: str, *, maps: bool = False) -> None:
    channel = Channel(directory, address, maps=maps)
    try:
        error = (await channel.said())["error"]
        assert text in error
        assert "\n" not in error
        assert await channel.exit_code() == 1
        assert "Traceback" not in channel.log.read_text()
    finally:
        channel.close()
