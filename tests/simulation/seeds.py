"""Many seeds, in several processes: each with what it says of clients, storage and faults."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Final

from simulation.world import Verdict, run, setup_of

#: With this in its environment a process orders sets of strings as every other one does.
HASH_SEED: Final = ("PYTHONHASHSEED", "0")
#: Seeds that a process runs at a time.
_BATCH: Final = 20


def run_seed(seed: int) -> Verdict:
    """Run a seed with what it says of clients, storage and faults."""
    return run(seed, setup_of(seed))


def run_batch(first: int, behind: int) -> list[Verdict]:
    """Run the seeds from ``first`` to before ``behind``."""
    return [run_seed(seed) for seed in range(first, behind)]


def verdicts(first: int, count: int, jobs: int, until: float = float("inf")) -> Iterator[Verdict]:
    """Yield the verdicts of ``count`` seeds as they come, out of order; begin no more when it is ``until``.

    One job runs here; more run in processes of their own.
    """
    behind = first + count
    batches = ((at, min(at + _BATCH, behind)) for at in range(first, behind, _BATCH) if time.perf_counter() < until)
    if jobs == 1:
        for batch in batches:
            yield from run_batch(*batch)
        return
    os.environ.setdefault(*HASH_SEED)
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running: set[concurrent.futures.Future[list[Verdict]]] = set()
        for each in batches:
            running.add(pool.submit(run_batch, *each))
            if len(running) > jobs:
                done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                yield from (verdict for future in done for verdict in future.result())
        yield from (verdict for future in running for verdict in future.result())
