"""Small files: made, read cold and warm, in order and shuffled, looked at, listed, found and deleted.

Files of 4 KiB go through all of it, by one process and by four; those of 16 and 64 KiB through the essence by one.
The quick run leaves out 16 KiB and cold reads by four.
"""

from __future__ import annotations

import time
from typing import Final

from bench.peers.base import Peer, fresh
from bench.workloads.base import Turn, Workload
from fuseclient.bench.timing import share, timed
from fuseclient.bench.works import paths, shuffled

_PER_DIRECTORY: Final = 100
_PROCESSES: Final = 4
_TTL_S: Final = 1.0


class SmallFiles(Workload):
    """Workload 1."""

    name = "small"
    weight = 5
    about = "small files, microseconds each; cold: all daemons new and the page cache dropped"

    def turn(self, turn: Turn) -> None:
        self._all_of_4k(turn)
        for kib in (64,) if self.scale.quick else (16, 64):
            self._essence(turn, self.scale.files // 2, kib << 10)

    def _essence(self, turn: Turn, files: int, size: int) -> None:
        kib = size >> 10
        with fresh(turn.kind, self.directory) as peer:
            tree = _tree(peer, "one", files)
            turn.time_of_writing(f"create {kib} KiB", _create(tree, size, 1), files)
            if turn.kind.changes_only:
                return
            peer.restart()
            cold, warm = _read(shuffled(tree), size, 1)
            turn.time(f"read {kib} KiB shuffled, cold", cold, files)
            turn.time(f"read {kib} KiB shuffled, warm", warm, files)

    def _all_of_4k(self, turn: Turn) -> None:
        files, size = self.scale.files, 4096
        with fresh(turn.kind, self.directory) as peer:
            tree, other = _tree(peer, "one", files), _tree(peer, "four", files)
            turn.time_of_writing("create 4 KiB", _create(tree, size, 1), files)
            turn.time_of_writing("create 4 KiB, 4 processes", _create(other, size, _PROCESSES), files)
            if not turn.kind.changes_only:
                self._read_4k(turn, peer, tree)
            if turn.written:
                for name, each, processes in (("delete", tree, 1), ("delete, 4 processes", other, _PROCESSES)):
                    shares = [{"paths": part} for part in share(each, processes)]
                    turn.time(name, timed("remove_files", shares)[0], files)

    def _read_4k(self, turn: Turn, peer: Peer, tree: list[str]) -> None:
        files, size = len(tree), 4096
        for order, ordered in (("in order", tree), ("shuffled", shuffled(tree))):
            for processes in (1,) if self.scale.quick else (1, _PROCESSES):
                peer.restart()
                by = "" if processes == 1 else f", {processes} processes"
                cold, warm = _read(ordered, size, processes)
                turn.time(f"read 4 KiB {order}, cold{by}", cold, files)
                turn.time(f"read 4 KiB {order}, warm{by}", warm, files)
        peer.restart(ttl_s=_TTL_S)
        _stat(turn, tree, size)
        _list(turn, peer, files)


def _stat(turn: Turn, tree: list[str], size: int) -> None:
    stat = {"paths": shuffled(tree), "size": size}
    cold, warm = timed("stat_files", [stat], passes=2)
    time.sleep(_TTL_S * 1.2)
    (expired,) = timed("stat_files", [stat])
    for name, seconds in (("stat, cold", cold), ("stat, warm", warm), ("stat, after 1 s TTL", expired)):
        turn.time(name, seconds, len(tree))


def _list(turn: Turn, peer: Peer, files: int) -> None:
    for what, work in (("ls -lR", "list_long"), ("find", "find_files")):
        peer.restart()
        cold, warm = timed(work, [{"directory": f"{peer.root}/one", "files": files}], passes=2)
        turn.time(f"{what}, cold", cold, files)
        turn.time(f"{what}, warm", warm, files)


def _tree(peer: Peer, name: str, files: int) -> list[str]:
    return paths(peer.root / name, files, max(_PROCESSES, files // _PER_DIRECTORY))


def _create(tree: list[str], size: int, processes: int) -> float:
    (seconds,) = timed("create_files", [{"paths": part, "size": size} for part in share(tree, processes)])
    return seconds


def _read(tree: list[str], size: int, processes: int) -> tuple[float, float]:
    shares = [{"paths": part, "size": size} for part in share(tree, processes)]
    cold, warm = timed("read_files", shares, passes=2)
    return cold, warm
