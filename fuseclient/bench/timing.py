"""Time works in processes of their own (:mod:`fuseclient.bench.works`), one or several that begin together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import IO, Any

from fuseclient.errors import UserError


def timed(work: str, shares: list[dict[str, Any]], *, passes: int = 1, bound: bool = True) -> list[float]:
    """Do a work by as many processes as there are ``shares``, each with its arguments.

    Returns, for each pass, the seconds from the first one's beginning to the last one's end. ``bound``: each process
    stays on one CPU. Unbound, an idle machine's scheduler moves a process to another CPU at every reply, or does not:
    a lottery that decides more than what is measured does.

    Raises :exc:`UserError`, with what the process said, if one fails or reads what was not written.
    """
    cpus = sorted(os.sched_getaffinity(0), reverse=True)
    workers: list[subprocess.Popen[str]] = []
    try:
        for number, arguments in enumerate(shares):
            worker = subprocess.Popen(
                [sys.executable, "-P", "-m", "fuseclient.bench.works"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            workers.append(worker)
            cpu = cpus[number % len(cpus)] if bound else None
            _say(worker, json.dumps({"work": work, "arguments": arguments, "cpu": cpu}))
        for worker in workers:
            _line(worker)
        return [_pass(workers) for _ in range(passes)]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def share(items: list[str], processes: int) -> list[list[str]]:
    """Deal ``items`` out, in their order, each process a stretch of them."""
    return [items[n * len(items) // processes : (n + 1) * len(items) // processes] for n in range(processes)]


def _pass(workers: Iterable[subprocess.Popen[str]]) -> float:
    for worker in workers:
        _say(worker, "go")
    times: list[list[float]] = [json.loads(_line(worker)) for worker in workers]
    return max(end for _, end in times) - min(start for start, _ in times)


def _say(worker: subprocess.Popen[str], line: str) -> None:
    pipe = _pipe(worker.stdin)
    try:
        pipe.write(f"{line}\n")
        pipe.flush()
    except BrokenPipeError:
        _failed(worker)


def _line(worker: subprocess.Popen[str]) -> str:
    line = _pipe(worker.stdout).readline()
    if not line:
        _failed(worker)
    return line


def _failed(worker: subprocess.Popen[str]) -> None:
    worker.wait()
    text = _pipe(worker.stderr).read().strip()
    raise UserError(text.splitlines()[-1] if text else f"a measuring process ended with code {worker.returncode}")


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
