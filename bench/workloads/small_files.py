"""Small files: made, read cold and warm, in order and shuffled, looked at, listed, found and deleted.

All sizes are made and read by one process and by four; files of 4 KiB go through the rest as well. The quick run
leaves out 16 KiB and reads by four.
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
#: The size of those that are looked at, listed, found and deleted, too.
_WHOLE_KIB: Final = 4


class SmallFiles(Workload):
    """Workload 1."""

    name = "small"
    weight = 5
    about = "small files, microseconds each; cold: all daemons new and the page cache dropped"

    def turn(self, turn: Turn) -> None:
        for kib in (4, 64) if self.scale.quick else (4, 16, 64):
            self._size(turn, kib << 10, self.scale.files if kib == _WHOLE_KIB else self.scale.files // 2)

    def _size(self, turn: Turn, size: int, files: int) -> None:
        whole, create = size >> 10 == _WHOLE_KIB, f"create {size >> 10} KiB"
        with fresh(turn.kind, self.directory) as peer:
            tree, other = _tree(peer, "one", files), _tree(peer, "four", files)
            turn.time_of_writing(create, _create(tree, size, 1), files)
            turn.time_of_writing(f"{create}, {_PROCESSES} processes", _create(other, size, _PROCESSES), files)
            if not turn.kind.changes_only:
                self._read(turn, peer, tree, size)
                if whole:
                    peer.restart(ttl_s=_TTL_S)
                    _stat(turn, tree, size)
                    _list(turn, peer, files)
            if whole and turn.written:
                for name, each, processes in (("delete", tree, 1), ("delete, 4 processes", other, _PROCESSES)):
                    shares = [{"paths": part} for part in share(each, processes)]
                    turn.time(name, timed("remove_files", shares)[0], files)

    def _read(self, turn: Turn, peer: Peer, tree: list[str], size: int) -> None:
        for order, ordered in (("in order", tree), ("shuffled", shuffled(tree))):
            for processes in (1,) if self.scale.quick else (1, _PROCESSES):
                peer.restart()
                row, by = f"read {size >> 10} KiB {order}", "" if processes == 1 else f", {processes} processes"
                shares = [{"paths": part, "size": size} for part in share(ordered, processes)]
                cold, warm = timed("read_files", shares, passes=2)
                turn.time(f"{row}, cold{by}", cold, len(tree))
                turn.time(f"{row}, warm{by}", warm, len(tree))


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
