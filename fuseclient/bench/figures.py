"""Figures: what was measured of several systems in alternating rounds, and what is told of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

#: Units in which more is better; in all others less is.
_MORE_IS_BETTER: Final = frozenset({"MiB/s", "samples/s", "IOPS", "reads/s"})


@dataclass(frozen=True)
class Summary:
    """What the rounds of one row gave for one system."""

    median: float
    low: float
    high: float
    rounds: int


@dataclass
class Row:
    """One thing that was measured: its unit, and each system's value of each round."""

    name: str
    unit: str
    values: dict[str, list[float]] = field(default_factory=dict)

    @property
    def more_is_better(self) -> bool:
        return self.unit in _MORE_IS_BETTER

    def summary(self, system: str) -> Summary | None:
        """Return the median and the spread; None: it was not measured."""
        found = self.values.get(system)
        return Summary(statistics.median(found), min(found), max(found), len(found)) if found else None

    def speed(self, system: str, base: str) -> float | None:
        """Return how many times as fast as ``base`` a system is, by medians; None if that cannot be said."""
        own, other = self.summary(system), self.summary(base)
        if own is None or other is None or min(own.median, other.median) <= 0:
            return None
        return own.median / other.median if self.more_is_better else other.median / own.median


class Figures:
    """Rows by name, in the order in which they were first measured."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows: dict[str, Row] = {row.name: row for row in rows}

    def add(self, name: str, system: str, value: float, unit: str) -> None:
        """Take a value of one round. Raises :exc:`ValueError` for one that is no number, or another unit."""
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} of {system}: {value}")
        row = self.rows.setdefault(name, Row(name, unit))
        if row.unit != unit:
            raise ValueError(f"{name} is in {row.unit}, not in {unit}")
        row.values.setdefault(system, []).append(value)

    def add_time(self, name: str, system: str, seconds: float, count: int = 1) -> None:
        """Take the time of ``count`` operations: microseconds each, or milliseconds if it is one."""
        scale, unit = (1e6, "us") if count > 1 else (1e3, "ms")
        self.add(name, system, seconds / count * scale, unit)

    def systems(self) -> list[str]:
        """Return the systems that have a value, in the order in which they came."""
        return list(dict.fromkeys(system for row in self.rows.values() for system in row.values))

    def to_json(self) -> list[dict[str, Any]]:
        """Return what :meth:`from_json` takes."""
        return [{"name": row.name, "unit": row.unit, "values": row.values} for row in self.rows.values()]

    @classmethod
    def from_json(cls, rows: Iterable[dict[str, Any]]) -> Figures:
        """Return the figures that :meth:`to_json` gave."""
        return cls(Row(row["name"], row["unit"], row["values"]) for row in rows)


def show(value: float) -> str:
    """Return a value with three digits that mean something."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 3)}f}"
