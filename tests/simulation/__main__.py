"""``make simulate``: run one seed, or many, and say which fail. A failing seed fails again, exactly."""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import sys
import time
from collections.abc import Iterator

from simulation.world import Verdict, run, setup_of

_HASH_SEED = "PYTHONHASHSEED"
#: Seeds that one task of a pool runs.
_BATCH = 20


def main() -> int:
    """Run and return 1 if a seed failed."""
    options = _options()
    if os.environ.get(_HASH_SEED) != "0":
        # The order of sets of strings is of no consequence, one hopes; with this it needs no hope.
        os.execve(sys.executable, [sys.executable, "-m", "simulation", *sys.argv[1:]], {**os.environ, _HASH_SEED: "0"})
    if options.seed is not None:
        verdict = run_seed(options.seed)
        print(
            verdict if verdict.complaints else f"seed {options.seed}: right", f"digest {verdict.digest:08x}", sep="\n"
        )
        return bool(verdict.complaints)
    return run_many(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--first", type=int, default=0, help="the first of many")
    parser.add_argument("--seeds", type=int, default=1000, help="how many to run")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no more after so long")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    return parser.parse_args()


def run_seed(seed: int) -> Verdict:
    """Run a seed with what it says of clients, storage and faults."""
    return run(seed, setup_of(seed))


def run_batch(first: int, behind: int) -> list[Verdict]:
    """Run the seeds from ``first`` to before ``behind``."""
    return [run_seed(seed) for seed in range(first, behind)]


def run_many(options: argparse.Namespace) -> int:
    """Run seeds until the time is over; print those that fail as they come."""
    begun, done, failed = time.perf_counter(), 0, 0
    for verdicts in _batches(options, begun + options.seconds):
        for verdict in verdicts:
            done += 1
            if verdict.complaints:
                failed += 1
                print(f"{verdict}\n  again: make simulate SEED={verdict.seed}", flush=True)
    print(f"{done} seeds from {options.first}, {failed} failed, {time.perf_counter() - begun:.1f} s")
    return bool(failed)


def _batches(options: argparse.Namespace, until: float) -> Iterator[list[Verdict]]:
    firsts = range(options.first, options.first + options.seeds, _BATCH)
    behind = options.first + options.seeds
    batches = ((first, min(first + _BATCH, behind)) for first in firsts if time.perf_counter() < until)
    if options.jobs == 1:
        yield from (run_batch(*each) for each in batches)
        return
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        running: set[concurrent.futures.Future[list[Verdict]]] = set()
        for batch in batches:
            running.add(pool.submit(run_batch, *batch))
            if len(running) > options.jobs:
                done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                yield from (each.result() for each in done)
        yield from (each.result() for each in running)


if __name__ == "__main__":
    sys.exit(main())
