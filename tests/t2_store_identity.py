"""Whose a store is: what ``bpfuse format`` notes there, and what fsck and gc do not do to another volume's objects."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import rig
import weed

from fuseclient.data.objects import ObjectStore, StoreError, object_name, open_store
from metaserver import namespace, wire
from metaserver.engine import open_engine
from metaserver.volumes import Context
from metaserver.wire import Slice

SIZE = 100_000


class Volume:
    """An embedded volume made by ``bpfuse format``."""

    def __init__(self, sandbox: rig.Sandbox, name: str, store: str, *options: str) -> None:
        self.sandbox = sandbox
        self.store_url = store
        self.path = sandbox.path / name
        self.url = sandbox.format(name, "--store", store, *options)

    def store_files(self, count: int) -> list[int]:
        """Make files of one object each; return the slices."""
        return asyncio.run(self._store_files(count))

    async def _store_files(self, count: int) -> list[int]:
        engine, store = open_engine(f"lmdb://{self.path}/meta"), open_store(self.store_url)
        try:
            volume = await engine.read(lambda snapshot: namespace.open_volume(snapshot, "volume"))
            context = Context(volume, b"session-of-tests", 1)

            async def change(request: wire.Request) -> wire.Reply:
                reply: wire.Reply = await engine.write(
                    lambda txn: namespace.WRITES[type(request)](txn, context, request)
                )
                return reply

            ids = await change(wire.NewSlices(count))
            assert isinstance(ids, wire.SliceIds)
            for slice_id in ids.ids:
                made = await change(wire.MakeNode(1, b"%d" % slice_id, 0o100644, 0, 0))
                assert isinstance(made, wire.Changed)
                await store.put(slice_id, os.urandom(SIZE))
                laid = [Slice(0, SIZE, slice_id, 0)]
                await change(wire.CommitSlices(made.attributes[0].ino, laid, SIZE))
            return ids.ids
        finally:
            store.close()
            await engine.close()

    def fsck(self, *options: str) -> rig.Outcome:
        return self.sandbox.run("fsck", self.url, *options)


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, sandbox: rig.Sandbox, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a store, to which a name can be appended."""
    if request.param == "file":
        return f"file://{sandbox.path}/stores-"
    server: weed.Weed = request.getfixturevalue("server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.url(f"{sandbox.path.name}-")


@pytest.fixture(scope="module")
def server() -> Iterator[weed.Weed]:
    with weed.running() as running:
        yield running


def named(place: str, name: str) -> str:
    before, mark, options = place.partition("?")
    return f"{before}{name}{mark}{options}"


def content(url: str) -> tuple[bytes | None, list[int]]:
    """Whose a store is, and the objects in it."""

    async def look(store: ObjectStore) -> tuple[bytes | None, list[int]]:
        try:
            return await store.owner(), [each.slice_id async for page in store.list() for each in page]
        finally:
            store.close()

    return asyncio.run(look(open_store(url)))


def forget_owner(url: str) -> None:
    """Have a store say nothing, as those of earlier volumes do, and empty it."""

    async def empty(store: ObjectStore) -> None:
        await store.delete([each.slice_id async for page in store.list() for each in page])
        store.close()

    asyncio.run(empty(open_store(url)))


def test_a_store_is_one_volumes(sandbox: rig.Sandbox, place: str) -> None:
    store = named(place, "one")
    one = Volume(sandbox, "one", store)
    owner, objects = content(store)
    assert owner is not None
    assert objects == []
    other = f"file://{sandbox.path}/other"
    sandbox.run("format", other, "--store", store).expect_error("is another volume's", "--reuse-store")
    assert not (sandbox.path / "other").exists()
    one.store_files(2)
    sandbox.run("format", other, "--store", store).expect_error("is another volume's")
    assert content(store) == (owner, [1, 2])
    one.fsck().expect_success()


def test_a_store_that_is_reused(sandbox: rig.Sandbox, place: str) -> None:
    store = named(place, "reused")
    old = Volume(sandbox, "old", store)
    before = old.store_files(2)
    new = Volume(sandbox, "new", store, "--reuse-store")
    after = new.store_files(2)
    assert min(after) > max(before), "an id that was used before"
    for command in (("fsck", old.url), ("fsck", old.url, "--repair")):
        sandbox.run(*command).expect_error("belongs to another volume", code=2)
    sandbox.run("gc", old.url).expect_error("belongs to another volume")
    assert content(store)[1] == before + after
    sandbox.run("gc", new.url).expect_success()
    assert content(store)[1] == after
    new.fsck("--verify").expect_success()


def test_no_repair_with_a_store_that_has_nothing(sandbox: rig.Sandbox, place: str) -> None:
    store = named(place, "emptied")
    volume = Volume(sandbox, "v", store)
    volume.store_files(2)
    forget_owner(store)
    assert volume.fsck().code == 1
    volume.fsck("--repair").expect_error("is empty of all 2 objects", "--accept-empty-store", code=2)
    assert "2 found" in volume.fsck().out
    volume.fsck("--repair", "--accept-empty-store").expect_success()
    volume.fsck().expect_success()


def test_no_repair_with_a_store_of_somebody_elses_objects(sandbox: rig.Sandbox) -> None:
    store = f"file://{sandbox.path}/blocks"
    volume = Volume(sandbox, "v", store)
    volume.store_files(2)
    away = (sandbox.path / "blocks").rename(sandbox.path / "away")
    stranger = sandbox.path / "blocks" / object_name(500)
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(b"not to be lost")
    volume.fsck("--repair").expect_error("is empty of all 2 objects", code=2)
    assert stranger.read_bytes() == b"not to be lost"
    Path(sandbox.path / "blocks").rename(sandbox.path / "strangers")
    away.rename(sandbox.path / "blocks")
    volume.fsck().expect_success()


def test_no_repair_with_a_store_that_cannot_be_reached(sandbox: rig.Sandbox, place: str) -> None:
    if place.startswith("file"):
        pytest.skip("a directory is there or not: t2_maintenance.py")
    store = named(place, "away")
    volume = Volume(sandbox, "v", f"{store}&timeout=1")
    (lost,) = volume.store_files(1)
    for options in (["--repair"], ["--repair", "--accept-empty-store"]):
        told = sandbox.run("fsck", volume.url, *options, env={"AWS_SECRET_ACCESS_KEY": "wrong"})
        told.expect_error("the store", code=2)
    volume.fsck("--verify").expect_success()
    assert content(store)[1] == [lost]


def test_an_owner_that_cannot_be_read(sandbox: rig.Sandbox) -> None:
    volume = Volume(sandbox, "v", f"file://{sandbox.path}/blocks")
    (sandbox.path / "blocks" / "bpfuse-volume").write_text("nonsense")
    volume.fsck().expect_error("bpfuse-volume", code=2)
    with pytest.raises(StoreError, match="cannot be read"):
        content(volume.store_url)
