"""The comparison: every workload, on every system, in rounds in which each system has its turn."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from bench.peers.base import Peer
from bench.workloads.base import Scale, Turn, Workload
from fuseclient.bench.figures import Figures
from fuseclient.errors import UserError

NAME: Final = "comparison.json"
#: What a system's turn fails with if it is not this program's mistake, which is told with its traceback.
_FAILURES: Final = (UserError, RuntimeError, OSError, subprocess.SubprocessError)
#: When a turn took too long it is interrupted, and so is what it then does to end, if that hangs as well.
_AGAIN_S: Final = 60.0


@dataclass
class Measured:
    """One workload: when and on what it was measured, its figures, and which systems did not come through it."""

    name: str
    about: str
    date: str
    machine: dict[str, str]
    rounds: int
    scale: dict[str, int]
    #: What is said of each system that was to have turns.
    systems: dict[str, dict[str, str]]
    left_out: list[str] = field(default_factory=list)
    #: Of all of it, with what is made once.
    seconds: float = 0.0
    #: Of each system's turn in each round.
    turns_s: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    #: What systems did wrong, without failing, by system; one of each round at most.
    wrong: dict[str, list[str]] = field(default_factory=dict)
    figures: Figures = field(default_factory=Figures)

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` takes."""
        return {key: value for key, value in vars(self).items() if key != "figures"} | {"rows": self.figures.to_json()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Measured:
        """Return what :meth:`to_json` gave."""
        return cls(figures=Figures.from_json(content.pop("rows")), **content)


@dataclass
class Comparison:
    """The workloads that were measured, each when it was measured last."""

    workloads: list[Measured] = field(default_factory=list)

    def add(self, measured: Measured, order: Sequence[str]) -> None:
        """Put a workload in its place in ``order``, instead of what was known of it."""
        others = [each for each in self.workloads if each.name != measured.name]
        self.workloads = sorted([*others, measured], key=lambda each: order.index(each.name))

    def write(self, directory: Path) -> None:
        """Write it as JSON."""
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"workloads": [each.to_json() for each in self.workloads]}, indent=1)
        new = directory / f"{NAME}.new"
        new.write_text(text + "\n")
        new.rename(directory / NAME)

    @classmethod
    def read(cls, path: Path) -> Comparison:
        """Read what :meth:`write` wrote. Raises :exc:`FileNotFoundError` if nothing was measured."""
        return cls([Measured.from_json(each) for each in json.loads(path.read_text())["workloads"]])

    def of(self, names: Sequence[str]) -> Comparison:
        """Return these workloads only, of those that were measured."""
        return Comparison([each for each in self.workloads if each.name in names])

    def figures(self) -> dict[str, Figures]:
        """Return the figures by workload."""
        return {each.name: each.figures for each in self.workloads}

    @property
    def systems(self) -> dict[str, dict[str, str]]:
        """What is said of each system, of the workload that was measured last."""
        found: dict[str, dict[str, str]] = {}
        for each in sorted(self.workloads, key=lambda each: each.date):
            found.update(each.systems)
        most = max((each.systems for each in self.workloads), key=len, default={})
        return {name: found[name] for name in dict.fromkeys([*most, *found])}


def compare(
    workloads: Sequence[type[Workload]],
    kinds: Sequence[type[Peer]],
    rounds: int,
    scale: Scale,
    results: Path,
    left_out: Sequence[str] = (),
    order: Sequence[str] = (),
    limit_s: float = math.inf,
) -> Comparison:
    """Measure, and put what is known into ``results`` after each workload, beside the workloads that are there.

    A system that fails in a workload has no more turns in it, and is named with the reason; a workload that cannot be
    prepared is told aloud, and what was known of it stays. ``order``: of the names of all workloads, as others may be
    there. ``limit_s``: no round of a workload begins that would likely end later. Returns what was measured now.
    """
    systems = {kind.name: {"version": kind.version(), "durability": kind.durability} for kind in kinds}
    sizes = {key: int(value) for key, value in asdict(scale).items()}
    known = Comparison.read(results / NAME) if (results / NAME).exists() else Comparison()
    names, done = list(order) or [each.name for each in workloads], list[str]()
    for each in workloads:
        if (missing := each.missing()) is not None:
            _say(f"left out: {each.name}, for want of {missing}")
            continue
        now = time.strftime("%Y-%m-%d %H:%M")
        measured = Measured(each.name, each.about, now, machine(), rounds, sizes, systems, list(left_out))
        with tempfile.TemporaryDirectory(prefix="bpfuse-bench-") as name:
            os.environ["BPFUSE_RUNTIME_DIR"] = f"{name}/run"
            os.mkdir(f"{name}/run")
            try:
                _measure(each(Path(name), scale), kinds, measured, limit_s)
            except Exception:
                traceback.print_exc()
                _say(f"left out: {each.name}, which broke")
                continue
        done.append(each.name)
        known.add(measured, names)
        known.write(results)
    return known.of(done)


def _measure(workload: Workload, kinds: Sequence[type[Peer]], measured: Measured, limit_s: float) -> None:
    start = time.monotonic()
    workload.prepare()
    try:
        longest = 0.0
        for number in range(measured.rounds):
            round_start = time.monotonic()
            if number and round_start + longest > start + limit_s:
                _say(f"{workload.name}: {number} of {measured.rounds} rounds, for want of time")
                measured.rounds = number
                break
            for kind in kinds:
                if kind.name in measured.failed or not workload.suits(kind):
                    continue
                began = time.monotonic()
                turn = Turn(measured.figures, kind)
                failure = _turn(workload, turn)
                took = time.monotonic() - began
                measured.turns_s.setdefault(kind.name, []).append(round(took, 1))
                _say(f"{workload.name}, round {number + 1}: {kind.name}, {took:.1f} s")
                if failure is not None:
                    measured.failed[kind.name] = failure
                    _say(f"{workload.name}: {kind.name} failed: {failure}")
                if turn.wrong:
                    measured.wrong.setdefault(kind.name, []).append("; ".join(turn.wrong))
                    _say(f"{workload.name}: {kind.name} was wrong: {'; '.join(turn.wrong)}")
            longest = max(longest, time.monotonic() - round_start)
    finally:
        workload.close()
    measured.seconds = round(time.monotonic() - start, 1)


def _turn(workload: Workload, turn: Turn) -> str | None:
    """Let a system have its turn; return why it failed, if it did: the others are measured all the same."""
    try:
        with _at_most(workload.turn_limit_s):
            workload.turn(turn)
    except _FAILURES as error:
        return " ".join(str(error).split())[-500:] or type(error).__name__
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"[:500]
    return None


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Interrupt the body, which is the main thread's, with :exc:`TimeoutError` when it takes too long."""

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def machine() -> dict[str, str]:
    """Return what is measured on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "cpus": f"{os.cpu_count()} x {model}",
        "memory": f"{psutil.virtual_memory().total / (1 << 30):.0f} GiB",
        "kernel": f"Linux {platform.release()}",
        "python": platform.python_version(),
        "commit": commit,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
