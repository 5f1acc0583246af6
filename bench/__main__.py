"""``python -m bench``: measure, print tables, write bench/results/yardstick.json. Exit code 1: a ratio is missed."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import yardstick
from bench.systems import Bpfuse, Proof, System, Tree

_RESULTS: Final = Path(__file__).parent / "results"
_PROOF: Final = Path(__file__).parent.parent.parent / "shared" / "feasibility"
_TREE: Final = Tree(files=2000, directories=10, size=4096)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in each of which every system has its turn.")] = 5,
    proof: Annotated[Path, typer.Option(help="The sources of the proof of the datapath.")] = _PROOF,
) -> None:
    """Measure bpfuse beside the proof of the datapath and beside itself without acceleration."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="bpfuse-bench-") as name:
        os.environ["BPFUSE_RUNTIME_DIR"] = f"{name}/run"
        os.mkdir(f"{name}/run")
        systems = _systems(Path(name), proof, console)
        for system in systems:
            system.prepare(_TREE)
        per_round = 3 * len(systems)
        measured = yardstick.measure(systems, rounds)
        samples = list(track(measured, "measuring", total=rounds * per_round, console=console))
    ratios = yardstick.ratios(samples)
    console.print(_medians_table(samples), _ratios_table(ratios))
    _write(samples, ratios, rounds)
    raise typer.Exit(0 if all(ratio.holds for ratio in ratios) else 1)


def _systems(directory: Path, proof: Path, console: Console) -> list[System]:
    systems: list[System] = [Bpfuse(directory / "bpf", "bpf"), Bpfuse(directory / "off", "off")]
    if proof.is_dir():
        return [Proof(proof, directory), *systems]
    console.print(f"left out: the proof of the datapath, which is not at {proof}")
    return systems


def _medians_table(samples: list[yardstick.Sample]) -> Table:
    table = Table(title="microseconds a file", title_justify="left")
    for heading in ("workload", "system", "minimum", "median", "maximum"):
        table.add_column(heading, justify="left" if heading in ("workload", "system") else "right")
    for (workload, system), figures in sorted(yardstick.medians(samples).items()):
        table.add_row(workload, system, *(f"{figure:.1f}" for figure in figures))
    return table


def _ratios_table(ratios: list[yardstick.Ratio]) -> Table:
    table = Table(title="ratios of medians", title_justify="left")
    for heading in ("workload", "system", "to", "ratio", "limit", ""):
        table.add_column(heading)
    for ratio in ratios:
        verdict = "holds" if ratio.holds else "missed"
        table.add_row(ratio.workload, ratio.system, ratio.base, f"{ratio.ratio:.2f}", f"{ratio.limit:.2f}", verdict)
    return table


def _write(samples: list[yardstick.Sample], ratios: list[yardstick.Ratio], rounds: int) -> None:
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "files": _TREE.files,
        "bytes_each": _TREE.size,
        "rounds": rounds,
        "microseconds_a_file": [
            {"workload": workload, "system": system, "minimum": low, "median": middle, "maximum": high}
            for (workload, system), (low, middle, high) in sorted(yardstick.medians(samples).items())
        ],
        "ratios": [
            {"workload": r.workload, "system": r.system, "to": r.base, "ratio": round(r.ratio, 3), "limit": r.limit}
            for r in ratios
        ],
    }
    _RESULTS.mkdir(exist_ok=True)
    (_RESULTS / "yardstick.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
