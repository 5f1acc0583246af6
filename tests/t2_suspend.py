"""Scenario 11: the machine sleeps, or somebody sets its clock. The clocks are given; nothing here really sleeps."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from served import until
from worker_rig import ME, ROOT, rigged

from fuseclient.worker import suspend
from fuseclient.worker.suspend import SuspendWatch

S = 1_000_000_000


@dataclass
class Sleep:
    """How long a machine slept, and how often that was noticed."""

    slept_ns: int = 7 * S
    noticed: int = 0

    def notice(self) -> None:
        self.noticed += 1

    def watch(self) -> SuspendWatch:
        return SuspendWatch(self.notice, lambda: self.slept_ns)


def test_scenario_11_a_suspend_is_noticed_once() -> None:
    sleep = Sleep()
    watch = sleep.watch()
    sleep.slept_ns += 600 * S
    watch.look()
    watch.look()
    assert sleep.noticed == 1


def test_scenario_11_a_clock_that_was_set_is_no_suspend() -> None:
    """What CLOCK_BOOTTIME gains on CLOCK_MONOTONIC does not change with the time of day; reading them takes time."""
    sleep = Sleep()
    watch = sleep.watch()
    sleep.slept_ns += 1_000_000
    watch.look()
    assert sleep.noticed == 0


def test_the_machine_did_not_sleep_between_two_looks() -> None:
    assert abs(suspend.slept_ns() - suspend.slept_ns()) < S


async def test_the_kernels_timer_makes_it_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer is given a moment that has come: it becomes readable, as when it is cancelled."""
    monkeypatch.setattr(suspend, "_NEVER", bytes(16) + (1).to_bytes(8, "little") + bytes(8))
    sleep = Sleep()
    descriptors = len(os.listdir("/proc/self/fd"))
    with sleep.watch().watching():
        sleep.slept_ns += 600 * S
        await until(lambda: sleep.noticed)
        await asyncio.sleep(0)
    assert sleep.noticed == 1
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_scenario_11_after_a_suspend_the_kernel_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its times to live stood still meanwhile. The lease, which did not, is used on if it still runs."""
    async with rigged(tmp_path, monkeypatch) as rig:
        ino = await rig.create(b"file", b"content")
        await rig.ops.lookup(ROOT, b"file", ME)
        epoch, log = rig.maps.epoch, rig.kernel.log
        log.clear()
        rig.mount.woken()
        assert rig.mount._lease.left_s() == 0, "nothing is for keeping until it is dropped"
        await until(lambda: rig.mount._lease.left_s() > 0)
        assert rig.maps.epoch > epoch
        assert ("epoch",) in log
        assert ("inode", ino) in log
        assert ("attributes", ROOT) in log
        assert await rig.content(ino) == b"content"
