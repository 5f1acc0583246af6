"""What a system costs beside time: CPU and context switches of its daemons, memory, the time of a mount, and idling.

CPU time and context switches are those of the processes that the system consists of, not of the program that asks.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.peers.base import Peer, fresh
from bench.peers.local import Ext4
from bench.workloads.base import Turn, Workload
from fuseclient.bench.timing import share, timed
from fuseclient.bench.works import paths, shuffled

_IDLE_S: Final = 2.0
_ENTRIES: Final = 100_000
#: Files whose attributes are asked for to see what memory they take; once a system, as making them takes long.
_WEIGHED: Final = 10_000
_MAKERS: Final = 4
_OTHERS: Final = 200


@dataclass(frozen=True)
class Spent:
    """What the processes of a system have used since they began."""

    cpu_s: float
    switches: int

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.cpu_s - other.cpu_s, self.switches - other.switches)


class Resources(Workload):
    """Workload 7."""

    name = "resources"
    weight = 4
    about = (
        "CPU time and context switches of the daemons for 1,000 operations; memory for 100,000 entries whose "
        f"attributes are cached, reckoned from {_WEIGHED:,} in the first round; the time of a mount; CPU time "
        "of the daemons while nobody asks"
    )

    def suits(self, kind: type[Peer]) -> bool:
        return kind is not Ext4 and not (kind.changes_only or kind.metadata_only)

    def prepare(self) -> None:
        self._weighed = set[str]()

    def turn(self, turn: Turn) -> None:
        files = self.scale.files
        with fresh(turn.kind, self.directory) as peer:
            tree = paths(peer.root / "tree", files, max(1, files // 100))
            self._spent(turn, peer, "create", files, lambda: timed("create_files", [{"paths": tree, "size": 4096}]))
            turn.time("mount", peer.restart())
            read = [{"paths": shuffled(tree), "size": 4096}]
            self._spent(turn, peer, "cold read", files, lambda: timed("read_files", read))
            self._spent(turn, peer, "warm read", files, lambda: timed("read_files", read))
            before = spent(peer)
            time.sleep(_IDLE_S)
            turn.value("idle CPU, a second", (spent(peer) - before).cpu_s / _IDLE_S * 1e3, "ms")
        if turn.kind.name not in self._weighed:
            self._weighed.add(turn.kind.name)
            self._memory(turn)

    def _spent(self, turn: Turn, peer: Peer, name: str, count: int, work: Callable[[], object]) -> None:
        before = spent(peer)
        work()
        used = spent(peer) - before
        if turn.written or name != "create":
            turn.value(f"{name}, CPU of daemons for 1,000", used.cpu_s / count * 1e6, "ms")
            turn.value(f"{name}, context switches of daemons for 1,000", used.switches / count * 1e3, "switches")

    def _memory(self, turn: Turn) -> None:
        """What a stat of every file adds, when others were looked at before; so what is taken once is left out.

        The others are far away in the volume, as a system may fetch what is near ahead.
        """
        files = self.scale.files if self.scale.quick else _WEIGHED
        with fresh(turn.kind, self.directory) as peer:
            others, tree = (
                paths(peer.root / "others", _OTHERS, 2),
                paths(peer.root / "tree", files, max(2, files // 100)),
            )
            for directory in {os.path.dirname(path) for path in (*others, *tree)}:
                os.makedirs(directory)
            timed("make_nodes", [{"paths": part} for part in share([*others, *tree], _MAKERS)])
            turn.time("mount", peer.restart())
            timed("stat_files", [{"paths": others, "size": 0}])
            daemons, slabs, maps = _resident(peer), _slabs(), _bpf_maps(peer)
            timed("stat_files", [{"paths": tree, "size": 0}])
            after, scale = _resident(peer), _ENTRIES / len(tree) / (1 << 20)
            turn.value("memory of daemons, 100,000 entries", max(0, after - daemons) * scale, "MiB")
            turn.value("memory of daemons in all", after / (1 << 20), "MiB")
            turn.value("kernel slabs, 100,000 entries", max(0, _slabs() - slabs) * scale, "MiB")
            turn.value("BPF maps in all", max(maps, _bpf_maps(peer)) / (1 << 20), "MiB")


def spent(peer: Peer) -> Spent:
    """Return what the processes of a system have used, of all their threads that live."""
    nanoseconds = switches = 0
    for pid in peer.processes().values():
        for task in Path(f"/proc/{pid}/task").iterdir():
            nanoseconds += int((task / "schedstat").read_text().split()[0])
            switches += sum(map(int, re.findall(r"ctxt_switches:\s+(\d+)", (task / "status").read_text())))
    return Spent(nanoseconds / 1e9, switches)


def _resident(peer: Peer) -> int:
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in peer.processes().values())


def _slabs() -> int:
    """Return the bytes of the kernel's slabs, of the whole machine."""
    (kilobytes,) = re.findall(r"^Slab:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(kilobytes) << 10


def _bpf_maps(peer: Peer) -> int:
    """Return the bytes of the BPF maps that the processes of a system hold, each once."""
    maps: dict[str, int] = {}
    for pid in peer.processes().values():
        for each in Path(f"/proc/{pid}/fdinfo").iterdir():
            try:
                text = each.read_text()
            except OSError:  # it has been closed meanwhile
                continue
            if found := re.search(r"^memlock:\s+(\d+)\nmap_id:\s+(\d+)$", text, re.MULTILINE):
                maps[found[2]] = int(found[1])
    return sum(maps.values())
