"""Metaservers, the servers of their engine and the object store are killed, hung and cut off from each other, in random
order and under load: what was acknowledged is there, and no answer is stale.

Two mounts, one of them accelerated where that is possible, are written to and read through without a pause. What each
completed call has made is in a manifest outside the volume: at the end fsck must find nothing, and a fresh mount must
show all of the manifest. A read that begins after a write's call has returned on the other mount must show it.

``BPFUSE_CRASHES=N`` has N faults of each engine happen instead of a few (make crashes), with the store on an S3 server;
``BPFUSE_SEED`` repeats an order.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import crash_faults
import pytest
import rig
import weed
from cables import Cable, cables
from crash_faults import Faults
from crash_load import FILES, number_of, running
from databases import SERVERS, Server, Unavailable
from several_metaservers import Group
from several_mounts import SLACK_S

from bench.etcd_cluster import EtcdCluster
from fuseclient import features

_COUNT: Final = int(os.environ.get("BPFUSE_CRASHES", "0"))
#: Seconds for the servers, and for each fault: a store that was killed takes 20 until it stores again.
pytestmark = [pytest.mark.usefixtures("needs_mounts"), pytest.mark.timeout(180 + 60 * _COUNT)]

LEASE_S: Final = 5.0
_METASERVERS: Final = 2
#: The lines in a mount's log when a close says so.
_TOLD: Final = ("may have lost changes that it had acknowledged", r"NOT_FOUND: there is no inode \d+")
#: And when the store was away for too long.
_FAILED: Final = (r"object \d+ cannot be stored", r"read: object \d+: ")
#: Of each engine: what happens, once each, and what else may.
_FEW: Final = {
    "lmdb": ("kill_the_authority", "kill_a_standby", "end_the_authority"),
    "etcd": ("kill_the_leader", "cut_off_the_authority"),
    "postgresql": ("kill_the_engine", "two_authorities"),
}
_MANY: Final = {
    "lmdb": crash_faults.OF_METASERVERS,
    "etcd": (*crash_faults.OF_METASERVERS, *crash_faults.OF_DATABASES, *crash_faults.OF_CLUSTERS),
    "postgresql": (*crash_faults.OF_METASERVERS, *crash_faults.OF_DATABASES),
    "mysql": (*crash_faults.OF_METASERVERS, *crash_faults.OF_DATABASES),
}


@dataclass
class Site:
    """All the servers of a volume. ``engine`` is its URL for who is next to it."""

    group: Group
    engine: str
    database: Server | EtcdCluster | None = None
    cables: list[Cable] = field(default_factory=list)
    store: weed.Weed | None = None


@pytest.fixture
def store() -> Iterator[weed.Weed | None]:
    """An S3 server, if more than a few faults are to happen; else the store is a directory."""
    if not _COUNT or weed.find() is None:
        yield None
        return
    with weed.running() as server:
        yield server


@pytest.fixture(params=_MANY if _COUNT else _FEW)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def site(kind: str, store: weed.Weed | None, sandbox: rig.Sandbox) -> Iterator[Site]:
    with contextlib.ExitStack() as stack:
        made = _site(kind, store, sandbox, stack)
        stack.callback(made.group.close)
        made.group.start()
        blocks = f"file://{sandbox.path}/blocks" if store is None else store.url(f"crashes-{kind}")
        sandbox.run("format", made.group.url, "--store", blocks).expect_success()
        try:
            yield made
        finally:
            print(f"--- log of the metaservers\n{made.group.log()}", file=sys.stderr)


def _site(kind: str, store: weed.Weed | None, sandbox: rig.Sandbox, stack: contextlib.ExitStack) -> Site:
    if kind == "lmdb":
        engine = f"lmdb://{sandbox.path}/engine"
        return Site(Group(sandbox, [engine] * _METASERVERS, LEASE_S), engine, store=store)
    try:
        database = EtcdCluster() if kind == "etcd" else SERVERS[kind]()
    except Unavailable as error:
        pytest.skip(str(error))
    stack.callback(database.close)
    database.start()
    engine = database.url()
    laid = stack.enter_context(cables(_METASERVERS, database.ports))
    group = Group(sandbox, [each.through(engine) for each in laid], LEASE_S)
    return Site(group, engine, database, laid, store)


def _order(kind: str, store: weed.Weed | None) -> tuple[list[str], int]:
    """Return the faults, in order, and the seed."""
    seed = int(os.environ.get("BPFUSE_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    rng = random.Random(seed)
    if not _COUNT:
        return rng.sample(_FEW[kind], len(_FEW[kind])), seed
    return rng.choices([*_MANY[kind], *(crash_faults.OF_STORES if store is not None else ())], k=_COUNT), seed


def test_what_was_acknowledged_outlives_every_process(
    kind: str, site: Site, sandbox: rig.Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, seed = _order(kind, site.store)
    monkeypatch.setattr(rig, "WATCHDOG_S", rig.WATCHDOG_S * max(1, len(order)))
    print(f"{kind}, seed {seed}: {order}")
    accelerated = "off" if features.missing_for_bpf(rig.probed()) else "bpf"
    allowed = [*_TOLD, *(_FAILED if set(order) & set(crash_faults.OF_STORES) else ())]
    mounts = [rig.Mount(sandbox, site.group.url, sandbox.directory(name), accel, (), allowed) for name, accel in
              (("a", accelerated), ("b", "off"))]  # fmt: skip
    first = site.group.status()["epoch"]
    with contextlib.ExitStack() as stack:
        for each in mounts:
            stack.enter_context(rig.watched(each))
        load = stack.enter_context(running(sandbox.path / "manifest", [each.path for each in mounts], seed))
        faults = Faults(site.group, load, random.Random(seed), site.database, site.cables, site.store)
        for fault in order:
            load.went_on()
            began = time.monotonic()
            faults.do(fault)
            load.went_on()
            pauses = load.take_pauses()
            print(f"{fault}: {time.monotonic() - began:.1f} s, longest calls {pauses}", flush=True)
            if fault not in crash_faults.HANGS and (_COUNT or kind == "lmdb"):
                assert all(pause < LEASE_S + SLACK_S for pause in pauses.values()), pauses
        done = load.end()
        epoch = site.group.status()["epoch"]
    changed = sum(faults.counts[each] for each in crash_faults.GO_ROUND)
    assert epoch - first >= changed
    assert epoch - first == changed or kind != "lmdb", "the authority went round"
    assert sum(faults.counts.values()) == len(order) > 1
    assert done.counts["told"] <= (2 * changed if kind == "lmdb" else 0), "each writer has one file open"
    assert done.counts["read"] > 0
    assert done.counts["rename"] > 0
    assert len(done.numbers) > FILES, "both have written"
    print(dict(done.counts))

    site.group.close()
    sandbox.run("fsck", site.group.url, "--engine", site.engine, "--verify").expect_success()
    site.group.start()
    with rig.watched(rig.Mount(sandbox, site.group.url, sandbox.directory("c"), "off", (), [])) as fresh:
        shown = {name: number_of(name, (fresh.path / name).read_bytes()) for name in done.numbers}
        lost = {name: number for name, number in done.numbers.items() if shown[name] < number}
        assert not lost
        assert done.directories <= set(os.listdir(fresh.path))
