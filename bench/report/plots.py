"""A comparison as plots: for each workload the medians of all systems, row by row, with their spread."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.comparison import Comparison
from fuseclient.bench.figures import Row

#: In the name of a row that is a point of a curve: what is measured, this, what it grows with = how large that is.
_CURVE: Final = " | "
_COLOURS: Final = {
    "ext4": "#7f7f7f",
    "bpfuse": "#d62728",
    "bpfuse dataset": "#ff7f0e",
    "bpfuse interval": "#e377c2",
    "bpfuse off": "#f7b6b2",
    "passthrough": "#bcbd22",
    "juicefs": "#1f77b4",
    "juicefs sqlite": "#aec7e8",
    "seaweedfs": "#2ca02c",
}


def missing() -> str | None:
    """Return what it wants; None: plots can be drawn."""
    try:
        import matplotlib  # noqa: F401 - an extra: everything else works without
    except ImportError:
        return "matplotlib (pip install matplotlib==3.11.2)"
    return None


def draw(rows: Sequence[Row], systems: Sequence[str], title: str, path: Path) -> None:
    """Draw one bar a system and row, its length the median, on a logarithmic scale; a panel for each unit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    units = list(dict.fromkeys(row.unit for row in rows))
    by_unit = [[row for row in rows if row.unit == unit] for unit in units]
    shown = [name for name in systems if any(name in row.values for row in rows)]
    height = sum(len(each) for each in by_unit) * (0.09 * len(shown) + 0.12) + 0.9 * len(units) + 0.8
    figure, axes = pyplot.subplots(
        len(units), 1, squeeze=False, figsize=(9, height), height_ratios=[len(each) + 0.5 for each in by_unit]
    )
    for axis, unit, each in zip(axes[:, 0], units, by_unit, strict=True):
        _panel(axis, each, unit, shown)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.suptitle(title, fontsize=10)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(shown)), fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axis: Any, rows: Sequence[Row], unit: str, systems: Sequence[str]) -> None:
    thick = 0.85 / len(systems)
    for number, name in enumerate(systems):
        found = [(place, row.summary(name)) for place, row in enumerate(rows)]
        bars = [(place, each) for place, each in found if each is not None and each.median > 0]
        medians = [each.median for _, each in bars]
        spread = [[each.median - each.low for _, each in bars], [each.high - each.median for _, each in bars]]
        axis.barh(
            [place + (number - len(systems) / 2 + 0.5) * thick for place, _ in bars],
            medians,
            thick,
            xerr=spread if bars else None,
            color=_COLOURS.get(name),
            label=name,
            error_kw={"elinewidth": 0.6, "alpha": 0.6},
        )
    more = rows[0].more_is_better
    axis.set_xscale("log")
    axis.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"{unit}, {'more' if more else 'less'} is better", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", which="major", alpha=0.4)


def draw_curves(rows: Sequence[Row], systems: Sequence[str], title: str, path: Path) -> None:
    """Draw rows named "what | of=number" as curves, a panel for each what and of."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str], list[tuple[int, Row]]] = {}
    for row in rows:
        what, _, where = row.name.partition(_CURVE)
        of, _, number = where.partition("=")
        panels.setdefault((what, of), []).append((int(number), row))
    lines = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(lines, 2, squeeze=False, figsize=(9, 2.6 * lines + 0.8))
    for axis, ((what, of), points) in zip(axes.flat, panels.items(), strict=False):
        for name in systems:
            found = [(number, each) for number, row in points if (each := row.summary(name)) is not None]
            medians = [each.median for _, each in found]
            axis.plot([number for number, _ in found], medians, marker="o", label=name, color=_COLOURS.get(name))
        axis.set(xscale="log", yscale="log", title=what, xlabel=of, ylabel=points[0][1].unit)
        axis.grid(visible=True, alpha=0.4)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.suptitle(title, fontsize=10)
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_all(comparison: Comparison, directory: Path) -> list[Path]:
    """Draw each workload into ``directory``; return the files."""
    drawn = []
    for each in comparison.workloads:
        rows = list(each.figures.rows.values())
        if rows:
            path, title = directory / f"{each.name}.png", f"{each.name}: {textwrap.fill(each.about, 120)}"
            if all(_CURVE in row.name for row in rows):
                draw_curves(rows, list(comparison.systems), title, path)
            else:
                draw(rows, list(comparison.systems), title, path)
            drawn.append(path)
    return drawn
