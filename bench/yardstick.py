"""The end-to-end figures: bpfuse beside the proof of the datapath and beside itself without acceleration.

Workloads: a cold pass (a fresh mount, each file opened, read and closed once by one Python process), a second pass of
the same, and a stat whose kernel time-to-live has run out (0 s).
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Final

from bench import measure
from bench.results import Result, Samples
from bench.systems import Bpfuse, Proof, System, Tree, proof

#: (workload, system, of system, limit): the ratio of medians may be this large.
_LIMITS: Final = (
    ("cold", "bpfuse bpf", "proof", 2.0),
    ("cold", "bpfuse bpf", "bpfuse off", 0.25),
    ("warm", "bpfuse bpf", "proof", 1.5),
    ("stat", "bpfuse bpf", "proof", 1.3),
    ("stat", "bpfuse bpf", "bpfuse off", 1 / 3),
)
_PASSES: Final = 5


def run(directory: Path, rounds: int, *, small: bool) -> Result:
    """Measure; all files lie in ``directory``."""
    tree = Tree(files=100 if small else Proof.FILES, directories=10, size=4096)
    beside = [] if small else proof(directory)
    systems: list[System] = [*beside, Bpfuse(directory / "bpf", "bpf"), Bpfuse(directory / "off", "off")]
    samples, passes = Samples(), 1 if small else _PASSES
    for system in systems:
        system.prepare(tree)
    for _ in range(rounds):
        for system in systems:
            with system.mounted(kernel_ttl_s=None) as paths:
                cold, warm = measure.run("read_all", 2, paths=paths)
            samples.add("cold", system.name, cold, tree.files)
            samples.add("warm", system.name, warm, tree.files)
            with system.mounted(kernel_ttl_s=0) as paths:
                seconds = statistics.median(measure.run("stat_all", passes, paths=paths))
            samples.add("stat", system.name, seconds, tree.files)
    figures = [each for limit in _LIMITS for each in samples.ratio(*limit)]
    return Result("yardstick", rounds, {"files": tree.files, "bytes_each": tree.size}, samples, figures)
