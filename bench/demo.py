"""``make demo``: a real tree on a fresh volume, read back cold, warm and without acceleration, and who answered.

It works like a user would, with the command ``bpfuse``, in a temporary directory. At the end, after a failure too,
everything is unmounted and gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fuseclient import mounts
from fuseclient.observe.figures import Answers, Stats, parse_stats, requests_table, since

SOURCE: Final = Path(sysconfig.get_path("stdlib"))
_COMMAND: Final = (sys.executable, "-P", "-m", "fuseclient.cli")
_COMMAND_TIMEOUT_S: Final = 120.0
_LOG_LINES: Final = 20

console: Final = Console(width=None if sys.stdout.isatty() else 110)


class Failed(Exception):
    """The demo cannot go on, or what was read is not what was written. The text is one line."""


@dataclass
class Tree:
    """What a tree holds: every path below its root with a file's SHA-256, a link's target or "directory"."""

    content: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    walk_s: float = 0.0
    stat_s: float = 0.0
    read_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.walk_s + self.stat_s + self.read_s


class Demo:
    """The volume, its mount point and its log, all in one temporary directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = f"file://{directory}/volume"
        self.point = directory / "mnt"
        self.log = directory / "log"
        self.point.mkdir()

    def run(self, *arguments: str | Path) -> str:
        """Run ``bpfuse`` and return what it prints; raise :exc:`Failed`."""
        words = [str(argument) for argument in arguments]
        if words[0] != "stats":
            console.print(f"$ bpfuse {' '.join(words)}", style="dim", highlight=False, soft_wrap=True)
        done = subprocess.run(
            [*_COMMAND, *words],
            env={**os.environ, "BPFUSE_RUNTIME_DIR": str(self.directory / "run")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise Failed(f"bpfuse {words[0]}: {done.stderr.strip()}{self._log_tail()}")
        console.print(done.stderr, end="", highlight=False, soft_wrap=True)
        return done.stdout

    @contextlib.contextmanager
    def mounted(self, accel: str) -> Iterator[None]:
        """Have the volume mounted, all caches cold, for as long as the body runs."""
        self.run("mount", self.url, self.point, "--accel", accel, "--log-file", self.log)
        try:
            yield
        finally:
            self.run("umount", self.point)

    def stats(self) -> Stats:
        return parse_stats(json.loads(self.run("stats", self.point, "--json")))

    def close(self) -> None:
        """Unmount whatever is still mounted, by force; raise :exc:`Failed` if something is left."""
        if mounts.find_mount(str(self.point)) is not None:
            self.run("umount", self.point, "--force")
        if mounts.find_mount(str(self.point)) is not None:
            raise Failed(f"{self.point} is still mounted")

    def _log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(["", "the end of the log:", *lines[-_LOG_LINES:]]) if lines else ""


def main() -> int:
    """Run the demo; return the exit code."""
    begun = time.monotonic()
    try:
        with _temporary_demo() as demo:
            _show(demo)
    except Failed as error:
        console.print(f"[red]the demo failed:[/red] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    console.print(f"Everything is unmounted and gone. The demo took {time.monotonic() - begun:.0f} s.")
    return 0


@contextlib.contextmanager
def _temporary_demo() -> Iterator[Demo]:
    with tempfile.TemporaryDirectory(prefix="bpfuse-demo-") as directory:
        demo = Demo(Path(os.path.realpath(directory)))
        try:
            yield demo
        finally:
            demo.close()


def _show(demo: Demo) -> None:
    with _progress() as progress:
        source = read_tree(SOURCE, progress, f"reading {SOURCE}")
        demo.run("format", demo.url)
        with demo.mounted("auto"):
            copied_s = _copy_tree(SOURCE, demo.point, source, progress)
        with demo.mounted("auto"):
            before = demo.stats()
            cold = _read_back(demo, source, progress, "first pass, cold")
            between = demo.stats()
            warm = _read_back(demo, source, progress, "second pass, warm")
            after = demo.stats()
        with demo.mounted("off"):
            plain = _read_back(demo, source, progress, "one pass, not accelerated")
    first = "BPF" if after.accel == "bpf" else "not accelerated"
    console.print(_times_table(source, copied_s, {f"cold, {first}": cold, f"again, {first}": warm, "cold, off": plain}))
    console.print(f"SHA-256 of all {_file_count(source):,} files is equal to the source's, in every pass.")
    _print_answers("Requests of the first pass", since(between.requests, before.requests))
    _print_answers("Requests of the second pass", since(after.requests, between.requests))


def read_tree(root: Path, progress: Progress, title: str) -> Tree:
    """Walk, then stat, then read a whole tree; the time to hash what was read is not counted."""
    tree = Tree()
    start = time.perf_counter()
    paths = sorted(_walk(root))
    tree.walk_s = time.perf_counter() - start
    start = time.perf_counter()
    sizes = {path: os.lstat(path).st_size for path in paths}
    tree.stat_s = time.perf_counter() - start
    task = progress.add_task(title, total=len(paths))
    for path in paths:
        tree.content[path[len(str(root)) + 1 :]] = _read_entry(path, sizes[path], tree)
        progress.advance(task)
    return tree


def _walk(root: Path) -> Iterator[str]:
    for directory, subdirectories, files in os.walk(root):
        yield from (os.path.join(directory, name) for name in (*subdirectories, *files))


def _read_entry(path: str, size: int, tree: Tree) -> str:
    if os.path.islink(path):
        return f"link to {os.readlink(path)}"
    if os.path.isdir(path):
        return "directory"
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        data = file.readall()
    tree.read_s += time.perf_counter() - start
    tree.bytes += len(data)
    if len(data) != size:
        raise Failed(f"{path} has {len(data)} bytes, and {size} by its attributes")
    return hashlib.sha256(data).hexdigest()


def _copy_tree(source: Path, target: Path, tree: Tree, progress: Progress) -> float:
    """Copy every entry with its mode and times; return the seconds it took."""
    task = progress.add_task("copying it to the volume", total=len(tree.content))
    start = time.perf_counter()
    for name, what in tree.content.items():
        if what == "directory":
            (target / name).mkdir()
        else:
            shutil.copy2(source / name, target / name, follow_symlinks=False)
        progress.advance(task)
    return time.perf_counter() - start


def _read_back(demo: Demo, source: Tree, progress: Progress, title: str) -> Tree:
    tree = read_tree(demo.point, progress, title)
    if tree.content != source.content:
        names = tree.content.keys() | source.content.keys()
        wrong = sorted(name for name in names if tree.content.get(name) != source.content.get(name))
        raise Failed(f"{title}: {len(wrong)} entries differ from the source, the first is {wrong[0]}")
    return tree


def _file_count(tree: Tree) -> int:
    return sum(what != "directory" and not what.startswith("link") for what in tree.content.values())


def _times_table(source: Tree, copied_s: float, passes: dict[str, Tree]) -> Table:
    title = f"{len(source.content):,} entries, {source.bytes / 1e6:.1f} MB; copied in {copied_s:.1f} s"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("pass")
    for heading in ("walk", "stat", "read", "together"):
        table.add_column(heading, justify="right")
    for name, tree in {**passes, f"{SOURCE} itself": source}.items():
        table.add_row(name, *(f"{each:.3f} s" for each in (tree.walk_s, tree.stat_s, tree.read_s, tree.total_s)))
    return table


def _print_answers(title: str, requests: dict[str, Answers]) -> None:
    console.print(requests_table(requests, title))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


if __name__ == "__main__":
    sys.exit(main())
