"""``bpfuse stats`` tells how far requests had to go: to the maps, the worker, its caches, the metaserver, the store."""

from __future__ import annotations

import os

import figures
import pytest
import rig
from conftest import MountFactory

pytestmark = pytest.mark.usefixtures("needs_mounts")


def levels(mounted: rig.Mount) -> dict[str, int]:
    found: dict[str, int] = figures.stats(mounted)["levels"]
    return found


def test_metadata_comes_from_the_metaserver_and_then_from_the_maps(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel, "--kernel-ttl", "0")
    for number in range(20):
        os.mknod(mounted.path / f"{number}")
    mounted.remount()
    before = levels(mounted)
    for _ in range(2):
        for number in range(20):
            os.stat(mounted.path / f"{number}")
    after = levels(mounted)
    asked = {level: count - before[level] for level, count in after.items()}
    if accel == "bpf":
        assert asked["kernel"] >= 38
        assert 1 <= asked["metaserver"] <= 4
    else:
        assert asked["kernel"] == 0
        assert asked["metaserver"] >= 40
    assert asked["store"] == asked["disk_cache"] == 0
    requests = figures.stats(mounted)["requests"]
    assert sum(after.values()) <= sum(sum(each.values()) for each in requests.values())
    assert asked["uncounted"] <= 2


def test_data_comes_from_the_store_and_then_from_the_disk_cache(mount: MountFactory) -> None:
    """The first of the reads asks the metaserver where the bytes are, too."""
    mounted = mount("off", "--cache-size", "64M")
    content = os.urandom(900_000)
    (mounted.path / "file").write_bytes(content)
    mounted.remount()
    before = levels(mounted)
    assert (mounted.path / "file").read_bytes() == content
    first = levels(mounted)
    assert first["store"] > before["store"]
    assert first["disk_cache"] == before["disk_cache"]
    mounted.remount()
    before = levels(mounted)
    assert (mounted.path / "file").read_bytes() == content
    second = levels(mounted)
    assert second["store"] == before["store"]
    assert second["disk_cache"] > before["disk_cache"]
    shown = mounted.sandbox.run("stats", mounted.path).expect_success().out
    assert "the disk cache" in shown
    assert "hit ratio" in shown
