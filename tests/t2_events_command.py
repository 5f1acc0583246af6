"""``bpfuse events`` by the real command: on a metaserver, on a volume that nobody has mounted, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rig

from fuseclient import servers
from fuseclient.events import source
from fuseclient.volumes import Embedded, parse_volume
from fuseclient.worker import rpc
from metaserver import wire


@contextlib.contextmanager
def served(sandbox: rig.Sandbox, engine: Path, listen: str = "127.0.0.1:0", *, kill: bool = False) -> Iterator[str]:
    """A metaserver on an engine; gives host:port."""
    options = ("--lease", "2", "--durability", "interval")
    server = sandbox.start("metaserver", "--engine", f"lmdb://{engine}", "--listen", listen, *options)
    assert server.stderr is not None
    said = ""
    while (address := re.search(r" on tcp:(127\.0\.0\.1:\d+)", said)) is None:
        line = server.stderr.readline()
        assert line, said
        said += line
    drain = threading.Thread(target=server.stderr.read, daemon=True)
    drain.start()
    try:
        yield address[1]
    finally:
        server.kill() if kill else server.terminate()
        server.wait(rig.WAIT_S)
        drain.join()


class Listener:
    """The command, running, and the lines that it has said."""

    def __init__(self, sandbox: rig.Sandbox, *arguments: str) -> None:
        self.process = sandbox.start("events", *arguments)
        self.lines: list[str] = []
        self.errors: list[str] = []
        for stream, into in ((self.process.stdout, self.lines), (self.process.stderr, self.errors)):
            threading.Thread(target=self._read, args=(stream, into), daemon=True).start()

    @staticmethod
    def _read(stream: Any, into: list[str]) -> None:
        for line in stream:
            into.append(line.rstrip("\n"))

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def names(self) -> list[str]:
        return [event.get("name", "") for event in self.events()]

    def said(self, name: str) -> None:
        rig.wait_for(lambda: name in self.names(), f"{name} is told: {self.lines} {self.errors}")

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(rig.WAIT_S)


async def renew(connection: rpc.Connection) -> None:
    """Keep a session while changes wait for the leases of an earlier run."""
    while True:
        await connection.call(wire.Renew(0), wire.Renewed)
        await asyncio.sleep(0.3)


def make(address: str, *names: bytes, lazy: bool = False, close: bool = True) -> None:
    """Make files on the volume "home"; to end the session makes all of them durable."""

    async def body() -> None:
        connection = await rpc.connect(f"tcp:{address}")
        await connection.call(wire.OpenSession("home", "maker"), wire.SessionOpened)
        renewing = asyncio.create_task(renew(connection))
        for name in names:
            await connection.call(wire.MakeNode(1, name, 0o100644, 0, 0, lazy=lazy), wire.Changed)
        renewing.cancel()
        if close:
            await connection.call(wire.CloseSession(), wire.Done)
        connection.abort()

    asyncio.run(body())


def make_home(sandbox: rig.Sandbox, address: str, *options: str) -> str:
    url = f"bpfuse://{address}/home"
    sandbox.run("format", url, "--store", f"file://{sandbox.path}/blocks", *options).expect_success()
    return url


def test_lines_and_their_end(sandbox: rig.Sandbox) -> None:
    with served(sandbox, sandbox.path / "engine") as address:
        url = make_home(sandbox, address)
        make(address, b"a", b"\xff", b"c")
        told = sandbox.run("events", url, "--since", "0", "--json", "--until-now").expect_success()
        events = [json.loads(line) for line in told.out.splitlines()]
        assert [(each["version"], each["operation"], each["client"]) for each in events] == [
            (1, "create", "maker"), (2, "create", "maker"), (3, "create", "maker"),
        ]  # fmt: skip
        assert [each.get("name_base64") for each in events] == [None, "/w==", None]
        assert sandbox.run("events", url, "--no-follow").expect_success().out == ""
        assert len(sandbox.run("events", url, "--since", "2", "--no-follow").expect_success().out.splitlines()) == 1
        human = sandbox.run("events", url, "--since", "0", "--no-follow").expect_success().out.splitlines()
        assert human[1].endswith("create      /\\xff  [maker]")
        sandbox.run("events", url, "--since", "4").expect_error("there is no event 4", "the last one", code=3)
        sandbox.run("events", f"bpfuse://{address}/none").expect_error("NO_SUCH_VOLUME")
        sandbox.run("events", url, "--since", "-1").expect_error("--since", code=2)
    sandbox.run("events", url).expect_error("no metaserver of")
    sandbox.run("events", "nonsense").expect_error("nonsense")
    sandbox.run("events", f"file://{sandbox.path}/none").expect_error("is not a volume")


def test_it_goes_on_after_the_metaserver_was_away(sandbox: rig.Sandbox) -> None:
    engine = sandbox.path / "engine"
    with served(sandbox, engine) as address:
        url = make_home(sandbox, address)
        make(address, b"before")
        listener = Listener(sandbox, url, "--since", "0", "--json")
        listener.said("before")
        make(address, b"live")
        listener.said("live")
    rig.wait_for(lambda: listener.errors, "it says that the metaserver is away")
    assert "is away" in listener.errors[0]
    with served(sandbox, engine, address):
        make(address, b"after")
        listener.said("after")
        assert listener.names() == ["before", "live", "after"]
        assert [each["version"] for each in listener.events()] == [1, 2, 3]
        assert listener.interrupt() == 130
    assert len(listener.errors) == 1


def test_what_it_has_told_survives_a_crash(sandbox: rig.Sandbox) -> None:
    """Commits are put off: what the crash undoes must not have been told, nor may a version be told twice."""
    engine = sandbox.path / "engine"
    listener, address = None, "127.0.0.1:0"
    for turn in range(3):
        with served(sandbox, engine, address, kill=True) as address:
            if listener is None:
                url = make_home(sandbox, address)
                listener = Listener(sandbox, url, "--since", "0", "--json")
            names = [b"%d-%d" % (turn, number) for number in range(400)]
            make(address, *names[:200], lazy=True)
            listener.said(f"{turn}-100")
            make(address, *names[200:], lazy=True, close=False)
    with served(sandbox, engine, address):
        make(address, b"last")
        assert listener is not None
        listener.said("last")
        kept = sandbox.run("events", url, "--since", "0", "--json", "--until-now").expect_success()
        assert listener.lines == kept.out.splitlines()
        assert listener.interrupt() == 130


def test_what_is_not_kept(sandbox: rig.Sandbox) -> None:
    with served(sandbox, sandbox.path / "engine") as address:
        url = make_home(sandbox, address, "--keep-events", "5")
        make(address, *(b"%d" % number for number in range(20)))

        def oldest() -> int:
            told = sandbox.run("events", url, "--since", "0", "--json", "--until-now").expect_success()
            return int(json.loads(told.out.splitlines()[0])["version"])

        rig.wait_for(lambda: oldest() == 16, "the oldest are forgotten")
        sandbox.run("events", url, "--since", "7").expect_error("event 8 is not kept", "oldest is 16", "anew", code=3)


@pytest.mark.usefixtures("needs_mounts")
def test_a_volume_that_nobody_has_mounted(sandbox: rig.Sandbox) -> None:
    url = sandbox.format("v")
    assert sandbox.run("events", url, "--since", "0", "--until-now").expect_success().out == ""
    sandbox.run("mount", url, str(point := sandbox.directory("point")), "--accel", "off").expect_success()
    (point / "made").mkdir()
    sandbox.run("umount", str(point)).expect_success()
    listener = Listener(sandbox, url, "--since", "0", "--json")
    listener.said("made")
    rig.wait_for(lambda: sandbox.run("fsck", url).code == 0, "the engine is free again")
    assert listener.interrupt() == 130
    assert listener.errors == []


def test_a_mount_that_begins_or_ends_just_then(sandbox: rig.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the engine, and cannot be talked to."""
    url, tries, embedded_server = sandbox.format("v"), [], servers.embedded_server

    @contextlib.contextmanager
    def busy_at_first(volume: Embedded, *options: str) -> Iterator[str]:
        tries.append(options)
        if len(tries) < 3:
            raise servers.EngineInUse("in use")
        with embedded_server(volume, *options) as address:
            yield address

    monkeypatch.setattr(servers, "embedded_server", busy_at_first)
    assert [page.events for page in source.pages(url, 0, live=False, note=pytest.fail)] == [[]]
    assert len(tries) == 3


def test_an_engine_in_use_is_told_from_one_that_cannot_be_used(sandbox: rig.Sandbox) -> None:
    volume = parse_volume(sandbox.format("v"))
    assert isinstance(volume, Embedded)
    with (
        servers.embedded_server(volume),
        pytest.raises(servers.EngineInUse, match="in use by another metaserver"),
        servers.embedded_server(volume),
    ):
        pass


def test_nobody_reads_it(sandbox: rig.Sandbox) -> None:
    with served(sandbox, sandbox.path / "engine") as address:
        url = make_home(sandbox, address)
        make(address, *(b"%0200d" % number for number in range(2000)), lazy=True)
        process: subprocess.Popen[str] = sandbox.start("events", url, "--since", "0")
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(rig.WAIT_S) == 1
        assert process.stderr.read() == ""
