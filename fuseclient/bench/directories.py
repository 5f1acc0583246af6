"""Measure directories of any file systems, beside each other: ``bpfuse bench``.

Nothing can be made cold here, as nothing is mounted here: the first read is of files that have just been written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fuseclient.bench.figures import Figures
from fuseclient.bench.timing import share, timed
from fuseclient.bench.works import STEP, paths, shuffled
from fuseclient.errors import UserError, reason

_PER_DIRECTORY: Final = 100
_RANDOM_READS: Final = 5000


@dataclass(frozen=True)
class Size:
    """How much is done in each round: small files of ``file_bytes`` by ``processes``, and one of ``large_bytes``."""

    files: int = 1000
    file_bytes: int = 4096
    processes: int = 1
    large_bytes: int = 64 << 20


def measure(directories: Sequence[str], size: Size, rounds: int, tell: Callable[[str], None]) -> Figures:
    """Measure each directory once a round, in a new directory below it that is removed at its end.

    ``tell`` is called with what is being done. Raises :exc:`UserError` if it cannot be done, or if what is read is not
    what was written.
    """
    figures = Figures()
    for number in range(rounds):
        for directory in directories:
            tell(f"round {number + 1} of {rounds}: {directory}")
            try:
                below = Path(tempfile.mkdtemp(prefix="bpfuse-bench-", dir=directory))
            except OSError as error:
                raise UserError(f"cannot make a directory in {directory}: {reason(error)}") from None
            try:
                _small(figures, directory, below, size)
                _large(figures, directory, below, size)
            finally:
                shutil.rmtree(below, ignore_errors=True)
    return figures


def _small(figures: Figures, directory: str, below: Path, size: Size) -> None:
    files, each = size.files, size.file_bytes
    tree = paths(below / "small", files, max(size.processes, files // _PER_DIRECTORY))

    def run(work: str, items: list[str], *, passes: int = 1, **arguments: int) -> list[float]:
        return timed(work, [{"paths": part, **arguments} for part in share(items, size.processes)], passes=passes)

    def add(name: str, seconds: float) -> None:
        figures.add_time(name, directory, seconds, files)

    (created,) = run("create_files", tree, size=each)
    add("create, write, close", created)
    first, again = run("read_files", shuffled(tree), passes=2, size=each)
    add("open, read, close", first)
    add("the same again", again)
    first, again = run("stat_files", shuffled(tree), passes=2, size=each)
    add("stat", first)
    add("stat again", again)
    listing = [{"directory": str(below / "small"), "files": files}]
    add("ls -lR", timed("list_long", listing)[0])
    add("find", timed("find_files", listing)[0])
    add("unlink", run("remove_files", tree)[0])


def _large(figures: Figures, directory: str, below: Path, size: Size) -> None:
    path, mebibytes = os.fspath(below / "large"), size.large_bytes // STEP
    if mebibytes == 0:
        return
    whole = [{"path": path, "size": mebibytes * STEP}]
    figures.add("write and fsync a large file", directory, mebibytes / timed("write_large", whole)[0], "MiB/s")
    figures.add("read it", directory, mebibytes / timed("read_large", whole, passes=2)[1], "MiB/s")
    (seconds,) = timed("read_at_random", [{"path": path, "count": _RANDOM_READS}])
    figures.add_time("pread 4 KiB of it at random", directory, seconds, _RANDOM_READS)
