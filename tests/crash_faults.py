"""What a test of crashes does to metaservers, to the servers of their engine, to the network between, and to the store.

Each fault ends when as many processes run as before, the network is whole, and one metaserver serves.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Final

import rig
from cables import Cable
from crash_load import Load
from databases import Server
from several_metaservers import Group
from weed import Weed

from bench.etcd_cluster import EtcdCluster

#: Seconds that something may take that waits for several leases of the engine's.
_LONG_S: Final = 60.0
#: The faults that any engine has, and those after which another metaserver serves than before.
OF_METASERVERS: Final = ("kill_the_authority", "kill_a_standby", "end_the_authority", "hang_the_authority")
GO_ROUND: Final = ("kill_the_authority", "end_the_authority", "hang_the_authority", "cut_off_the_authority")
OF_DATABASES: Final = ("kill_the_engine", "hang_the_engine", "cut_off_the_authority", "two_authorities")
OF_CLUSTERS: Final = ("kill_the_leader", "hang_the_leader", "kill_a_follower")
OF_STORES: Final = ("kill_the_store", "hang_the_store")
#: Those that last as long as the test wants; a pause around them says nothing.
HANGS: Final = ("hang_the_authority", "hang_the_engine", "hang_the_store", "kill_the_store")


class Faults:
    """``cables`` are between each of the metaservers and the engine's servers, as ``engine`` and ``store`` if any."""

    def __init__(
        self,
        group: Group,
        load: Load,
        rng: random.Random,
        engine: Server | EtcdCluster | None = None,
        cables: list[Cable] | None = None,
        store: Weed | None = None,
    ) -> None:
        self._group = group
        self._load = load
        self._rng = rng
        self._engine = engine
        self._cables = cables or []
        self._store = store
        self.counts: Counter[str] = Counter()

    def do(self, kind: str) -> None:
        """Do one, while the load goes on."""
        self.counts[kind] += 1
        getattr(self, kind)()

    def _some_seconds(self) -> float:
        return self._rng.uniform(0.5, 6.0)

    # Metaservers

    def kill_the_authority(self) -> None:
        server = self._group.authority()
        server.kill()
        self._group.wait_for_another(server)
        server.start()

    def kill_a_standby(self) -> None:
        server = self._group.standby()
        server.kill()
        server.start()

    def end_the_authority(self) -> None:
        server = self._group.authority()
        server.close()
        server.start()

    def hang_the_authority(self) -> None:
        server = self._group.authority()
        self._group.hang(server)
        self._group.wait_for_another(server)
        server.kill()
        server.start()

    def two_authorities(self) -> None:
        """One hangs until another has taken over, and goes on in the belief that it is the one."""
        server = self._group.authority()
        self._group.hang(server)
        try:
            self._group.wait_for_another(server)
        finally:
            self._group.go_on(server)
        rig.wait_for(lambda: self._group.stands_by(server), "the former authority stands by", _LONG_S)

    def cut_off_the_authority(self) -> None:
        """Its engine does not answer it any more; what it sent meanwhile arrives when another one serves."""
        server = self._group.authority()
        cable = self._cables[self._group.servers.index(server)]
        cable.unplug()
        try:
            self._group.wait_for_another(server)
            self._load.went_on()
        finally:
            cable.plug_in()
        rig.wait_for(lambda: self._group.stands_by(server), "the former authority stands by", _LONG_S)

    # The engine's servers

    def kill_the_engine(self) -> None:
        assert self._engine is not None
        self._engine.kill()
        self._engine.start()

    def hang_the_engine(self) -> None:
        assert self._engine is not None
        self._hang_all(self._engine)

    def _hang_all(self, servers: Server | EtcdCluster | Weed) -> None:
        """Nothing goes on without these."""
        servers.hang()
        try:
            self._load.stands_still(self._some_seconds())
        finally:
            servers.go_on()

    def _member(self, *, leads: bool) -> Server:
        cluster = self._engine
        assert isinstance(cluster, EtcdCluster)
        leader = rig.wait_for(cluster.leader, "the cluster has a leader")
        return leader if leads else self._rng.choice([each for each in cluster.members if each is not leader])

    def kill_the_leader(self) -> None:
        self._without(self._member(leads=True))

    def kill_a_follower(self) -> None:
        self._without(self._member(leads=False))

    def _without(self, member: Server) -> None:
        member.kill()
        try:
            self._load.went_on()
        finally:
            member.start()

    def hang_the_leader(self) -> None:
        member = self._member(leads=True)
        member.hang()
        try:
            self._load.went_on()
        finally:
            member.go_on()

    # The store

    def kill_the_store(self) -> None:
        assert self._store is not None
        self._load.store_goes()
        self._store.kill()
        self._store.start()
        self._load.store_is_back()

    def hang_the_store(self) -> None:
        assert self._store is not None
        self._load.store_goes()
        self._hang_all(self._store)
        self._load.store_is_back()
