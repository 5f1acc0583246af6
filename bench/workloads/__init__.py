"""The workloads that all systems are put through, in the order in which they are measured.

To add one: a subclass of :class:`~bench.workloads.base.Workload` in a module of its own, and its class in :data:`ALL`.
"""

from __future__ import annotations

from typing import Final

from bench.workloads.base import Workload
from bench.workloads.clients import Clients
from bench.workloads.fio import Fio
from bench.workloads.growth import Growth
from bench.workloads.metadata import Metadata
from bench.workloads.pytorch import Pytorch
from bench.workloads.resources import Resources
from bench.workloads.small_files import SmallFiles
from bench.workloads.trees import Trees

ALL: Final[tuple[type[Workload], ...]] = (
    SmallFiles,
    Fio,
    Pytorch,
    Trees,
    Metadata,
    Clients,
    Resources,
    Growth,
)
#: Those that are measured when none is named.
USUAL: Final = tuple(each for each in ALL if each is not Growth)


def choose(names: list[str] | None) -> list[type[Workload]]:
    """Return those with these names, or the usual ones. Raises :exc:`ValueError` for a name that there is not."""
    known = {each.name: each for each in ALL}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"{', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names] if names else list(USUAL)
