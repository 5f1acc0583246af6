"""A comparison as Markdown: every row with its spread, or a choice of rows, and what misses its target."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from bench.comparison import Comparison, Measured
from bench.report.targets import LIKE, OWN, PEERS, TARGETS, Judged, judge
from fuseclient.bench.figures import Row, show

#: What bpfuse is set against in a column of its own.
BASES: Final = ("ext4", "juicefs")


def whole(comparison: Comparison) -> str:
    """Return all of it."""
    parts = [about(comparison), *(_section(each, comparison) for each in comparison.workloads)]
    judged = list(judge(comparison))
    if judged:
        parts[1:1] = ["\n".join(["## Targets", "", *targets_table(judged)])]
        parts.append("\n".join(["## Rows that miss a target, and why", "", *misses(judged)]))
    return "\n\n".join(parts) + "\n"


def about(comparison: Comparison) -> str:
    """Return where, when and of what it was measured."""
    lines = [
        f"Measured {_when(comparison.workloads)}. In each round every system has its turn. Medians, with the least and "
        'the most in brackets. "To ext4" and "to JuiceFS" say how many times as fast bpfuse is, so that less than 1 is '
        "a loss.",
        "",
        "| system | version | on the disk after a close |",
        "|---|---|---|",
        *(f"| {name} | {each['version']} | {each['durability']} |" for name, each in comparison.systems.items()),
    ]
    if left_out := dict.fromkeys(name for each in comparison.workloads for name in each.left_out):
        lines += ["", f"Left out: {'; '.join(left_out)}."]
    return "\n".join(lines)


def _when(workloads: list[Measured]) -> str:
    """Return the date, the commit, the machine and the rounds, of each that there is."""
    dates = sorted(each.date for each in workloads)
    rounds = sorted({each.rounds for each in workloads})
    commits = dict.fromkeys(each.machine["commit"] for each in workloads)
    machines = dict.fromkeys(_machine(each) for each in workloads)
    return (
        f"{_span(dates)} at commit {', '.join(commits)} on {'; '.join(machines)}; {_span(list(map(str, rounds)))} "
        f"round{'s' if rounds[-1:] != [1] else ''}"
    )


def _span(found: list[str]) -> str:
    return found[0] if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def _machine(measured: Measured) -> str:
    return ", ".join(value for key, value in measured.machine.items() if key not in ("python", "commit"))


def _section(measured: Measured, comparison: Comparison) -> str:
    rounds = f"{measured.rounds} round{'s' if measured.rounds > 1 else ''}"
    sizes = f"{measured.scale['files']:,} files, {measured.scale['images']:,} images at most"
    lines = [f"## {measured.name}", "", f"{measured.about[0].upper()}{measured.about[1:]}.", ""]
    lines += [f"{measured.date}, {measured.machine['commit']}, {rounds}, {sizes}, {measured.seconds / 60:.1f} minutes."]
    lines += ["", *table(measured.figures.rows.values(), comparison)]
    lines += [f"\n{name} did not come through: {reason}" for name, reason in measured.failed.items()]
    lines += [
        f"\n{name} was wrong in {len(found)} of {len(measured.turns_s[name])} rounds, so without a figure: {found[0]}"
        for name, found in measured.wrong.items()
    ]
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
        # A row of a curve has the mark of a column in its name.
        lines.append(f"| {row.name.replace(' | ', ', ')}, {row.unit} | {' | '.join(cells)} |")
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


def targets_table(judged: list[Judged]) -> list[str]:
    """Return the lines of a table of the targets: how many rows reach each, and which is the worst."""
    lines = ["| bpfuse is to be | rows that are | the worst row |", "|---|---:|---|"]
    for target in TARGETS:
        found = [each for each in judged if each.target is target]
        if found:
            reached = sum(each.reached for each in found)
            worst = f"{found[0].workload}: {found[0].row}, {show(found[0].speed)}"
            lines.append(f"| {target.about} | {reached} of {len(found)} | {worst} |")
    return lines


def misses(judged: list[Judged]) -> list[str]:
    """Return the lines that tell of each row that misses a target: by how much, and why."""
    lost = [each for each in judged if not each.reached]
    if not lost:
        return ["There is none."]
    lines = []
    for why in dict.fromkeys(each.reason for each in lost):
        rows: dict[tuple[str, str], list[str]] = {}
        for each in lost:
            if each.reason == why:
                own = "" if each.target.own == OWN else f" by {each.target.own}"
                ratio = f"{show(each.speed)} of {each.target.base}{own}"
                rows.setdefault((each.workload, each.row), []).append(
                    ratio if each.target.least == 1 else f"{ratio} ({show(each.target.least)} is wanted)"
                )
        lines += ["", why or "Why is not known yet:", ""]
        lines += [f"- {workload}: {row}: {'; '.join(ratios)}" for (workload, row), ratios in rows.items()]
    return lines[1:]


def verdict(comparison: Comparison) -> str:
    """Return in a sentence in how many rows bpfuse is faster than every peer."""
    rows: dict[tuple[str, str], bool] = {}
    like: dict[tuple[str, str], bool] = {}
    for each in judge(comparison):
        if each.target.least == 1 and each.target.base in PEERS:
            found = rows if each.target.own == OWN else like
            found[each.workload, each.row] = found.get((each.workload, each.row), True) and each.reached
    beside = (
        f"; {LIKE}, whose changes are on disk as late as theirs, in {sum(like.values())} of the {len(like)} rows that "
        "it has"
        if like
        else ""
    )
    return (
        f"bpfuse is faster than every peer in {sum(rows.values())} of {len(rows)} rows of "
        f"{', '.join(dict.fromkeys(workload for workload, _ in rows))}{beside}. The others, and why, are in "
        "`docs/benchmarks.md`."
    )
