"""One measurement, in a process of its own and bound to one CPU: ``python -m bench.measure``, a JSON object on stdin.

Prints the seconds that each pass took, as a JSON list. What is read is checked; what is written by :func:`check_*`,
afterwards and off the clock.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from fuseclient.bench.works import STEP, Wrong, large_block, write_large

SMALL_BYTES: Final = 4096


def prefer(pid: int) -> None:
    """Let a process go before all others of the machine, of which none can be told from a slow answer then.

    A caller and its server are to be preferred alike. Raises :exc:`PermissionError` unless root asks.
    """
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setscheduler(int(thread.name), os.SCHED_RR, os.sched_param(1))


def run(work: str, passes: int = 1, *, preferred: bool = False, **arguments: Any) -> list[float]:
    """Do a work of :data:`WORKS` in a bound process of its own; return the seconds of each pass.

    ``preferred``: it goes before all others.

    Raises :exc:`subprocess.CalledProcessError`, with what it said on its standard error, if it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "bench.measure"],
        input=json.dumps({"work": work, "passes": passes, "arguments": arguments, "preferred": preferred}),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def run_at_once(work: str, parts: list[list[str]], *, preferred: bool = False) -> float:
    """Do a work on the paths of each part in a process of its own, all at once, bound to the CPUs in turn.

    Return the seconds of the slowest. Raises :exc:`Wrong` if one fails.
    """
    cpus = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "bench.measure"]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(len(parts))
    ]
    for number, (process, paths) in enumerate(zip(processes, parts, strict=True)):
        assert process.stdin is not None
        asked = {"work": work, "passes": 1, "arguments": {"paths": paths}, "preferred": preferred}
        asked["cpu"] = cpus[number % len(cpus)]
        process.stdin.write(json.dumps(asked))
        process.stdin.close()
    seconds = []
    for process in processes:
        assert process.stdout is not None
        told = process.stdout.read()
        if process.wait():
            raise Wrong("one of several processes failed")
        seconds += json.loads(told)
    return float(max(seconds))


# Works


def read_all(paths: list[str]) -> None:
    """Open, read and close each file once; a file holds one byte, repeated."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        data = os.read(descriptor, STEP)
        os.close(descriptor)
        if not data or data[0] != data[-1]:
            raise Wrong(f"wrong content in {path}")


def stat_all(paths: list[str]) -> None:
    """Stat each file once, from within its directory: the directories on the way to it are not looked up."""
    for name in _from_within(paths):
        os.stat(name)


def getxattr_all(paths: list[str]) -> None:
    """Ask each file for an extended attribute that it does not have, from within its directory as well."""
    for name in _from_within(paths):
        try:
            os.getxattr(name, "user.none")
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
        else:
            raise Wrong(f"{name} has an attribute that nobody set")


def _from_within(paths: list[str]) -> Iterator[str]:
    """Go to the directory of each path, and give the name there."""
    here = ""
    for directory, name in map(os.path.split, paths):
        if directory != here:
            os.chdir(directory)
            here = directory
        yield name


def command(words: list[str]) -> None:
    """Run a command to its end; what it prints is not looked at."""
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def create(directory: str, files: int) -> None:
    """Make, write and close files of 4 KiB."""
    for number in range(files):
        descriptor = os.open(f"{directory}/f{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(descriptor, small_content(number))
        os.close(descriptor)


def small_content(number: int) -> bytes:
    return number.to_bytes(8) * (SMALL_BYTES // 8)


def check_created(directory: str, files: int) -> None:
    """Raise :exc:`Wrong` unless the files are as :func:`create` makes them."""
    for number in range(files):
        with open(f"{directory}/f{number}", "rb") as file:
            if file.read() != small_content(number):
                raise Wrong(f"wrong content in {file.name}")


def unpack(directory: str, archive: str) -> None:
    """Unpack a source tree, as root does."""
    subprocess.run(["tar", "-xf", archive, "-C", directory], check=True)


def check_unpacked(directory: str, archive: str) -> None:
    """Raise :exc:`Wrong` unless the tree is what the archive has."""
    compared = subprocess.run(["tar", "-df", archive, "-C", directory], capture_output=True, text=True, check=False)
    if compared.returncode:
        raise Wrong(f"the tree in {directory} is not the archive's: {compared.stdout.splitlines()[:1]}")


def remove(directory: str) -> None:
    """Remove a tree."""
    subprocess.run(["rm", "-rf", directory], check=True)


def make_directories(directory: str, count: int) -> None:
    """Make empty directories."""
    for number in range(count):
        os.mkdir(f"{directory}/d{number}")


def read_large(path: str) -> None:
    """Read a file from its beginning to its end, a MiB at a time."""
    buffer = bytearray(STEP)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def read_at_random(path: str, count: int) -> None:
    """Read 4 KiB at random places, and check the first bytes of each by the block that the file repeats."""
    block = large_block()
    numbers, page = random.Random(1), bytearray(SMALL_BYTES)
    with open(path, "rb", buffering=0) as file:
        descriptor, pages = file.fileno(), os.fstat(file.fileno()).st_size // SMALL_BYTES
        for _ in range(count):
            offset = numbers.randrange(pages) * SMALL_BYTES
            os.preadv(descriptor, [page], offset)
            if page[:16] != block[offset % STEP : offset % STEP + 16]:
                raise Wrong(f"wrong content in {path} at {offset}")


WORKS: Final[dict[str, Callable[..., None]]] = {
    each.__name__: each
    for each in (
        read_all, stat_all, getxattr_all, command,
        create, unpack, remove, make_directories, write_large, read_large, read_at_random,
    )
}  # fmt: skip


def pack(path: str, files: int) -> None:
    """Make the archive of a tree that is like a program's sources: mostly small files, some of 100 KiB and more."""
    rng = random.Random(7)
    with tarfile.open(path, "w") as archive:
        for number in range(files):
            size = min(int(rng.lognormvariate(8.4, 1.4)), 400_000)
            member = tarfile.TarInfo(f"src/d{number // 40}/f{number}.c")
            member.size, member.mtime, member.mode = size, 1_700_000_000 + number, 0o644
            archive.addfile(member, io.BytesIO(rng.randbytes(size)))


def main() -> None:
    """Do the work that standard input names, as often as it says, and print the seconds of each pass."""
    # Unbound, an idle machine's scheduler moves the process to another CPU at every reply, or does not: a lottery
    # that decides more than what is measured does.
    asked = json.load(sys.stdin)
    os.sched_setaffinity(0, {asked.get("cpu", max(os.sched_getaffinity(0)))})
    if asked["preferred"]:
        prefer(os.getpid())
    work, seconds = WORKS[asked["work"]], []
    for _ in range(asked["passes"]):
        start = time.perf_counter()
        try:
            work(**asked["arguments"])
        except Wrong as error:
            raise SystemExit(str(error)) from None
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
