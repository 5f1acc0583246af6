"""A mount answers as a plain directory does: the same random steps on both, side by side, and after a cold remount.

Both ways to mount are compared with the plain directory, each with the kernel's own caches and without them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import file_steps
import pytest
import rig
from conftest import MountFactory
from file_steps import Difference, Step, at_random

pytestmark = pytest.mark.usefixtures("needs_mounts")

SEEDS = tuple(range(1, 13))
STEPS = 350
SHRINK_S = 20.0


@pytest.fixture(autouse=True)
def fixed_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


class Pair:
    """A plain directory and a mount; each run has a directory of its own in both."""

    def __init__(self, plain: Path, mounted: rig.Mount) -> None:
        self._roots = plain, mounted.path
        self._runs = 0
        for path in (mounted.sandbox.path, *self._roots):
            path.chmod(0o711)

    def fresh(self) -> tuple[Path, Path]:
        """Return a new directory in each, that any user may change, one level down so that ".." is of the run."""
        self._runs += 1
        made = []
        for root in self._roots:
            (root / f"run{self._runs}").mkdir()
            (root / f"run{self._runs}" / "top").mkdir()
            (root / f"run{self._runs}" / "top").chmod(0o777)
            made.append(root / f"run{self._runs}" / "top")
        return made[0], made[1]

    def difference(self, steps: list[Step]) -> Difference | None:
        return file_steps.compare(lambda _: steps, *self.fresh())[1]


@pytest.mark.parametrize("ttl", ["default", "0"])
def test_like_a_plain_directory(sandbox: rig.Sandbox, mount: MountFactory, accel: str, ttl: str) -> None:
    mounted = mount(accel, *(() if ttl == "default" else ("--kernel-ttl", ttl)))
    pair = Pair(sandbox.directory("plain"), mounted)
    runs = []
    for seed in SEEDS:
        directories = pair.fresh()
        steps, difference = file_steps.compare(at_random(seed, STEPS), *directories)
        if difference is not None:
            short = file_steps.shrink(steps, lambda fewer: pair.difference(fewer) is not None, SHRINK_S)
            fail(seed, short, pair.difference(short) or difference)
        runs.append((seed, steps, directories))
    mounted.remount()
    for seed, steps, directories in runs:
        difference = file_steps.compare_trees(*map(file_steps.tree, directories))
        if difference is not None:
            fail(seed, steps, difference)


def fail(seed: int, steps: list[Step], difference: Difference) -> NoReturn:
    pytest.fail(f"seed {seed}: {difference.what}\nThese steps repeat it:\n{file_steps.script_of(steps)}")
