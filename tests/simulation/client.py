"""One client machine: a kernel, its BPF maps, and a worker that can be stopped, killed and started again."""

from __future__ import annotations

import asyncio
import errno
import random
from array import array
from collections.abc import Awaitable, Callable
from typing import Any, Final

from pyfuse3 import FUSEError

from fuseclient.config import MapFds, MountOptions, WorkerConfig
from fuseclient.kernel_cache import NoKernelCache
from fuseclient.worker.mount import CannotStart, Mount
from simulation.bpf import Maps
from simulation.kernel import Kernel, Notifications
from simulation.loop import Node, VirtualLoop

#: Seconds that a reply takes at most from where it is made to the program that waits for it, and how often it does.
_LAG_S: Final = 0.001
_LAGGING: Final = 0.2

#: The channel's notifier threads: what never waits, and what may, each kind by itself.
LANES: Final = ("instant", "names", "pages", "written")

_NO_FDS: Final = MapFds(
    control=-1,
    names=-1,
    inodes=-1,
    uses=-1,
    xattrs=-1,
    pages=-1,
    opens=-1,
    counters=-1,
    name_capacity=1 << 16,
    inode_capacity=1 << 16,
    page_count=1 << 16,
)


class WorkerDied(Exception):
    """The worker that had a request in hand is gone."""


class Worker:
    """One process: its node, and the mount once it is open."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.mount: Mount | None = None
        self.in_flight: dict[asyncio.Future[Any], None] = {}


class Client:
    """A machine. ``kernel`` is what its programs use; they are to run in ``node``."""

    def __init__(
        self, loop: VirtualLoop, rng: random.Random, index: int, address: str, volume: str, accel: bool
    ) -> None:
        self._loop = loop
        self._rng = rng
        self.index = index
        self._address = address
        self._volume = volume
        self._accel = accel
        self._boot_offset_ns = rng.randrange(10**15)
        self._generation = 0
        self._session: str | None = None
        #: Called, with the index, when a worker has its session.
        self.on_ready: Callable[[int], None] = lambda index: None
        #: Called, with the index, when a worker has lost its session.
        self.on_lost: Callable[[int], None] = lambda index: None
        self.kernel: Kernel
        self.maps: Maps | None
        self.node: Node
        self.worker: Worker
        self._worker_up: asyncio.Event
        self.boot()

    def boot(self) -> None:
        """Start the machine: nothing is cached, and a worker without a past opens the mount."""
        self.node = Node(f"kernel{self.index}", self._boot_offset_ns)
        self.maps = Maps(self._loop, self._rng) if self._accel else None
        self.kernel = Kernel(self._loop, self.maps, self)
        self._notifiers = {lane: Notifications() for lane in LANES}
        self._worker_up = asyncio.Event()
        self._session = None
        for each in self._notifiers.values():
            self._loop.spawn(self.node, each.run(), f"notifier {self.index}")
        self.start_worker()

    def start_worker(self) -> None:
        """Start the next worker, which is to resume the session of the one before."""
        self._generation += 1
        self.worker = Worker(Node(f"client{self.index}", self._boot_offset_ns))
        self._loop.spawn(self.worker.node, self._run(self.worker), f"worker {self.index}")

    async def _run(self, worker: Worker) -> None:
        while True:
            mount = Mount(self._config(), self.maps or NoKernelCache(), Notifier(self, worker))
            self._watch(mount)
            try:
                await mount.open()
                break
            except CannotStart:
                await asyncio.sleep(0.2)
        worker.mount = mount
        self._loop.post(self.node, self._ready, worker, mount.session_id.hex())

    def holds(self, ino: int) -> bool:
        """Whether the worker has made a file that the metaserver does not know of."""
        return self.worker.mount is not None and ino in self.worker.mount._creations

    def held_as(self, parent: int, name: bytes) -> int | None:
        """Return the inode of a name, if the metaserver does not know of it."""
        return self.worker.mount._creations.find(parent, name) if self.worker.mount is not None else None

    def has_removed(self, parent: int, name: bytes) -> bool:
        """Whether the worker has removed a name, and the metaserver does not know of that."""
        return self.worker.mount is not None and (parent, name) in self.worker.mount._removals

    def _watch(self, mount: Mount) -> None:
        """Tell when a mount loses its session."""
        drop = mount._session._on_lost

        def lost() -> None:
            self.on_lost(self.index)
            drop()

        mount._session._on_lost = lost

    def _ready(self, worker: Worker, session: str) -> None:
        if worker is self.worker:
            self._session = session
            self.on_ready(self.index)
            self._worker_up.set()

    def _config(self) -> WorkerConfig:
        return WorkerConfig(
            options=MountOptions(url="file:///volume", mountpoint=f"/mnt{self.index}", cache_bytes=0),
            address=self._address,
            volume=self._volume,
            fuse_fd=-1,
            extra_fd=-1,
            notify_fd=-1,
            status_fd=-1,
            generation=self._generation,
            maps=_NO_FDS if self._accel else None,
            session=self._session,
        )

    def kill_worker(self) -> None:
        """The worker's process ends, and its channel sees to it that the requests in its hands are answered."""
        self._worker_up.clear()
        self._loop.kill(self.worker.node)
        for future in self.worker.in_flight:
            self._loop.post(self.node, _fail, future)

    def kill(self) -> None:
        """The machine ends, with all programs on it."""
        self._loop.kill(self.worker.node)
        self._loop.kill(self.node)

    def freeze(self, frozen: bool) -> None:
        """SIGSTOP or SIGCONT the worker."""
        self.worker.node.frozen = frozen

    # For the kernel

    async def lag(self) -> None:
        """The time that a reply takes."""
        if self._rng.random() < _LAGGING:
            await asyncio.sleep(self._rng.uniform(0, _LAG_S))

    async def request(self, operation: str, *args: Any, repeatable: bool) -> Any:
        """Have the worker do an operation. One whose worker died is sent again if it does no harm, else EIO."""
        while True:
            await self._worker_up.wait()
            worker, future = self.worker, self._loop.create_future()
            worker.in_flight[future] = None
            self._loop.spawn(worker.node, self._serve(worker, future, operation, args), operation)
            try:
                return await future
            except WorkerDied:
                if not repeatable:
                    raise FUSEError(errno.EIO) from None
            finally:
                worker.in_flight.pop(future, None)

    async def _serve(self, worker: Worker, future: asyncio.Future[Any], operation: str, args: tuple[Any, ...]) -> None:
        assert worker.mount is not None
        call: Callable[..., Awaitable[Any]] = getattr(worker.mount.operations, operation)
        result: Any = None
        error: Exception | None = None
        try:
            result = await call(*args)
        except FUSEError as refused:
            error = FUSEError(refused.errno)
        except Exception as unexpected:
            error = unexpected
        delay_s = self._rng.uniform(0, _LAG_S) if self._rng.random() < _LAGGING else 0.0
        self._loop.after(delay_s, self.node, _answer, future, result, error)

    async def notify(self, worker: Worker, lane: str, action: Callable[[], Awaitable[int]]) -> int:
        """Have a notifier thread do something for a worker, and return its result."""
        future: asyncio.Future[int] = self._loop.create_future()

        def done(result: int) -> None:
            self._loop.post(worker.node, _answer, future, result, None)

        self._loop.post(self.node, self._notifiers[lane].send, action, done)
        return await future


class Notifier:
    """The worker's end of the notification sockets: :class:`fuseclient.worker.notifier.Notifier`."""

    def __init__(self, client: Client, worker: Worker) -> None:
        self._client = client
        self._kernel = client.kernel
        self._worker = worker

    async def invalidate_inode(self, ino: int) -> bool:
        return await self._client.notify(self._worker, "pages", lambda: self._kernel.invalidate_inode(ino)) == 0

    async def invalidate_written(self, ino: int) -> bool:
        return await self._client.notify(self._worker, "written", lambda: self._kernel.invalidate_inode(ino)) == 0

    async def invalidate_unused(self, inos: array[int]) -> None:
        async def drop() -> int:
            for ino in inos:
                await self._kernel.invalidate_inode(ino)
            return 0

        await self._client.notify(self._worker, "written", drop)

    async def invalidate_attributes(self, ino: int) -> bool:
        return await self._client.notify(self._worker, "instant", lambda: self._kernel.invalidate_attributes(ino)) == 0

    async def invalidate_entry(self, parent: int, name: bytes) -> None:
        await self._client.notify(self._worker, "names", lambda: self._kernel.invalidate_entry(parent, name))

    async def increment_epoch(self) -> bool:
        await self._client.notify(self._worker, "instant", self._kernel.increment_epoch)
        return True

    async def open_backing(self, descriptor: int) -> int:
        raise OSError(errno.EOPNOTSUPP, "there is no passthrough here")

    async def close_backing(self, backing_id: int) -> None:
        raise OSError(errno.ENOENT, "there is no such backing")


def _answer(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def _fail(future: asyncio.Future[Any]) -> None:
    _answer(future, None, WorkerDied())
