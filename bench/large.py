"""Large files, beside the same bytes on the file system that holds the cache.

Buffered sequential reading of a file whole in the disk cache, 4 KiB random preads of it, the first sequential read of
it after a mount without a cache, and sequential writing with an fsync at the end.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from bench import measure
from bench.results import Result, Samples
from bench.systems import bpfuse, mounted, stats
from fuseclient.bench import works

_WAIT_S: Final = 120.0


def run(directory: Path, rounds: int, *, small: bool) -> Result:
    """Measure; all files lie in ``directory``."""
    size, reads = (16 << 20, 500) if small else (1 << 30, 20_000)
    samples = Samples()
    volume, point, plain = f"file://{directory / 'volume'}", directory / "mnt", directory / "plain"
    bpfuse("format", volume)
    paths = {"bpfuse": str(point / "file"), "ext4": str(plain)}
    with mounted(volume, point, "--cache-dir", directory / "cache"):
        for _ in range(rounds):
            for system, path in paths.items():
                (seconds,) = measure.run("write_large", path=path, size=size)
                samples.add("write", system, seconds, size // works.STEP)
        for path in paths.values():
            works.read_large(path, size)
    with mounted(volume, point, "--cache-dir", directory / "cache"):
        (first,) = measure.run("read_large", path=paths["bpfuse"])
        samples.add("first read", "bpfuse", first, size // works.STEP)
        _wait_until_whole(point)
        for _ in range(rounds):
            for system, path in paths.items():
                (seconds,) = measure.run("read_large", path=path)
                samples.add("read", system, seconds, size // works.STEP)
                (seconds,) = measure.run("read_at_random", path=path, count=reads)
                samples.add("pread", system, seconds, reads)
        works.read_large(paths["bpfuse"], size)
    figures = [
        *samples.ratio("read", "bpfuse", "ext4", 0.9, speed=True),
        *samples.ratio("pread", "bpfuse", "ext4", 1.5),
        *samples.ratio("write", "bpfuse", "ext4", 0.6, speed=True),
    ]
    return Result("large", rounds, {"bytes": size, "reads": reads}, samples, figures)


def _wait_until_whole(point: Path) -> None:
    """Wait until the file that was read lies whole in the cache."""
    deadline = time.monotonic() + _WAIT_S
    while not stats(point)["caches"].get("whole_files", {}).get("files"):
        if time.monotonic() > deadline:
            raise works.Wrong("the file did not come into the disk cache")
        time.sleep(0.05)
