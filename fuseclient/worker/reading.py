"""All that reading file content needs, put together: layouts, objects with their caches, whole files, passthrough."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fuseclient import runtime
from fuseclient.config import WorkerConfig
from fuseclient.data.cached_objects import CachedObjects, Store
from fuseclient.data.caller import Caller
from fuseclient.data.disk_cache import DiskCache
from fuseclient.data.keeping import Keeper
from fuseclient.data.layouts import Layouts
from fuseclient.data.passthrough import Kernel, Passthrough, Surroundings
from fuseclient.data.reader import Reader
from fuseclient.data.store_url import parse_store_url
from fuseclient.data.whole_files import WholeFiles, ino_of
from fuseclient.data.writer import Writer
from fuseclient.worker.feeding import Feeder
from fuseclient.worker.lease import Lease
from metaserver import wire

if TYPE_CHECKING:
    from fuseclient.kernel_cache import Cache

_log = logging.getLogger(__name__)

#: Where caches lie unless the user says otherwise, and how many bytes each may have.
CACHE_DIRECTORY: Final = Path("/var/cache/bpfuse")
CACHE_BYTES: Final = 10 << 30


class ReadPath:
    """The reading half of the data path. Made when the session is open, closed when no request comes any more."""

    def __init__(
        self,
        config: WorkerConfig,
        opened: wire.SessionOpened,
        *,
        caller: Caller,
        store: Store,
        feeder: Feeder,
        writer: Writer,
        lease: Lease,
        cache: Cache,
        kernel: Kernel,
    ) -> None:
        self._config = config
        objects = _caches_objects(config, opened.store)
        self._disk = _open_disk_cache(config, opened.volume) if objects or config.maps is not None else None
        layouts = Layouts(caller, feeder, lease.left_s)
        feeder.on_drop = layouts.drop
        self._keeps_objects = objects and self._disk is not None
        self._objects = CachedObjects(store, self._disk if objects else None)
        self.reader = Reader(layouts, self._objects)
        self._whole: WholeFiles | None = None
        if self._disk is None or config.maps is None:
            reason = "the mount is not accelerated" if config.maps is None else "there is no disk cache"
            self.passthrough = Passthrough(None, reason)
            return
        self._whole = WholeFiles(self._disk, layouts, self.reader, writer.is_open)
        self.passthrough = passthrough = Passthrough(
            Surroundings(
                disk=self._disk,
                whole=self._whole,
                reader=self.reader,
                writer=writer,
                feeder=feeder,
                cache=cache,
                kernel=kernel,
                directory=self._disk.directory.parent / "live" / runtime.mount_key(config.options.mountpoint),
            )
        )
        self._disk.may_evict = lambda name: (ino := ino_of(name)) is None or passthrough.may_evict(ino)

    async def start(self) -> None:
        """Begin what goes on in the background; take over from the worker before this one."""
        if self._disk is not None:
            self._disk.start()
        if self._whole is not None:
            self._whole.start()
        await self.passthrough.start(inherits=self._config.generation > 1)

    def keeper(self) -> Keeper:
        """Return what brings files into the disk cache ahead of use."""
        return Keeper(self._disk, self.reader, self._objects if self._keeps_objects else None, self._whole)

    def read(self, attributes: wire.Attributes, count: int) -> None:
        """So many bytes of a file were read."""
        if self._whole is not None:
            self._whole.read(attributes, count)

    def figures(self) -> dict[str, Any]:
        """Return what ``stats`` shows of it."""
        figures = {
            "objects": self._objects.figures(),
            **self.reader.figures(),
            "passthrough": self.passthrough.figures(),
        }
        if self._disk is not None:
            figures["disk"] = self._disk.figures()
        if self._whole is not None:
            figures["whole_files"] = self._whole.figures()
        return figures

    async def close(self) -> None:
        """Stop what goes on in the background and give the cache directory back."""
        if self._whole is not None:
            await self._whole.close()
        await self.passthrough.close()
        await self.reader.close()
        await self._objects.close()
        if self._disk is not None:
            await self._disk.close()


def _caches_objects(config: WorkerConfig, store: str) -> bool:
    """A second copy of what lies on this machine already is kept only if the user asks for a cache."""
    return config.options.cache_bytes is not None or not parse_store_url(store).is_local


def _open_disk_cache(config: WorkerConfig, volume: bytes) -> DiskCache | None:
    options = config.options
    limit = CACHE_BYTES if options.cache_bytes is None else options.cache_bytes
    if not limit:
        return None
    directory = options.cache_directory or os.environ.get("BPFUSE_CACHE_DIR") or CACHE_DIRECTORY
    root = Path(directory) / volume.hex()
    try:
        return DiskCache(root, limit)
    except OSError as error:
        _log.warning("there is no disk cache: %s cannot be used: %s", root, error.strerror or error)
        return None
