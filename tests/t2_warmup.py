"""The worker's walk that warms a tree, asked as its channel asks: by windows, within the room, and only while somebody
wants it."""

from __future__ import annotations

import asyncio
import dataclasses
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from served import DEADLINE_S
from worker_rig import ME, ROOT, Rig, rigged

from fuseclient.errors import UserError
from fuseclient.kernel_cache import Room
from fuseclient.warmup import Progress
from fuseclient.worker import warming

FILES = 40
CONTENT = b"c" * 5000


@pytest_asyncio.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    async with rigged(tmp_path, monkeypatch) as made:
        for number in range(FILES):
            await made.create(b"%02d" % number, CONTENT)
        made.maps.bump_epoch()
        yield made


async def ask(rig: Rig, **arguments: Any) -> dict[str, Any]:
    return await rig.mount.answers["warmup"]({"job": "a", "ino": ROOT, **arguments})


async def ended(rig: Rig, **arguments: Any) -> Any:
    """Begin a walk and return what it came to."""
    progress = await ask(rig, begin=True, **arguments)
    async with asyncio.timeout(DEADLINE_S):
        while progress["state"] == "running":
            await asyncio.sleep(0)
            progress = await ask(rig)
    return progress


async def test_content_comes_by_windows_of_what_a_fetch_may_bring(rig: Rig) -> None:
    """A window that brings too little is cut, and goes on behind what it brought."""
    walks = rig.mount._walks
    walks._parts = dataclasses.replace(walks._parts, data_budget=7 * len(CONTENT))
    progress = await ended(rig, data=True)
    assert progress["state"] == "done"
    assert progress["entries"] == FILES
    assert progress["content"] == {"files": FILES, "bytes": FILES * len(CONTENT)}
    assert set(rig.maps.data.values()) == {CONTENT}
    assert len(rig.maps.data) == FILES
    assert len(rig.maps.listings[ROOT]) > FILES * 24
    await rig.assert_maps_are_right()


async def test_no_more_than_there_is_room_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.maps, "room", Room(FILES - 10, 1000))
    progress = await ended(rig)
    assert progress["entries"] == len(rig.maps.names) == FILES - 10
    assert progress["directories_left_out"] == 1
    monkeypatch.setattr(rig.maps, "room", Room(1000, 25))
    progress = await ended(rig, data=True)
    assert progress["content"]["files"] + progress["content_left_out"]["files"] == FILES
    assert 8 <= progress["content"]["files"] <= 12


async def test_a_walk_that_nobody_asks_for_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "SILENCE_S", 0.01)
    never = asyncio.Event()

    async def hangs(*_: Any) -> None:
        await never.wait()

    monkeypatch.setattr(warming.Walk, "_visit", hangs)
    await ask(rig, begin=True)
    task = rig.mount._walks._task
    assert task is not None
    await asyncio.wait({task}, timeout=DEADLINE_S)
    assert task.cancelled()
    assert (await ask(rig))["state"] == "stopped"


async def test_one_at_a_time_and_stopped_when_told(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    never = asyncio.Event()

    async def hangs(*_: Any) -> None:
        await never.wait()

    monkeypatch.setattr(warming.Walk, "_visit", hangs)
    assert (await ask(rig, begin=True))["state"] == "running"
    with pytest.raises(UserError, match="being warmed already"):
        await ask(rig, begin=True, job="b")
    with pytest.raises(UserError, match="started again"):
        await ask(rig, job="b")
    assert (await ask(rig, stop=True))["state"] == "stopped"


async def test_what_is_dropped_meanwhile_is_put_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is dropped after the first directory: the walk begins anew."""
    await rig.ops.mkdir(ROOT, b"directory", stat.S_IFDIR | 0o755, ME)
    visit, visited = warming.Walk._visit, 0

    async def drops_once(self: warming.Walk, ino: int) -> None:
        nonlocal visited
        await visit(self, ino)
        visited += 1
        if visited == 1:
            self._parts.feeder.drop_everything()

    monkeypatch.setattr(warming.Walk, "_visit", drops_once)
    progress = await ended(rig)
    # The other directory was put after that: it is passed over.
    assert (progress["directories"], progress["entries"]) == (1, FILES + 1)
    assert progress["directories_passed_over"] == 1
    assert visited == 4
    assert len(rig.maps.names) == FILES + 1


async def test_questions_that_make_no_sense(rig: Rig) -> None:
    for arguments in ({"ino": "x"}, {"unknown": 1}, {"data": 7}):
        with pytest.raises(UserError, match="not a question about warming"):
            await ask(rig, **arguments)
    # What is no directory, or is not there any more, is nothing to be warmed.
    progress = await ended(rig, ino=2**40)
    assert (progress["state"], progress["entries"]) == ("done", 0)


def test_what_is_complete() -> None:
    assert not Progress().complete
    assert Progress(state="done").complete
    assert not Progress(state="done", directories_left_out=1).complete
