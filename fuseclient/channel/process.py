"""The life of a mount: what is started in which order, watched while it lives, and ended.

Start: metaserver (embedded volumes), BPF object, worker with its session, mount and INIT, queues. The worker comes
before the mount, so that a volume that is not there is found out while there is nothing to undo. End: the mount goes
first, by umount(8) or by SIGTERM here; then the transport, whose end tells the worker to write out and leave; then
the metaserver.

One task each watches the transport, the worker and the metaserver; ``_ending`` is set before any of them is ended on
purpose.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import time
from collections.abc import Coroutine
from typing import Any, Final

from fuseclient import mounts, native, runtime
from fuseclient.channel import acceleration, control_server
from fuseclient.channel.children import Child, Metaserver, StartError, Worker
from fuseclient.channel.transport import NoUring, Transport
from fuseclient.config import MountOptions
from fuseclient.errors import UserError
from fuseclient.native import Bpf, NativeError
from fuseclient.observe import stats
from fuseclient.processes import identify
from fuseclient.volumes import Embedded, parse_volume
from fuseclient.worker.lock_store import make_store

_log = logging.getLogger(__name__)

_WORKER_INIT_S: Final = 30.0
_WORKER_END_S: Final = 30.0
_SERVER_END_S: Final = 30.0
_RESTART_MIN_S: Final = 0.1
_RESTART_MAX_S: Final = 5.0
#: A child that ran this long has its next restart without a pause.
_SETTLED_S: Final = 30.0
#: How long requests are counted for ``bpfuse top`` after it asked.
_WATCHED_NS: Final = 30_000_000_000


class Mount:
    """One mount and its processes."""

    def __init__(self, options: MountOptions) -> None:
        self.options = options
        self.volume = parse_volume(options.url)
        self.directory = runtime.directory_of(options.mountpoint)
        self.accel = "off"
        self.notice: str | None = None
        self.restarts = 0
        self._started = time.time()
        self._server: Metaserver | None = None
        self._bpf: Bpf | None = None
        self._refused: NativeError | None = None
        self._worker: Worker | None = None
        self._transport: Transport | None = None
        self._control: asyncio.Server | None = None
        self._generation = 0
        #: What is locked, which outlives the workers.
        self._locks_fd = make_store()
        self._metaservers_fd = os.memfd_create("bpfuse-metaservers", os.MFD_CLOEXEC)
        self._ending = False
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        self._stop_asked = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    # Start

    async def start(self) -> None:
        """Bring the mount up; raise StartError, TransportError or NativeError, with nothing left behind."""
        try:
            await self._prepare()
            await self._start_chosen()
            self._control = await control_server.serve(
                self.directory.control_socket,
                {
                    "stats": lambda _: self.stats(),
                    "trace": lambda _: self.trace(),
                    "busiest": lambda _: self.busiest(),
                    "warmup": self.warmup,
                    "stop": lambda _: self._stop_command(),
                },
            )
            self._write_record()
        except BaseException:
            await self._tear_down()
            raise
        self._watch("transport", self._watch_transport())
        self._watch("worker", self._watch_worker())
        if self._server is not None:
            self._watch("metaserver", self._watch_server())

    async def _prepare(self) -> None:
        """Start the metaserver, and meanwhile have the kernel check the programs; why it refuses them is kept."""
        started, loaded = await asyncio.gather(self._start_server(), self._load(), return_exceptions=True)
        if isinstance(started, BaseException):
            raise started
        if isinstance(loaded, NativeError):
            self._refused = loaded
        elif isinstance(loaded, BaseException):
            raise loaded

    async def _load(self) -> None:
        if self.options.accel != "off":
            self._bpf = await asyncio.to_thread(acceleration.load, self.options)

    async def _start_server(self) -> None:
        if isinstance(self.volume, Embedded):
            path = self.directory.metaserver_socket
            self._server = await Metaserver.start(self.volume, path, self.options)

    async def _start_chosen(self) -> None:
        """Mount as asked for: accelerated if it must be or can be; a fallback is said in ``notice``."""
        if self.options.accel == "off":
            await self._start_as("off")
            return
        try:
            await self._start_as("bpf")
        except (NativeError, NoUring) as error:
            if self.options.accel == "bpf":
                raise StartError(f"requests cannot be answered in the kernel: {error}") from error
            self.notice = f"not accelerated, every request goes to the daemon: {error}"
            _log.warning("%s", self.notice)
            await self._drop_mount()
            await self._start_as("off")

    async def _start_as(self, accel: str) -> None:
        self.accel = accel
        if accel == "bpf" and self._refused is not None:
            raise self._refused
        self._worker = await self._start_worker(session=None)
        self._transport = await asyncio.to_thread(self._open_transport)
        asyncio.get_running_loop().add_reader(self._transport.fileno(), self._on_event)
        if self._bpf is not None:
            self._bpf.attach()
        self._transport.start()
        await self._attach(self._worker)

    def _open_transport(self) -> Transport:
        with contextlib.ExitStack() as stack:
            if self._bpf is not None:
                stack.enter_context(acceleration.uring_enabled())
            return Transport(
                self.options.mountpoint,
                self.volume.url,
                read_only=self.options.read_only,
                allow_other=self.options.allow_other,
                # A mount that opens nothing does not say when a file is closed, which ends locks.
                shared_locks=self.options.locks == "shared" and self.options.profile != "dataset",
                trusted=self.options.trusted,
                entries_fd=None if self._bpf is None else self._bpf.map_fd("entries"),
                depth=acceleration.queue_depth(self.options),
            )

    async def _start_worker(self, session: str | None) -> Worker:
        self._generation += 1
        return await Worker.start(
            self.options,
            self._server.address if self._server is not None else self._remote_address(),
            self.volume.name,
            generation=self._generation,
            maps=None if self._bpf is None else acceleration.map_fds(self._bpf, self.options),
            session=session,
            locks_fd=self._locks_fd,
            metaservers_fd=self._metaservers_fd,
        )

    def _remote_address(self) -> str:
        assert not isinstance(self.volume, Embedded)
        return self.volume.address

    async def _attach(self, worker: Worker) -> None:
        """Give requests to a worker, and wait until it has answered INIT."""
        assert self._transport is not None
        self._transport.attach_worker(
            worker.fuse_socket, worker.extra_socket, worker.notify_socket, worker.slow_sockets
        )
        try:
            async with asyncio.timeout(_WORKER_INIT_S):
                while not self._transport.figures().worker_ready:
                    if not worker.running or self._transport.ended:
                        raise StartError("the worker ended before it answered INIT; see the log")
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise StartError(f"the worker did not answer INIT within {_WORKER_INIT_S:g} s") from None

    def _on_event(self) -> None:
        assert self._transport is not None
        with contextlib.suppress(BlockingIOError):
            os.read(self._transport.fileno(), 8)
        self._changed.set()
        if self._transport.ended:
            self._ended.set()

    def _write_record(self) -> None:
        children: list[Child] = [child for child in (self._worker, self._server) if child is not None and child.running]
        processes = [identify("channel", os.getpid())]
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                processes.append(identify(child.role, child.pid))
        mounted = mounts.find_mount(self.options.mountpoint)
        self.directory.write(
            runtime.MountRecord(
                mountpoint=self.options.mountpoint,
                url=self.volume.url,
                pid=os.getpid(),
                accel=self.accel,
                profile=self.options.profile,
                started=self._started,
                device_minor=mounted.device_minor if mounted is not None else 0,
                processes=processes,
            )
        )

    # Life

    def stop_at_signals(self) -> None:
        """Have SIGTERM and SIGINT end the mount; one that comes while it starts ends it when it has started."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop_asked.set)

    async def run(self) -> None:
        """Return when the mount has ended, by whatever hand, and everything of it is gone."""
        self._watch("signals", self._watch_signals())
        await self._ended.wait()
        _log.info("%s is unmounted", self.options.mountpoint)
        await self._tear_down()

    def _watch(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the task %s failed", task.get_name(), exc_info=error)

    async def _watch_signals(self) -> None:
        await self._stop_asked.wait()
        await self.unmount()

    async def _watch_transport(self) -> None:
        await self._ended.wait()
        self._ending = True

    async def _watch_worker(self) -> None:
        """Start the worker again whenever it ends, with a pause that grows while it keeps ending."""
        pause_s = 0.0
        while True:
            assert self._worker is not None
            started = time.monotonic()
            code = await self._worker.wait()
            if self._ending:
                return
            _log.error("the worker (pid %d) ended with %d; it is started again", self._worker.pid, code)
            pause_s = self._next_pause(pause_s, started)
            await self._restart_worker(pause_s)

    @staticmethod
    def _next_pause(before_s: float, started: float) -> float:
        if time.monotonic() - started > _SETTLED_S:
            return 0.0
        return min(_RESTART_MAX_S, max(_RESTART_MIN_S, 2 * before_s))

    async def _restart_worker(self, pause_s: float) -> None:
        assert self._worker is not None
        while not self._ending:
            await asyncio.sleep(pause_s)
            try:
                worker = await self._start_worker(self._worker.session)
            except StartError as error:
                _log.error("the worker cannot be started: %s", error)
                pause_s = min(_RESTART_MAX_S, max(_RESTART_MIN_S, 2 * pause_s))
                continue
            self._worker.release()
            self._worker = worker
            self.restarts += 1
            try:
                await self._attach(worker)
            except StartError as error:
                _log.error("%s", error)
                await worker.stop(1.0)  # its watcher starts the next
            self._write_record()
            return

    async def _watch_server(self) -> None:
        pause_s = 0.0
        while True:
            assert self._server is not None
            started = time.monotonic()
            code = await self._server.wait()
            if self._ending:
                return
            _log.error("the metaserver (pid %d) ended with %d; it is started again", self._server.pid, code)
            pause_s = self._next_pause(pause_s, started)
            await asyncio.sleep(pause_s)
            try:
                await self._start_server()
                self._write_record()
            except StartError as error:
                _log.error("the metaserver cannot be started: %s", error)

    # Questions

    async def stats(self) -> dict[str, Any]:
        """Return the figures that ``bpfuse stats --json`` shows."""
        assert self._transport is not None
        worker = self._worker
        return await asyncio.to_thread(
            stats.assemble,
            options=self.options,
            accel=self.accel,
            transport=self._transport.figures(),
            bpf=self._bpf,
            worker=await worker.figures() if worker is not None and worker.running else None,
            worker_pid=worker.pid if worker is not None and worker.running else None,
            restarts=self.restarts,
        )

    async def trace(self) -> dict[str, Any]:
        """Return what ``bpfuse trace`` needs to tell who answered: the number of the map ``recent``."""
        return {"recent": self._bpf.map_id("recent") if self._bpf is not None else None}

    async def busiest(self) -> dict[str, Any]:
        """Return what ``bpfuse top`` shows of inodes and processes, and have it counted for some seconds more."""
        if self._bpf is None:
            return {"inodes": [], "processes": []}
        native.watch(self._bpf.map_fd("watched"), time.clock_gettime_ns(time.CLOCK_BOOTTIME) + _WATCHED_NS)
        inodes, processes = await asyncio.to_thread(native.busiest, self._bpf.map_fd("busiest"))
        return {"inodes": inodes, "processes": processes}

    async def warmup(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Have the worker begin to warm a tree, go on, or stop, and return how far it is; see fuseclient/warmup.py."""
        if self._worker is None or not self._worker.running:
            raise UserError("the mount has no worker at this moment; try again")
        return await self._worker.answer("warmup", arguments)

    async def _stop_command(self) -> dict[str, Any]:
        await self.unmount()
        return {"stopping": True}

    # End

    async def unmount(self) -> None:
        """Unmount; if files are in use, detach the mount, let the worker write out, and cut off who still uses it."""
        self._ending = True
        mounted = await asyncio.to_thread(mounts.find_mount, self.options.mountpoint)
        if mounted is None:
            return
        try:
            await asyncio.to_thread(mounts.unmount, self.options.mountpoint)
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        _log.warning("%s is in use; it is detached and its users are cut off", self.options.mountpoint)
        await asyncio.to_thread(mounts.unmount, self.options.mountpoint, lazy=True)
        if self._worker is not None:
            await self._worker.stop(_WORKER_END_S)
        await asyncio.to_thread(mounts.abort_connection, mounted.device_minor)

    async def _drop_mount(self) -> None:
        """End what `_start_as` made, in the order that lets the worker write out."""
        if self._transport is not None and not self._transport.ended:
            with contextlib.suppress(OSError):
                await self.unmount()
            self._ending = False
        closing = None
        if self._transport is not None:
            asyncio.get_running_loop().remove_reader(self._transport.fileno())
            closing = asyncio.create_task(asyncio.to_thread(self._transport.close))
        if self._worker is not None:
            if await asyncio.to_thread(mounts.find_mount, self.options.mountpoint) is None:
                self._worker.say_unmounted()
            if self._transport is None:
                await self._worker.stop(_WORKER_END_S)
            else:
                await self._worker.join(_WORKER_END_S)
            self._worker.release()
        if closing is not None:
            await closing
        if self._bpf is not None:
            self._bpf.close()
        self._transport = self._worker = self._bpf = None
        self._changed.clear()
        self._ended.clear()

    async def _tear_down(self) -> None:
        self._ending = True
        if self._control is not None:
            self._control.close()
        await self._drop_mount()
        self._ending = True
        if self._server is not None:
            await self._server.stop(_SERVER_END_S)
        os.close(self._locks_fd)
        os.close(self._metaservers_fd)
        self.directory.remove()
