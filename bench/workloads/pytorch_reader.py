"""The process that PyTorch is measured in: ``python -m bench.workloads.pytorch_reader WORK IMAGES TARGET WORKERS``.

WORK is ``epochs`` (TARGET is the image folder, read twice by a DataLoader), ``save`` or ``load`` (TARGET is a
checkpoint). Prints a list of what was measured as JSON. IMAGES is the same set elsewhere, whose checksums are taken
off the clock.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

_SIDE: Final = 64
_BATCH: Final = 32
_TENSORS: Final = 16
_TENSOR_VALUES: Final = 1 << 20


class ImageFolder:
    """The images below a directory, each in that of its class, as a map-style data set."""

    def __init__(self, images: Path, target: Path) -> None:
        names = sorted(path.relative_to(images) for path in images.rglob("*.jpg"))
        self._sums = [zlib.crc32((images / name).read_bytes()) for name in names]
        self._paths = [os.fspath(target / name) for name in names]
        classes = sorted({name.parent for name in names})
        self._labels = [classes.index(name.parent) for name in names]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with open(self._paths[index], "rb") as file:
            data = file.read()
        if zlib.crc32(data) != self._sums[index]:
            raise ValueError(f"wrong content in {self._paths[index]}")
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((_SIDE, _SIDE))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(_SIDE, _SIDE, 3).permute(2, 0, 1).float().div_(255), self._labels[index]


def epochs(images: Path, target: Path, workers: int) -> Iterator[dict[str, float]]:
    """Read all of it twice, shuffled."""
    folder = ImageFolder(images, target)
    numbers = torch.Generator()
    numbers.manual_seed(1)
    loader = torch.utils.data.DataLoader(
        folder, batch_size=_BATCH, shuffle=True, num_workers=workers, generator=numbers, persistent_workers=workers > 0
    )
    for _ in range(2):
        start, first, samples = time.monotonic(), 0.0, 0
        for batch, _labels in loader:
            first = first or time.monotonic() - start
            samples += len(batch)
        seconds = time.monotonic() - start
        if samples != len(folder):
            raise ValueError(f"{samples} samples came, not {len(folder)}")
        yield {"samples_per_s": samples / seconds, "first_batch_s": first}


def _state() -> dict[str, Any]:
    numbers = torch.Generator()
    numbers.manual_seed(2)
    return {f"layer{n}": torch.rand(_TENSOR_VALUES, generator=numbers) for n in range(_TENSORS)}


def save(_images: Path, target: Path, _workers: int) -> Iterator[dict[str, float]]:
    """Write a checkpoint and fsync it."""
    state, start = _state(), time.monotonic()
    with target.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    yield {"seconds": time.monotonic() - start}


def load(_images: Path, target: Path, _workers: int) -> Iterator[dict[str, float]]:
    """Read a checkpoint, and compare it."""
    start = time.monotonic()
    loaded = torch.load(target, weights_only=True)
    seconds, state = time.monotonic() - start, _state()
    if loaded.keys() != state.keys() or not all(torch.equal(loaded[name], state[name]) for name in state):
        raise ValueError(f"{target} is not the checkpoint that was written")
    yield {"seconds": seconds}


def main() -> None:
    """Do what the arguments name."""
    work, images, target, workers = sys.argv[1:]
    torch.set_num_threads(1)
    works = {"epochs": epochs, "save": save, "load": load}
    print(json.dumps(list(works[work](Path(images), Path(target), int(workers)))))


if __name__ == "__main__":
    main()
