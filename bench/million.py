"""A million entries: how long it takes to warm them up, and what a request about one costs when all lie in the maps.

The kernel may keep nothing (its time-to-live is 0), so that each stat is two requests, of a name and of attributes. The
proof of the datapath answers the same of as many files as it holds, asked for in turn. The files are asked for in the
order of their directories, shuffled in each. Who asks and who answers go before all other processes: a stat changes
between them six times, and whoever came in between would be measured.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from bench import large_directory, measure
from bench.results import Figure, Result, Samples
from bench.systems import Tree, bpfuse, mounted, prefer_server, proof, stats
from fuseclient.volumes import EMBEDDED_NAME

_CACHE: Final = "1G"
_PROCESSES: Final = 4
_DIRECTORIES: Final = 10
#: Of the proof, whose maps hold 65,536.
_OF_PROOF: Final = 20_000
_STAT: Final = "stat, 1,000,000 cached"
_AT_ONCE: Final = f"{_STAT}, {_PROCESSES} processes"
#: Time of a request, and requests a second of several processes, beside the proof's.
_MOST_TIME: Final = 1.4
_LEAST_RATE: Final = 0.85
_WARM_UP_S: Final = 40.0


def run(directory: Path, rounds: int, *, small: bool) -> Result:
    """Measure; all files lie in ``directory``."""
    each, asked = (50, 100) if small else (100_000, 100_000)
    samples, volume = Samples(), f"file://{directory / 'volume'}"
    bpfuse("format", volume)
    for number in range(_DIRECTORIES):
        asyncio.run(large_directory.make(directory / "volume" / "meta", EMBEDDED_NAME, each, b"d%d" % number))
    with ExitStack() as stack:
        cache = ("--kernel-cache-size", _CACHE, "--kernel-ttl", "0")
        point = stack.enter_context(mounted(volume, directory / "mnt", *cache))
        began = time.monotonic()
        bpfuse("warmup", point)
        warm_up_s = time.monotonic() - began
        samples.add("warm-up", "bpfuse bpf", warm_up_s, _DIRECTORIES * each)
        prefer_server(point)
        systems = {"bpfuse bpf": _sample(point, each, asked)}
        for system in [] if small else proof(directory):
            system.preferred = True
            system.prepare(Tree(_OF_PROOF, 1, 4096))
            paths = stack.enter_context(system.mounted(kernel_ttl_s=0))
            systems[system.name] = list(itertools.islice(itertools.cycle(paths), asked))
        for _, (name, paths) in itertools.product(range(rounds), systems.items()):
            _, seconds = measure.run("stat_all", 2, paths=paths, preferred=True)
            samples.add(_STAT, name, seconds, asked)
            parts = [paths[number::_PROCESSES] for number in range(_PROCESSES)]
            samples.add(_AT_ONCE, name, measure.run_at_once("stat_all", parts, preferred=True), asked)
        _check_answered(point)
    figures = samples.ratio(_STAT, "bpfuse bpf", "proof", _MOST_TIME)
    figures += samples.ratio(_AT_ONCE, "bpfuse bpf", "proof", _LEAST_RATE, speed=True)
    limit = None if small else _WARM_UP_S
    figures.append(Figure("warm-up", "bpfuse bpf", "", warm_up_s, "s", limit))
    return Result("million", rounds, {"entries": _DIRECTORIES * each, "asked": asked}, samples, figures)


def _sample(point: Path, each: int, asked: int) -> list[str]:
    rng = random.Random(1)
    return [
        f"{point}/d{number}/{large_directory.name_of(file).decode()}"
        for number in range(_DIRECTORIES)
        for file in rng.sample(range(each), asked // _DIRECTORIES)
    ]


def _check_answered(point: Path) -> None:
    """Raise :exc:`RuntimeError` if the daemon was asked for what should lie in the maps."""
    counted = stats(point)["requests"]
    by_daemon = sum(counted.get(each, {}).get("daemon", 0) for each in ("LOOKUP", "GETATTR"))
    by_kernel = sum(counted.get(each, {}).get("kernel", 0) for each in ("LOOKUP", "GETATTR"))
    if by_daemon * 100 > by_kernel:
        raise RuntimeError(f"the daemon answered {by_daemon} requests, the kernel {by_kernel}: not all is in the maps")
