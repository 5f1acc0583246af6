"""Many files: a training set read in shuffled order, a directory and a tree of very many, what each request costs.

Beside the proof of the datapath, built for as many files, and beside the same files on the file system that holds the
volume, read warm. The kernel cache is given room for all: a set that does not fit in is another workload.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench import measure
from bench.results import Result, Samples
from bench.systems import Bpfuse, System, Tree, bpfuse, proof

_CACHE: Final = "1G"
#: (workload, system, of system, limit): the ratio of medians may be this large.
_LIMITS: Final = (
    ("first epoch", "bpfuse bpf", "proof", 1.7),
    ("later epoch", "bpfuse bpf", "proof", 1.3),
    ("later epoch", "bpfuse dataset", "ext4", 1.8),
    ("stat", "bpfuse bpf", "proof", 1.4),
    ("getxattr", "bpfuse bpf", "proof", 1.4),
    ("cp -a", "bpfuse bpf", "ext4", 2.0),
    *((f"{each}, {when}", "bpfuse bpf", "ext4", limit) for each in ("ls -l", "find", "du") for when, limit in
      (("cold", 4.0), ("again", 1.5))),
)  # fmt: skip
#: Each with where it is run: in one directory that has all files, or in a tree of directories that have as many each.
_COMMANDS: Final = {"ls -l": (["ls", "-l"], "many"), "find": (["find"], "tree"), "du": (["du", "-s"], "tree")}
_DIRECTORIES: Final = 100


def run(directory: Path, rounds: int, *, small: bool) -> Result:
    """Measure; all files lie in ``directory``."""
    samples = Samples()
    tree = Tree(files=200, directories=10, size=16384) if small else Tree(20_000, 200, 16384)
    entries, copied = (300, 50) if small else (100_000, 5000)
    _epochs(directory, tree, samples, rounds, small=small)
    _listings(directory, entries, copied, samples, rounds)
    figures = [each for limit in _LIMITS for each in samples.ratio(*limit)]
    figures += samples.ratio("first epoch", "bpfuse bpf, four", "bpfuse bpf", 1.7, speed=True)
    size = {"files": tree.files, "bytes_each": tree.size, "entries": entries, "copied": copied}
    return Result("scale", rounds, size, samples, figures)


def _epochs(directory: Path, tree: Tree, samples: Samples, rounds: int, *, small: bool) -> None:
    general = Bpfuse(directory / "set", "bpf", ("--kernel-cache-size", _CACHE))
    dataset = general.beside("bpfuse dataset", "--profile", "dataset", "--read-only", "--kernel-cache-size", _CACHE)
    systems: list[System] = [general, *([] if small else proof(directory))]
    for system in systems:
        system.prepare(tree)
    plain = directory / "plain-set"
    plain.mkdir()
    tree.create(plain)
    for _ in range(rounds):
        for system in (*systems, dataset):
            with system.mounted(kernel_ttl_s=None) as paths:
                first, later = measure.run("read_all", 2, paths=_shuffled(paths))
            samples.add("first epoch", system.name, first, tree.files)
            samples.add("later epoch", system.name, later, tree.files)
        for system in systems:
            with system.mounted(kernel_ttl_s=0) as paths:
                measure.run("read_all", paths=paths)
                (stats,) = measure.run("stat_all", paths=paths)
                (xattrs,) = measure.run("getxattr_all", paths=paths)
            samples.add("stat", system.name, stats, tree.files)
            samples.add("getxattr", system.name, xattrs, tree.files)
        for system in systems:
            with system.mounted(kernel_ttl_s=None) as paths:
                four = measure.run_at_once("read_all", _parts(paths, 4))
            samples.add("first epoch", f"{system.name}, four", four, tree.files)
        _, later = measure.run("read_all", 2, paths=_shuffled(tree.paths(plain)))
        samples.add("later epoch", "ext4", later, tree.files)


def _shuffled(paths: Sequence[str]) -> list[str]:
    return random.Random(1).sample(paths, len(paths))


def _parts(paths: Sequence[str], count: int) -> list[list[str]]:
    shuffled = _shuffled(paths)
    return [shuffled[number::count] for number in range(count)]


def _listings(directory: Path, entries: int, copied: int, samples: Samples, rounds: int) -> None:
    volume, point, plain = f"file://{directory / 'wide'}", directory / "wide-mnt", directory / "plain-wide"
    point.mkdir()
    bpfuse("format", volume)
    mount = ("mount", volume, point, "--kernel-cache-size", _CACHE, "--durability", "interval")
    bpfuse(*mount)
    for root in (point, plain):
        (root / "many").mkdir(parents=True)
        for number in range(entries):
            (root / "many" / f"entry{number}").touch()
        for number in range(_DIRECTORIES):
            (root / "tree" / f"d{number}").mkdir(parents=True)
            for each in range(entries // _DIRECTORIES):
                (root / "tree" / f"d{number}" / f"entry{each}").touch()
        (root / "small").mkdir()
        measure.run("create", directory=str(root / "small"), files=copied)
    bpfuse("umount", point)
    for _ in range(rounds):
        for name, (command, place) in _COMMANDS.items():
            bpfuse(*mount)
            for when in ("cold", "again"):
                (seconds,) = measure.run("command", words=[*command, str(point / place)])
                samples.add(f"{name}, {when}", "bpfuse bpf", seconds, entries)
            bpfuse("umount", point)
            _, warm = measure.run("command", 2, words=[*command, str(plain / place)])
            for when in ("cold", "again"):
                samples.add(f"{name}, {when}", "ext4", warm, entries)
        bpfuse(*mount)
        for system, root in (("bpfuse bpf", point), ("ext4", plain)):
            (seconds,) = measure.run("command", words=["cp", "-a", str(root / "small"), str(directory / "copy")])
            samples.add("cp -a", system, seconds, copied)
            measure.check_created(str(directory / "copy"), copied)
            shutil.rmtree(directory / "copy")
        bpfuse("umount", point)
