"""The parts of the documentation that are made of a comparison: README's table and plot, docs/benchmarks.md.

Nothing of it is edited by hand: ``make bench-readme`` writes all of it anew from ``bench/results/comparison.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bench.comparison import Comparison
from bench.report import markdown, plots
from bench.report.targets import judge
from fuseclient.bench.figures import Row

_REPOSITORY: Final = Path(__file__).parent.parent.parent
_BEGIN: Final = "<!-- made by make bench-readme: begin -->"
_END: Final = "<!-- made by make bench-readme: end -->"
#: What README shows, by workload.
CHOSEN: Final[dict[str, tuple[str, ...]]] = {
    "small": (
        "create 4 KiB",
        "create 4 KiB, 4 processes",
        "read 4 KiB shuffled, cold",
        "read 4 KiB shuffled, warm",
        "read 64 KiB shuffled, cold",
        "read 64 KiB shuffled, warm",
        "stat, cold",
        "stat, after 1 s TTL",
        "ls -lR, cold",
        "find, cold",
        "delete",
    ),
    "metadata": ("create in one directory, 4 processes", "stat in many directories", "remove in one directory"),
    "fio": (
        "sequential read 1 MiB, cached, psync",
        "random read 4 KiB, cached, psync",
        "random read 4 KiB, O_DIRECT, io_uring",
        "sequential write 1 MiB, fsync, psync",
    ),
    "pytorch": (
        "first epoch, 0 workers",
        "second epoch, 0 workers",
        "first epoch, 2 workers",
        "second epoch, 2 workers",
    ),
    "trees": ("tar extract", "git clone", "git status, cold", "rsync", "pip install", "C build", "compileall"),
}


def chosen_rows(comparison: Comparison) -> list[Row]:
    """Return the rows that README shows, of those that were measured."""
    figures = comparison.figures()
    return [
        figures[workload].rows[name]
        for workload, names in CHOSEN.items()
        if workload in figures
        for name in names
        if name in figures[workload].rows
    ]


def write(comparison: Comparison, repository: Path = _REPOSITORY) -> None:
    """Write README's part, docs/benchmarks.md and docs/benchmarks.png."""
    rows, docs = chosen_rows(comparison), repository / "docs"
    latest = max(comparison.workloads, key=lambda each: each.date)
    title = f"bpfuse beside others, {latest.date}, {latest.machine['cpus']}"
    plots.draw(rows, list(comparison.systems), title, docs / "benchmarks.png")
    heading = (
        "# Benchmarks\n\nMade by `make bench` and `make bench-readme`; how, and what it means, is in `bench/`.\n\n"
    )
    (docs / "benchmarks.md").write_text(heading + markdown.whole(comparison))
    readme = repository / "README.md"
    readme.write_text(_replace(readme.read_text(), _part(comparison, rows)))


def _part(comparison: Comparison, rows: list[Row]) -> str:
    lines = [markdown.about(comparison), "", *markdown.table(rows, comparison, spread=False)]
    if judged := list(judge(comparison)):
        lines += ["", *markdown.targets_table(judged), "", markdown.verdict(comparison)]
    lines += ["", "![the same as a plot](docs/benchmarks.png)", "", "Every row, with its spread: `docs/benchmarks.md`."]
    return "\n".join(lines)


def _replace(text: str, part: str) -> str:
    """Put ``part`` between the two marks. Raises :exc:`ValueError` if they are not there."""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError("README.md has no place for the figures")
    return f"{before}{begin}\n\n{part}\n\n{end}{after}"
