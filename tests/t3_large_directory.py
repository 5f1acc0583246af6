"""A directory of 100,000 entries through a real mount: ls, find and du see all of it, and nobody holds it whole.

With BPFUSE_LONG=1 another has a million entries.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from typing import Final

import figures
import pytest
import rig
from conftest import MountFactory
from posix_rig import LONG

from bench import large_directory
from fuseclient.worker.directories import WINDOW

pytestmark = pytest.mark.usefixtures("needs_mounts")

ENTRIES: Final = 100_000
#: What the worker may take more than before: its windows of the listing, not the listing.
MOST_BYTES: Final = 80_000_000
#: Of the other one; and how many of them are unlinked while it is listed.
MANY: Final = 1_000_000 if LONG else 30_000
UNLINKED: Final = 20


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


def test_what_is_asked_for_in_the_middle_is_fetched_and_a_listing_goes_on_while_entries_go(
    mount: MountFactory, sandbox: rig.Sandbox, accel: str
) -> None:
    url = sandbox.format("wide")
    asyncio.run(large_directory.make(sandbox.path / "wide" / "meta", "volume", MANY))
    mounted = mount(accel, url=url)
    many = mounted.path / "many"
    before = figures.stats(mounted)["worker"]["rss_bytes"]
    assert (many / f"entry{MANY // 2:07}").stat().st_size == 0
    if accel == "bpf":
        found = figures.stats(mounted)
        assert found["maps"]["names"]["entries"] < 2 * WINDOW
        assert found["caches"]["directories"]["windows"] <= 2
    doomed = {f"entry{number:07}" for number in range(0, MANY, MANY // UNLINKED)}
    seen: list[str] = []
    for entry in os.scandir(many):
        seen.append(entry.name)
        if entry.name in doomed:
            (many / entry.name).unlink()
    assert len(seen) == len(set(seen)), "none came twice"
    assert set(seen) >= {f"entry{number:07}" for number in range(MANY)} - doomed
    assert set(os.listdir(many)).isdisjoint(doomed)
    assert len(os.listdir(many)) == MANY - len(doomed)
    assert figures.stats(mounted)["worker"]["rss_bytes"] - before < MOST_BYTES
    if accel == "bpf":
        counts = figures.stats(mounted)["caches"]["directories"]
        assert counts["small"] <= 2 * UNLINKED, "one after each removal, and then a window"
        assert counts["fetches"] < 4 * (MANY // WINDOW + 1) + 4 * UNLINKED
