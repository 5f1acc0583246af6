"""Content of small files that are listed before they are read: when it is fetched, counted in requests, and whether it
is what the files hold."""

from __future__ import annotations

import asyncio
import random
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from served import until
from worker_rig import ROOT, Rig, dirents, rigged, spied

from metaserver import wire

DIR = stat.S_IFDIR | 0o755

#: The files of directories: by directory, by file, what it holds.
Tree = dict[int, dict[int, bytes]]


@pytest_asyncio.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    async with rigged(tmp_path, monkeypatch) as rig:
        yield rig


async def make_tree(rig: Rig, directories: int, files: int, size: int = 100) -> Tree:
    tree: Tree = {}
    for number in range(directories):
        parent = (await rig.other.make(b"d%03d" % number, DIR)).ino
        tree[parent] = {}
        for n in range(files):
            ino = (await rig.other.make(b"%d" % n, parent=parent)).ino
            tree[parent][ino] = (b"%d " % ino).ljust(size, b".")
            await write(rig, ino, tree[parent][ino])
    return tree


async def write(rig: Rig, ino: int, data: bytes) -> None:
    """Another mount writes to a file."""
    await rig.other.change(wire.WriteInline(ino, 0, data))


async def list_all(rig: Rig, ino: int) -> None:
    """List a directory as the kernel does: BPF answers from a listing that is there."""
    if ino not in rig.maps.listings:
        await rig.listing(ino)
    await until(lambda: ino in rig.maps.listings)
    for _, each in dirents(rig.maps.listings[ino])[2:]:
        assert each in rig.maps.inodes


async def read(rig: Rig, ino: int) -> bytes:
    """Read a file as the kernel does: BPF opens it, and answers with content that is in the maps."""
    known = rig.maps.data.get(ino)
    return await rig.ops.read(ino, 0, 65536) if known is None else known


async def test_a_listing_leaves_content_out(rig: Rig) -> None:
    tree = await make_tree(rig, 12, 10)
    log = spied(rig)
    for parent in (ROOT, *tree):
        await list_all(rig, parent)
    assert {each.data_budget for each in log if isinstance(each, wire.FetchDirectory)} == {0}
    assert len(log) <= 6
    assert not rig.maps.data
    figures = (await rig.mount.figures())["directories"]
    assert (figures["without_content"], figures["content_read"]) == (len(log), 0)
    await rig.assert_maps_are_right()


async def test_the_first_read_in_a_listed_directory_brings_the_content_of_all(rig: Rig) -> None:
    tree = await make_tree(rig, 3, 10)
    for parent in (ROOT, *tree):
        await list_all(rig, parent)
    log = spied(rig)
    files = next(iter(tree.values()))
    for ino, data in files.items():
        assert await read(rig, ino) == data
    assert [type(each) for each in log] == [wire.FetchDirectory]
    assert set(rig.maps.data) == set(files)
    assert (await rig.mount.figures())["directories"]["content_read"] == 1
    await rig.assert_maps_are_right()


async def test_a_shuffled_epoch_of_a_listed_tree_takes_a_request_for_500_files(rig: Rig) -> None:
    tree = await make_tree(rig, 60, 100)
    log = spied(rig)
    for parent in (ROOT, *tree):
        await list_all(rig, parent)
    files = [item for found in tree.values() for item in found.items()]
    random.Random(1).shuffle(files)
    listed = len(log)
    for ino, data in files:
        assert await read(rig, ino) == data
    assert {type(each) for each in log} == {wire.FetchDirectory}
    assert listed <= 8
    assert len(log) - listed <= len(files) // 500
    await rig.assert_maps_are_right()


async def test_who_reads_what_he_lists_has_content_with_later_listings(rig: Rig) -> None:
    tree = await make_tree(rig, 60, 5)
    log = spied(rig)
    await list_all(rig, ROOT)
    for parent, files in tree.items():
        await list_all(rig, parent)
        for ino, data in files.items():
            assert await read(rig, ino) == data
    assert {type(each) for each in log} == {wire.FetchDirectory}
    assert len(log) <= 14
    assert any(each.data_budget for each in log if isinstance(each, wire.FetchDirectory) and each.also)
    await rig.assert_maps_are_right()


async def test_several_readers_wait_for_one_fetch(rig: Rig) -> None:
    tree = await make_tree(rig, 1, 10)
    for parent in (ROOT, *tree):
        await list_all(rig, parent)
    log = spied(rig)
    (files,) = tree.values()
    assert await asyncio.gather(*(read(rig, ino) for ino in files)) == list(files.values())
    assert len(log) == 1


async def test_a_large_directory_is_brought_from_the_file_on_that_is_read(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rig.ops._directories, "_window", 50)
    tree = await make_tree(rig, 1, 200)
    ((parent, files),) = tree.items()
    await list_all(rig, ROOT)
    await list_all(rig, parent)
    log = spied(rig)
    order = list(files)
    random.Random(3).shuffle(order)
    for ino in order:
        assert await read(rig, ino) == files[ino]
    assert len(log) <= 20
    await rig.assert_maps_are_right()


async def test_of_more_content_than_a_fetch_brings_the_file_that_is_read_comes_first(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads the directory's last file does not wait for the content of the others, or of those beside it."""
    monkeypatch.setattr(rig.ops._directories, "_data_budget", 1000)
    tree = await make_tree(rig, 3, 40)
    for parent in (ROOT, *tree):
        await list_all(rig, parent)
    log = spied(rig)
    for number, (parent, files) in enumerate(tree.items()):
        last = list(files)[-1]
        assert await read(rig, last) == files[last]
        assert [(each.ino, each.also) for each in log if isinstance(each, wire.FetchDirectory)][number:] == [
            (parent, [])
        ]
        assert set(rig.maps.data) & set(files) == {last}
    for files in tree.values():
        for ino, data in files.items():
            assert await read(rig, ino) == data
    assert len(log) <= 3 * 6
    await rig.assert_maps_are_right()


async def test_who_waits_for_what_had_no_room_is_served_next(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory for which a fetch beside another had no room comes first in the fetch that follows."""
    tree = await make_tree(rig, 16, 10)
    for parent in (ROOT, *tree):
        await list_all(rig, parent)
    most = max(sum(map(len, files.values())) for files in tree.values())
    monkeypatch.setattr(rig.ops._directories, "_data_budget", 2 * most)
    log = spied(rig)

    def missing() -> list[int]:
        return [parent for parent, files in tree.items() if not set(files) & set(rig.maps.data)]

    for _ in range(3):
        ino, data = next(iter(tree[missing()[0]].items()))
        assert await read(rig, ino) == data
        await until(lambda: not rig.ops._directories._fetches)
    first, *_, last = missing()[:5]
    del log[:]
    one, two = (next(iter(tree[parent].items())) for parent in (first, last))
    assert await asyncio.gather(read(rig, one[0]), read(rig, two[0])) == [one[1], two[1]]
    assert {type(each) for each in log} == {wire.FetchDirectory}
    asked = [each for each in log if isinstance(each, wire.FetchDirectory)]
    assert (asked[0].ino, last in asked[0].also) == (first, True)
    assert asked[1].ino == last
    await rig.assert_maps_are_right()


async def test_what_does_not_fit_is_asked_for_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content that no fetch may bring is read file by file, by no more requests than that."""
    monkeypatch.setattr(rig.ops._directories, "_data_budget", 50)
    tree = await make_tree(rig, 1, 20)
    ((parent, files),) = tree.items()
    await list_all(rig, ROOT)
    await list_all(rig, parent)
    log = spied(rig)
    for ino in list(files)[::-1]:
        assert await read(rig, ino) == files[ino]
    assert sum(isinstance(each, wire.FetchDirectory) for each in log) == 1
    await rig.assert_maps_are_right()


async def test_what_changes_on_its_way_is_read_as_it_is(rig: Rig) -> None:
    """Another mount writes a file after its content was sent, and before it has come: no old byte is answered."""
    tree = await make_tree(rig, 1, 10)
    ((parent, files),) = tree.items()
    await list_all(rig, ROOT)
    await list_all(rig, parent)
    stream, sent, go = rig.session.stream, asyncio.Event(), asyncio.Event()

    async def held(request: wire.FetchDirectory) -> AsyncIterator[wire.DirectoryPage]:
        pages = [page async for page in stream(request)]
        sent.set()
        await go.wait()
        for page in pages:
            yield page

    rig.session.stream = held
    ino, other, *_ = files
    reading = asyncio.create_task(read(rig, ino))
    await sent.wait()
    await write(rig, ino, b"new content")
    go.set()
    new = b"new content" + files[ino][len(b"new content") :]
    assert await reading == new
    rig.session.stream = stream
    assert await read(rig, ino) == new
    assert await read(rig, other) == files[other]
    await rig.assert_maps_are_right()


async def test_what_is_written_here_is_read_as_it_is(rig: Rig) -> None:
    tree = await make_tree(rig, 1, 10)
    ((parent, files),) = tree.items()
    await list_all(rig, ROOT)
    await list_all(rig, parent)
    ino = next(iter(files))
    await rig.set_attributes(ino, size=0)
    assert await read(rig, ino) == b""
    await rig.assert_maps_are_right()


async def test_nothing_is_told_after_the_lease_has_ended(rig: Rig) -> None:
    """Content that has come is as good as the lease: without one the file is read anew."""
    tree = await make_tree(rig, 1, 3)
    ((parent, files),) = tree.items()
    await list_all(rig, ROOT)
    await list_all(rig, parent)
    rig.ops._directories._is_live = lambda: False
    log = spied(rig)
    ino = next(iter(files))
    assert await read(rig, ino) == files[ino]
    assert [type(each) for each in log] == [wire.FetchDirectory, wire.GetContent]
