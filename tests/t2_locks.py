"""Locks over sockets: waits and their end, the end of sessions, restarts, and what a client may not do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from served import VOLUME, Client, Metaserver, serving, until

from fuseclient.worker.rpc import Refused
from metaserver import locking, locks, wire
from metaserver.wire import LockOutcome

INO = 5


@pytest.fixture
async def metaserver(tmp_path: Path) -> AsyncIterator[Metaserver]:
    async with serving(tmp_path) as running:
        yield running


class Locker:
    """A client with short forms of the requests, and what it was told later."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.told: list[tuple[int, LockOutcome]] = []
        client.connection.on_lock_settled(lambda settled: self.told.append((settled.number, settled.outcome)))
        self.number = 0

    async def lock(
        self, *, exclusive: bool = True, wait: bool = False, ino: int = INO, owner: int = 1, flock: bool = False,
        start: int = 0, end: int = wire.LAST_BYTE,
    ) -> LockOutcome:  # fmt: skip
        self.number += 1
        lock = wire.Lock(ino, owner, flock, start, end, exclusive, 77)
        return await self._ask(wire.SetLock(lock, self.number, wait))

    async def unlock(self, *, ino: int = INO, owner: int = 1, flock: bool = False) -> LockOutcome:
        lock = wire.Lock(ino, owner, flock, 0, wire.LAST_BYTE, False)
        return await self._ask(wire.SetLock(lock, 0, unlock=True))

    async def cancel(self, number: int) -> LockOutcome:
        return await self._ask(wire.CancelLock(number))

    async def _ask(self, request: wire.Request) -> LockOutcome:
        return (await self.client.connection.call(request, wire.LockAnswer)).outcome

    async def test(self, *, exclusive: bool = True, flock: bool = False) -> wire.Lock | None:
        request = wire.TestLock(wire.Lock(INO, 9, flock, 0, wire.LAST_BYTE, exclusive))
        return (await self.client.connection.call(request, wire.LockIs)).lock

    async def hold(self, *locks: wire.Lock, last: bool = True) -> list[int]:
        return (await self.client.connection.call(wire.HoldLocks(list(locks), last), wire.LocksLost)).indexes


async def locker(metaserver: Metaserver) -> Locker:
    return Locker(await metaserver.client())


async def back(metaserver: Metaserver, before: Locker) -> Locker:
    """The client of before, on another connection."""
    client = Client(await metaserver.connect())
    assert (await client.open(VOLUME, before.client.session.session)).resumed
    return Locker(client)


async def restart(metaserver: Metaserver) -> None:
    await metaserver.stop()
    await metaserver.start()


async def test_a_lock_is_somebody_elses_until_it_is_given_up(metaserver: Metaserver) -> None:
    one, two = await locker(metaserver), await locker(metaserver)
    assert await one.lock() is LockOutcome.GRANTED
    assert await two.lock() is LockOutcome.DENIED
    assert await two.lock(ino=INO + 1) is LockOutcome.GRANTED
    assert await one.unlock() is LockOutcome.GRANTED
    assert await two.lock() is LockOutcome.GRANTED


async def test_the_lock_in_the_way_and_its_process(metaserver: Metaserver) -> None:
    one, two = await locker(metaserver), await locker(metaserver)
    assert await two.test() is None
    await one.lock(start=5, end=9, exclusive=False)
    assert await two.test() == wire.Lock(INO, 0, False, 5, 9, False, 0), "a process of another machine is nobody here"
    assert await one.test() == wire.Lock(INO, 0, False, 5, 9, False, 77)
    assert await two.test(exclusive=False) is None
    assert await two.test(flock=True) is None


async def test_who_waits_is_told(metaserver: Metaserver) -> None:
    one, two = await locker(metaserver), await locker(metaserver)
    await one.lock()
    assert await two.lock(wait=True) is LockOutcome.WAITING
    assert await two.lock(wait=True, owner=2) is LockOutcome.WAITING
    await one.unlock()
    await until(lambda: two.told == [(1, LockOutcome.GRANTED)])
    await two.unlock()
    await until(lambda: two.told[1:] == [(2, LockOutcome.GRANTED)])


async def test_more_than_a_connection_may_ask_at_once_can_wait(metaserver: Metaserver) -> None:
    one, two = await locker(metaserver), await locker(metaserver)
    await one.lock()
    outcomes = [await two.lock(wait=True, owner=owner) for owner in range(300)]
    assert set(outcomes) == {LockOutcome.WAITING}
    await two.client.renew(0)


async def test_a_wait_that_is_cancelled(metaserver: Metaserver) -> None:
    one, two = await locker(metaserver), await locker(metaserver)
    await one.lock()
    await two.lock(wait=True)
    assert await two.cancel(1) is LockOutcome.CANCELLED
    assert await two.cancel(1) is LockOutcome.DENIED
    await one.unlock()
    assert await one.test() is None
    assert two.told == []


async def test_a_wait_that_would_never_end(metaserver: Metaserver) -> None:
    one, two = await locker(metaserver), await locker(metaserver)
    await one.lock()
    await two.lock(ino=INO + 1)
    assert await one.lock(ino=INO + 1, wait=True) is LockOutcome.WAITING
    assert await two.lock(wait=True) is LockOutcome.DEADLOCK


async def test_who_comes_later_lets_others_pass_for_a_moment(
    metaserver: Metaserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "_TICK_S", 0.01)
    one, two, three = [await locker(metaserver) for _ in range(3)]
    await one.lock(exclusive=False)
    await two.lock(wait=True)
    assert await three.lock(wait=True, exclusive=False) is LockOutcome.WAITING
    await until(lambda: three.told == [(1, LockOutcome.GRANTED)])
    assert two.told == []


async def test_the_locks_of_a_session_end_with_it(metaserver: Metaserver) -> None:
    one, two = await locker(metaserver), await locker(metaserver)
    await one.lock()
    await two.lock(wait=True)
    await one.client.connection.call(wire.CloseSession(), wire.Done)
    await until(lambda: two.told == [(1, LockOutcome.GRANTED)])


async def test_the_locks_of_a_client_that_says_nothing_end_with_its_lease(tmp_path: Path) -> None:
    async with serving(tmp_path, lease_s=0.4) as metaserver:
        one, two = await locker(metaserver), await locker(metaserver)
        await one.lock()
        await two.lock(wait=True)

        async def granted() -> bool:
            await two.client.renew(0)
            return two.told == [(1, LockOutcome.GRANTED)]

        await until(granted)
        with pytest.raises(Refused):
            await one.lock()


async def test_a_wait_outlives_its_connection(metaserver: Metaserver) -> None:
    one, two = await locker(metaserver), await locker(metaserver)
    await one.lock()
    await two.lock(wait=True)
    again = await back(metaserver, two)
    assert await again.lock(wait=True) is LockOutcome.WAITING, "the same number: it is the same wait"
    await one.unlock()
    await until(lambda: again.told == [(1, LockOutcome.GRANTED)])
    assert again.number == 1
    third = await back(metaserver, again)
    assert await third.lock(wait=True) is LockOutcome.GRANTED, "what was said was lost: it is said again"


# Restarts


async def test_after_a_restart_nobody_gets_a_lock_before_all_are_back(metaserver: Metaserver) -> None:
    one, two = await locker(metaserver), await locker(metaserver)
    held = wire.Lock(INO, 1, False, 0, 9, True, 77)
    await one.lock(end=9)
    await restart(metaserver)
    two = await back(metaserver, two)
    await two.client.renew(0)
    assert await two.lock() is LockOutcome.WAITING
    assert await two.lock(start=10) is LockOutcome.WAITING
    one = await back(metaserver, one)
    await asyncio.sleep(0)
    assert two.told == [], "it is back, but did not say what it holds"
    assert await one.hold(held) == []
    await until(lambda: sorted(two.told) == [(1, LockOutcome.DENIED), (2, LockOutcome.GRANTED)])


async def test_who_renews_without_a_word_holds_nothing(metaserver: Metaserver) -> None:
    one, two = await locker(metaserver), await locker(metaserver)
    await one.lock()
    await restart(metaserver)
    one, two = await back(metaserver, one), await back(metaserver, two)
    await two.client.renew(0)
    assert await two.lock() is LockOutcome.WAITING
    await one.client.renew(0)
    await until(lambda: two.told == [(1, LockOutcome.GRANTED)])


async def test_who_does_not_come_back_loses_its_locks(tmp_path: Path) -> None:
    async with serving(tmp_path, lease_s=0.5) as metaserver:
        one, two = await locker(metaserver), await locker(metaserver)
        await one.lock()
        await restart(metaserver)
        two = await back(metaserver, two)
        assert await two.lock() is LockOutcome.WAITING

        async def granted() -> bool:
            await two.client.renew(0)
            return two.told == [(1, LockOutcome.GRANTED)]

        await until(granted)


async def test_unlocking_and_cancelling_wait_for_nobody(metaserver: Metaserver) -> None:
    one, two = await locker(metaserver), await locker(metaserver)
    await one.lock()
    await restart(metaserver)
    two = await back(metaserver, two)
    await two.client.renew(0)
    assert await two.lock() is LockOutcome.WAITING
    assert await two.unlock() is LockOutcome.GRANTED
    assert await two.cancel(1) is LockOutcome.CANCELLED
    one = await back(metaserver, one)
    await one.client.renew(0)
    assert await one.test() is None


async def test_a_new_worker_says_what_the_session_holds(metaserver: Metaserver) -> None:
    """The one before may have died between the metaserver's word and its own note of it."""
    one, two = await locker(metaserver), await locker(metaserver)
    await one.lock(end=9)
    await one.lock(start=20, end=29)
    await two.lock(start=50, end=59)
    assert await one.lock(wait=True, start=55, end=55) is LockOutcome.WAITING
    again = await back(metaserver, one)
    kept, taken = wire.Lock(INO, 1, False, 0, 9, True), wire.Lock(INO, 1, False, 50, 50, True)
    assert await again.hold(kept, last=False) == []
    assert await two.lock(start=25, end=25) is LockOutcome.DENIED, "not before the last"
    assert await again.hold(taken) == [1]
    assert await two.lock(start=25, end=25) is LockOutcome.GRANTED
    assert await two.lock(start=9, end=9) is LockOutcome.DENIED
    assert again.told == [(3, LockOutcome.CANCELLED)]


# Bounds


async def test_a_session_has_so_many(metaserver: Metaserver, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await locker(metaserver)
    await one.lock()
    table = metaserver.server._service._locking._tables[1]
    monkeypatch.setattr(table, "_session_locks", 3)
    monkeypatch.setattr(table, "_session_waits", 2)
    for ino in (11, 12):
        assert await one.lock(ino=ino) is LockOutcome.GRANTED
    assert await one.lock(ino=13) is LockOutcome.FULL
    await one.unlock(ino=12)
    outcomes = [await one.lock(owner=owner, wait=True) for owner in (5, 6, 7)]
    assert outcomes == [LockOutcome.WAITING, LockOutcome.WAITING, LockOutcome.FULL]


async def test_what_a_session_tells_of_is_bounded(metaserver: Metaserver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "SESSION_LOCKS", 3)
    one = await locker(metaserver)
    lock = wire.Lock(INO, 1, False, 0, 9, True)
    await one.hold(lock, lock, last=False)
    with pytest.raises(Refused) as caught:
        await one.hold(lock, lock)
    assert caught.value.code is wire.ErrorCode.INVALID


@pytest.mark.parametrize(
    "lock",
    [wire.Lock(INO, 1, False, 5, 4, True), wire.Lock(INO, 1, True, 0, 4, True)],
    ids=["of no bytes", "a part of a file that is locked whole"],
)
async def test_a_lock_that_makes_no_sense(metaserver: Metaserver, lock: wire.Lock) -> None:
    one = await locker(metaserver)
    for request in (wire.SetLock(lock, 1), wire.TestLock(lock)):
        with pytest.raises(Refused) as caught:
            await one.client.connection.call(request, wire.LockAnswer)
        assert caught.value.code is wire.ErrorCode.INVALID


async def test_the_most_locks_that_a_message_tells_of_fit_into_it() -> None:
    lock = wire.Lock(2**48 - 1, -(2**63), True, 2**63 - 1, 2**63 - 1, True, 2**32 - 1)
    frame = wire.encode(2**63 - 1, wire.HoldLocks([lock] * wire.MAX_LOCKS, True))
    assert len(frame) <= wire.MAX_REQUEST
    assert locks.SESSION_LOCKS % wire.MAX_LOCKS == 0
