"""Making small files, and unpacking a source tree: bpfuse in its modes, beside ext4 and JuiceFS on Redis."""

from __future__ import annotations

from pathlib import Path

from bench import measure, peers
from bench.peers.base import fresh
from bench.results import Result, Samples

_OWN = ["ext4", "bpfuse", "bpfuse interval", "bpfuse off"]


def run(directory: Path, rounds: int, *, small: bool) -> Result:
    """Measure; all files lie in ``directory``."""
    files, sources = (20, 40) if small else (2000, 5000)
    archive = str(directory / "sources.tar")
    measure.pack(archive, sources)
    samples, kinds = Samples(), peers.choose(_OWN if small else [*_OWN, "juicefs"])
    for _ in range(rounds):
        for kind in kinds:
            with fresh(kind, directory) as peer:
                samples.add("create", kind.name, _create(peer.root / "created", files), files)
                samples.add("unpack", kind.name, _unpack(peer.root / "unpacked", archive), sources)
    figures = [
        *samples.ratio("create", "bpfuse", "juicefs", 1.0),
        *samples.ratio("create", "bpfuse interval", "juicefs", 0.5),
        *samples.ratio("unpack", "bpfuse", "juicefs", 0.5),
        *samples.ratio("unpack", "bpfuse interval", "juicefs", None),
    ]
    return Result("writes", rounds, {"files": files, "sources": sources}, samples, figures)


def _create(target: Path, files: int) -> float:
    target.mkdir()
    (seconds,) = measure.run("create", directory=str(target), files=files)
    measure.check_created(str(target), files)
    return seconds


def _unpack(target: Path, archive: str) -> float:
    target.mkdir()
    (seconds,) = measure.run("unpack", directory=str(target), archive=archive)
    measure.check_unpacked(str(target), archive)
    return seconds
