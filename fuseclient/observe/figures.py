"""The figures that a channel gives on its control socket, typed, and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fuseclient.control import ControlError

_Key = TypeVar("_Key")

_LEVELS: Final = {
    "kernel": "the kernel's maps (BPF)",
    "memory": "the worker's memory",
    "disk_cache": "the disk cache",
    "metaserver": "the metaserver",
    "store": "the object store",
}
_UNCOUNTED: Final = "uncounted"


class Answers(msgspec.Struct, frozen=True):
    """How many requests of one opcode the kernel's BPF programs answered, and how many the daemon did."""

    kernel: int
    daemon: int

    @property
    def total(self) -> int:
        return self.kernel + self.daemon

    @property
    def kernel_share(self) -> float:
        """The part answered in the kernel, from 0 to 1; 0 if there were no requests."""
        return self.kernel / self.total if self.total else 0.0


class MapFigures(msgspec.Struct, frozen=True):
    """How full a BPF map is."""

    entries: int
    capacity: int
    bytes: int


class WorkerFigures(msgspec.Struct, frozen=True):
    """The process that answers what the kernel does not. ``pid`` is ``None`` while there is none."""

    pid: int | None = None
    rss_bytes: int = 0
    restarts: int = 0


class Stats(msgspec.Struct, frozen=True):
    """All figures of a mount. A channel may send more than is named here."""

    accel: str
    profile: str
    requests: dict[str, Answers]
    worker: WorkerFigures
    epoch: int | None = None
    lease_remaining_s: float | None = None
    maps: dict[str, MapFigures] = {}
    #: By request, how often the BPF programs came to each outcome.
    outcomes: dict[str, dict[str, int]] = {}
    #: Who had what it took to answer how many requests, the nearest first.
    levels: dict[str, int] = {}


def parse_stats(reply: dict[str, Any]) -> Stats:
    """Return a channel's answer to "stats", typed; raise :exc:`ControlError`."""
    try:
        return msgspec.convert(reply, Stats)
    except msgspec.ValidationError as error:
        raise ControlError(f"the mount's figures cannot be understood: {error}") from None


def since(later: Mapping[_Key, Answers], earlier: Mapping[_Key, Answers]) -> dict[_Key, Answers]:
    """Return the requests answered between two readings of one mount, by what they were that had any."""
    none = Answers(0, 0)
    changes = {}
    for key, answers in later.items():
        before = earlier.get(key, none)
        change = Answers(answers.kernel - before.kernel, answers.daemon - before.daemon)
        if change.total > 0:
            changes[key] = change
    return changes


def total(requests: dict[str, Answers]) -> Answers:
    """Return the sum over all opcodes."""
    return Answers(sum(each.kernel for each in requests.values()), sum(each.daemon for each in requests.values()))


def render(stats: Stats, title: str) -> RenderableType:
    """Return all figures for a terminal."""
    parts: list[RenderableType] = [Text(title, style="bold"), _summary(stats)]
    if any(stats.levels.values()):
        parts.append(_levels_table(stats.levels))
    parts.append(requests_table(stats.requests))
    if any(_misses(outcomes) for outcomes in stats.outcomes.values()):
        parts.append(_misses_table(stats.outcomes))
    if stats.maps:
        parts.append(_maps_table(stats.maps))
    return Group(*parts)


def requests_table(requests: dict[str, Answers], title: str | None = None) -> Table:
    """Return a table of requests by opcode and of the share answered in the kernel, the most frequent first."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", show_footer=bool(requests))
    everything = total(requests)
    table.add_column("request", "all")
    for heading, figure in (("in the kernel", everything.kernel), ("by the daemon", everything.daemon)):
        table.add_column(heading, f"{figure:,}", justify="right")
    table.add_column("kernel's share", _percent(everything), justify="right")
    for opcode, answers in sorted(requests.items(), key=lambda item: -item[1].total):
        if answers.total:
            table.add_row(opcode, f"{answers.kernel:,}", f"{answers.daemon:,}", _percent(answers))
    return table


def _misses(outcomes: dict[str, int]) -> dict[str, int]:
    """Return why requests were left to the daemon, and how many; the most frequent reason first."""
    missed = {name.removeprefix("miss_"): count for name, count in outcomes.items() if name.startswith("miss_")}
    return dict(sorted(missed.items(), key=lambda item: -item[1]))


def _misses_table(outcomes: dict[str, dict[str, int]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("left to the daemon")
    table.add_column("why, and how many", overflow="fold")
    for opcode, counts in sorted(outcomes.items(), key=lambda item: -sum(_misses(item[1]).values())):
        if missed := _misses(counts):
            table.add_row(opcode, ", ".join(f"{reason} {count:,}" for reason, count in missed.items()))
    return table


def _levels_table(levels: Mapping[str, int]) -> Table:
    """Return a table of how far requests went; the ratio is of those that came to a level and were answered there."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("answered with what is in")
    for heading in ("requests", "share", "hit ratio"):
        table.add_column(heading, justify="right")
    everything = sum(levels.values())
    left = everything - levels.get(_UNCOUNTED, 0)
    for level, count in levels.items():
        if level == _UNCOUNTED:
            continue
        ratio = f"{count / left:.1%}" if left else "-"
        table.add_row(_LEVELS.get(level, level), f"{count:,}", f"{count / everything:.1%}", ratio)
        left -= count
    if uncounted := levels.get(_UNCOUNTED):
        table.add_row(
            "(no answer, in hand, an earlier worker's)", f"{uncounted:,}", f"{uncounted / everything:.1%}", "-"
        )
    return table


def _summary(stats: Stats) -> Table:
    grid = Table.grid(padding=(0, 2))
    lease = "none" if stats.lease_remaining_s is None else f"{stats.lease_remaining_s:.1f} s left"
    answered = "BPF programs in the kernel" if stats.accel == "bpf" else "the daemon alone (not accelerated)"
    grid.add_row("answered by", answered)
    grid.add_row("profile", stats.profile)
    grid.add_row("lease", lease if stats.epoch is None else f"{lease}, epoch {stats.epoch}")
    grid.add_row("worker", _worker_text(stats.worker))
    return grid


def _worker_text(worker: WorkerFigures) -> str:
    who = "none at this moment" if worker.pid is None else f"pid {worker.pid}, {_mebibytes(worker.rss_bytes)}"
    return f"{who}, restarted {worker.restarts} times"


def _maps_table(maps: dict[str, MapFigures]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("kernel map")
    for heading in ("entries", "capacity", "full", "memory"):
        table.add_column(heading, justify="right")
    for name, figures in maps.items():
        full = f"{figures.entries / figures.capacity:.1%}" if figures.capacity else "-"
        table.add_row(name, f"{figures.entries:,}", f"{figures.capacity:,}", full, _mebibytes(figures.bytes))
    return table


def _percent(answers: Answers) -> str:
    return f"{answers.kernel_share:.1%}" if answers.total else "-"


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"
