"""Random work on a mount: on one file in every way that its bytes can be changed, and on one tree by many processes.

BPFUSE_LONG=1 has it go on for longer; BPFUSE_SEED=n repeats one seed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import file_exerciser
import pytest
import rig
from conftest import MountFactory
from file_exerciser import OneFile, OneTree
from posix_rig import LONG

from bench import large_directory
from fuseclient.volumes import EMBEDDED_NAME, Embedded, parse_volume

pytestmark = [pytest.mark.usefixtures("needs_mounts"), pytest.mark.timeout(3600 if LONG else 180)]

SEED = int(os.environ.get("BPFUSE_SEED", "0"))
PROCESSES = 4


class Profile(NamedTuple):
    """``most``: how large files get, in bytes."""

    most: int
    seeds: int
    steps: int


#: Around the inline limit; a few pages of the kernel's cache; around the size of an object.
PROFILES = {
    "small": Profile(192 * 1024, 40 if LONG else 2, 3000 if LONG else 200),
    "middle": Profile(2 * 2**20, 40 if LONG else 1, 3000 if LONG else 200),
    "large": Profile(10 * 2**20, 20 if LONG else 1, 1000 if LONG else 80),
}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    if LONG:
        monkeypatch.setattr(rig, "WATCHDOG_S", 3600.0)


def test_one_file_in_every_way(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    digests = {}
    for name, profile in PROFILES.items():
        for seed in [SEED] if SEED else range(1, profile.seeds + 1):
            path = mounted.path / f"{name}{seed}"
            file = OneFile(path, seed, profile.most)
            try:
                file.run(profile.steps)
            except (OSError, AssertionError) as error:
                pytest.fail(f"{name}, BPFUSE_SEED={seed}: {error!r}\n" + "\n".join([str(error), *file.log[-60:]]))
            digests[path] = hashlib.sha256(file.model).digest()
    mounted.remount()
    for path, digest in digests.items():
        assert hashlib.sha256(path.read_bytes()).digest() == digest, f"{path.name} is another after a remount"


def test_one_tree_by_many_processes(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    root = mounted.path / "tree"
    used = inodes_used(mounted.path)
    for seed in [SEED] if SEED else range(1, 21 if LONG else 2):
        root.mkdir()
        pids = [_start(root, seed * 100 + number) for number in range(PROCESSES)]
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        assert statuses == [0] * PROCESSES, f"BPFUSE_SEED={seed}: a process failed, see its output"
        before = file_exerciser.check_tree(root)
        mounted.remount()
        assert file_exerciser.check_tree(root) == before, f"BPFUSE_SEED={seed}: the tree is another after a remount"
        shutil.rmtree(root)
        rig.wait_for(lambda: inodes_used(mounted.path) == used, "all inodes are given back")
    mounted.unmount()
    checked = mounted.sandbox.run("fsck", mounted.url, "--verify")
    assert checked.code == 0, checked.out


def _start(root: Path, seed: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        OneTree(root, seed).run(6000 if LONG else 250)
        os._exit(0)
    except BaseException as error:
        print(f"seed {seed}: {error!r}", flush=True)
        os._exit(1)


def inodes_used(path: Path) -> int:
    figures = os.statvfs(path)
    return figures.f_files - figures.f_ffree


ENTRIES = 1_000_000 if LONG else 20_000


async def test_a_large_directory_is_not_loaded_whole(sandbox: rig.Sandbox, mount: MountFactory, accel: str) -> None:
    place = parse_volume(url := sandbox.format("large"))
    assert isinstance(place, Embedded)
    await large_directory.make(Path(place.engine_url.removeprefix("lmdb://")), EMBEDDED_NAME, ENTRIES)
    mounted = mount(accel, url=url)
    many = mounted.path / "many"
    before = mounted.stats()["worker"]["rss_bytes"]
    count = sum(entry.name.startswith("entry") for entry in os.scandir(many))
    assert count == ENTRIES
    assert len(set(os.listdir(many))) == ENTRIES
    grown = mounted.stats()["worker"]["rss_bytes"] - before
    assert grown < 100 * 2**20, f"the worker grew by {grown >> 20} MiB"
    for number in (0, 1, ENTRIES // 2, ENTRIES - 1):
        assert (many / f"entry{number:07}").stat().st_size == 0
    assert not (many / "none").exists()
    (many / "another").touch()
    assert (many / "another").exists()
    assert len(os.listdir(many)) == ENTRIES + 1
