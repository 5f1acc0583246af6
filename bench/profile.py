"""``python -m bench.profile WORKLOAD``: where the time of a workload goes, on bpfuse.

Each worker and metaserver that the workload starts is sampled by py-spy, the whole machine by perf if it is there, and
the BPF programs are counted by the kernel (kernel.bpf_stats_enabled). Tables go to the terminal; the samples as folded
stacks, which speedscope and flamegraph.pl take, into ``bench/results/profile/``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import psutil
import typer
from rich.console import Console
from rich.table import Table

from bench import peers, workloads
from bench.comparison import compare
from bench.peers.base import program
from bench.results import DIRECTORY
from bench.workloads.base import Scale

_ROLES: Final = {"fuseclient.worker": "worker", "metaserver": "metaserver"}
_LOOK_S: Final = 0.1
_END_S: Final = 30.0
_PER_SECOND: Final = 250
_BPF_STATS: Final = Path("/proc/sys/kernel/bpf_stats_enabled")
_SHOWN: Final = 25
#: The number of the line in a frame, which is "function (file:line)".
_LINE: Final = re.compile(r":\d+(?=\)$)")


class Sampler:
    """Watches for processes of bpfuse that belong to this run, and has py-spy sample each."""

    def __init__(self, directory: Path, py_spy: str) -> None:
        self._directory = directory
        self._py_spy = py_spy
        self._samplers: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        #: By program: runs, and nanoseconds in all.
        self.programs: dict[int, tuple[str, int, int]] = {}

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Sample while the body runs."""
        self._thread.start()
        try:
            yield
        finally:
            self._done.set()
            self._thread.join()
            for _, sampler in self._samplers.values():
                if sampler.poll() is None:
                    sampler.send_signal(signal.SIGINT)
                sampler.wait(_END_S)

    def _watch(self) -> None:
        while not self._done.wait(_LOOK_S):
            for process in psutil.process_iter(["cmdline"]):
                role = _role(process)
                if role is not None and process.pid not in self._samplers:
                    self._samplers[process.pid] = (role, self._sample(process.pid, role))
            self._count_programs()

    def _sample(self, pid: int, role: str) -> subprocess.Popen[bytes]:
        path = self._directory / f"{role}-{pid}.folded"
        options = ["--format", "raw", "--rate", str(_PER_SECOND), "--nonblocking", "--duration", "86400"]
        return subprocess.Popen(
            [self._py_spy, "record", "--pid", str(pid), "--output", str(path), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _count_programs(self) -> None:
        done = subprocess.run(["bpftool", "prog", "show", "-j"], capture_output=True, check=False)
        if done.returncode:
            return
        for each in json.loads(done.stdout):
            if each.get("run_cnt"):
                self.programs[each["id"]] = (each.get("name", ""), each["run_cnt"], each["run_time_ns"])

    def samples(self, role: str) -> Counter[tuple[str, ...]]:
        """Return how often each stack of the processes of a role was seen."""
        found: Counter[tuple[str, ...]] = Counter()
        for path in sorted(self._directory.glob(f"{role}-*.folded")):
            found += parse_folded(path.read_text())
        return found


def parse_folded(text: str) -> Counter[tuple[str, ...]]:
    """Return the stacks of folded lines, "outer;inner count", with how often each was seen."""
    found: Counter[tuple[str, ...]] = Counter()
    for line in text.splitlines():
        stack, _, count = line.rpartition(" ")
        found[tuple(stack.split(";"))] += int(count)
    return found


def by_function(samples: Counter[tuple[str, ...]]) -> list[tuple[str, int, int]]:
    """Return the functions with how often each was the innermost and how often anywhere, the busiest first."""
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for stack, count in samples.items():
        names = [_LINE.sub("", frame) for frame in stack]
        own[names[-1]] += count
        for name in set(names):
            whole[name] += count
    return [
        (name, own[name], count) for name, count in sorted(whole.items(), key=lambda each: (-own[each[0]], -each[1]))
    ]


def _role(process: psutil.Process) -> str | None:
    """Return what a process of this run's mounts is; None: it is none of them."""
    words = process.info["cmdline"] or []
    role = next(
        (_ROLES[word] for before, word in itertools.pairwise(words) if before == "-m" and word in _ROLES),
        None,
    )
    if role is None:
        return None
    with contextlib.suppress(psutil.Error):
        if process.environ().get("BPFUSE_RUNTIME_DIR") == os.environ.get("BPFUSE_RUNTIME_DIR"):
            return role
    return None


@contextlib.contextmanager
def _bpf_counted() -> Iterator[None]:
    """Have the kernel count the runs of BPF programs, which costs each some 20 ns."""
    before = _BPF_STATS.read_text()
    _BPF_STATS.write_text("1")
    try:
        yield
    finally:
        _BPF_STATS.write_text(before)


@contextlib.contextmanager
def _perf(directory: Path) -> Iterator[None]:
    """Sample the whole machine, if perf is there."""
    perf = shutil.which("perf")
    if perf is None:
        print("left out: perf (apt install linux-perf)")
        yield
        return
    data = directory / "perf.data"
    options = ["-a", "-e", "cpu-clock", "-F", str(_PER_SECOND), "-g", "-o", str(data)]
    with (directory / "perf.log").open("wb") as log:
        recorder = subprocess.Popen([perf, "record", *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield
        finally:
            recorder.send_signal(signal.SIGINT)
            recorder.wait(_END_S)
        command = [
            perf,
            "report",
            "-i",
            str(data),
            "--stdio",
            "--no-children",
            "-g",
            "none",
            "-F",
            "overhead,comm,dso,symbol",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    (directory / "perf.txt").write_text(done.stdout)


def main(
    workload: Annotated[str, typer.Argument(help=f"Of {', '.join(each.name for each in workloads.ALL)}.")],
    system: Annotated[str, typer.Option(help="bpfuse, or one of its modes.")] = "bpfuse",
    files: Annotated[int, typer.Option(min=20)] = 1000,
    quick: Annotated[bool, typer.Option("--quick/--full", help="As in make bench-quick, or whole.")] = True,
) -> None:
    """Profile one workload on bpfuse."""
    directory, py_spy = DIRECTORY / "profile" / workload, program("py-spy")
    if py_spy is None:
        raise SystemExit("py-spy is not there (pip install py-spy==0.4.3)")
    try:
        chosen, kinds = workloads.choose([workload]), peers.choose([system])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    sampler = Sampler(directory, py_spy)
    with _bpf_counted(), _perf(directory), sampler.sampling():
        compare(chosen, kinds, 1, Scale(files=files, quick=quick), directory)
    _show(sampler, directory)


def _show(sampler: Sampler, directory: Path) -> None:
    console = Console(width=None if Console().is_terminal else 140)
    for role in _ROLES.values():
        samples = sampler.samples(role)
        (directory / f"{role}.folded").write_text("".join(f"{';'.join(s)} {n}\n" for s, n in sorted(samples.items())))
        table = Table(title=f"{role}: {sum(samples.values())} samples", title_justify="left")
        for heading in ("function", "itself", "with what it calls"):
            table.add_column(heading, justify="left" if heading == "function" else "right")
        total = max(1, sum(samples.values()))
        for name, own, whole in by_function(samples)[:_SHOWN]:
            table.add_row(name, f"{own / total:.1%}", f"{whole / total:.1%}")
        console.print(table)
    for name, runs, nanoseconds in sorted(sampler.programs.values(), key=lambda each: -each[2])[:5]:
        console.print(f"BPF program {name}: {runs} runs, {nanoseconds / max(1, runs):.0f} ns each")
    report = directory / "perf.txt"
    if report.exists():
        lines = [line for line in report.read_text().splitlines() if line and not line.startswith("#")]
        console.print("perf, the whole machine:\n" + "\n".join(lines[:_SHOWN]), markup=False, highlight=False)
    console.print(f"samples: {directory}")


if __name__ == "__main__":
    typer.run(main)
