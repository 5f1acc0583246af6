"""One measurement, in a process of its own: ``python -m bench.measure WORK PASSES``, the paths on standard input.

Prints the seconds that each pass took. What is read is checked: a file of the tree holds one byte, repeated.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Final


def read_all(paths: list[str]) -> None:
    """Open, read and close each file once."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        data = os.read(descriptor, 1 << 20)
        os.close(descriptor)
        if not data or data[0] != data[-1]:
            raise SystemExit(f"wrong content in {path}")


def stat_all(paths: list[str]) -> None:
    """Stat each file once, from within its directory: the directories on the way to it are not looked up."""
    here = ""
    for directory, name in map(os.path.split, paths):
        if directory != here:
            os.chdir(directory)
            here = directory
        os.stat(name)


WORKS: Final[dict[str, Callable[[list[str]], None]]] = {"read": read_all, "stat": stat_all}


def main() -> None:
    """Do the work named by the argument, as often as the second one says, and print the seconds of each pass."""
    # Unbound, an idle machine's scheduler moves the process to another CPU at every reply, or does not: a lottery
    # that decides more than what is measured does.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    work, passes = WORKS[sys.argv[1]], int(sys.argv[2])
    paths = sys.stdin.read().splitlines()
    for _ in range(passes):
        start = time.perf_counter()
        work(paths)
        print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
