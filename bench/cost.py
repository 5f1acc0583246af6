"""What making, unpacking and removing files costs: CPU time of each process, and requests of the kernel, a file.

CPU time is what can be compared while other things run. No figure has a limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psutil

from bench import measure
from bench.results import Figure, Result, Samples
from bench.systems import bpfuse, stats

_MODES: Final = {"commit": ["--durability", "commit"], "interval": ["--durability", "interval"]}


def run(directory: Path, rounds: int, *, small: bool) -> Result:
    """Measure once, whatever ``rounds`` says; all files lie in ``directory``."""
    files = 20 if small else 1000
    archive = str(directory / "sources.tar")
    measure.pack(archive, files)
    samples, figures = Samples(), list[Figure]()
    for mode, options in _MODES.items():
        url, point = f"file://{directory}/{mode}", directory / f"mnt-{mode}"
        point.mkdir()
        bpfuse("format", url)
        bpfuse("mount", url, point, *options)
        try:
            for work, do in _works(point, archive, files).items():
                figures += _costs(f"{work}, {mode}", point, do, files, samples)
        finally:
            bpfuse("umount", point)
    return Result("cost", 1, {"files": files}, samples, figures)


def _works(point: Path, archive: str, files: int) -> dict[str, Callable[[], list[float]]]:
    for name in ("created", "unpacked", "directories"):
        (point / name).mkdir()
    return {
        "create": lambda: measure.run("create", directory=f"{point}/created", files=files),
        "unpack": lambda: measure.run("unpack", directory=f"{point}/unpacked", archive=archive),
        "remove": lambda: measure.run("remove", directory=f"{point}/unpacked"),
        "mkdir": lambda: measure.run("make_directories", directory=f"{point}/directories", count=files),
    }


def _costs(work: str, point: Path, do: Callable[[], list[float]], files: int, samples: Samples) -> list[Figure]:
    processes = _processes(point)
    before, asked = {name: _cpu_s(pid) for name, pid in processes.items()}, _requests(stats(point))
    samples.add(work, "bpfuse", do()[0], files)
    after = {name: _cpu_s(pid) for name, pid in processes.items()}
    requests = {who: count - asked[who] for who, count in _requests(stats(point)).items()}
    spent = [Figure(work, name, "", (after[name] - before[name]) / files * 1e6, "us") for name in processes]
    return spent + [
        Figure(work, f"answered by {who}", "", count / files, "requests") for who, count in requests.items()
    ]


def _processes(point: Path) -> dict[str, int]:
    """Return the processes of a mount."""
    worker = int(stats(point)["worker"]["pid"])
    channel = psutil.Process(worker).parent()
    assert channel is not None
    (metaserver,) = (each.pid for each in channel.children() if each.pid != worker)
    return {"channel": channel.pid, "worker": worker, "metaserver": metaserver}


def _cpu_s(pid: int) -> float:
    """Return the seconds that a process has run, of all its threads that live."""
    nanoseconds = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        nanoseconds += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    return nanoseconds / 1e9


def _requests(figures: dict[str, Any]) -> dict[str, int]:
    by_opcode = figures["requests"].values()
    return {who: sum(each[who] for each in by_opcode) for who in ("kernel", "daemon")}
