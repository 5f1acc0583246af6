"""``python -m bench.large``: large files, beside the same bytes on the file system that holds the cache.

Ratios of one run: buffered sequential reading of a file whole in the disk cache, 4 KiB random preads of it, the first
sequential read of it after a mount without a cache, and sequential writing with an fsync at the end. Rounds alternate
between the two; each has its best time, for what else the machine does only adds to one. Exit code 1: one is missed.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from fuseclient import control, runtime

_STEP: Final = 1 << 20
_RANDOM_READS: Final = 20_000
_PAGE: Final = 4096
_WAIT_S: Final = 120.0


@dataclass(frozen=True)
class Ratio:
    """How two times compare. ``speed``: of speeds, which is to be at least ``limit``; else of times, at most."""

    what: str
    bpfuse_s: float
    plain_s: float
    limit: float | None
    speed: bool

    @property
    def value(self) -> float:
        return self.plain_s / self.bpfuse_s if self.speed else self.bpfuse_s / self.plain_s

    @property
    def holds(self) -> bool:
        return self.limit is None or (self.value >= self.limit if self.speed else self.value <= self.limit)


def main(
    mebibytes: Annotated[int, typer.Option(min=16, help="The size of the file.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in each of which both have their turn.")] = 9,
) -> None:
    """Measure reading and writing of a large file."""
    with tempfile.TemporaryDirectory(prefix="bpfuse-bench-") as name:
        os.environ["BPFUSE_RUNTIME_DIR"] = f"{name}/run"
        os.mkdir(f"{name}/run")
        ratios = measure(Path(name), mebibytes << 20, rounds)
    Console().print(_table(ratios))
    raise typer.Exit(0 if all(ratio.holds for ratio in ratios) else 1)


def measure(directory: Path, size: int, rounds: int) -> list[Ratio]:
    """Return the ratios; all files lie in ``directory``."""
    volume, point, plain = f"file://{directory / 'volume'}", directory / "mnt", directory / "plain"
    point.mkdir()
    _write(plain, size)
    _run("format", volume)
    with _mounted(volume, point, directory / "cache"):
        path = point / "file"
        writing = _both(lambda each: _write(each, size), [path, directory / "plain-written"], max(2, rounds // 3))
    with _mounted(volume, point, directory / "cache"):
        first = _timed(lambda: _read(path))
        _until_whole(point)
        descriptors = [os.open(each, os.O_RDONLY) for each in (path, plain)]
        reading = _both(_read, [path, plain], rounds)
        at_random = _both(_read_at_random, descriptors, rounds)
        for descriptor in descriptors:
            os.close(descriptor)
    return [
        Ratio("sequential read, whole in the cache", *reading, 0.9, speed=True),
        Ratio("4 KiB random pread, whole in the cache", *at_random, 1.5, speed=False),
        Ratio("sequential read, the first", first, reading[1], None, speed=True),
        Ratio("sequential write and fsync", *writing, 0.6, speed=True),
    ]


def _both(work: Callable[..., object], of: list[Path] | list[int], rounds: int) -> tuple[float, float]:
    """Return the least seconds that the work on each of two took."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for each, taken in zip(of, times, strict=True):
            taken.append(_timed(lambda each=each: work(each)))  # type: ignore[misc]
    return min(times[0]), min(times[1])


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _read(path: Path) -> None:
    buffer = bytearray(_STEP)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _read_at_random(descriptor: int) -> None:
    pages = os.fstat(descriptor).st_size // _PAGE
    numbers = random.Random(1)
    buffer = [bytearray(_PAGE)]
    for _ in range(_RANDOM_READS):
        os.preadv(descriptor, buffer, numbers.randrange(pages) * _PAGE)


def _write(path: Path, size: int) -> None:
    block = random.Random(2).randbytes(_STEP)
    with path.open("wb", buffering=0) as file:
        for _ in range(size // _STEP):
            file.write(block)
        os.fsync(file.fileno())


@contextlib.contextmanager
def _mounted(volume: str, point: Path, cache: Path) -> Iterator[None]:
    _run("mount", volume, point, "--cache-dir", cache)
    try:
        yield
    finally:
        _run("umount", point)


def _until_whole(point: Path) -> None:
    """Wait until the file that was read lies whole in the cache."""
    deadline = time.monotonic() + _WAIT_S
    socket = runtime.directory_of(str(point)).control_socket
    while not control.ask(socket, "stats", timeout_s=_WAIT_S)["caches"].get("whole_files", {}).get("files"):
        if time.monotonic() > deadline:
            raise SystemExit("the file did not come into the disk cache")
        time.sleep(0.05)


def _run(*arguments: str | Path) -> None:
    command = [sys.executable, "-P", "-m", "fuseclient.cli", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _table(ratios: list[Ratio]) -> Table:
    table = Table(title="bpfuse to the file system below", title_justify="left")
    for heading in ("workload", "ratio of", "ratio", "limit", ""):
        table.add_column(heading)
    for ratio in ratios:
        of = "speeds" if ratio.speed else "times"
        limit = "" if ratio.limit is None else f"{ratio.limit:.2f}"
        verdict = "" if ratio.limit is None else "holds" if ratio.holds else "missed"
        table.add_row(ratio.what, of, f"{ratio.value:.2f}", limit, verdict)
    return table


if __name__ == "__main__":
    typer.run(main)
