"""Several clients: one mount reads files that it has cached, while another mount of the volume changes them.

A read is stale if it gives what was there before a change that had returned when the read began. bpfuse promises that
there is none; JuiceFS and SeaweedFS promise less, and are counted all the same.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from bench.coherence import metaserver
from bench.peers.base import Peer, fresh, need, run
from bench.peers.juicefs import JuicefsRedis
from bench.systems import bpfuse
from bench.workloads.base import Turn, Workload

_RATES: Final = (1, 10, 100)
_SECONDS: Final = 1.0
_FILES: Final = 200


@contextlib.contextmanager
def _bpfuse(directory: Path, *reader: str) -> Iterator[tuple[Path, Path]]:
    with metaserver(directory) as address:
        url = f"bpfuse://{address}/clients"
        bpfuse("format", url, "--store", f"file://{directory}/blocks")
        with contextlib.ExitStack() as stack:
            for name, options in (("writer", ()), ("reader", reader)):
                (directory / name).mkdir()
                bpfuse("mount", url, directory / name, "--cache-dir", directory / f"cache-{name}", *options)
                stack.callback(bpfuse, "umount", directory / name)
            yield directory / "writer", directory / "reader"


@contextlib.contextmanager
def _juicefs(directory: Path) -> Iterator[tuple[Path, Path]]:
    with fresh(JuicefsRedis, directory) as peer:
        assert isinstance(peer, JuicefsRedis)
        second = directory / "second"
        second.mkdir()
        places = ["--log", f"{directory}/second.log", "--cache-dir", f"{directory}/second-cache"]
        run(need("juicefs"), "mount", "-d", "--no-usage-report", *places, peer.meta_url(), second)
        try:
            yield peer.root, second
        finally:
            run(need("juicefs"), "umount", second)


#: By the name of a system: the mount that is written to, and the one that is read.
_PAIRS: Final[dict[str, Callable[[Path], contextlib.AbstractContextManager[tuple[Path, Path]]]]] = {
    "bpfuse": _bpfuse,
    "bpfuse dataset": lambda directory: _bpfuse(directory, "--profile", "dataset"),
    "bpfuse off": lambda directory: _bpfuse(directory, "--accel", "off"),
    "juicefs": _juicefs,
}


class Clients(Workload):
    """Workload 6."""

    name = "clients"
    weight = 2
    about = (
        f"one mount reads {_FILES} cached files of 4 KiB over and over, while another changes 1, 10 and 100 of them a "
        "second; stale: a read that began after a change had returned, and gave what was before it"
    )

    def suits(self, kind: type[Peer]) -> bool:
        return kind.name in _PAIRS

    def turn(self, turn: Turn) -> None:
        directory = self.directory / f"{turn.kind.name}-{len(list(self.directory.iterdir()))}".replace(" ", "-")
        directory.mkdir()
        with _PAIRS[turn.kind.name](directory) as (writer, reader):
            for rate in _RATES:
                changes = f"{rate} change{'s' if rate > 1 else ''} a second"
                found = _measure(writer, reader, rate, 0.5 if self.scale.quick else _SECONDS)
                turn.value(f"reads, {changes}", found["reads"] / found["seconds"], "reads/s")
                turn.value(f"stale of 1,000 reads, {changes}", found["stale"] / found["reads"] * 1000, "stale")
                if found["stale"] and turn.kind.name.startswith("bpfuse"):
                    raise RuntimeError(f"{found['stale']:.0f} reads were stale, with {changes}")


def _measure(writer: Path, reader: Path, rate: int, seconds: float) -> dict[str, float]:
    words = [writer, reader, _FILES, rate, seconds]
    command = [sys.executable, "-m", "bench.workloads.stale_reads", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-1000:])
    found: dict[str, float] = json.loads(done.stdout)
    return found
