"""``bpfuse fsck`` and ``bpfuse gc``, by the real command, on volumes that are not mounted and on a metaserver."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
import rig
from namespaces import FILE, ROOT, Files
from rich.console import Console

from fuseclient.cli.progress import ProgressLine
from fuseclient.data.object_format import plain_size
from fuseclient.data.objects import ObjectStore, object_name, parse_store_url
from fuseclient.maintenance.fsck import Options, check
from fuseclient.maintenance.gc import collect
from fuseclient.maintenance.job import Amount, Finding
from fuseclient.worker import rpc
from metaserver import keys, namespace, wire
from metaserver.engine import open_engine
from metaserver.records import Entry, Inode, pack_listed
from metaserver.wire import Slice

SIZE = 100_000
AN_HOUR_AGO = 3700


class Volume:
    """An embedded volume, or one of a metaserver's engine, that a test changes behind everybody's back."""

    def __init__(self, sandbox: rig.Sandbox, url: str, engine: Path, name: str, store: str) -> None:
        self.sandbox = sandbox
        self.url = url
        self.engine = engine
        self.name = name
        self.store_url = store

    @property
    def blocks(self) -> Path:
        return Path(parse_store_url(self.store_url).path)

    @contextlib.asynccontextmanager
    async def files(self) -> AsyncIterator[Files]:
        """The volume's namespace, on its engine."""
        engine = open_engine(f"lmdb://{self.engine}")
        try:
            volume = await engine.read(lambda snapshot: namespace.open_volume(snapshot, self.name))
            yield Files(engine, volume)
        finally:
            await engine.close()

    @contextlib.contextmanager
    def store(self) -> Iterator[ObjectStore]:
        store = ObjectStore(parse_store_url(self.store_url))
        yield store
        store.close()

    def path(self, slice_id: int) -> Path:
        return self.blocks / object_name(slice_id)

    def objects(self) -> list[int]:
        """Return the ids of all that lies in the store, unfinished objects included."""
        return sorted(int(path.name.removesuffix(".new"), 16) for path in self.blocks.glob("*/*/*"))

    def age(self, *slice_ids: int, seconds: float = AN_HOUR_AGO) -> None:
        for each in slice_ids:
            when = time.time() - seconds
            os.utime(self.path(each), (when, when))

    def fsck(self, *options: str) -> rig.Outcome:
        return self.sandbox.run("fsck", self.url, *options)

    def found(self, **options: Any) -> list[tuple[str, bool]]:
        """Check without the command around it, and return (kind, whether repaired) of the findings."""
        heard = Heard()
        outcome = asyncio.run(check(self.url, Options(**options), heard))
        assert outcome.found == len(heard.findings)
        assert outcome.remaining == sum(not finding.repaired for finding in heard.findings)
        return [(finding.kind, finding.repaired) for finding in heard.findings]

    def repair(self, *kinds: str, **options: Any) -> None:
        """These are found, repaired, and gone."""
        assert sorted({kind for kind, _ in self.found(**options)}) == sorted(kinds)
        repaired = self.found(repair=True, **options)
        assert {kind for kind, _ in repaired} >= set(kinds)
        assert all(done for _, done in repaired)
        assert self.found(**options) == []

    def gc(self, *, dry_run: bool = False, age_s: float | None = None) -> dict[str, tuple[int, int]]:
        """Collect without the command around it; return by kind (count, bytes) of what there was any of."""
        said = collect(self.url, dry_run=dry_run, age_s=age_s, listener=Heard())
        amounts = ((name, getattr(said, name)) for name in said.__struct_fields__)
        return {name: (each.count, each.bytes) for name, each in amounts if isinstance(each, Amount) and each.count}


class Heard:
    """What a check says."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def progress(self, what: str, done: int, total: int) -> None:
        assert what
        assert done >= 0 <= total

    def finding(self, finding: Finding) -> None:
        self.findings.append(finding)


async def store_file(volume: Volume, fs: Files, name: bytes, *, commit: bool = True) -> tuple[int, int]:
    """Make a file of one object of SIZE bytes; return its inode and its slice."""
    ino = await fs.make(name)
    (slice_id,) = await fs.slices(1)
    with volume.store() as store:
        await store.put(slice_id, os.urandom(SIZE))
    if commit:
        await fs.change(wire.CommitSlices(ino, [Slice(0, SIZE, slice_id, 0)], SIZE))
    return ino, slice_id


def make_files(volume: Volume, *names: bytes) -> list[tuple[int, int]]:
    async def body() -> list[tuple[int, int]]:
        async with volume.files() as fs:
            return [await store_file(volume, fs, name) for name in names]

    return asyncio.run(body())


def put_objects(volume: Volume, count: int) -> list[int]:
    """Store objects that no commit comes for; return their ids."""

    async def body() -> list[int]:
        async with volume.files() as fs:
            ids = await fs.slices(count)
            with volume.store() as store:
                for slice_id in ids:
                    await store.put(slice_id, os.urandom(SIZE))
            return ids

    return asyncio.run(body())


def change_inode(volume: Volume, ino: int, **fields: Any) -> None:
    async def body() -> None:
        async with volume.files() as fs:
            key = keys.inode(fs.volume.id, ino)
            inode = Inode.unpack(ino, await fs.engine.read(lambda snapshot: snapshot.get(key) or b""))
            for name, value in fields.items():
                setattr(inode, name, value)
            await fs.engine.write(lambda txn: txn.put(key, inode.pack()))

    asyncio.run(body())


@pytest.fixture
def volume(sandbox: rig.Sandbox) -> Volume:
    return make_volume(sandbox)


def make_volume(sandbox: rig.Sandbox, options: str = "") -> Volume:
    """Make an embedded volume as ``bpfuse format`` does, without starting anything."""
    path = sandbox.directory("v")
    volume = Volume(sandbox, f"file://{path}", path / "meta", "volume", f"file://{path}/blocks{options}")

    async def body() -> None:
        engine = open_engine(f"lmdb://{volume.engine}")
        request = wire.CreateVolume(volume.name, volume.store_url, wire.MAX_INLINE)
        await engine.write(lambda txn: namespace.create_volume(txn, request, 0))
        await engine.close()

    volume.blocks.mkdir()
    asyncio.run(body())
    return volume


# fsck


def test_a_clean_volume(volume: Volume) -> None:
    make_files(volume, b"a", b"b")
    outcome = volume.fsck().expect_success()
    assert outcome.err == ""
    assert "3 inodes, 2 entries, files of 195.3 KiB" in outcome.out
    assert "2 objects of" in outcome.out
    assert f"{volume.url} is clean" in outcome.out
    assert volume.found(repair=True) == volume.found(verify=True) == []
    assert "objects" not in volume.fsck("--metadata-only").expect_success().out


def test_what_is_wrong_is_told_repaired_and_gone(volume: Volume) -> None:
    ((ino, _),) = make_files(volume, b"a")
    change_inode(volume, ino, nlink=7, size=5)
    told = volume.fsck()
    assert told.code == 1
    assert "wrong-nlink: /a counts 7 links instead of 1" in told.out.splitlines()
    lines = [json.loads(line) for line in volume.fsck("--json").out.splitlines()]
    assert lines[0]["finding"] == {
        "kind": "wrong-nlink",
        "ino": ino,
        "where": "/a",
        "what": "counts 7 links instead of 1",
        "repaired": False,
    }
    assert lines[-1]["summary"]["remaining"] == len(lines) - 1
    assert "of them remain; to repair it: --repair" in told.out
    repaired = volume.fsck("--repair").expect_success()
    assert "wrong-nlink: /a counts 7 links instead of 1 (repaired)" in repaired.out.splitlines()
    assert "found and repaired" in repaired.out
    assert "is clean" in volume.fsck().expect_success().out


def test_a_missing_object(volume: Volume) -> None:
    (ino, lost), (_, kept) = make_files(volume, b"a", b"b")
    volume.path(lost).unlink()
    outcome = volume.fsck()
    assert outcome.code == 1
    assert f"missing-object: /a has lost bytes 0-{SIZE - 1}: missing are object {lost}" in outcome.out
    volume.repair("missing-object")
    assert volume.objects() == [kept]

    async def content() -> wire.Content:
        async with volume.files() as fs:
            return await fs.call(wire.GetContent(ino, 0, SIZE), wire.Content)

    after = asyncio.run(content())
    assert after.attributes.size == SIZE
    assert [(s.offset, s.length, s.slice_id) for s in after.slices] == [(0, SIZE, 0)]


@pytest.mark.parametrize("damage", ["cut", "emptied", "another's", "header"])
def test_a_damaged_object(volume: Volume, damage: str) -> None:
    (_, bad), (_, other) = make_files(volume, b"a", b"b")
    path = volume.path(bad)
    if damage == "cut":
        os.truncate(path, SIZE // 2)
    elif damage == "emptied":
        os.truncate(path, 0)
    elif damage == "another's":
        path.write_bytes(volume.path(other).read_bytes() + b"?")
    else:
        path.write_bytes(b"?" * (SIZE + 7))
    volume.repair("damaged-object")


def test_wrong_bytes_are_found_by_reading_them_all(volume: Volume) -> None:
    (_, bad), _ = make_files(volume, b"a", b"b")
    with volume.path(bad).open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"wrong")
    assert volume.found() == []
    volume.repair("damaged-object", verify=True)


def test_objects_that_belong_to_nothing(volume: Volume) -> None:
    (_, used), _ = make_files(volume, b"a", b"b")
    leaked, unfinished = put_objects(volume, 2)
    volume.path(unfinished).rename(f"{volume.path(unfinished)}.new")
    shutil.copy(volume.path(used), f"{volume.path(used)}.new")
    (volume.blocks / "README").write_text("no object")
    outcome = volume.fsck()
    assert f"leaked-object: {volume.path(leaked)} has {plain_size(SIZE)} bytes, and no file uses it" in outcome.out
    volume.repair("leaked-object", "unfinished-object")
    assert not volume.path(leaked).exists()
    assert volume.path(used).exists()
    assert (volume.blocks / "README").exists()


def test_compressed_objects_are_of_any_size(sandbox: rig.Sandbox) -> None:
    volume = make_volume(sandbox, "?compression=zstd")

    async def body() -> int:
        async with volume.files() as fs:
            ino = await fs.make(b"a")
            (slice_id,) = await fs.slices(1)
            with volume.store() as store:
                await store.put(slice_id, bytes(SIZE))
            await fs.change(wire.CommitSlices(ino, [Slice(0, SIZE, slice_id, 0)], SIZE))
            return slice_id

    slice_id = asyncio.run(body())
    assert volume.path(slice_id).stat().st_size < SIZE / 2
    assert volume.found(verify=True) == volume.found() == []
    with volume.path(slice_id).open("ab") as file:
        file.truncate(100)
    volume.repair("damaged-object")


def test_what_waits_to_be_deleted_is_no_damage(volume: Volume) -> None:
    ((ino, _),) = make_files(volume, b"a")

    async def empty() -> None:
        async with volume.files() as fs:
            await fs.change(wire.SetAttributes(ino, size=0))

    asyncio.run(empty())
    assert "1 of them to be deleted (bpfuse gc)" in volume.fsck().expect_success().out


def test_a_store_that_is_gone(volume: Volume) -> None:
    make_files(volume, b"a")
    away = volume.blocks.rename(volume.blocks.with_name("away"))
    volume.fsck().expect_error(str(volume.blocks), "is gone", code=2)
    volume.fsck("--repair").expect_error("is gone", code=2)
    volume.sandbox.run("gc", volume.url).expect_error("is gone")
    assert not volume.blocks.exists()
    volume.blocks.mkdir()
    assert volume.found() == [("missing-object", False)]
    volume.fsck("--repair").expect_error("is empty", "mounted?", code=2)
    volume.blocks.rmdir()
    away.rename(volume.blocks)
    assert volume.found(verify=True) == []


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["fsck"], ["url"], 2),
        (["gc"], ["url"], 2),
        (["fsck", "nonsense"], ["nonsense", "file:///"], 2),
        (["gc", "nonsense"], ["nonsense", "file:///"], 1),
        (["fsck", "file://{}/none"], ["not a volume", "bpfuse format"], 2),
        (["gc", "file://{}/none"], ["not a volume", "bpfuse format"], 1),
        (["fsck", "file://{}/v", "--nonsense"], ["--nonsense"], 2),
        (["gc", "file://{}/v", "--age", "-1"], ["--age"], 2),
        (["fsck", "file://{}/v", "--engine", "lmdb:///x"], ["--engine"], 2),
        (["fsck", "bpfuse://127.0.0.1:1/v"], ["--engine lmdb:///directory"], 2),
        (["gc", "bpfuse://127.0.0.1:1/v"], ["127.0.0.1:1"], 1),
        (["fsck", "bpfuse://127.0.0.1:1/v", "--engine", "lmdb://{}/none"], ["there is no LMDB engine"], 2),
        (["fsck", "bpfuse://127.0.0.1:1/v", "--engine", "nonsense://"], ["no such storage engine"], 2),
        (["fsck", "bpfuse://127.0.0.1:1/w", "--engine", "lmdb://{}/v/meta"], ["there is no volume 'w'"], 2),
    ],
)
def test_mistakes(volume: Volume, arguments: list[str], words: list[str], code: int) -> None:
    outcome = volume.sandbox.run(*(each.format(volume.sandbox.path) for each in arguments))
    outcome.expect_error(*words, code=code)
    assert not (volume.sandbox.path / "none").exists()


@contextlib.contextmanager
def served(sandbox: rig.Sandbox, engine: Path, *options: str) -> Iterator[str]:
    """A metaserver on an engine; gives host:port."""
    server = sandbox.start("metaserver", "--engine", f"lmdb://{engine}", "--listen", "127.0.0.1:0", *options)
    assert server.stderr is not None
    first = server.stderr.readline()
    address = re.search(r"tcp:(127\.0\.0\.1:\d+)", first)
    assert address is not None, first
    drain = threading.Thread(target=server.stderr.read, daemon=True)
    drain.start()
    try:
        yield address[1]
    finally:
        server.terminate()
        assert server.wait(rig.WAIT_S) == 0
        drain.join()


def test_an_engine_that_is_in_use(volume: Volume) -> None:
    with served(volume.sandbox, volume.engine):
        volume.fsck().expect_error("in use by another metaserver", code=2)
        volume.sandbox.run("gc", volume.url).expect_error("in use by another metaserver")
    volume.fsck().expect_success()


def test_a_volume_of_a_metaserver_is_checked_without_it(sandbox: rig.Sandbox) -> None:
    engine = sandbox.path / "engine"
    with served(sandbox, engine) as address:
        url = f"bpfuse://{address}/home"
        sandbox.run("format", url, "--store", f"file://{sandbox.path}/blocks").expect_success()
        sandbox.run("fsck", url).expect_error("--engine", code=2)
        sandbox.run("fsck", url, "--engine", f"lmdb://{engine}").expect_error("in use", code=2)
    volume = Volume(sandbox, url, engine, "home", f"file://{sandbox.path}/blocks")
    ((ino, _),) = make_files(volume, b"a")
    change_inode(volume, ino, nlink=2)
    assert volume.fsck("--engine", f"lmdb://{engine}").code == 1
    volume.repair("wrong-nlink", engine=f"lmdb://{engine}")


def add_many(volume: Volume, count: int) -> None:
    """Make files with wrong link counts, a little faster than by the engine."""
    env = lmdb.open(str(volume.engine), map_size=1 << 30)
    with env.begin(write=True) as txn:
        for n in range(count):
            ino = 16 * (n + 10)
            name = b"%06d" % n
            inode = Inode.made(ino, FILE, 0, 0, 0, 0)
            inode.nlink = 3
            txn.put(keys.inode(1, ino), inode.pack())
            txn.put(keys.entry(1, ROOT, name), Entry(ino, n + 1).pack())
            txn.put(keys.listing(1, ROOT, n + 1), pack_listed(ino, name))
    env.close()


def test_ctrl_c_ends_it_and_what_is_repaired_stays(volume: Volume) -> None:
    count = 20_000
    add_many(volume, count)
    process = volume.sandbox.start("fsck", volume.url, "--repair", "--json")
    assert process.stdout is not None
    assert "finding" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=rig.WAIT_S)
    assert (process.returncode, errors) == (130, "")
    left = volume.found(store=False)
    assert 0 < len([kind for kind, _ in left if kind == "wrong-nlink"]) < count
    assert all(repaired for _, repaired in volume.found(store=False, repair=True))


def test_it_survives_that_nobody_reads_what_it_says(volume: Volume) -> None:
    add_many(volume, 2000)
    process = volume.sandbox.start("fsck", volume.url)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(rig.WAIT_S) == 1


# gc


def gone(volume: Volume, *names: bytes) -> None:
    async def body() -> None:
        async with volume.files() as fs:
            for name in names:
                await fs.change(wire.Remove(ROOT, name, False))

    asyncio.run(body())


def test_garbage_of_a_volume_that_nobody_has_mounted(volume: Volume) -> None:
    (_, kept), (emptied, unused), (_, orphaned) = make_files(volume, b"kept", b"emptied", b"orphan")
    uncommitted, unfinished = put_objects(volume, 2)
    volume.path(unfinished).rename(f"{volume.path(unfinished)}.new")

    async def empty() -> None:
        async with volume.files() as fs:
            await fs.change(wire.SetAttributes(emptied, size=0))

    asyncio.run(empty())
    gone(volume, b"orphan")
    size = plain_size(SIZE)
    before = volume.objects()
    expected = {"orphans": (1, SIZE), "unused": (1, size), "uncommitted": (1, size), "unfinished": (1, size)}
    assert volume.gc(dry_run=True) == expected
    assert volume.gc(dry_run=True) == expected, "a dry run has changed something"
    assert volume.objects() == before
    text = volume.sandbox.run("gc", volume.url, "--dry-run").expect_success().out
    line = json.loads(volume.sandbox.run("gc", volume.url, "--dry-run", "--json").expect_success().out)
    assert (line["dry_run"], line["online"], line["unused"]) == (True, False, {"count": 1, "bytes": size})
    assert "1 unfinished uploads (97.7 KiB) to be deleted" in text
    collected = volume.gc()
    assert collected == {**expected, "unused": (2, 2 * size)}, "the orphan's object is unused by then"
    assert volume.objects() == [kept]
    assert volume.gc() == {}
    assert "has no garbage" in volume.sandbox.run("gc", volume.url).expect_success().out
    assert volume.found(verify=True) == []
    assert {unused, orphaned, uncommitted}.isdisjoint(volume.objects())


def test_an_age_can_be_asked_for(volume: Volume) -> None:
    old, young = put_objects(volume, 2)
    volume.age(old)
    assert volume.gc(age_s=3600) == {
        "uncommitted": (1, plain_size(SIZE)),
        "young": (1, plain_size(SIZE)),
    }
    assert volume.objects() == [young]


def test_what_the_volume_never_stored_is_left(volume: Volume) -> None:
    (foreign,) = put_objects(volume, 1)
    path = volume.path(10**12)
    path.parent.mkdir(parents=True)
    volume.path(foreign).rename(path)
    assert volume.gc() == {"foreign": (1, plain_size(SIZE))}
    assert path.exists()


class Online:
    """A volume of a running metaserver, with a client."""

    def __init__(self, volume: Volume, connection: rpc.Connection) -> None:
        self.volume = volume
        self.connection = connection

    async def put(self, count: int) -> list[int]:
        ids = (await self.connection.call(wire.NewSlices(count), wire.SliceIds)).ids
        with self.volume.store() as store:
            for slice_id in ids:
                await store.put(slice_id, os.urandom(SIZE))
        return ids

    async def make(self, name: bytes) -> int:
        reply = await self.connection.call(wire.MakeNode(ROOT, name, FILE, 0, 0), wire.Changed)
        return reply.attributes[0].ino

    async def commit(self, ino: int, slice_id: int) -> None:
        await self.connection.call(wire.CommitSlices(ino, [Slice(0, SIZE, slice_id, 0)], SIZE), wire.Changed)

    async def gc(self, **options: Any) -> dict[str, tuple[int, int]]:
        return await asyncio.to_thread(lambda: self.volume.gc(**options))


def online(sandbox: rig.Sandbox, body: Callable[[Online], Any], lease_s: str = "2") -> Volume:
    """Run a coroutine function with a client of a metaserver; return the volume, when the metaserver has ended."""
    engine = sandbox.path / "engine"
    with served(sandbox, engine, "--lease", lease_s) as address:
        url = f"bpfuse://{address}/home"
        sandbox.run("format", url, "--store", f"file://{sandbox.path}/blocks").expect_success()
        volume = Volume(sandbox, url, engine, "home", f"file://{sandbox.path}/blocks")

        async def connected() -> None:
            connection = await rpc.connect(f"tcp:{address}")
            opened = await connection.call(wire.OpenSession("home", "test"), wire.SessionOpened)
            renewing = asyncio.create_task(_renew(connection, opened))
            try:
                await body(Online(volume, connection))
            finally:
                renewing.cancel()
                await asyncio.wait({renewing})
                connection.abort()

        asyncio.run(connected())
    return volume


async def _renew(connection: rpc.Connection, opened: wire.SessionOpened) -> None:
    while True:
        await asyncio.sleep(opened.lease_ms / 4000)
        await connection.call(wire.Renew(opened.version), wire.Renewed)


def test_what_a_live_writer_is_about_to_commit_is_left(sandbox: rig.Sandbox) -> None:
    async def body(client: Online) -> None:
        volume = client.volume
        ino = await client.make(b"f")
        committed, young, old, late = await client.put(4)
        await client.commit(ino, committed)
        volume.age(committed, old, late)
        size = plain_size(SIZE)
        assert await client.gc(dry_run=True) == {"uncommitted": (2, 2 * size), "young": (1, size)}
        await client.commit(await client.make(b"late"), late)
        assert await client.gc() == {"uncommitted": (1, size), "young": (1, size)}
        assert volume.objects() == [committed, young, late]
        await client.commit(await client.make(b"g"), young)
        volume.age(young)
        assert await client.gc() == {}

    volume = online(sandbox, body)
    assert volume.found(engine=f"lmdb://{volume.engine}", verify=True) == []


def test_age_is_never_less_than_two_leases_while_clients_are_there(sandbox: rig.Sandbox) -> None:
    async def body(client: Online) -> None:
        (young,) = await client.put(1)
        assert await client.gc(age_s=0) == {"young": (1, plain_size(SIZE))}
        client.volume.age(young, seconds=1000)
        assert await client.gc(age_s=0) == {"uncommitted": (1, plain_size(SIZE))}
        assert client.volume.objects() == []

    online(sandbox, body)


def test_readers_get_a_lease_before_unused_objects_go(sandbox: rig.Sandbox) -> None:
    async def body(client: Online) -> None:
        ino = await client.make(b"f")
        first, second = await client.put(2)
        await client.commit(ino, first)
        await client.connection.call(wire.SetAttributes(ino, size=0), wire.Changed)
        await client.commit(ino, second)
        begin = time.monotonic()
        assert await client.gc() == {"unused": (1, plain_size(SIZE))}
        assert time.monotonic() - begin >= 1.0
        assert client.volume.objects() == [second]
        assert (await client.connection.call(wire.ListSlices(10), wire.SliceIds)).ids == []

    online(sandbox, body, lease_s="1")


def test_a_metaserver_without_the_volume(sandbox: rig.Sandbox) -> None:
    with served(sandbox, sandbox.path / "engine") as address:
        sandbox.run("gc", f"bpfuse://{address}/none").expect_error("NO_SUCH_VOLUME", "'none'")


# The command's own


def test_progress_shows_amounts_and_rates() -> None:
    screen = io.StringIO()
    line = ProgressLine(Console(file=screen, force_terminal=True, width=100))
    with line:
        for done in range(0, 2001, 500):
            line.progress("inodes", done, 2000)
        line.progress("objects", 12_345, 0)
        line.refresh()
    assert "inodes" in screen.getvalue()
    assert "12,345" in screen.getvalue()


def test_an_interrupted_gc_exits_with_130(sandbox: rig.Sandbox) -> None:
    async def body(client: Online) -> None:
        ino = await client.make(b"f")
        (first,) = await client.put(1)
        await client.commit(ino, first)
        await client.connection.call(wire.SetAttributes(ino, size=0), wire.Changed)
        process = sandbox.start("gc", client.volume.url)
        await asyncio.to_thread(_wait_until_it_sleeps, process, client.volume)
        process.send_signal(signal.SIGINT)
        _, errors = await asyncio.to_thread(process.communicate, timeout=rig.WAIT_S)
        assert (process.returncode, errors) == (130, "")
        assert client.volume.objects() == [first]

    online(sandbox, body, lease_s="60")


def _wait_until_it_sleeps(process: subprocess.Popen[str], volume: Volume) -> None:
    """Until it has a connection, and with it something to wait for."""
    port = int(volume.url.split(":")[2].split("/")[0])
    rig.wait_for(lambda: _is_connected(process.pid, port), "gc connects")


def _is_connected(pid: int, port: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        sockets = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[2].endswith(f":{port:04X}") and f"socket:[{fields[9]}]" in sockets:
                return True
    return False
