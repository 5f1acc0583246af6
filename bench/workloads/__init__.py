"""The workloads that all systems are put through, in the order in which they are measured.

To add one: a subclass of :class:`~bench.workloads.base.Workload` in a module of its own, and its class in :data:`ALL`.
"""

from __future__ import annotations

from typing import Final

from bench.workloads.base import Workload
from bench.workloads.metadata import Metadata
from bench.workloads.small_files import SmallFiles

ALL: Final[tuple[type[Workload], ...]] = (SmallFiles, Metadata)


def choose(names: list[str] | None) -> list[type[Workload]]:
    """Return those with these names, or all. Raises :exc:`ValueError` for a name that there is not."""
    known = {each.name: each for each in ALL}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"{', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names] if names else list(ALL)
