"""Every fault scenario of the coherence protocol has a test by its number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SCENARIOS = {
    1: "a holder is killed",
    2: "a holder's worker stands still past its deadline",
    3: "a partition, both sides alive",
    4: "breaks are lost, renewals pass",
    5: "a break overtakes the grant that it concerns",
    6: "a directory fetch is in flight when a break is applied",
    7: "the metaserver is killed in a transaction",
    8: "the metaserver is restarted under live holders",
    9: "it is restarted twice within one grace",
    10: "a reply is lost after the commit",
    11: "the wall clock jumps; the machine is suspended",
    12: "an old server still runs after failover",
    13: "the engine is away, or has lost its history",
    14: "a client ignores breaks",
    15: "10,000 holders of one directory",
    16: "renames across, removals and creations under random delays",
    17: "a worker is killed with dirty pages",
    18: "a channel is killed",
    19: "a change on one client, an access on another after it has returned",
    20: "the object store fails for two minutes",
    21: "no space in the engine, the disk cache, the object store",
    22: "an old client and a new server, and the other way",
}

_TEST = re.compile(r"^(?:async )?def test_scenario_0*(\d+)_", re.MULTILINE)


def _tested() -> set[int]:
    files = Path(__file__).parent.glob("t?_*.py")
    return {int(number) for file in files for number in _TEST.findall(file.read_text())}


@pytest.mark.parametrize("number", SCENARIOS, ids=lambda number: f"{number}: {SCENARIOS[number]}")
def test_a_scenario_has_a_test(number: int) -> None:
    assert number in _tested()


def test_no_test_has_another_number() -> None:
    assert _tested() <= SCENARIOS.keys()
