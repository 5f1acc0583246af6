"""bpfuse in its modes: an embedded volume, that is a metaserver of its own on LMDB, and a directory as the store."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import psutil

from bench.peers.base import Peer
from bench.systems import bpfuse, stats


class Bpfuse(Peer):
    """As it is mounted without further options."""

    name = "bpfuse"
    durability = "metadata and small files at close, all at fsync"
    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._url = f"file://{directory}/volume"
        self._mounted = False
        bpfuse("format", self._url)

    @classmethod
    def version(cls) -> str:
        return f"bpfuse {metadata.version('bpfuse')}, {' '.join(cls.options) or 'as by default'}"

    def start(self, *, ttl_s: float | None = None, writing: bool = False) -> None:
        options = [] if writing and self.read_only else [*self.options]
        if ttl_s is not None:
            options += ["--kernel-ttl", str(ttl_s)]
        try:
            bpfuse("mount", self._url, self.root, "--cache-dir", self.directory / "cache", *options)
        except BaseException:
            # Interrupted, its processes may be there.
            with contextlib.suppress(subprocess.CalledProcessError):
                bpfuse("umount", "--force", self.root)
            raise
        self._mounted = True

    def stop(self) -> None:
        if self._mounted:
            bpfuse("umount", self.root)
            self._mounted = False

    @contextlib.contextmanager
    def beside(self) -> Iterator[Path]:
        """Mount it once more, for the body."""
        root = self.directory / "beside"
        root.mkdir()
        bpfuse("mount", self._url, root, "--cache-dir", self.directory / "cache beside", *self.options)
        try:
            yield root
        finally:
            bpfuse("umount", root)
            root.rmdir()

    def processes(self) -> dict[str, int]:
        worker = int(stats(self.root)["worker"]["pid"])
        channel = psutil.Process(worker).parent()
        assert channel is not None
        (server,) = (each.pid for each in channel.children() if each.pid != worker)
        return {"channel": channel.pid, "worker": worker, "metaserver": server}


class BpfuseDataset(Bpfuse):
    """Mounted read-only, for training data."""

    name = "bpfuse dataset"
    durability = "mounted read-only; written as bpfuse"
    read_only = True
    options = ("--profile", "dataset")


class BpfuseInterval(Bpfuse):
    """With commits that are synced every 100 ms."""

    name = "bpfuse interval"
    durability = "within 100 ms after close, all at fsync"
    changes_only = True
    options = ("--durability", "interval")


class BpfuseOff(Bpfuse):
    """Every request answered by the daemon."""

    name = "bpfuse off"
    durability = "as bpfuse"
    options = ("--accel", "off")
