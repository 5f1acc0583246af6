"""The comparison: every workload, on every system, in rounds in which each system has its turn."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from bench.peers.base import Peer
from bench.workloads.base import Scale, Turn, Workload
from fuseclient.bench.figures import Figures
from fuseclient.errors import UserError

NAME: Final = "comparison.json"
#: What a system's turn may fail with; a mistake of this program's is none of them.
_FAILURES: Final = (UserError, RuntimeError, OSError, subprocess.SubprocessError)


@dataclass
class Measured:
    """One workload: its figures, how long it took, and which systems did not come through it."""

    name: str
    about: str
    seconds: float = 0.0
    figures: Figures = field(default_factory=Figures)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class Comparison:
    """All that is known of one run."""

    date: str
    machine: dict[str, str]
    rounds: int
    scale: dict[str, int]
    systems: dict[str, dict[str, str]]
    left_out: list[str]
    workloads: list[Measured] = field(default_factory=list)

    def write(self, directory: Path) -> None:
        """Write it as JSON."""
        content = asdict(self) | {
            "workloads": [
                {**{key: getattr(each, key) for key in ("name", "about", "seconds", "failed")}}
                | {"rows": each.figures.to_json()}
                for each in self.workloads
            ]
        }
        directory.mkdir(parents=True, exist_ok=True)
        (directory / NAME).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Comparison:
        """Read what :meth:`write` wrote."""
        content: dict[str, Any] = json.loads(path.read_text())
        workloads = [
            Measured(each["name"], each["about"], each["seconds"], Figures.from_json(each["rows"]), each["failed"])
            for each in content.pop("workloads")
        ]
        return cls(**content, workloads=workloads)

    def figures(self) -> dict[str, Figures]:
        """Return the figures by workload."""
        return {each.name: each.figures for each in self.workloads}


def compare(
    workloads: Sequence[type[Workload]],
    kinds: Sequence[type[Peer]],
    rounds: int,
    scale: Scale,
    results: Path,
    left_out: Sequence[str] = (),
) -> Comparison:
    """Measure, and write what is known into ``results`` after each workload.

    A system that fails in a workload has no more turns in it, and is named with the reason.
    """
    systems = {kind.name: {"version": kind.version(), "durability": kind.durability} for kind in kinds}
    sizes = {key: int(value) for key, value in asdict(scale).items()}
    date = time.strftime("%Y-%m-%d %H:%M")
    comparison = Comparison(date, machine(), rounds, sizes, systems, list(left_out))
    for each in workloads:
        if (missing := each.missing()) is not None:
            comparison.left_out.append(f"{each.name} (for want of {missing})")
            _say(f"left out: {each.name}, for want of {missing}")
            continue
        with tempfile.TemporaryDirectory(prefix="bpfuse-bench-") as name:
            os.environ["BPFUSE_RUNTIME_DIR"] = f"{name}/run"
            os.mkdir(f"{name}/run")
            comparison.workloads.append(_measure(each(Path(name), scale), kinds, rounds))
        comparison.write(results)
    return comparison


def _measure(workload: Workload, kinds: Sequence[type[Peer]], rounds: int) -> Measured:
    measured, start = Measured(workload.name, workload.about), time.monotonic()
    workload.prepare()
    try:
        for number in range(rounds):
            for kind in kinds:
                if kind.name in measured.failed or not workload.suits(kind):
                    continue
                began = time.monotonic()
                try:
                    workload.turn(Turn(measured.figures, kind))
                except _FAILURES as error:
                    measured.failed[kind.name] = " ".join(str(error).split())[-500:]
                    _say(f"{workload.name}: {kind.name} failed: {error}")
                _say(f"{workload.name}, round {number + 1}: {kind.name}, {time.monotonic() - began:.1f} s")
    finally:
        workload.close()
    measured.seconds = time.monotonic() - start
    return measured


def machine() -> dict[str, str]:
    """Return what is measured on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "cpus": f"{os.cpu_count()} x {model}",
        "memory": f"{psutil.virtual_memory().total / (1 << 30):.0f} GiB",
        "kernel": f"Linux {platform.release()}",
        "python": platform.python_version(),
        "commit": commit,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
