"""Metadata as mdtest does it: empty files and directories made, looked at and removed.

In one directory and in many, by one process and by four, each with names of its own.
"""

from __future__ import annotations

import os
from typing import Final

from bench.peers.base import Peer, fresh
from bench.workloads.base import Turn, Workload
from fuseclient.bench.timing import share, timed
from fuseclient.bench.works import paths

_DIRECTORIES: Final = 20
_PROCESSES: Final = 4
#: How often each file is looked at: once takes so short that who is woken when decides on the time.
_STATS: Final = 10


class Metadata(Workload):
    """Workload 5."""

    name = "metadata"
    weight = 2
    about = (
        f"empty files and directories, microseconds each, every file looked at {_STATS} times; nothing is cold, "
        "nothing is synced but what a close syncs"
    )

    def suits(self, kind: type[Peer]) -> bool:
        return not kind.read_only

    def turn(self, turn: Turn) -> None:
        count = self.scale.files // 2
        with fresh(turn.kind, self.directory) as peer:
            for where, directories in (("one directory", 1), ("many directories", _DIRECTORIES)):
                for processes in (1, _PROCESSES):
                    tree = paths(peer.root / f"{directories}-{processes}", count, directories)
                    for directory in {os.path.dirname(path) for path in tree}:
                        os.makedirs(directory)
                    _files(turn, where, tree, processes)
            top = peer.root / "directories"
            top.mkdir()
            names = [f"{top}/d{number}" for number in range(count)]
            turn.time("mkdir", timed("make_directories", [{"paths": names}])[0], count)
            turn.time("rmdir", timed("remove_directories", [{"paths": names}])[0], count)


def _files(turn: Turn, where: str, tree: list[str], processes: int) -> None:
    by = where if processes == 1 else f"{where}, {processes} processes"
    parts = share(tree, processes)
    turn.time(f"create in {by}", timed("make_nodes", [{"paths": part} for part in parts])[0], len(tree))
    looks = [{"paths": part * _STATS, "size": 0} for part in parts]
    turn.time(f"stat in {by}", timed("stat_files", looks)[0], len(tree) * _STATS)
    turn.time(f"remove in {by}", timed("remove_files", [{"paths": part} for part in parts])[0], len(tree))
