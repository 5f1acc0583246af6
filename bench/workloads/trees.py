"""Trees of files, as programs make and read them: tar, git, rsync, pip, a C build, compileall.

What was written is compared with its source afterwards, off the clock. Nothing is bound to a CPU.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench import measure
from bench.peers.base import Peer, fresh
from bench.workloads import sources
from bench.workloads.base import Turn, Workload
from fuseclient.bench.timing import timed
from fuseclient.bench.works import Wrong

_PROGRAMS: Final = ("git", "rsync", "tar", "gcc", "make")
_QUIET_GIT: Final = ("git", "-c", "advice.detachedHead=false", "-c", "gc.auto=0")


class Trees(Workload):
    """Workload 4."""

    name = "trees"
    weight = 3
    about = "trees made and read by other programs, milliseconds each, compared with their sources afterwards"

    @classmethod
    def missing(cls) -> str | None:
        return next((f"{name} (apt install {name})" for name in _PROGRAMS if shutil.which(name) is None), None)

    def suits(self, kind: type[Peer]) -> bool:
        return not kind.read_only

    def prepare(self) -> None:
        files = max(20, self.scale.files * 2 // 5)
        self._project, self._archive = self.directory / "project", self.directory / "sources.tar"
        sources.make_project(self._project, files)
        self._wheel = sources.make_wheel(self.directory, files // 2)
        measure.pack(str(self._archive), files)
        self._unpacked = self.directory / "unpacked"
        self._unpacked.mkdir()
        measure.unpack(str(self._unpacked), str(self._archive))

    def turn(self, turn: Turn) -> None:
        with fresh(turn.kind, self.directory) as peer:
            self._copy(turn, peer.root)
            self._git(turn, peer)
            self._build(turn, peer.root / "clone")
            self._python(turn, peer.root / "installed")
            _time(turn, "rm -r", ["rm", "-r", str(peer.root / "tar")])

    def _copy(self, turn: Turn, root: Path) -> None:
        tar, copied = root / "tar", root / "rsync"
        tar.mkdir()
        with _right(turn, "tar extract"):
            seconds = _seconds(["tar", "-xf", str(self._archive), "-C", str(tar)])
            measure.check_unpacked(str(tar), str(self._archive))
            turn.time("tar extract", seconds)
        with _right(turn, "rsync"):
            seconds = _seconds(["rsync", "-a", f"{self._unpacked}/", str(copied)])
            _compare(self._unpacked, copied)
            turn.time("rsync", seconds)

    def _git(self, turn: Turn, peer: Peer) -> None:
        clone = peer.root / "clone"
        _time(turn, "git clone", [*_QUIET_GIT, "clone", "-q", "--no-local", str(self._project), str(clone)])
        peer.restart()
        status = [*_QUIET_GIT, "status", "--porcelain"]
        _time(turn, "git status, cold", status, clone)
        _time(turn, "git status, warm", status, clone)
        if changed := sources.git("status", "--porcelain", directory=clone):
            raise RuntimeError(f"git finds changes in a new clone: {changed.splitlines()[0]}")
        sources.git("fsck", "--full", directory=clone)

    def _build(self, turn: Turn, clone: Path) -> None:
        _time(turn, "C build", ["make", "-s", "-j2"], clone)
        printed = subprocess.run([clone / "program"], check=True, stdout=subprocess.PIPE, text=True).stdout
        if printed != sources.program_output():
            raise RuntimeError(f"the program that was built prints {printed!r}")

    def _python(self, turn: Turn, target: Path) -> None:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        _time(turn, "pip install", [*pip, "--target", str(target), str(self._wheel)])
        modules = sources.check_wheel(self._wheel, target)
        _time(turn, "compileall", [sys.executable, "-m", "compileall", "-q", str(target)])
        if (compiled := len(list(target.rglob("*.pyc")))) != modules:
            raise RuntimeError(f"{compiled} modules are compiled, not {modules}")


@contextlib.contextmanager
def _right(turn: Turn, name: str) -> Iterator[None]:
    """What the body finds wrong is told, and the rest is measured all the same."""
    try:
        yield
    except (RuntimeError, Wrong) as error:
        turn.wrong.append(f"{name}: {error}")


def _time(turn: Turn, name: str, command: list[str], directory: Path | None = None) -> None:
    turn.time(name, _seconds(command, directory))


def _seconds(command: list[str], directory: Path | None = None) -> float:
    arguments = {"arguments": command, "directory": None if directory is None else str(directory)}
    return timed("command", [arguments], bound=False)[0]


def _compare(source: Path, copy: Path) -> None:
    done = subprocess.run(["diff", "-r", source, copy], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the copy differs: {done.stdout.splitlines()[:1]}")
