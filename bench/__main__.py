"""``python -m bench [PART...]``: measure, print tables, write bench/results/PART.json.

Exit code 1: a limit is missed.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Final, Protocol

import typer
from rich.console import Console

from bench import coherence, cost, large, results, writes, yardstick
from bench.results import Result


class _Run(Protocol):
    def __call__(self, directory: Path, rounds: int, *, small: bool) -> Result: ...


#: What can be measured, and in how many rounds, in each of which every system has its turn.
PARTS: Final[dict[str, tuple[_Run, int]]] = {
    "yardstick": (yardstick.run, 5),
    "large": (large.run, 5),
    "writes": (writes.run, 3),
    "coherence": (coherence.run, 5),
    "cost": (cost.run, 1),
}


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(PARTS)}; all, if none is named.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each part.")] = None,
    small: Annotated[
        bool, typer.Option("--small", help="Try out, with next to nothing; figures mean nothing.")
    ] = False,
    directory: Annotated[Path, typer.Option(help="Where the results are written.")] = results.DIRECTORY,
) -> None:
    """Measure bpfuse beside what it is to be compared with."""
    if unknown := [part for part in parts or () if part not in PARTS]:
        raise typer.BadParameter(f"{', '.join(unknown)}; there are {', '.join(PARTS)}")
    console, met = Console(width=None if Console().is_terminal else 110), True
    for part in parts or PARTS:
        run, usual = PARTS[part]
        console.print(f"measuring: {part}")
        with tempfile.TemporaryDirectory(prefix="bpfuse-bench-") as name:
            os.environ["BPFUSE_RUNTIME_DIR"] = f"{name}/run"
            os.mkdir(f"{name}/run")
            result = run(Path(name), rounds or usual, small=small)
        for table in result.tables():
            console.print(table)
        result.write(directory)
        met &= result.holds
    raise typer.Exit(0 if met or small else 1)


if __name__ == "__main__":
    typer.run(main)
