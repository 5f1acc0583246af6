"""``python -m bench``: the comparison with other systems, or parts that look at bpfuse alone."""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final, Protocol

import typer
from rich.console import Console
from rich.markdown import Markdown

from bench import (
    coherence,
    cost,
    engines,
    failover,
    large,
    million,
    peers,
    results,
    scale,
    workloads,
    writes,
    yardstick,
)
from bench.comparison import NAME, Comparison, compare
from bench.report import documents, markdown, plots
from bench.results import Result
from bench.workloads.base import Scale


class _Run(Protocol):
    def __call__(self, directory: Path, rounds: int, *, small: bool) -> Result: ...


#: The parts that have limits of their own, and in how many rounds, in each of which every system has its turn.
PARTS: Final[dict[str, tuple[_Run, int]]] = {
    "yardstick": (yardstick.run, 5),
    "large": (large.run, 5),
    "writes": (writes.run, 3),
    "coherence": (coherence.run, 5),
    "cost": (cost.run, 1),
    "engines": (engines.run, 3),
    "scale": (scale.run, 3),
    "million": (million.run, 3),
    "failover": (failover.run, 1),
}
_WORKLOADS: Final = tuple(each.name for each in workloads.ALL)
_USUAL: Final = tuple(each.name for each in workloads.USUAL)
_ROUNDS: Final = 5
_MINUTES: Final = 65
_QUICK_MINUTES: Final = 2.5
_QUICK_ROUNDS: Final = 2
_QUICK: Final = Scale(files=200, images=100, file_bytes=16 << 20, most_files=1000, quick=True)
_SMALL: Final = Scale(files=20, images=20, file_bytes=1 << 20, most_files=1000, quick=True)
_QUICK_SYSTEMS: Final = ["ext4", "bpfuse", "juicefs"]
_QUICK_WORKLOADS: Final = ("small", "fio", "pytorch", "trees", "metadata")


def main(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Workloads of the comparison: {', '.join(_WORKLOADS)} (all but growth, if nothing is named). "
            f"Parts with limits: {', '.join(PARTS)}."
        ),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each; 5 for a comparison.")] = None,
    systems: Annotated[
        str | None, typer.Option(help=f"Which are compared, with commas: {','.join(each.name for each in peers.ALL)}.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=1,
            help=f"End with fewer rounds when it takes longer; {_MINUTES} if neither rounds nor parts are said, "
            f"{_QUICK_MINUTES:g} with --quick.",
        ),
    ] = None,
    files: Annotated[int | None, typer.Option(min=20, help="Small files; others have as many, or half.")] = None,
    images: Annotated[int | None, typer.Option(min=20, help="Images of the training set.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds, files and systems.")] = False,
    small: Annotated[
        bool, typer.Option("--small", help="Try out, with next to nothing; figures mean nothing.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--readme", help="Measure nothing: write the documentation's figures anew.")
    ] = False,
    directory: Annotated[
        Path | None,
        typer.Option(
            help="Where the results are written. By default bench/results, in which a workload replaces what was known "
            "of it, or bench/results/partial with --quick, --small or --systems."
        ),
    ] = None,
) -> None:
    """Measure bpfuse beside what it is to be compared with."""
    # What is mounted is to be unmounted however this ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    partial = bool(quick or small or systems)
    directory = directory or (results.DIRECTORY / "partial" if partial else results.DIRECTORY)
    if report:
        _document(directory)
        return
    if unknown := [part for part in parts or () if part not in PARTS and part not in _WORKLOADS]:
        raise typer.BadParameter(f"{', '.join(unknown)}; there are {', '.join((*_WORKLOADS, *PARTS))}")
    console = Console(width=None if Console().is_terminal else 160)
    met = True
    for part in [each for each in parts or () if each in PARTS]:
        met &= _part(part, rounds, small, directory, console)
    chosen = [each for each in parts or (_QUICK_WORKLOADS if quick else _USUAL) if each in _WORKLOADS]
    if chosen:
        scale = _scaled(_SMALL if small else _QUICK if quick else Scale(), files, images)
        try:
            kinds = peers.choose(systems.split(",") if systems else _QUICK_SYSTEMS if quick or small else None)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        usual = 1 if small else _QUICK_ROUNDS if quick else _ROUNDS
        usual_minutes = _QUICK_MINUTES if quick else _MINUTES
        limit_s = 60 * (minutes or (usual_minutes if parts is None and rounds is None else math.inf))
        end, left = time.monotonic() + limit_s, sum(each.weight for each in workloads.choose(chosen))
        for each in workloads.choose(chosen):
            limit_s, left = (end - time.monotonic()) * each.weight / left, left - each.weight
            named = systems is not None or each.usual_systems is None
            its = kinds if named else [kind for kind in kinds if kind.name in (each.usual_systems or ())]
            left_out = [] if partial else [f"{kind.name} in {each.name}" for kind in peers.ALL if kind not in kinds]
            its_rounds = rounds or each.usual_rounds or usual
            found = compare([each], its, its_rounds, scale, directory, left_out, _WORKLOADS, limit_s)
            met &= bool(found.workloads) or each.missing() is not None
        met &= _tell(Comparison.read(directory / NAME).of(chosen), directory, console)
    raise typer.Exit(0 if met else 1)


def _scaled(scale: Scale, files: int | None, images: int | None) -> Scale:
    return replace(
        scale, files=files or scale.files, images=images or scale.images, most_files=files or scale.most_files
    )


def _document(directory: Path) -> None:
    if not (directory / NAME).exists():
        raise typer.BadParameter(f"{directory / NAME} is not there: make bench comes first")
    if (missing := plots.missing()) is not None:
        raise typer.BadParameter(f"plots want {missing}")
    documents.write(Comparison.read(directory / NAME))


def _tell(comparison: Comparison, directory: Path, console: Console) -> bool:
    """Show and write what was found; return whether bpfuse came through everything."""
    (directory / "comparison.md").write_text(markdown.whole(Comparison.read(directory / NAME)))
    console.print(Markdown(markdown.whole(comparison)))
    if (missing := plots.missing()) is not None:
        console.print(f"no plots, for want of {missing}")
    else:
        for path in plots.draw_all(comparison, directory):
            console.print(f"{path}")
    return not any(name.startswith("bpfuse") for each in comparison.workloads for name in (*each.failed, *each.wrong))


def _part(name: str, rounds: int | None, small: bool, directory: Path, console: Console) -> bool:
    """Measure a part that has limits; return whether they hold."""
    run, usual = PARTS[name]
    console.print(f"measuring: {name}")
    with tempfile.TemporaryDirectory(prefix="bpfuse-bench-") as below:
        os.environ["BPFUSE_RUNTIME_DIR"] = f"{below}/run"
        os.mkdir(f"{below}/run")
        result = run(Path(below), rounds or usual, small=small)
    for table in result.tables():
        console.print(table)
    result.write(directory)
    return result.holds or small


if __name__ == "__main__":
    typer.run(main)
