"""Thousands of seeds of the simulation; and that its checker notices when a safety rule does not hold.

A seed that fails here fails again with ``make simulate SEED=n``.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import pytest
from simulation.rules import RULES
from simulation.seeds import verdicts
from simulation.world import Verdict, run, setup_of
from t2_simulation_scenarios import STORIES

SEEDS = 2000
#: Seeds of one test.
PART = 250
SEEDS_OF_A_RULE = 30

#: What must have happened in so many seeds: otherwise they prove less than they seem to.
FAULTS = (
    "cut_a_connection", "partition", "one_way_partition", "freeze_a_worker", "kill_a_worker", "kill_a_client",
    "suspend_a_client", "jump_a_wall_clock", "restart_the_server", "fail_over", "freeze_the_server",
    "kill_a_metaserver", "freeze_a_metaserver",
    "slow_the_network", "fill_the_engine", "confuse_the_engine", "break_the_store",
)  # fmt: skip
CONSEQUENCES = ("full", "lost commits", "store failures", "unknown outcomes")
READS = ("attributes", "bpf", "dentry", "errno", "pages", "readdir", "worker")
CHANGES = (
    "create", "mkdir", "symlink", "link", "unlink", "rmdir", "rename", "exchange", "chmod", "chown", "utimens",
    "truncation", "truncating", "write", "append", "setxattr",
)  # fmt: skip


class Seeds:
    """The verdicts of all seeds, in short; some at a time, each when it is first asked for."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[Counter[str], list[Verdict]]] = {}

    def failed(self, first: int) -> list[Verdict]:
        """Return those that failed of a part, which begins with the seed ``first``."""
        if first not in self._parts:
            counts, failed = Counter[str](), list[Verdict]()
            for verdict in verdicts(first, PART, _processors()):
                counts += verdict.counts
                failed += [verdict] if verdict.complaints else []
            self._parts[first] = counts, failed
        return self._parts[first][1]

    def count(self, what: str) -> int:
        """Return how often something happened in all seeds."""
        for first in range(0, SEEDS, PART):
            self.failed(first)
        return sum(counts[what] for counts, _ in self._parts.values())


def _processors() -> int:
    """Return this process's share of the processors, of those that run tests at the same time."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


@pytest.fixture(scope="module")
def seeds() -> Seeds:
    return Seeds()


@pytest.mark.parametrize("first", range(0, SEEDS, PART))
def test_every_seed_is_right(seeds: Seeds, first: int) -> None:
    failed = seeds.failed(first)
    assert not failed, "\n".join(map(str, failed))


@pytest.mark.parametrize("what", [*FAULTS, *CONSEQUENCES])
def test_a_fault_of_each_kind_came(seeds: Seeds, what: str) -> None:
    assert seeds.count(what) >= 10


@pytest.mark.parametrize("source", READS, ids="from_{}".format)  # no "[bpf]", which is a mode and shared out by itself
def test_each_cache_answered(seeds: Seeds, source: str) -> None:
    assert seeds.count(f"read from {source}") >= 100


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_was_made(seeds: Seeds, what: str) -> None:
    assert seeds.count(f"{what} ok") >= 50


def test_a_seed_is_the_same_every_time() -> None:
    first, second = (run(7, setup_of(7)) for _ in range(2))
    assert first.digest == second.digest
    assert first.counts == second.counts


@pytest.mark.parametrize("clients", [1, 2])
def test_a_client_that_is_alone_removes_names_by_itself(clients: int) -> None:
    """For all of its time, or until another comes: with all faults, on an engine that acknowledges early."""
    removed = 0
    for seed in range(30):
        setup = replace(setup_of(seed), clients=clients, programs=3, operations=80, accel=True, lazy=True, late=True)
        verdict = run(seed, setup)
        assert not verdict.complaints, str(verdict)
        removed += verdict.counts["removed by itself"]
    assert removed > 20 / clients


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in STORIES])
def test_the_checker_notices_that_a_rule_is_off(rule: str) -> None:
    """It does in one of a few seeds, in which the faults come that the rule is for. Other rules have their stories."""
    for seed in range(SEEDS_OF_A_RULE):
        setup = replace(setup_of(seed), clients=3, programs=3, operations=60, accel=True, lazy=False, faults=True)
        setup = replace(setup, kinds=RULES[rule].faults, late=RULES[rule].late, standby=RULES[rule].standby)
        setup = replace(setup, lazy=RULES[rule].lazy)
        if run(seed, replace(setup, rule_off=rule)).complaints:
            assert not run(seed, setup).complaints, "with the rule on"
            return
    pytest.fail(f"nobody noticed that the rule was off: {rule}")
