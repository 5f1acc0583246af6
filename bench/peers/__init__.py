"""The file systems that are compared, each set up as its own documentation recommends.

To add one: a subclass of :class:`~bench.peers.base.Peer` in a module of its own, and its name in :data:`ALL`.
"""

from __future__ import annotations

import sys
from typing import Final

from bench.peers.base import Peer
from bench.peers.juicefs import JuicefsRedis, JuicefsSqlite
from bench.peers.local import Ext4, Passthrough
from bench.peers.own import Bpfuse, BpfuseDataset, BpfuseInterval, BpfuseOff
from bench.peers.seaweedfs import Seaweedfs

ALL: Final[tuple[type[Peer], ...]] = (
    Ext4,
    Bpfuse,
    BpfuseDataset,
    BpfuseInterval,
    BpfuseOff,
    Passthrough,
    JuicefsRedis,
    JuicefsSqlite,
    Seaweedfs,
)


def choose(names: list[str] | None) -> list[type[Peer]]:
    """Return those with these names, or all, without those that cannot be had here, which are named aloud.

    Raises :exc:`ValueError` for a name that there is not.
    """
    known = {each.name: each for each in ALL}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"{', '.join(unknown)}; there are {', '.join(known)}")
    found = []
    for peer in [known[name] for name in names] if names else ALL:
        missing = peer.missing()
        if missing is None:
            found.append(peer)
        else:
            print(f"left out: {peer.name}, for want of {missing}", file=sys.stderr)
    return found
