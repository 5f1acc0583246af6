"""A mount answers as a plain directory does: the same random steps on both, side by side, and after a cold remount.

Both ways to mount are compared with the plain directory, each with the kernel's own caches and without them.
"""

from __future__ import annotations

import os
import stat
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


def test_special_files(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    device = os.makedev(4095, 1048575)
    kinds = {stat.S_IFCHR: device, stat.S_IFBLK: device, stat.S_IFIFO: 0, stat.S_IFSOCK: 0}
    for kind, number in kinds.items():
        os.mknod(mounted.path / str(kind), kind | 0o640, number)
    mounted.remount()
    for kind, number in kinds.items():
        status = (mounted.path / str(kind)).lstat()
        assert (status.st_mode, status.st_rdev, status.st_size, status.st_nlink) == (kind | 0o640, number, 0, 1)


def test_times_are_kept_to_the_nanosecond(mount: MountFactory, accel: str) -> None:
    """Those of the most distant years that are kept, too."""
    mounted = mount(accel)
    times = [0, 1, -1, 1_999_999_999, -1_500_000_000, 2**31 * 10**9, -(2**63), 2**63 - 1]
    for number, time_ns in enumerate(times):
        (mounted.path / f"f{number}").touch()
        os.utime(mounted.path / f"f{number}", ns=(time_ns, -1 - time_ns))
    for _ in range(2):
        for number, time_ns in enumerate(times):
            status = (mounted.path / f"f{number}").stat()
            assert (status.st_atime_ns, status.st_mtime_ns) == (time_ns, -1 - time_ns)
        mounted.remount()
