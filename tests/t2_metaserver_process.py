"""``python -m metaserver`` as a process: how it says it is ready, ends, refuses, and keeps what it acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from served import DEADLINE_S, DIRECTORY, VOLUME, Client, until

from fuseclient.worker import rpc
from metaserver import wire

ROOT = Path(__file__).parent.parent


class Process:
    """A metaserver, started and ready, and what it said on stderr once it has ended."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address
        self.errors = ""

    async def client(self) -> Client:
        client = Client(await rpc.connect(self.address))
        with contextlib.suppress(rpc.Refused):
            await client.connection.call(wire.CreateVolume(VOLUME, "file:///blocks", 65536), wire.Done)
        await client.open(VOLUME)
        return client

    async def end(self, number: signal.Signals) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        async with asyncio.timeout(DEADLINE_S):
            _, errors = await self.process.communicate()
        self.errors = errors.decode()
        return self.process.returncode or 0


@contextlib.asynccontextmanager
async def running(*arguments: str) -> AsyncIterator[Process]:
    """A metaserver that said on its ready descriptor that it listens."""
    reader, writer = os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "metaserver", *arguments, "--ready-fd", str(writer),
        pass_fds=[writer], stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    os.close(writer)
    try:
        async with asyncio.timeout(DEADLINE_S):
            line = await asyncio.to_thread(_read_line, reader)
        assert line.startswith("ready "), line or (await process.communicate())[1].decode()
        yield Process(process, line.removeprefix("ready ").rstrip("\n"))
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def _read_line(descriptor: int) -> str:
    with open(descriptor) as file:
        return file.read()


def refuse(*arguments: str) -> str:
    """Start a metaserver that must refuse, and return the line it says."""
    done = subprocess.run(
        [sys.executable, "-m", "metaserver", *arguments],
        capture_output=True, text=True, timeout=DEADLINE_S, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("listen", ["unix:{}/socket", "tcp:127.0.0.1:0"])
async def test_it_says_when_it_listens_and_ends_cleanly(tmp_path: Path, number: signal.Signals, listen: str) -> None:
    async with running("--engine", f"lmdb://{tmp_path}/meta", "--listen", listen.format(tmp_path)) as metaserver:
        client = await metaserver.client()
        await client.make(b"directory", DIRECTORY)
        assert not metaserver.address.endswith(":0")
        assert await metaserver.end(number) == 0
        await until(lambda: client.connection.lost)
    assert "Traceback" not in metaserver.errors
    assert os.listdir(tmp_path) == ["meta"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "--engine"),
        (["--engine", "memory://"], "--listen"),
        (["--engine", "memory://", "--listen", "here"], "not an address"),
        (["--engine", "memory://", "--listen", "tcp:127.0.0.1:x"], "not an address"),
        (["--engine", "memory://", "--listen", "tcp:0.0.0.0:0"], "--insecure"),
        (["--engine", "memory://", "--listen", "tcp:no.such.host.invalid:0"], "cannot listen"),
        (["--engine", "memory://", "--listen", "unix:/no/such/dir/socket"], "No such file"),
        (["--engine", "nothing://", "--listen", "tcp:127.0.0.1:0"], "no such storage engine"),
        (["--engine", "lmdb:///dev/null", "--listen", "tcp:127.0.0.1:0"], "/dev/null"),
        (["--engine", "memory://", "--listen", "tcp:127.0.0.1:0", "--lease-s", "0"], "0.1 to 3600"),
        (["--engine", "memory://", "--listen", "tcp:127.0.0.1:0", "--lease-s", "nan"], "0.1 to 3600"),
        (["--engine", "memory://", "--listen", "tcp:127.0.0.1:0", "--ready-fd", "99"], "file descriptor"),
        (["--engine", "memory://", "--listen", "tcp:127.0.0.1:0", "--log-level", "LOUD"], "--log-level"),
        (["--engine", "memory://", "--listen", "tcp:127.0.0.1:0", "--nonsense"], "--nonsense"),
    ],
)
def test_a_users_mistake_is_one_line(arguments: list[str], what: str) -> None:
    assert what in refuse(*arguments)


async def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    engine = f"lmdb://{tmp_path}/meta"
    async with running("--engine", engine, "--listen", f"unix:{tmp_path}/one") as metaserver:
        assert "in use" in await asyncio.to_thread(
            refuse, "--engine", engine, "--listen", f"unix:{tmp_path}/two", "--alone"
        )
        assert "another server" in await asyncio.to_thread(
            refuse, "--engine", "memory://", "--listen", metaserver.address
        )
        client = await metaserver.client()
        await client.attributes()
        client.connection.abort()


async def test_a_directory_in_use_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    """The one that waits is not to stand by, and says that it has looked."""
    engine, second = f"lmdb://{tmp_path}/meta", f"unix:{tmp_path}/two"
    async with running("--engine", engine, "--listen", f"unix:{tmp_path}/one") as one:
        waiting = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "metaserver", "--engine", engine, "--listen", second, "--alone",
            "--log-level", "DEBUG", stderr=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        assert waiting.stderr is not None
        try:
            async with asyncio.timeout(DEADLINE_S):
                while b"in use by another metaserver; looking again" not in (line := await waiting.stderr.readline()):
                    assert line
                assert await one.end(signal.SIGTERM) == 0
                while b"listening on" not in (line := await waiting.stderr.readline()):
                    assert line
            (await rpc.connect(second)).abort()
        finally:
            waiting.kill()
            await waiting.communicate()


async def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    arguments = ("--engine", f"lmdb://{tmp_path}/meta", "--listen", f"unix:{tmp_path}/socket", "--lease-s", "5")
    async with running(*arguments) as metaserver:
        client = await metaserver.client()
        made = await asyncio.gather(*(client.make(b"%d" % number) for number in range(50)))
        file = (await client.change(wire.WriteInline(made[0].ino, 0, b"content"))).attributes[0]
        assert await metaserver.end(signal.SIGKILL) == -signal.SIGKILL
    async with running(*arguments) as metaserver:
        client = await metaserver.client()
        pages = [page async for page in client.connection.stream(wire.FetchDirectory(1, 0, 100, 65536, 1 << 20))]
        entries = {entry.name: entry for page in pages for entry in page.entries}
        assert entries.keys() == {b"%d" % number for number in range(50)}
        assert (entries[b"0"].data, entries[b"0"].attributes) == (b"content", file)
        assert client.session.lease_ms == 5000
        client.connection.abort()


async def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    """The parent is a shell of the test's own, which says the metaserver's pid and is then killed."""
    address = f"unix:{tmp_path}/socket"
    command = f"{sys.executable} -m metaserver --engine memory:// --listen {address} --die-with-parent & echo $!; wait"
    parent = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    await until(lambda: _answers(address))
    parent.kill()
    await parent.wait()
    await until(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes())
    await until(lambda: not (tmp_path / "socket").exists())


async def _answers(address: str) -> bool:
    try:
        (await rpc.connect(address)).abort()
    except rpc.Disconnected:
        return False
    return True
