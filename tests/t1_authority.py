"""What every engine must do for those who stand for its authority: the same tests for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from claimant import DEADLINE_S, Claimant, claimants
from databases import SERVERS, Databases

Make = Callable[[], Awaitable[Claimant]]


@pytest.fixture(params=["memory", "lmdb", *SERVERS])
async def make(request: pytest.FixtureRequest, databases: Databases, tmp_path: Path) -> AsyncIterator[Make]:
    """Makes the claimants a, b, ... of one engine."""
    async with claimants(databases.url(request.param, tmp_path / "engine")) as claimant:
        yield claimant


async def test_authority(make: Make) -> None:
    """One of two has it; a release hands over at once, a death soon; the epoch grows, and no change is lost."""
    a, b = await make(), await make()
    assert await b.do("holder") == "None"
    assert await a.do("take") == "1"
    assert await a.do("holder") == await b.do("holder") == "a"
    assert await b.do("take") == "busy"
    assert await a.do("write") == "a"
    waiting = asyncio.create_task(b.do("wait"))
    assert await a.do("resign") == "done"
    assert await waiting == "2"
    assert await b.do("holder") == "b"
    assert await b.do("write") == "a b"
    c = await make()
    assert await c.do("take") == "busy"
    assert await c.do("holder") == "b"
    waiting = asyncio.create_task(c.do("wait"))
    await b.kill()
    assert await waiting == "3"
    assert await c.do("holder") == "c"
    assert await c.do("write") == "a b c"


async def test_who_stands_is_known_to_all(make: Make) -> None:
    """Whoever has the authority, if anybody: until he resigns, or some time after he has died."""
    a, b = await make(), await make()
    assert await a.do("announce") == "a"
    assert await b.do("announce") == "a b"
    assert await a.do("take") == "1"
    assert await a.do("announce") == await a.do("announce") == "a b"
    assert await a.do("resign") == "done"
    assert await b.do("announce") == "b"
    c = await make()
    assert await c.do("announce") == "b c"
    await b.kill()
    await until(lambda: c.do("announce"), "c")


async def until(ask: Callable[[], Awaitable[str]], answer: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if await ask() == answer:
                return
            await asyncio.sleep(0.1)


async def test_claims_at_once(make: Make) -> None:
    """Of those that claim at the same time one has it."""
    claims = [await make() for _ in range(3)]
    said = await asyncio.gather(*(each.do("take") for each in claims))
    assert sorted(said) == ["1", "busy", "busy"]
    assert await claims[said.index("1")].do("write") == "abc"[said.index("1")]


async def test_one_that_hung_commits_nothing_more(make: Make) -> None:
    """A standby takes over from one that hangs; that one, when it goes on, commits nothing, and is told or dead."""
    a, b = await make(), await make()
    assert await a.do("take") == "1"
    assert await a.do("write") == "a"
    await a.stop()
    assert await b.do("wait") == "2"
    await a.go_on()
    assert await b.do("write") == "a b"
    assert await a.do("write") in ("fenced", "dead")
    assert await a.do("lost") in ("1", "dead")
    assert await b.do("write") == "a b b"
    assert await b.do("holder") == "b"
