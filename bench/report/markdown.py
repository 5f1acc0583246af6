"""A comparison as Markdown: every row with its spread, or a choice of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from bench.comparison import Comparison, Measured
from fuseclient.bench.figures import Row, show

#: What is set against others, and what it is set against.
OWN: Final = "bpfuse"
BASES: Final = ("ext4", "juicefs")


def whole(comparison: Comparison) -> str:
    """Return all of it."""
    return "\n\n".join([about(comparison), *(_section(each, comparison) for each in comparison.workloads)]) + "\n"


def about(comparison: Comparison) -> str:
    """Return where, when and of what it was measured."""
    machine = ", ".join(f"{value}" for key, value in comparison.machine.items() if key not in ("python", "commit"))
    lines = [
        f"Measured {comparison.date} at commit {comparison.machine['commit']} on {machine}; {comparison.rounds} rounds,"
        " in each of which every system has its turn. Medians, with the least and the most in brackets. "
        '"To ext4" and "to JuiceFS" say how many times as fast bpfuse is, so that less than 1 is a loss.',
        "",
        "| system | version | on the disk after a close |",
        "|---|---|---|",
        *(f"| {name} | {each['version']} | {each['durability']} |" for name, each in comparison.systems.items()),
    ]
    if comparison.left_out:
        lines += ["", f"Left out: {'; '.join(comparison.left_out)}."]
    return "\n".join(lines)


def _section(measured: Measured, comparison: Comparison) -> str:
    lines = [f"### {measured.name}", "", f"{measured.about}.", "", *table(measured.figures.rows.values(), comparison)]
    lines += [f"\n{name} did not come through: {reason}" for name, reason in measured.failed.items()]
    return "\n".join(lines)


def table(rows: Iterable[Row], comparison: Comparison, *, spread: bool = True) -> list[str]:
    """Return the lines of a table of these rows, with a column for each system that has a value in one."""
    chosen = list(rows)
    systems = [name for name in comparison.systems if any(name in row.values for row in chosen)]
    bases = [name for name in BASES if name in systems]
    heads = ["", *systems, *(f"to {'JuiceFS' if base == 'juicefs' else base}" for base in bases)]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for row in chosen:
        cells = [_value(row, system, spread=spread) for system in systems] + [_ratio(row, base) for base in bases]
        lines.append(f"| {row.name}, {row.unit} | {' | '.join(cells)} |")
    return lines


def _value(row: Row, system: str, *, spread: bool) -> str:
    found = row.summary(system)
    if found is None:
        return ""
    text = show(found.median)
    return f"{text} ({show(found.low)}-{show(found.high)})" if spread and found.rounds > 1 else text


def _ratio(row: Row, base: str) -> str:
    speed = row.speed(OWN, base)
    return "" if speed is None else f"**{show(speed)}**" if speed < 1 else show(speed)


def losses(comparison: Comparison, base: str, *, own: str = OWN) -> Sequence[tuple[float, str, str]]:
    """Return the rows in which ``own`` is slower than ``base``, as (speed, workload, row), the worst first."""
    found = [
        (speed, each.name, row.name)
        for each in comparison.workloads
        for row in each.figures.rows.values()
        if (speed := row.speed(own, base)) is not None and speed < 1
    ]
    return sorted(found)
