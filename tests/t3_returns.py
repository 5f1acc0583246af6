"""What a mount holds at the metaserver is bounded by its kernel cache, however much it has looked at."""

from __future__ import annotations

import asyncio
import os
from typing import Final

import figures
import pytest
import rig
from conftest import MountFactory

from bench import large_directory
from fuseclient.observe import status

pytestmark = [pytest.mark.usefixtures("needs_mounts"), pytest.mark.usefixtures("needs_uring")]

ENTRIES: Final = 20_000


def test_what_is_held_is_bounded_by_the_kernel_cache(mount: MountFactory, sandbox: rig.Sandbox) -> None:
    url = sandbox.format("wide")
    asyncio.run(large_directory.make(sandbox.path / "wide" / "meta", "volume", ENTRIES))
    mounted = mount("bpf", "--kernel-cache-size", "1M", "--lease", "2", url=url)
    capacity = figures.stats(mounted)["maps"]["inodes"]["capacity"]
    assert capacity < ENTRIES / 3

    def held() -> int:
        with mounted.sandbox_environment():
            (session,) = status.read(url)["sessions"]
        return int(session["leases"]["inodes"])

    for _ in range(2):
        assert sum(entry.stat().st_nlink for entry in os.scandir(mounted.path / "many")) == ENTRIES
        assert held() > 0
        rig.wait_for(lambda: held() <= capacity + 8, "what was evicted to be given back")
    leases = figures.stats(mounted)["caches"]["leases"]
    assert leases["returned_inodes"] >= 2 * (ENTRIES - capacity) - ENTRIES // 10
    assert leases["untold"] == 0
    # What was given back and changes is seen all the same.
    path = mounted.path / "many" / "entry0000000"
    path.chmod(0o600)
    assert path.stat().st_mode & 0o777 == 0o600
