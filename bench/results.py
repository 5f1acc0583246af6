"""Figures and samples: what every part of the measurements gives, how it is shown, and where it is written."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from rich.table import Table

from bench.report.reasons import reason

DIRECTORY: Final = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """One figure against its limit: at most that, or with ``at_least`` at least; None: it has none.

    ``unit`` is "x" for a ratio of times, "x speed" for one of speeds.
    """

    workload: str
    system: str
    base: str
    value: float
    unit: str
    limit: float | None = None
    at_least: bool = False

    @property
    def holds(self) -> bool:
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass
class Samples:
    """What was measured: seconds by (workload, system), one of each round, and for how many things."""

    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, workload: str, system: str, seconds: float, count: int = 1) -> None:
        self.seconds.setdefault((workload, system), []).append(seconds)
        self.counts[workload] = count

    def median(self, workload: str, system: str) -> float | None:
        """Return the median of the seconds; None: it was not measured."""
        found = self.seconds.get((workload, system))
        return statistics.median(found) if found else None

    def ratio(self, workload: str, system: str, base: str, limit: float | None, *, speed: bool = False) -> list[Figure]:
        """Return how two medians compare; nothing if one was not measured."""
        own, other = self.median(workload, system), self.median(workload, base)
        if own is None or other is None:
            return []
        value = other / own if speed else own / other
        return [Figure(workload, system, base, value, "x speed" if speed else "x", limit, at_least=speed)]


@dataclass
class Result:
    """What a part has found. ``size`` says how large it was made."""

    part: str
    rounds: int
    size: dict[str, int]
    samples: Samples
    figures: list[Figure]

    @property
    def holds(self) -> bool:
        return all(each.holds for each in self.figures)

    def why(self, figure: Figure) -> str | None:
        """Return why a figure misses its limit, as far as that is known."""
        return None if figure.holds else reason(self.part, figure.workload, figure.base)

    def tables(self) -> Iterable[Table | str]:
        """Yield what is to be printed."""
        if self.samples.seconds:
            yield self._samples_table()
        table = Table(title=f"{self.part}: figures", title_justify="left")
        for heading in ("workload", "system", "to", "figure", "limit", ""):
            table.add_column(heading)
        for each in self.figures:
            verdict = "" if each.limit is None else "holds" if each.holds else "missed"
            bound = "" if each.limit is None else f"{'>=' if each.at_least else '<='} {each.limit:.2f}"
            table.add_row(each.workload, each.system, each.base, f"{each.value:.2f} {each.unit}", bound, verdict)
        yield table
        yield from dict.fromkeys(why for each in self.figures if (why := self.why(each)) is not None)

    def _samples_table(self) -> Table:
        table = Table(title=f"{self.part}: microseconds each", title_justify="left")
        for heading in ("workload", "system", "minimum", "median", "maximum"):
            table.add_column(heading, justify="left" if heading in ("workload", "system") else "right")
        for (workload, system), seconds in sorted(self.samples.seconds.items()):
            each = [value / self.samples.counts[workload] * 1e6 for value in seconds]
            table.add_row(workload, system, *(f"{v:.1f}" for v in (min(each), statistics.median(each), max(each))))
        return table

    def write(self, directory: Path) -> None:
        """Write all of it as JSON."""
        samples = [
            {"workload": workload, "system": system, "count": self.samples.counts[workload], "seconds": seconds}
            for (workload, system), seconds in sorted(self.samples.seconds.items())
        ]
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()},
            "rounds": self.rounds,
            "size": self.size,
            "samples": samples,
            "figures": [{**asdict(each), "holds": each.holds, "reason": self.why(each)} for each in self.figures],
        }
        directory.mkdir(exist_ok=True)
        (directory / f"{self.part}.json").write_text(json.dumps(result, indent=2) + "\n")
