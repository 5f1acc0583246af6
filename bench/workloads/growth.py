"""How costs grow: with the files of a volume, with the entries of a directory, with the processes that ask.

Up to 100,000 files, or ``--files``. Only ext4, bpfuse and JuiceFS on Redis, in one round, if nothing else is said, for
making them takes most systems minutes; so this is measured only when it is named.
"""

from __future__ import annotations

import time
from typing import Final

from bench.peers.base import Peer, fresh
from bench.workloads.base import Turn, Workload
from fuseclient.bench.timing import share, timed
from fuseclient.bench.works import paths, shuffled

_SAMPLE: Final = 500
#: A directory grows to a tenth of the volume.
_MOST_ENTRIES: Final = 100_000
_PROCESSES: Final = (1, 2, 4, 8)
#: By how many the files are made that are not measured.
_FILLING: Final = 4
_SHARED_FILES: Final = 2000
_PER_DIRECTORY: Final = 1000


class Growth(Workload):
    """Workload 8. A row's name ends with ``| what=number``, which makes the plot a curve."""

    name = "growth"
    turn_limit_s = 4 * 3600.0
    usual_systems = ("ext4", "bpfuse", "juicefs")
    usual_rounds = 1
    about = "how the cost of an operation grows with files in the volume, entries in a directory, and processes"

    def suits(self, kind: type[Peer]) -> bool:
        return not kind.read_only

    def turn(self, turn: Turn) -> None:
        with fresh(turn.kind, self.directory) as peer:
            self._files(turn, peer)
            self._entries(turn, peer)
            self._processes(turn, peer)

    def _files(self, turn: Turn, peer: Peer) -> None:
        most = max(1000, self.scale.most_files)
        tree = [f"{peer.root}/volume/d{number // _PER_DIRECTORY}/f{number}" for number in range(most)]
        made = 0
        for count in _steps(1000, most):
            filling = share(tree[made : count - _SAMPLE], _FILLING)
            timed("create_files", [{"paths": part, "size": 64} for part in filling])
            last = [{"paths": tree[count - _SAMPLE : count], "size": 64}]
            turn.time(f"create | files={count}", timed("create_files", last)[0], _SAMPLE)
            made = count
            turn.time(f"mount | files={count}", peer.restart())
            some = shuffled(tree[:made])[:_SAMPLE]
            turn.time(f"cold read | files={count}", timed("read_files", [{"paths": some, "size": 64}])[0], _SAMPLE)

    def _entries(self, turn: Turn, peer: Peer) -> None:
        top = peer.root / "entries"
        for count in _steps(1, min(_MOST_ENTRIES, self.scale.most_files // 10)):
            directory = top / f"{count}"
            directory.mkdir(parents=True)
            names = [f"{directory}/f{number}" for number in range(count)]
            turn.time(f"create | entries={count}", timed("make_nodes", [{"paths": names}])[0] / count, 1)
            peer.restart()
            listed = timed("list_long", [{"directory": str(directory), "files": count}])[0]
            turn.time(f"ls -l, cold, all | entries={count}", listed)
            peer.restart()
            start = time.monotonic()
            (directory / f"f{count // 2}").stat()
            turn.time(f"stat of one, cold | entries={count}", time.monotonic() - start)

    def _processes(self, turn: Turn, peer: Peer) -> None:
        tree = paths(peer.root / "processes", min(_SHARED_FILES, self.scale.most_files), 20)
        timed("create_files", [{"paths": tree, "size": 4096}])
        for processes in _PROCESSES:
            peer.restart()
            shares = [{"paths": part, "size": 4096} for part in share(shuffled(tree), processes)]
            cold, warm = timed("read_files", shares, passes=2)
            turn.time(f"cold read, of each | processes={processes}", cold, len(tree))
            turn.time(f"warm read, of each | processes={processes}", warm, len(tree))


def _steps(first: int, last: int) -> list[int]:
    """Return the powers of ten between these, and the last."""
    steps = []
    while first < last:
        steps.append(first)
        first *= 10
    return [*steps, last]
