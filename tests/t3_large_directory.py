"""A directory of 100,000 entries through a real mount: ls, find and du see all of it, and nobody holds it whole."""

from __future__ import annotations

import asyncio
import subprocess
from typing import Final

import figures
import large_directory
import pytest
import rig
from conftest import MountFactory

pytestmark = pytest.mark.usefixtures("needs_mounts")

ENTRIES: Final = 100_000
#: What the worker may take more than before: its windows of the listing, not the listing.
MOST_BYTES: Final = 80_000_000


def _lines(*command: str) -> int:
    done = subprocess.run(command, capture_output=True, check=True, timeout=rig.WATCHDOG_S)
    return len(done.stdout.splitlines())


# ls -l asks for the access control lists of each, which takes the daemon of the twin a minute.
@pytest.mark.parametrize(
    ("accel", "commands"), [("bpf", (("ls", "-l"), ("find",), ("du", "-a"))), ("off", (("find",), ("ls", "-U", "-a")))]
)
def test_a_listing_of_100_000_entries(
    mount: MountFactory, sandbox: rig.Sandbox, needs_uring: None, accel: str, commands: tuple[tuple[str, ...], ...]
) -> None:
    url = sandbox.format("wide")
    asyncio.run(large_directory.make(sandbox.path / "wide" / "meta", "volume", ENTRIES))
    mounted = mount(accel, url=url)
    before = figures.stats(mounted)["worker"]["rss_bytes"]
    many = str(mounted.path / "many")
    for command in commands:
        assert _lines(*command, many) in (ENTRIES + 1, ENTRIES + 2), command
    assert figures.stats(mounted)["worker"]["rss_bytes"] - before < MOST_BYTES
