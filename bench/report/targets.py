"""What bpfuse is to reach beside the others, and which rows miss it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bench.comparison import Comparison
from bench.report.reasons import reason
from fuseclient.bench.figures import Row

#: What is judged; and what of it tells as late as the peers that a change is on disk, which they do not wait for.
OWN: Final = "bpfuse"
LIKE: Final = "bpfuse interval"
#: The systems that do what bpfuse does; ext4 and the passthrough server show what could be reached at best.
CEILING: Final = "ext4"
PEERS: Final = ("juicefs", "juicefs sqlite", "seaweedfs")


@dataclass(frozen=True)
class Target:
    """In these rows of these workloads (regular expressions) ``own`` is to be ``least`` times as fast as ``base``."""

    about: str
    workload: str
    row: str
    base: str
    least: float
    own: str = OWN

    def applies(self, workload: str, row: Row) -> bool:
        return bool(re.fullmatch(self.workload, workload) and re.fullmatch(self.row, row.name))


_COMPARED: Final = "small|pytorch|trees|metadata"
TARGETS: Final = (
    *(Target(f"faster than {base}", _COMPARED, ".*", base, 1.0) for base in PEERS),
    *(Target(f"faster than {base} at changes of like durability", _COMPARED, ".*", base, 1.0, LIKE) for base in PEERS),
    Target("8 times as fast as juicefs at reading small files", "small", "read .*", "juicefs", 8.0),
    Target("0.8 of ext4's samples in a warm epoch", "pytorch", "second epoch, .*", "ext4", 0.8),
    Target("4 times juicefs's samples in a cold epoch", "pytorch", "first epoch, .*", "juicefs", 4.0),
    Target("0.9 of ext4 at cached reads of fio", "fio", ".* cached, .*", "ext4", 0.9),
)


@dataclass(frozen=True)
class Judged:
    """One row against one target."""

    target: Target
    workload: str
    row: str
    speed: float
    #: How many times as fast as the base ext4 is, which shows what can be reached; None: it was not measured.
    ext4: float | None = None

    @property
    def reached(self) -> bool:
        return self.speed >= self.target.least

    @property
    def reason(self) -> str | None:
        """Why it is missed, as far as that is known."""
        if self.target.base != CEILING and self.ext4 is not None and self.ext4 < self.target.least:
            return f"Not even ext4 is so many times as fast as {self.target.base} there:"
        return reason(self.workload, self.row, self.target.base)


def judge(comparison: Comparison) -> Iterator[Judged]:
    """Yield every row that has a target, once for each of its targets, the worst first within a target."""
    for target in TARGETS:
        found = [
            Judged(target, measured.name, row.name, speed, row.speed(CEILING, target.base))
            for measured in comparison.workloads
            for row in measured.figures.rows.values()
            if target.applies(measured.name, row) and (speed := row.speed(target.own, target.base)) is not None
        ]
        yield from sorted(found, key=lambda each: each.speed)


def missed(comparison: Comparison) -> list[Judged]:
    """Return the rows that miss a target."""
    return [each for each in judge(comparison) if not each.reached]
