"""PyTorch: a DataLoader over an image folder, two epochs, and a checkpoint.

The set is filled once for each system and stays; each turn restarts the system, so that the first epoch is cold.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Final

from bench.peers.base import Peer, fresh
from bench.workloads.base import Turn, Workload

_CLASSES: Final = 20
_WORKERS: Final = (0, 2, 4)
_TIMEOUT_S: Final = 3600.0
_LEAST: Final = 4 << 10
_MOST: Final = 100 << 10


class Pytorch(Workload):
    """Workload 3."""

    name = "pytorch"
    weight = 5
    about = (
        "a DataLoader over JPEG files of 4 to 100 KiB in 20 classes, shuffled: samples a second, decoding included; "
        "each file is compared by its checksum"
    )

    @classmethod
    def missing(cls) -> str | None:
        wanted = {"torch": "torch==2.13.0", "PIL": "pillow==13.0.0"}
        return next(
            (f"{each} (pip install)" for name, each in wanted.items() if not importlib.util.find_spec(name)), None
        )

    def suits(self, kind: type[Peer]) -> bool:
        return not (kind.changes_only or kind.metadata_only)

    def prepare(self) -> None:
        self._images, self._sums = self.directory / "images", self.directory / "sums.json"
        make_images(self._images, self.scale.images)
        self._filled: dict[str, Peer] = {}
        self._open = contextlib.ExitStack()

    def close(self) -> None:
        self._open.close()

    def turn(self, turn: Turn) -> None:
        peer = self._peer(turn.kind)
        for workers in (0,) if self.scale.quick else _WORKERS:
            peer.restart()
            first, second = _reader("epochs", self._images, peer.root / "images", workers)
            by = f"{workers} workers"
            turn.value(f"first epoch, {by}", first["samples_per_s"], "samples/s")
            turn.value(f"second epoch, {by}", second["samples_per_s"], "samples/s")
            turn.time(f"first batch, cold, {by}", first["first_batch_s"])
            turn.time(f"first batch, warm, {by}", second["first_batch_s"])
        if turn.written:
            (saved,) = _reader("save", self._images, peer.root / "checkpoint", 0)
            turn.time("checkpoint write and fsync, 64 MiB", saved["seconds"])
            peer.restart()
            (loaded,) = _reader("load", self._images, peer.root / "checkpoint", 0)
            turn.time("checkpoint read, cold, 64 MiB", loaded["seconds"])
        peer.stop()

    def _peer(self, kind: type[Peer]) -> Peer:
        """Return the system's volume with the set in it, filled the first time."""
        if kind.name not in self._filled:
            peer = self._open.enter_context(fresh(kind, self.directory))
            subprocess.run(["cp", "-r", self._images, peer.root / "images"], check=True)
            self._filled[kind.name] = peer
        return self._filled[kind.name]


def _reader(work: str, images: Path, target: Path, workers: int) -> list[dict[str, float]]:
    """Run the reading process; return what it measured."""
    command = [sys.executable, "-m", "bench.workloads.pytorch_reader", work, images, target, workers]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"PyTorch: {done.stderr.strip()[-1000:]}")
    measured: list[dict[str, float]] = json.loads(done.stdout)
    return measured


def make_images(directory: Path, count: int) -> None:
    """Encode ``count`` JPEG files of 4 to 100 KiB: noise over a gradient, of many sizes."""
    from PIL import Image

    rng, gradient = random.Random(17), Image.linear_gradient("L")
    for number in range(count):
        folder = directory / f"class{number % _CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        path, side = folder / f"{number}.jpg", rng.randrange(96, 480)
        while True:
            noise = Image.frombytes("L", (side // 4, side // 4), rng.randbytes((side // 4) ** 2)).resize((side, side))
            plain = gradient.resize((side, side))
            Image.merge("RGB", (noise, plain, Image.blend(noise, plain, 0.5))).save(path, quality=rng.randrange(70, 95))
            size = path.stat().st_size
            if _LEAST <= size <= _MOST:
                break
            side = side * 5 // 4 if size < _LEAST else side * 3 // 4
