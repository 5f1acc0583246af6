"""fio, with the job files in ``bench/fio/``: large files read and written in many ways, and many small ones.

Every read compares the checksum that each 4 KiB carries, so the figures are of reading and checking.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.peers.base import Peer, fresh
from bench.workloads.base import Scale, Turn, Workload

JOBS: Final = Path(__file__).parent.parent / "fio"
_TIMEOUT_S: Final = 600.0
#: From this size on a rate of bytes says more than a rate of operations.
_LARGE_BLOCK: Final = 16 << 10


@dataclass(frozen=True)
class Job:
    """What fio tells of one job, in the direction that the job is about."""

    name: str
    bytes_per_s: float
    operations_per_s: float
    block: int


class Fio(Workload):
    """Workload 2."""

    name = "fio"
    weight = 5
    about = (
        "fio's job files in bench/fio/, each read compared with its checksum; cached: as far as the kernel caches; "
        "writes end with an fsync"
    )

    @classmethod
    def missing(cls) -> str | None:
        return None if shutil.which("fio") else "fio (apt install fio)"

    def suits(self, kind: type[Peer]) -> bool:
        return not (kind.read_only or kind.metadata_only)

    def turn(self, turn: Turn) -> None:
        with fresh(turn.kind, self.directory) as peer:
            self._jobs(turn, peer, "write", "small", *(("direct_write",) if turn.kind.direct_io else ()))
            run(JOBS / "layout.fio", peer.root, self.scale)
            peer.restart()
            self._jobs(turn, peer, "cold", "cached", *(("direct",) if turn.kind.direct_io else ()))

    def _jobs(self, turn: Turn, peer: Peer, *names: str) -> None:
        for name in names:
            for job in run(JOBS / f"{name}.fio", peer.root, self.scale):
                _add(turn, job)


def run(path: Path, directory: Path, scale: Scale) -> list[Job]:
    """Do the jobs of a file in ``directory``. Raises :exc:`RuntimeError` if one fails or reads what is wrong."""
    sizes = {"BENCH_SIZE": str(scale.file_bytes), "BENCH_FILES": str(scale.files)}
    done = subprocess.run(
        ["fio", "--output-format=json", str(path)],
        cwd=directory,
        env={**os.environ, **sizes, "BENCH_DIRECTORY": str(directory)},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"fio {path.name}: {(done.stderr or done.stdout).strip()[:1000]}")
    return list(parse(done.stdout))


def parse(output: str) -> Iterator[Job]:
    """Yield the jobs that fio's JSON, which may stand after other lines, tells of.

    Raises :exc:`RuntimeError` for one that failed.
    """
    report: dict[str, Any] = json.loads(output[output.index("{") :])
    for job in report["jobs"]:
        if job["error"]:
            raise RuntimeError(f"fio: {job['jobname']} ended with error {job['error']}")
        # A job that writes reads again what it wrote, to compare it.
        way = job["write"] if job["write"]["io_bytes"] else job["read"]
        block = way["io_bytes"] // max(1, way["total_ios"])
        yield Job(job["jobname"], way["bw_bytes"], way["iops"], block)


def _add(turn: Turn, job: Job) -> None:
    if job.block >= _LARGE_BLOCK:
        turn.value(job.name, job.bytes_per_s / (1 << 20), "MiB/s")
    else:
        turn.value(job.name, job.operations_per_s, "IOPS")
