"""Engines on a store elsewhere: round trips, lost answers, other processes, and stores that are away."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import operator
from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio
import pytest
from local_store import LocalStore, Rows
from msgspec import structs
from namespaces import DIRECTORY, FILE, ROOT, SESSION, Files

from metaserver import keys, new_files, recovery, wire
from metaserver.engine import Snapshot, Transaction
from metaserver.engine.etcd import EtcdStore, Settings
from metaserver.engine.remote import RemoteEngine
from metaserver.engine.store import Found, Lost, Moved, Query
from metaserver.errors import EngineFull, EngineUnavailable, EngineUnusable, LimitExceeded, Unknown
from metaserver.volumes import Context


@pytest.fixture
def store() -> LocalStore:
    return LocalStore()


@pytest.fixture
async def engine(store: LocalStore) -> AsyncIterator[RemoteEngine]:
    engine = RemoteEngine(store, "test", patience_s=0.2)
    yield engine
    store.is_away = False
    await engine.close()


def add(txn: Transaction, key: bytes = b"n") -> int:
    value = int(txn.get(key) or b"0") + 1
    txn.put(key, b"%d" % value)
    return value


def get(snapshot: Snapshot) -> bytes | None:
    return snapshot.get(b"n")


async def test_transactions_that_wait_share_a_commit(engine: RemoteEngine, store: LocalStore) -> None:
    """Though each depends on the one before, and none is seen before it is stored."""
    await engine.write(add)
    values = await asyncio.gather(*(engine.write(add) for _ in range(200)))
    assert sorted(values) == list(range(2, 202))
    assert store.now.rows == {b"n": b"201"}
    assert store.commits <= 5


async def test_what_is_at_hand_is_not_fetched_again(engine: RemoteEngine, store: LocalStore) -> None:
    await engine.write(add)
    before = store.fetches
    for _ in range(10):
        await engine.write(add)
    assert store.fetches == before
    assert await asyncio.gather(*(engine.read(get) for _ in range(10))) == [b"11"] * 10
    assert store.fetches <= before + 2


async def test_many_keys_are_one_round_trip(engine: RemoteEngine, store: LocalStore) -> None:
    await engine.write(add)
    keys = [b"%d" % n for n in range(1000)]
    before = store.fetches
    assert await engine.read(lambda snapshot: snapshot.get_many([*keys, b"n"])) == [None] * 1000 + [b"1"]
    assert store.fetches == before + 1


@pytest.mark.parametrize("step", [1, 2, 1000])
async def test_keys_that_lie_together_are_read_as_a_range(engine: RemoteEngine, store: LocalStore, step: int) -> None:
    """And give the same as those that do not, while others write some of them; a key of another length, too."""
    keys = [b"i" + (number * step).to_bytes(8) for number in range(60)]

    def write(txn: Transaction, number: int, value: bytes) -> None:
        txn.put(keys[number], value)

    other = RemoteEngine(store, "other")
    for number in range(0, 60, 3):
        await other.write(functools.partial(write, number=number, value=b"1"))
    asked = keys, [*keys, b"i"]
    reading = [asyncio.create_task(engine.read(operator.methodcaller("get_many", each))) for each in asked]
    await asyncio.gather(*(engine.write(functools.partial(write, number=n, value=b"2")) for n in range(0, 60, 6)))
    for values in await asyncio.gather(*reading):
        assert [value is not None for value in values[:60]] == [number % 3 == 0 for number in range(60)]
        assert set(values[3:60:6]) == {b"1"}
    assert await engine.read(lambda s: s.get_many(keys[::6])) == [b"2"] * 10
    await other.close()


@pytest.mark.parametrize(("others", "requests"), [(0, 1), (1, 1), (15, 2)])
async def test_of_keys_between_others_so_many_are_read_at_most(
    engine: RemoteEngine, store: LocalStore, others: int, requests: int
) -> None:
    """As the inodes of one shard are: those of the others may be there, or not."""
    numbers = [(number * 16 - (number == 1)).to_bytes(8) for number in range(1, 101)]
    rows = {b"i" + number: number for number in numbers}
    between = {
        b"i" + (int.from_bytes(n) + more).to_bytes(8): b"other" for n in numbers for more in range(1, others + 1)
    }
    store.now = Rows(rows | between, store.now.tip)
    largest = 0
    fetch = Rows.fetch

    async def noting(self: Rows, keys: Sequence[bytes], queries: Sequence[Query]) -> Found:
        nonlocal largest
        found = await fetch(self, keys, queries)
        largest = max([largest, *map(len, found.ranges.values())])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "fetch", noting)
        await engine.read(get)
        before = store.fetches
        assert await engine.read(lambda snapshot: snapshot.get_many(list(rows))) == numbers
    assert store.fetches == before + requests
    assert 100 <= largest <= 300


async def test_files_that_come_whole_are_two_requests(engine: RemoteEngine, store: LocalStore) -> None:
    """One for all that is looked at, one for what is written; the directory is at hand from the first."""
    fs = await Files.create(engine)
    context = Context(fs.volume, SESSION, 0)
    given = await engine.write(lambda txn: new_files.reserve_inodes(txn, context, wire.ReserveInodes(10)))
    file = wire.NewFile(ROOT, b"", 0, FILE, 0, 0, 1, 1, 1, 1, b"content")

    async def make(*numbers: int) -> None:
        inos = [given.first + given.step * number for number in numbers]
        files = [structs.replace(file, name=b"%d" % ino, ino=ino) for ino in inos]
        await fs.change(wire.MakeFiles(files))

    await make(0)
    engine.trust(2**40)
    for numbers in ((1,), (2, 3, 4)):
        before = store.fetches, store.commits
        await make(*numbers)
        assert (store.fetches, store.commits) == (before[0] + 1, before[1] + 1)


async def test_a_long_body_is_run_once_and_sees_one_moment(engine: RemoteEngine, store: LocalStore) -> None:
    """On a thread, with a round trip a row, while others write."""

    def write(txn: Transaction, value: bytes) -> None:
        for number in range(50):
            txn.put(b"k%02d" % number, value)

    runs: list[int] = []

    def body(snapshot: Snapshot) -> set[bytes | None]:
        runs.append(1)
        return {snapshot.get(b"k%02d" % number) for number in range(50)}

    await engine.write(functools.partial(write, value=b"0"))
    reading = asyncio.create_task(engine.scan(body))
    other = RemoteEngine(store, "other")
    for number in range(1, 20):
        await (engine if number % 2 else other).write(functools.partial(write, value=b"%d" % number))
    assert len(await reading) == 1
    assert len(runs) == 1
    other_body = await other.read(body)  # one that does not say that it is long
    assert other_body == {b"19"}
    await other.close()


async def test_another_process_between_two_commits(engine: RemoteEngine, store: LocalStore) -> None:
    other = RemoteEngine(store, "other")
    for _ in range(5):
        await engine.write(add)
        await other.write(add)
    assert await engine.read(get) == await other.read(get) == b"10"
    await other.close()


@pytest.mark.parametrize("done", [True, False], ids=["after it was made", "before it was made"])
async def test_a_lost_answer_is_found_out(engine: RemoteEngine, store: LocalStore, done: bool) -> None:
    """Whether it was committed or not, the transaction is made exactly once."""
    await engine.write(add)
    losses = iter([Lost("cut")] * 2)

    def lose() -> None:
        if (error := next(losses, None)) is not None:
            raise error

    if done:
        store.after = lose
    else:
        store.before = lose
    assert await engine.write(add) == 2
    assert store.now.rows == {b"n": b"2"}


async def test_a_lost_answer_with_another_process_behind_it(engine: RemoteEngine, store: LocalStore) -> None:
    """It was committed, its answer was lost, and others have committed since."""
    await engine.write(add)
    other = RemoteEngine(store, "other")
    tasks: list[asyncio.Task[int]] = []

    def lose() -> None:
        store.after = lambda: None
        tasks.append(asyncio.create_task(other.write(add)))
        raise Lost("cut")

    store.after = lose
    assert await engine.write(add) == 2
    assert await tasks[0] == 3
    assert await engine.write(add) == 4
    await other.close()


async def test_an_unknown_outcome_is_said_and_what_is_late_is_refused(engine: RemoteEngine, store: LocalStore) -> None:
    """A commit that is still on its way when patience ends cannot arrive after something else was done."""
    await engine.write(add)
    late = store.now.tip.version

    def lose() -> None:
        store.is_away = True
        raise Lost("cut")

    store.before = lose
    with pytest.raises(Unknown):
        await engine.write(add)
    store.is_away, store.before = False, lambda: None
    assert await engine.read(get) == b"1"
    assert store.now.tip.version > late


@pytest.mark.parametrize("refusal", [EngineFull("no space"), Moved(None)], ids=["full", "moved"])
async def test_a_refusal_says_nothing_of_a_commit_that_was_lost_before(
    engine: RemoteEngine, store: LocalStore, refusal: Exception
) -> None:
    """It was made: whoever asked is not told that it was not, and asks for the outcome."""
    await engine.write(add)

    def lose() -> None:
        store.before, store.after = refuse, lambda: None
        raise Lost("cut")

    def refuse() -> None:
        store.before = lambda: None
        raise refusal

    store.after = lose
    with pytest.raises(Unknown):
        await engine.write(add)
    assert await engine.read(get) == b"2"
    store.before = refuse
    with pytest.raises(EngineFull) if isinstance(refusal, EngineFull) else contextlib.nullcontext():
        await engine.write(add)


async def test_who_depends_on_a_failed_commit_runs_again(engine: RemoteEngine, store: LocalStore) -> None:
    await engine.write(add)

    def lose() -> None:
        store.is_away = True
        store.before = lambda: None
        raise Lost("cut")

    store.before = lose
    first = asyncio.create_task(engine.write(add))
    first.add_done_callback(lambda _: setattr(store, "is_away", False))
    while not store.is_away:  # noqa: ASYNC110 - the commit is under way when it is
        await asyncio.sleep(0)
    second = asyncio.create_task(engine.write(add))
    with pytest.raises(Unknown):
        await first
    assert await second == 2
    assert store.now.rows == {b"n": b"2"}


async def test_closing_does_not_wait_for_a_store_that_is_away(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose authority is lost is to stand for it again soon; what it was about to commit is of an unknown outcome."""
    monkeypatch.setattr("metaserver.engine.remote._CLOSE_S", 0.05)
    engine = RemoteEngine(store, "test", patience_s=3600)
    await engine.write(add)
    store.is_away = True
    writing = asyncio.create_task(engine.write(add))
    while not engine._batches:  # noqa: ASYNC110 - it is under way when there is one
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await engine.close()
        with pytest.raises(Unknown):
            await writing


async def test_a_store_that_is_away(engine: RemoteEngine, store: LocalStore) -> None:
    store.is_away = True
    with pytest.raises(EngineUnusable, match="test does not answer: it is away"):
        await engine.read(get)
    store.is_away = False
    await engine.write(add)
    store.is_away = True
    with pytest.raises(EngineUnavailable):
        await engine.read(get)
    store.is_away = False
    assert await engine.write(add) == 2


async def test_a_store_that_takes_less_than_it_should(engine: RemoteEngine, store: LocalStore) -> None:
    """Batches become smaller; what one transaction writes is refused whole."""
    store.most_writes = 10

    def write(txn: Transaction, first: int, count: int) -> None:
        for number in range(first, first + count):
            txn.put(b"%d" % number, b"")

    await asyncio.gather(*(engine.write(functools.partial(write, first=first, count=8)) for first in range(0, 80, 8)))
    assert len(store.now.rows) == 80
    with pytest.raises(LimitExceeded):
        await engine.write(functools.partial(write, first=100, count=11))
    assert len(store.now.rows) == 80


async def test_nothing_is_lost_when_a_server_is_killed(engine: RemoteEngine) -> None:
    """So the next one skips no numbers, and has no client drop what it has; unless fsck has repaired something."""
    files = await Files.create(engine)
    assert not await recovery.prepare(engine)
    before = await files.make(b"before")
    assert not await recovery.prepare(engine)
    assert await files.make(b"before2") < before + 1000
    await recovery.spoil(engine)
    assert await recovery.prepare(engine)
    assert await files.make(b"after") > before + 1000


def _make_new(txn: Transaction, prefix: bytes = b"d1/") -> None:
    txn.put(prefix, b"made")
    txn.is_new(prefix)


async def test_what_is_new_is_known_to_be_empty(engine: RemoteEngine, store: LocalStore) -> None:
    """Once it is committed: each key is what was written to it, and no other is asked for."""
    await engine.write(_make_new)
    fetches = store.fetches
    engine.trust(math.inf)
    for number in range(10):
        key = b"d1/%d" % number
        assert await engine.write(functools.partial(add, key=key)) == 1
        assert await engine.write(functools.partial(add, key=key)) == 2
    assert await engine.read(lambda snapshot: snapshot.get_many([b"d1/3", b"d1/x"])) == [b"2", None]
    assert store.fetches == fetches
    assert await engine.read(lambda snapshot: snapshot.get(b"d2/x")) is None
    assert store.fetches == fetches + 1, "of another prefix nothing is known"


async def test_what_was_new_is_asked_for_when_a_row_of_it_has_gone(
    engine: RemoteEngine, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._cache, "_most_bytes", 3000)
    await engine.write(_make_new)
    await engine.write(lambda txn: txn.put(b"d1/x", b"kept"))
    for number in range(20):
        await engine.write(lambda txn, number=number: txn.put(b"d1/%d" % number, bytes(100)))  # type: ignore[misc]
        assert await engine.read(lambda snapshot: snapshot.get(b"d1/x")) == b"kept"
        engine._cache._rows.move_to_end(b"d1/x", last=False)  # it goes next
    assert await engine.read(lambda snapshot: snapshot.get(b"d1/0")) == bytes(100)
    fetches = store.fetches
    assert await engine.read(lambda snapshot: snapshot.get(b"d1/y")) is None
    assert store.fetches > fetches


async def test_what_was_new_may_be_another_s_when_the_store_has_moved(engine: RemoteEngine, store: LocalStore) -> None:
    await engine.write(_make_new)
    async with contextlib.AsyncExitStack() as stack:
        other = RemoteEngine(store, "other", patience_s=0.2)
        stack.push_async_callback(other.close)
        await other.write(lambda txn: txn.put(b"d1/x", b"7"))
        assert await engine.write(functools.partial(add, key=b"d1/x")) == 8


async def test_what_is_not_committed_is_not_new(engine: RemoteEngine, store: LocalStore) -> None:
    await engine.write(lambda txn: txn.put(b"d1/x", b"7"))
    engine._cache.clear()

    def fail(txn: Transaction) -> None:
        _make_new(txn)
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - it is the body's own
        await engine.write(fail)
    assert await engine.write(functools.partial(add, key=b"d1/x")) == 8


async def test_a_name_in_a_new_directory_is_made_with_one_request(store: LocalStore, engine: RemoteEngine) -> None:
    files = await Files.create(engine)
    made = await files.make(b"directory", DIRECTORY)
    engine.trust(math.inf)
    for shard in range(keys.SHARDS):  # each has its own numbers, which are asked for once
        await engine.read(lambda snapshot, shard=shard: snapshot.get(keys.shard(files.volume.id, shard)))  # type: ignore[misc]
    await files.make(b"first", parent=made)
    before = store.fetches, store.commits
    for name in (b"second", b"third", b"fourth"):
        await files.make(name, parent=made)
    assert (store.fetches - before[0], store.commits - before[1]) == (0, 3)
    await files.refused(wire.ErrorCode.EXISTS, wire.MakeNode(made, b"third", FILE, 0, 0))
    for name in (b"first", b"second", b"third", b"fourth"):
        await files.change(wire.Remove(made, name, False))
    await files.change(wire.Remove(ROOT, b"directory", True))


async def test_etcd_is_waited_for_longer_only_after_all_endpoints_were_silent() -> None:
    """Those without a leader are silent, while another one may know the next one."""
    store = EtcdStore(Settings(("one:1", "two:2", "three:3"), b"p"))
    waited: list[tuple[int, float]] = []

    class Silent:
        def __init__(self, channel: object) -> None:
            self._at = store._channels.index(channel)

        def Range(self, request: object, *, timeout: float, metadata: object) -> asyncio.Future[None]:
            waited.append((self._at, timeout))
            answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            answer.set_exception(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata()))
            return answer

    for _ in range(7):
        with pytest.raises(Lost):
            await store.call(Silent, "Range", None)
    await store.close()
    assert [at for at, _ in waited] == [0, 1, 2, 0, 1, 2, 0]
    first, second, third = (waited[at][1] for at in (0, 3, 6))
    assert [timeout for _, timeout in waited] == [first] * 3 + [second] * 3 + [third]
    assert first < second < third
