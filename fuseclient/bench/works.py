"""The works that are timed. Each is done by a process of its own: ``python -m fuseclient.bench.works``.

The first line of standard input is a JSON object: the work's name, its arguments, and the CPU to be bound to, if any.
The process says "ready"; for each further line it does the work once and prints when it began and when it ended, in
seconds of the machine's monotonic clock, so that several processes can begin together and be timed as one.

What is read is compared with what was written, whole, while the clock runs.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

STEP: Final = 1 << 20
_PAGE: Final = 4096


class Wrong(Exception):
    """What was read is not what was written. The text is one line."""


def content(number: int, size: int) -> bytes:
    """Return what file ``number`` holds; no two numbers give the same."""
    return (number.to_bytes(8, "big") * (size // 8 + 1))[:size]


def paths(root: str | Path, files: int, directories: int) -> list[str]:
    """Return the paths of ``files`` files, evenly in ``directories`` directories, directory after directory."""
    return [f"{root}/d{number * directories // files}/f{number}" for number in range(files)]


def shuffled(items: Sequence[str], seed: int = 1) -> list[str]:
    """Return them in an order that is the same each time."""
    mixed = list(items)
    random.Random(seed).shuffle(mixed)
    return mixed


def _number(path: str) -> int:
    return int(path.rpartition("/f")[2])


# Small files


def create_files(paths: list[str], size: int) -> None:
    """Make, write and close each file, and its directory when it is the first in it."""
    made = ""
    for path in paths:
        directory = path.rpartition("/")[0]
        if directory != made:
            os.makedirs(directory, exist_ok=True)
            made = directory
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(descriptor, content(_number(path), size))
        os.close(descriptor)


def read_files(paths: list[str], size: int) -> None:
    """Open, read and close each file once, and compare all of it."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        data = os.read(descriptor, size + 1)
        while len(data) < size and (more := os.read(descriptor, size + 1 - len(data))):
            data += more
        os.close(descriptor)
        if data != content(_number(path), size):
            raise Wrong(f"wrong content in {path}")


def stat_files(paths: list[str], size: int) -> None:
    """Stat each file once, and compare its size."""
    for path in paths:
        if os.stat(path).st_size != size:
            raise Wrong(f"wrong size of {path}")


def list_long(directory: str, files: int) -> None:
    """``ls -lR``; every file must be there."""
    done = subprocess.run(["ls", "-lR", directory], check=True, stdout=subprocess.PIPE)
    _expect(directory, sum(line.startswith(b"-") for line in done.stdout.splitlines()), files)


def find_files(directory: str, files: int) -> None:
    """``find -type f``; every file must be there."""
    done = subprocess.run(["find", directory, "-type", "f"], check=True, stdout=subprocess.PIPE)
    _expect(directory, done.stdout.count(b"\n"), files)


def _expect(directory: str, found: int, files: int) -> None:
    if found != files:
        raise Wrong(f"{found} files are found in {directory}, not {files}")


def remove_files(paths: list[str]) -> None:
    """Unlink each file."""
    for path in paths:
        os.unlink(path)


# Names without content


def make_nodes(paths: list[str]) -> None:
    """Make empty files; their directories are there."""
    for path in paths:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))


def make_directories(paths: list[str]) -> None:
    """Make directories."""
    for path in paths:
        os.mkdir(path)


def remove_directories(paths: list[str]) -> None:
    """Remove empty directories."""
    for path in paths:
        os.rmdir(path)


# Large files


def write_large(path: str, size: int) -> None:
    """Write a file of ``size`` bytes, whole MiB, and fsync it."""
    block = large_block()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // STEP):
            file.write(block)
        os.fsync(file.fileno())


def large_block() -> bytes:
    """Return the MiB that a large file repeats."""
    return random.Random(2).randbytes(STEP)


def read_large(path: str, size: int) -> None:
    """Read a file from its beginning to its end, a MiB at a time, and compare all of it."""
    block, buffer, total = large_block(), bytearray(STEP), 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            start = total % STEP
            same = (
                buffer == block if count == STEP and not start else buffer[:count] == (block * 2)[start : start + count]
            )
            if not same:
                raise Wrong(f"wrong content in {path} near {total}")
            total += count
    if total != size:
        raise Wrong(f"{path} has {total} bytes, not {size}")


def read_at_random(path: str, count: int) -> None:
    """Read 4 KiB at ``count`` random places, and compare them."""
    block = large_block()
    numbers, page = random.Random(1), bytearray(_PAGE)
    with open(path, "rb", buffering=0) as file:
        descriptor, pages = file.fileno(), os.fstat(file.fileno()).st_size // _PAGE
        for _ in range(count):
            offset = numbers.randrange(pages) * _PAGE
            os.preadv(descriptor, [page], offset)
            if page != block[offset % STEP : offset % STEP + _PAGE]:
                raise Wrong(f"wrong content in {path} at {offset}")


# Other programs


def command(arguments: list[str], directory: str | None = None) -> None:
    """Run a program, which must succeed."""
    done = subprocess.run(arguments, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        raise Wrong(f"{' '.join(arguments)}: {done.stderr.decode(errors='replace').strip()[-500:]}")


WORKS: Final[dict[str, Callable[..., None]]] = {
    each.__name__: each
    for each in (
        create_files, read_files, stat_files, list_long, find_files, remove_files, make_nodes, make_directories,
        remove_directories, write_large, read_large, read_at_random, command,
    )
}  # fmt: skip


def main() -> None:
    """Do the work that the first line of standard input names, once for each further line."""
    asked: dict[str, Any] = json.loads(sys.stdin.readline())
    if asked["cpu"] is not None:
        os.sched_setaffinity(0, {asked["cpu"]})
    work, arguments = WORKS[asked["work"]], asked["arguments"]
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.monotonic()
        try:
            work(**arguments)
        except (Wrong, OSError) as error:
            raise SystemExit(f"{asked['work']}: {error}") from None
        print(json.dumps([start, time.monotonic()]), flush=True)


if __name__ == "__main__":
    main()
