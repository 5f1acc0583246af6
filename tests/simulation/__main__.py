"""``make simulate``: run one seed, or many, and say which fail. A failing seed fails again, exactly."""

from __future__ import annotations

import argparse
import os
import sys
import time

from simulation.seeds import HASH_SEED, run_seed, verdicts


def main() -> int:
    """Run and return 1 if a seed failed."""
    options = _options()
    if os.environ.get(HASH_SEED[0]) != HASH_SEED[1]:
        # The order of sets of strings is of no consequence, one hopes; with this it needs no hope.
        environment = {**os.environ, **dict([HASH_SEED])}
        os.execve(sys.executable, [sys.executable, "-m", "simulation", *sys.argv[1:]], environment)
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


def run_many(options: argparse.Namespace) -> int:
    """Run seeds until the time is over; print those that fail as they come."""
    begun, done, failed = time.perf_counter(), 0, 0
    for verdict in verdicts(options.first, options.seeds, options.jobs, begun + options.seconds):
        done += 1
        if verdict.complaints:
            failed += 1
            print(f"{verdict}\n  again: make simulate SEED={verdict.seed}", flush=True)
    print(f"{done} seeds from {options.first}, {failed} failed, {time.perf_counter() - begun:.1f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
