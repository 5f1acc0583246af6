"""Small files that are read in the order of their directory: one fetch brings the content of the next ones, while that
pays. In another order, and without acceleration, nothing is brought."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import figures
import pytest
import rig
from conftest import MountFactory

pytestmark = pytest.mark.usefixtures("needs_mounts")

FILES = 150


def content(number: int) -> bytes:
    return b"%d " % number * 500


@pytest.fixture
def known(mount: MountFactory, accel: str) -> rig.Mount:
    """A mount that knows the names and inodes of a directory, and no content."""
    mounted = mount(accel)
    (mounted.path / "d").mkdir()
    for number in range(FILES):
        (mounted.path / "d" / f"{number:03d}").write_bytes(content(number))
    mounted.remount()
    if accel == "bpf":
        mounted.sandbox.run("warmup", mounted.path).expect_success()
    return mounted


def ahead(mounted: rig.Mount) -> dict[str, Any]:
    found: dict[str, Any] = figures.stats(mounted)["caches"]["content_ahead"]
    return found


def read(directory: Path, numbers: list[int]) -> None:
    for number in numbers:
        assert (directory / f"{number:03d}").read_bytes() == content(number)


def test_in_order(known: rig.Mount, accel: str) -> None:
    before = figures.answers(known, "READ")
    read(known.path / "d", list(range(FILES)))
    after = figures.answers(known, "READ")
    if accel == "off":
        assert after.daemon - before.daemon >= FILES
        assert ahead(known) == {}
        return
    # Three reads to begin with, and those that were made while the fetch was under way.
    assert after.daemon - before.daemon < FILES // 3
    assert after.kernel - before.kernel > FILES // 2
    found = ahead(known)
    assert found["fetches"] == 1
    assert FILES - 3 - found["fetches"] <= found["files"] <= FILES
    assert found["bytes"] >= found["files"] * len(content(0))
    assert found["wasted"] == 0


def test_in_no_order(known: rig.Mount, accel: str) -> None:
    numbers = list(range(0, FILES, 2))
    random.Random(7).shuffle(numbers)
    before = figures.answers(known, "READ")
    read(known.path / "d", numbers)
    assert figures.answers(known, "READ").daemon - before.daemon >= len(numbers)
    if accel == "bpf":
        assert ahead(known)["fetches"] == 0
