"""``python -m bench.check``: has bpfuse become slower, measured by itself without acceleration and by ext4?

``bench/baseline.json`` holds, for rows of the comparison, how many times as fast as a base bpfuse was, and how far that
may fall. It has no times: those are a machine's. ``--update`` writes it anew from what is measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from bench import peers, workloads
from bench.comparison import NAME, Comparison, compare
from bench.results import DIRECTORY
from bench.workloads.base import Scale
from fuseclient.bench.figures import Row

BASELINE: Final = Path(__file__).parent / "baseline.json"
OWN: Final = "bpfuse"
BASES: Final = ("ext4", "bpfuse off")
_WORKLOADS: Final = ["small", "metadata", "trees"]
_SCALE: Final = Scale(files=300, images=20, file_bytes=16 << 20, quick=True)
_ROUNDS: Final = 3
#: A ratio may fall by this part of itself, or by as much as its rounds were apart when the baseline was taken.
_LEAST_TOLERANCE: Final = 0.4
_MOST_TOLERANCE: Final = 0.8


@dataclass(frozen=True)
class Fall:
    """A ratio that is worse than it may be."""

    row: str
    base: str
    speed: float
    least: float

    def __str__(self) -> str:
        return f"{self.row}: {self.speed:.3g} times as fast as {self.base}, at least {self.least:.3g} was to be"


def falls(comparison: Comparison, baseline: dict[str, dict[str, dict[str, float]]]) -> Iterator[Fall]:
    """Yield what became worse. Raises :exc:`KeyError` for a row that was not measured."""
    rows = _rows(comparison)
    for name, bases in baseline.items():
        for base, expected in bases.items():
            speed = rows[name].speed(OWN, base)
            if speed is None:
                raise KeyError(f"{name}, {base}")
            least = expected["speed"] * (1 - expected["tolerance"])
            if speed < least:
                yield Fall(name, base, speed, least)


def baseline_of(comparison: Comparison) -> dict[str, dict[str, dict[str, float]]]:
    """Return a baseline that these figures hold."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, row in _rows(comparison).items():
        for base in BASES:
            speed = row.speed(OWN, base)
            if speed is not None:
                tolerance = round(min(_MOST_TOLERANCE, max(_LEAST_TOLERANCE, _apart(row, base))), 2)
                found.setdefault(name, {})[base] = {"speed": float(f"{speed:.3g}"), "tolerance": tolerance}
    return found


def _rows(comparison: Comparison) -> dict[str, Row]:
    return {f"{each.name}: {row.name}": row for each in comparison.workloads for row in each.figures.rows.values()}


def _apart(row: Row, base: str) -> float:
    """Return how far the rounds' own ratios were from the best of them, as a part of it."""
    pairs = zip(row.values[OWN], row.values[base], strict=False)
    ratios = [own / other if row.more_is_better else other / own for own, other in pairs]
    return 1 - min(ratios) / max(ratios)


def main(
    update: Annotated[bool, typer.Option("--update", help="Write the baseline anew.")] = False,
    rounds: Annotated[int, typer.Option(min=1)] = _ROUNDS,
    measured: Annotated[Path | None, typer.Option(help="Measure nothing: judge this comparison.json.")] = None,
) -> None:
    """Fail if a ratio to ext4 or to bpfuse without acceleration got worse than the baseline allows."""
    if measured is None:
        kinds = peers.choose([BASES[0], OWN, BASES[1]])
        compare(workloads.choose(_WORKLOADS), kinds, rounds, _SCALE, DIRECTORY / "check")
        measured = DIRECTORY / "check" / NAME
    comparison = Comparison.read(measured)
    if update:
        BASELINE.write_text(json.dumps(baseline_of(comparison), indent=1) + "\n")
        return
    if not BASELINE.exists():
        raise SystemExit("bench-check: there is no bench/baseline.json; --update takes what is now as the baseline")
    baseline: dict[str, Any] = json.loads(BASELINE.read_text())
    try:
        found = list(falls(comparison, baseline))
    except KeyError as error:
        raise SystemExit(f"bench-check: not measured: {error.args[0]}") from None
    for fall in found:
        print(fall, file=sys.stderr)
    print(f"{len(found)} of {sum(map(len, baseline.values()))} ratios are worse than the baseline allows")
    raise typer.Exit(1 if found else 0)


if __name__ == "__main__":
    typer.run(main)
