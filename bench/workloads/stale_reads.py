"""Reading through one mount what another changes.

``python -m bench.workloads.stale_reads WRITER READER FILES RATE SECONDS``; the first two are mount points.
Two processes share, in memory, the version of each file that has certainly been written: the writing one stores it when
its close has returned, the reading one looks it up before each open. Prints reads, stale ones and seconds as JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Final

_BYTES: Final = 4096
_VERSION: Final = struct.Struct("<Q")


class Versions:
    """The version of each file that is there for everybody, shared with forked processes."""

    def __init__(self, files: int) -> None:
        self._memory = mmap.mmap(-1, files * _VERSION.size)

    def __getitem__(self, number: int) -> int:
        version: int = _VERSION.unpack_from(self._memory, number * _VERSION.size)[0]
        return version

    def __setitem__(self, number: int, version: int) -> None:
        _VERSION.pack_into(self._memory, number * _VERSION.size, version)


def write(path: str, version: int) -> None:
    """Write a file's version into all of it, in place, and close it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(descriptor, _VERSION.pack(version) * (_BYTES // _VERSION.size))
    os.close(descriptor)


def read(path: str) -> int:
    """Return the version that a file has, whole. Raises :exc:`ValueError` if it is a mixture."""
    descriptor = os.open(path, os.O_RDONLY)
    data = os.read(descriptor, _BYTES + 1)
    os.close(descriptor)
    if len(data) != _BYTES or data != data[: _VERSION.size] * (_BYTES // _VERSION.size):
        raise ValueError(f"wrong content in {path}")
    version: int = _VERSION.unpack_from(data)[0]
    return version


def change(writer: str, versions: Versions, files: int, rate: float) -> None:
    """Change one file after another, ``rate`` times a second, until killed."""
    start, done = time.monotonic(), 0
    while True:
        number = done % files
        version = versions[number] + 1
        write(f"{writer}/f{number}", version)
        versions[number] = version
        done += 1
        time.sleep(max(0.0, start + done / rate - time.monotonic()))


def measure(reader: str, versions: Versions, files: int, seconds: float) -> dict[str, float]:
    """Read all files over and over for ``seconds``, and count."""
    reads = stale = 0
    start = time.monotonic()
    while (now := time.monotonic() - start) < seconds:
        for number in range(files):
            least = versions[number]
            stale += read(f"{reader}/f{number}") < least
            reads += 1
    return {"reads": reads, "stale": stale, "seconds": now}


def main() -> None:
    """Fill the files, have one process change them, and read them."""
    writer, reader, count, rate, seconds = sys.argv[1:]
    files = int(count)
    versions = Versions(files)
    for number in range(files):
        write(f"{writer}/f{number}", 1)
        versions[number] = 1
    deadline = time.monotonic() + 10
    # What the reader has not heard of yet at the beginning is not counted.
    while any(not Path(f"{reader}/f{number}").exists() for number in range(files)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in range(files):
        read(f"{reader}/f{number}")
    child = os.fork()
    if child == 0:
        change(writer, versions, files, float(rate))
    try:
        found = measure(reader, versions, files, float(seconds))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
