"""What coherence between clients costs: when a change is visible, and what a change and a break take.

Two mounts of one volume on one metaserver; and clients that speak the protocol only, in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

from bench import measure
from bench.protocol import Clients
from bench.results import Figure, Result, Samples
from bench.systems import Proof, Tree, bpfuse, mounted, proof, stats
from fuseclient.bench import works

_DIRECTORIES: Final = 10
_HOLDERS: Final = 100


def run(directory: Path, rounds: int, *, small: bool) -> Result:
    """Measure; all files lie in ``directory``."""
    changes, names = (20, 100) if small else (1000, 10_000)
    samples = Samples()
    with metaserver(directory) as address:
        figures = asyncio.run(_protocol(address, samples, rounds, changes))
        volume = f"bpfuse://{address}/mounts"
        bpfuse("format", volume, "--store", f"file://{directory}/blocks")
        with mounted(volume, directory / "one") as one, mounted(volume, directory / "two") as two:
            figures += [_visible(one, two, samples, changes)]
            figures += _revalidated(one, two, directory, samples, rounds, names)
    return Result("coherence", rounds, {"changes": changes, "names": names, "holders": _HOLDERS}, samples, figures)


@contextlib.contextmanager
def metaserver(directory: Path) -> Iterator[str]:
    """Serve an engine below ``directory`` on a port of the loopback device; give the address."""
    arguments = ["--engine", f"lmdb://{directory}/engine", "--listen", "127.0.0.1:0"]
    command = [sys.executable, "-P", "-m", "fuseclient.cli", "metaserver", *arguments]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        address = re.search(r"tcp:(127\.0\.0\.1:\d+)", server.stderr.readline())
        if address is None:
            raise RuntimeError("the metaserver does not say where it listens")
        yield address[1]
    finally:
        server.terminate()
        server.communicate()


# Mounts


def _visible(one: Path, two: Path, samples: Samples, changes: int) -> Figure:
    """A change through one mount, of a file that the other has in its caches: until an fstat there shows it."""
    (one / "file").write_bytes(b"x")
    descriptor = os.open(two / "file", os.O_RDONLY)
    for number in range(changes):
        os.fstat(descriptor)
        mode = 0o600 | number % 8 << 3 | (number // 8) % 8
        os.chmod(one / "file", mode)
        start = time.perf_counter()
        while os.fstat(descriptor).st_mode & 0o777 != mode:
            pass
        samples.add("visible", "bpfuse", time.perf_counter() - start)
    os.close(descriptor)
    seconds = sorted(samples.seconds["visible", "bpfuse"])
    return Figure("visible, 99th percentile", "bpfuse", "", seconds[len(seconds) * 99 // 100] * 1e3, "ms", 5.0)


def _revalidated(one: Path, two: Path, directory: Path, samples: Samples, rounds: int, names: int) -> list[Figure]:
    """Names that the kernel has expired all at once, each asked for again, beside the proof's stat."""
    tree = Tree(files=names, directories=_DIRECTORIES, size=0)
    tree.create(one)
    paths = tree.paths(two)
    for number in range(_DIRECTORIES):
        (one / f"d{number}" / "other").touch()
    beside = [] if names < Proof.FILES else proof(directory)
    for each in beside:
        each.prepare(Tree(files=Proof.FILES, directories=1, size=4096))
    measure.run("stat_all", 2, paths=paths)
    by_daemon = 0
    for number in range(rounds):
        for system in beside:
            with system.mounted(kernel_ttl_s=0) as served:
                samples.add("revalidate", system.name, measure.run("stat_all", 2, paths=served)[1] / len(served))
        _expire_names(one, two, number)
        before = stats(two)["requests"]["LOOKUP"]
        samples.add("revalidate", "bpfuse", measure.run("stat_all", paths=paths)[0] / names)
        after = stats(two)["requests"]["LOOKUP"]
        if after["kernel"] - before["kernel"] < names:
            raise works.Wrong("the names were not asked for again, so nothing was measured")
        by_daemon = max(by_daemon, after["daemon"] - before["daemon"])
    ratio = samples.ratio("revalidate", "bpfuse", "proof", 1.4)
    return [*ratio, Figure("revalidate, not answered by BPF", "bpfuse", "", by_daemon, "names", 0)]


def _expire_names(one: Path, two: Path, number: int) -> None:
    """Have the other mount's kernel expire every name, as it does when it does not know an inode that is changed."""
    other = f"d{number % _DIRECTORIES}/other"
    os.chmod(one / other, 0o600 | number + 1)
    # The change is made when it returns, so the break was acknowledged, and the names had been expired before.


# The protocol


async def _protocol(address: str, samples: Samples, rounds: int, changes: int) -> list[Figure]:
    async with _clients(address) as clients:
        extra = await clients.messages_of_changes(changes)
        for _ in range(rounds * 10):
            samples.add("break", "nobody holds it", await clients.timed_change(0))
            samples.add("break", f"{_HOLDERS} hold it", await clients.timed_change(_HOLDERS))
    alone, held = samples.median("break", "nobody holds it"), samples.median("break", f"{_HOLDERS} hold it")
    assert alone is not None
    assert held is not None
    return [
        Figure("messages beside request and reply, alone in a directory", "bpfuse", "", extra, "messages", 0),
        Figure(f"a break to {_HOLDERS} holders adds", "bpfuse", "", (held - alone) * 1e3, "ms", 20.0),
    ]


@contextlib.asynccontextmanager
async def _clients(address: str) -> AsyncIterator[Clients]:
    clients = await Clients.connect(f"tcp:{address}", _HOLDERS)
    try:
        yield clients
    finally:
        await clients.close()
