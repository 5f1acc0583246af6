"""What a workload is: sources that all systems share, and one system's turn in one round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from bench.peers.base import Peer
from fuseclient.bench.figures import Figures


@dataclass(frozen=True)
class Scale:
    """How much is done. ``quick``: as little as shows the order of magnitude."""

    files: int = 600
    images: int = 600
    file_bytes: int = 128 << 20
    #: Up to so many files costs are seen to grow.
    most_files: int = 100_000
    quick: bool = False


@dataclass
class Turn:
    """What a workload adds its figures to, as one system's in this round."""

    figures: Figures
    kind: type[Peer]
    written: bool = field(init=False)
    #: What the system did wrong, though it went on; such rows have no figure.
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.written = not self.kind.read_only

    def time(self, name: str, seconds: float, count: int = 1) -> None:
        """Take the time of ``count`` operations."""
        self.figures.add_time(name, self.kind.name, seconds, count)

    def time_of_writing(self, name: str, seconds: float, count: int = 1) -> None:
        """Take the time of operations that a read-only system does not do: they were done through another mount."""
        if self.written:
            self.time(name, seconds, count)

    def value(self, name: str, value: float, unit: str) -> None:
        """Take any other value."""
        self.figures.add(name, self.kind.name, value, unit)


class Workload(ABC):
    """One workload. It is made once; ``turn`` is called for each system in each round."""

    name: ClassVar[str]
    #: What the report says of it.
    about: ClassVar[str]
    #: A system whose turn takes longer is interrupted and named: it hangs.
    turn_limit_s: ClassVar[float] = 600.0
    #: The systems that are measured with it if none is named; None: all.
    usual_systems: ClassVar[tuple[str, ...] | None] = None
    #: In how many rounds, if that is not said; None: as many as all.
    usual_rounds: ClassVar[int | None] = None
    #: Its part of the time that all may take, beside those of the others.
    weight: ClassVar[int] = 1

    def __init__(self, directory: Path, scale: Scale) -> None:
        self.directory = directory
        self.scale = scale

    @classmethod
    def missing(cls) -> str | None:
        """Return what it wants and this machine has not; None: it can be done."""
        return None

    def suits(self, kind: type[Peer]) -> bool:
        """Say whether a system is measured with it."""
        return True

    def prepare(self) -> None:  # noqa: B027 - not every workload has any
        """Make what all systems share, once, in ``directory``."""

    @abstractmethod
    def turn(self, turn: Turn) -> None:
        """Measure one system once."""

    def close(self) -> None:  # noqa: B027 - nor that
        """End what outlives a turn."""
