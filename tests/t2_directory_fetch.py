"""Directories fetched ahead of use: beside one another, and by windows; counted in requests to the metaserver."""

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

from fuseclient.worker import siblings
from metaserver import wire

DIR = stat.S_IFDIR | 0o755
DIRECTORIES, FILES = 40, 100


@pytest_asyncio.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    async with rigged(tmp_path, monkeypatch) as rig:
        yield rig


async def make_tree(rig: Rig, directories: int, files: int) -> dict[int, dict[bytes, int]]:
    """Return the files of some directories in the root, by directory."""
    tree: dict[int, dict[bytes, int]] = {}
    for number in range(directories):
        parent = (await rig.other.make(b"d%03d" % number, DIR)).ino
        tree[parent] = {b"%d" % n: (await rig.other.make(b"%d" % n, parent=parent)).ino for n in range(files)}
    return tree


async def ask(rig: Rig, parent: int, name: bytes) -> int:
    """Look a name up as the kernel does: whatever the maps have does not come to the worker."""
    known = rig.maps.names.get((parent, name))
    return known if known is not None else await rig.ino(name, parent)


async def test_a_shuffled_epoch_takes_a_request_for_500_files(rig: Rig) -> None:
    """One request brings several directories, once it is seen that they are read one after the other."""
    tree = await make_tree(rig, DIRECTORIES, FILES)
    names = {parent: b"d%03d" % number for number, parent in enumerate(tree)}
    files = [(parent, name) for parent, found in tree.items() for name in found]
    random.Random(1).shuffle(files)
    log = spied(rig)
    for parent, name in files:
        assert await ask(rig, ROOT, names[parent]) == parent
        assert await ask(rig, parent, name) == tree[parent][name]
    assert len(log) <= len(files) // 500
    figures = (await rig.mount.figures())["directories"]
    assert figures["fetches"] == len(log)
    missed = len(log) - 1 - figures["unasked"]
    assert figures["unasked"] > 0
    assert figures["ahead"] == DIRECTORIES - missed
    assert figures["names"] == 0
    await rig.assert_maps_are_right()


async def test_a_listed_tree_comes_by_several_directories_too(rig: Rig) -> None:
    tree = await make_tree(rig, 12, 3)
    log = spied(rig)
    for ino in await ask_all(rig, ROOT):
        assert sorted(await ask_all(rig, ino)) == sorted(tree[ino].values())
    assert len(log) <= 6
    await rig.assert_maps_are_right()


async def ask_all(rig: Rig, ino: int) -> list[int]:
    """List a directory as the kernel does: BPF answers from a listing that is there."""
    listing = rig.maps.listings.get(ino)
    return list((await rig.listing(ino)).values()) if listing is None else [each for _, each in dirents(listing)[2:]]


async def test_who_asks_for_what_is_on_its_way_waits_for_it(rig: Rig) -> None:
    tree = await make_tree(rig, 4, 5)
    one, two, three, _ = tree
    await ask(rig, ROOT, b"d000")
    log = spied(rig)
    await ask(rig, one, b"0")
    _, found = await asyncio.gather(rig.ino(b"0", two), rig.ino(b"4", three))
    assert found == tree[three][b"4"]
    assert [each.also for each in log if isinstance(each, wire.FetchDirectory)] == [[], [three]]
    await until(lambda: (three, b"0") in rig.maps.names)
    assert len(log) == 2
    # What others change is not kept of what came beside, either.
    await rig.other.make(b"new", parent=three)
    assert await rig.ino(b"new", three)
    await rig.assert_maps_are_right()


async def test_what_does_not_fit_is_fetched_when_it_is_asked_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.ops._directories, "_window", 8)
    tree = await make_tree(rig, 4, 7)
    for number, (parent, files) in enumerate(tree.items()):
        assert await ask(rig, ROOT, b"d%03d" % number) == parent
        for name, ino in files.items():
            assert await ask(rig, parent, name) == ino
    assert (await rig.mount.figures())["directories"]["ahead"] == 0
    await rig.assert_maps_are_right()


async def test_a_directory_removed_meanwhile_is_left_out(rig: Rig) -> None:
    tree = await make_tree(rig, 4, 1)
    one, two, _, four = tree
    request = wire.FetchDirectory(one, 0, 100, 0, 0, None, [999, two, four])
    pages = [page async for page in rig.other.connection.stream(request)]
    assert [(page.directory.ino, page.last, page.complete) for page in pages] == [
        (one, False, True),
        (two, False, True),
        (four, True, True),
    ]


def directory_page(ino: int, children: list[int]) -> wire.DirectoryPage:
    def attributes(number: int) -> wire.Attributes:
        return wire.Attributes(number, DIR, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1)

    entries = [wire.DirectoryEntry(b"%d" % child, child, attributes(child)) for child in children]
    return wire.DirectoryPage(attributes(ino), entries, True, True, True)


def test_no_more_is_brought_than_half_the_cache_holds_in_vain() -> None:
    used: dict[int, bool | None] = {}
    now = 0.0
    beside = siblings.Siblings(lambda ino: used.get(ino, False), 100, 1 << 20, lambda: now)
    beside.page(directory_page(1, list(range(10, 500))))

    def missed(ino: int) -> list[int]:
        found = beside.missed(ino, lambda each: each in used)
        used[ino] = True
        for each in found:
            beside.brought(each, 30, 0)
            used[each] = False
        return found

    assert [len(missed(ino)) for ino in (10, 300, 100, 400)] == [0, 1, 2, 4]
    assert missed(200) == []
    assert beside.figures() == {"ahead": 7, "ahead_used": 0, "ahead_wasted": 0, "ahead_held_back": 1}
    used.update(dict.fromkeys([ino for ino, is_used in used.items() if not is_used], True))
    assert len(missed(250)) == 16
    now = 100.0
    assert missed(30) == []
    assert beside.figures()["ahead_used"] == 7


def test_what_follows_unasked() -> None:
    """What one fetch had no room for; then, once misses were steady, more and more, while what came is used."""
    used: dict[int, bool | None] = {}
    beside = siblings.Siblings(lambda ino: used.get(ino, False), 100_000, 1 << 30, lambda: 0.0)
    beside.page(directory_page(1, list(range(10, 500))))

    def following(ino: int, rest: list[int] | None = None) -> list[int]:
        return beside.following(ino, rest or [], lambda each: False, content=False)

    def missed(ino: int) -> list[int]:
        return beside.missed(ino, lambda each: False)

    assert following(10, [11, 12]) == [11, 12]
    for ino in (10, 20, 30):
        missed(ino)
        assert following(ino) == []
    missed(40)
    assert following(44) == [*range(45, 53)]
    assert following(52) == [*range(53, 69)]
    assert beside.following(52, [], lambda each: False, content=True) == []
    assert following(1) == []
    for ino in range(100, 117):
        beside.brought(ino, 1, 0)
    assert following(68) == []
    used.update(dict.fromkeys(range(100, 117), True))
    assert following(68) == [*range(69, 101)]
    beside.brought(200, 4 * wire.MAX_FETCH, 0)
    assert following(100, [101]) == [101]
    beside.brought(201, 1, 0)
    assert following(100, [101]) == []
    used[200] = True
    assert following(100, [101]) == [101]
    beside.brought(202, 1, (64 << 20) + 1)
    assert following(100, [101]) == []
    used[201] = used[202] = None  # evicted before anybody asked: there is no room for more
    assert following(100, [101]) == []
    assert following(100, [101]) == [101]


async def test_what_nobody_uses_is_not_followed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads in some directories and then stops has some more brought, and not all that there are."""
    tree = await make_tree(rig, 120, 2)
    log = spied(rig)
    directories = list(tree)
    asked: set[int] = set()
    monkeypatch.setattr(rig.ops._directories._siblings, "_is_used", asked.__contains__)
    for ino in (ROOT, *directories[:8]):
        await ask_all(rig, ino)
        asked.add(ino)
    await until(lambda: not rig.ops._directories._fetches)
    figures = (await rig.mount.figures())["directories"]
    assert figures["unasked"] > 0
    brought = {parent for parent, _ in rig.maps.names} - {ROOT}
    assert set(directories[:8]) < brought
    assert len(brought) <= 8 + 8 + 16
    assert len(log) == figures["fetches"]
    await rig.assert_maps_are_right()


async def test_names_asked_for_at_random_fetch_nothing_else(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.ops._directories, "_window", 20)
    made = [(await rig.other.make(b"%04d" % index)).ino for index in range(400)]
    assert await rig.ino(b"0000") == made[0]
    before = len(rig.maps.names)
    log = spied(rig)
    for index in random.Random(2).sample(range(50, 400, 25), 12):
        assert await ask(rig, ROOT, b"%04d" % index) == made[index]
    assert {type(each) for each in log} == {wire.Lookup}
    assert len(rig.maps.names) == before + 12
    log.clear()
    for index in range(200, 400):
        assert await ask(rig, ROOT, b"%04d" % index) == made[index]
    fetches = [each for each in log if isinstance(each, wire.FetchDirectory)]
    assert [each.limit for each in fetches] == [64, 128, 256]
    assert len(log) <= 20
    await rig.assert_maps_are_right()


async def test_a_listing_is_read_a_window_ahead(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.ops._directories, "_window", 20)
    made = {b"%03d" % index: (await rig.other.make(b"%03d" % index)).ino for index in range(90)}
    log = spied(rig)
    assert await rig.listing(at_once=5) == made
    assert [type(each) for each in log] == [wire.FetchDirectory] * 5
    assert (await rig.mount.figures())["directories"]["in_order"] == 4
    await rig.assert_maps_are_right()
