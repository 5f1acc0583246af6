"""The end-to-end figures: bpfuse beside the proof and beside itself without acceleration, in alternating rounds.

Workloads: a cold pass (a fresh mount, each file opened, read and closed once by one Python process), a second pass of
the same, and a stat whose kernel time-to-live has run out (0 s).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bench.systems import System

#: (workload, system, of system, limit): the ratio of medians may be this large.
LIMITS: Final = (
    ("cold", "bpfuse bpf", "proof", 2.0),
    ("cold", "bpfuse bpf", "bpfuse off", 0.25),
    ("warm", "bpfuse bpf", "proof", 1.5),
    ("stat", "bpfuse bpf", "proof", 1.3),
    ("stat", "bpfuse bpf", "bpfuse off", 1 / 3),
)
_PASSES: Final = 5


@dataclass(frozen=True)
class Sample:
    """Microseconds a file, of one round."""

    workload: str
    system: str
    microseconds: float


def measure(systems: list[System], rounds: int) -> Iterator[Sample]:
    """Yield the samples of each round as they are made: A B C A B C."""
    for _ in range(rounds):
        for system in systems:
            with system.mounted(kernel_ttl_s=None) as paths:
                cold, warm = _run("read", paths, 2)
            yield Sample("cold", system.name, cold)
            yield Sample("warm", system.name, warm)
            with system.mounted(kernel_ttl_s=0) as paths:
                yield Sample("stat", system.name, statistics.median(_run("stat", paths, _PASSES)))


def _run(work: str, paths: list[str], passes: int) -> list[float]:
    """Return microseconds a file of each pass, measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.measure", work, str(passes)],
        input="\n".join(paths),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return [float(line) / len(paths) * 1e6 for line in done.stdout.splitlines()]


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians against its limit."""

    workload: str
    system: str
    base: str
    ratio: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.ratio <= self.limit


def medians(samples: list[Sample]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Return minimum, median and maximum by (workload, system)."""
    grouped: dict[tuple[str, str], list[float]] = {}
    for sample in samples:
        grouped.setdefault((sample.workload, sample.system), []).append(sample.microseconds)
    return {key: (min(values), statistics.median(values), max(values)) for key, values in grouped.items()}


def ratios(samples: list[Sample]) -> list[Ratio]:
    """Return those ratios of :data:`LIMITS` whose both systems were measured."""
    found = medians(samples)
    return [
        Ratio(workload, system, base, found[workload, system][1] / found[workload, base][1], limit)
        for workload, system, base, limit in LIMITS
        if (workload, system) in found and (workload, base) in found
    ]
