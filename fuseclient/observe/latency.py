"""How long a mount's requests take, by opcode and by who answered: histograms of powers of two, and what follows.

A time is from the making of a request in the kernel to its end, so all that an application waits for but its own
wake-up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_BAR: Final = 40
_QUANTILES: Final = (0.5, 0.9, 0.99)


class Kind(NamedTuple):
    """Requests of one opcode (a name), answered in the kernel or by the worker."""

    opcode: str
    in_kernel: bool

    @property
    def who(self) -> str:
        return "kernel" if self.in_kernel else "worker"


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """The times of one kind. ``histogram``: of each power of two, in nanoseconds, the requests from it to the next."""

    opcode: str
    answered_by: str
    count: int
    mean_us: float
    longest_us: float
    p50_us: float
    p90_us: float
    p99_us: float
    histogram: dict[int, int]


def quantile_ns(histogram: Mapping[int, int], fraction: float) -> float:
    """Return the time that a fraction of the requests (0 to 1) took at most, as if each bucket were filled evenly."""
    total = sum(histogram.values())
    wanted, seen = fraction * total, 0
    for power in sorted(histogram):
        count = histogram[power]
        if seen + count >= wanted:
            return (1 << power) * (1 + (wanted - seen) / count)
        seen += count
    return 0.0


def latencies(buckets: Iterable[tuple[Kind, int, int]], sums: Mapping[Kind, tuple[int, int, int]]) -> list[Latency]:
    """Return what was measured, the kinds that took the most time first.

    ``buckets``: (kind, power of two, count); ``sums``: requests, nanoseconds of all, nanoseconds of the longest.
    """
    histograms: defaultdict[Kind, dict[int, int]] = defaultdict(dict)
    for kind, power, count in buckets:
        histograms[kind][power] = count
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])
    return [_latency(kind, sum_, dict(sorted(histograms[kind].items()))) for kind, sum_ in ordered if histograms[kind]]


def _latency(kind: Kind, sums: tuple[int, int, int], histogram: dict[int, int]) -> Latency:
    count, total_ns, longest_ns = sums
    p50, p90, p99 = (min(quantile_ns(histogram, each), longest_ns) / 1000 for each in _QUANTILES)
    return Latency(
        opcode=kind.opcode,
        answered_by=kind.who,
        count=count,
        mean_us=total_ns / count / 1000,
        longest_us=longest_ns / 1000,
        p50_us=p50,
        p90_us=p90,
        p99_us=p99,
        histogram=histogram,
    )


def render(measured: list[Latency], title: str) -> RenderableType:
    """Return a table of all kinds and a histogram of each, for a terminal."""
    if not measured:
        return Text(f"{title}: no requests", style="bold")
    return Group(Text(title, style="bold"), _table(measured), *(_histogram(each) for each in measured))


def _table(measured: list[Latency]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("request")
    table.add_column("answered by")
    for heading in ("requests", "mean", "50 %", "90 %", "99 %", "longest"):
        table.add_column(heading, justify="right")
    for each in measured:
        times = (each.mean_us, each.p50_us, each.p90_us, each.p99_us, each.longest_us)
        table.add_row(each.opcode, each.answered_by, f"{each.count:,}", *map(_time, times))
    return table


def _histogram(latency: Latency) -> Table:
    table = Table(title=f"{latency.opcode} answered by the {latency.answered_by}", box=None, title_justify="left")
    table.add_column("from", justify="right")
    table.add_column("requests", justify="right")
    table.add_column("")
    most = max(latency.histogram.values())
    for power in range(min(latency.histogram), max(latency.histogram) + 1):
        count = latency.histogram.get(power, 0)
        table.add_row(_time((1 << power) / 1000), f"{count:,}", "█" * round(_BAR * count / most))
    return table


def _time(us: float) -> str:
    return f"{us:,.1f} us" if us < 1000 else f"{us / 1000:,.1f} ms"


def as_json(measured: list[Latency], seconds: float) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    return {"seconds": seconds, "latencies": [msgspec.to_builtins(each, str_keys=True) for each in measured]}
