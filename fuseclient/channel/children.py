"""The channel's children: an embedded volume's metaserver, and the worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from fuseclient import questions
from fuseclient.config import MapFds, MountOptions, WorkerConfig
from fuseclient.errors import UserError
from fuseclient.volumes import Embedded

_log = logging.getLogger(__name__)

_START_S: Final = 60.0
_FIGURES_S: Final = 1.0
_ANSWER_S: Final = 5.0
_LINE_MAX: Final = 1 << 20
#: Not among the constants of Python's socket module.
_SO_SNDBUFFORCE: Final = 32
_SOCKET_BUFFER: Final = 8 << 20


class StartError(Exception):
    """A child ended, or said that it cannot work; the message is one line for the user."""


class Child:
    """A process that ends with the channel. ``role`` names it in the log."""

    def __init__(self, role: str, process: asyncio.subprocess.Process) -> None:
        self.role = role
        self.process = process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    async def wait(self) -> int:
        """Return the exit code, negative for a signal."""
        return await self.process.wait()

    async def stop(self, grace_s: float) -> None:
        """End it by SIGTERM, and after ``grace_s`` by SIGKILL, which is logged."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
        await self.join(grace_s)

    async def join(self, grace_s: float) -> None:
        """Wait for it to end by itself; after ``grace_s`` kill it, which is logged."""
        try:
            await asyncio.wait_for(self.process.wait(), grace_s)
        except TimeoutError:
            _log.error("the %s (pid %d) did not end within %g s and is killed", self.role, self.pid, grace_s)
            self.process.kill()
            await self.process.wait()


class Metaserver(Child):
    """The metaserver of an embedded volume, on a unix socket."""

    address: str

    @classmethod
    async def start(cls, volume: Embedded, path: Path, options: MountOptions) -> Metaserver:
        """Start it and wait until it listens; raise :exc:`StartError` with what it says is wrong."""
        reading, writing = os.pipe()
        arguments = ["-m", "metaserver", "--engine", volume.engine_url, "--listen", f"unix:{path}"]
        arguments += ["--ready-fd", str(writing), "--lease-s", str(options.lease_s), "--log-level", options.log_level]
        arguments += ["--durability", options.durability, "--die-with-parent", "--no-grace", "--alone"]
        try:
            try:
                server = cls("metaserver", await _spawn(arguments, [writing]))
            finally:
                os.close(writing)
            line = await _read_line(reading, server)
        finally:
            os.close(reading)
        said, _, text = line.decode(errors="replace").strip().partition(" ")
        if said != "ready":
            await server.stop(1.0)
            raise StartError(text or "the metaserver ended before it was ready; see the log")
        server.address = text
        return server


class Worker(Child):
    """A worker, with the ends of its sockets that are the transport's until they are taken."""

    session: str
    fuse_socket: socket.socket
    extra_socket: socket.socket
    notify_socket: socket.socket
    slow_sockets: tuple[socket.socket, ...]
    _status: socket.socket
    _asking: asyncio.Lock
    #: What the worker has said and nobody has read yet, and the number of the last question.
    _said: bytearray
    _asked: int

    @classmethod
    async def start(
        cls,
        options: MountOptions,
        address: str,
        volume: str,
        *,
        generation: int,
        maps: MapFds | None,
        session: str | None,
        locks_fd: int,
        metaservers_fd: int,
    ) -> Worker:
        """Start a worker and wait until it has its session; raise :exc:`StartError`."""
        fuse, fuse_theirs = _message_pair()
        extra, extra_theirs = _message_pair()
        notify, notify_theirs = _message_pair()
        slow, slow_theirs = zip(*(_message_pair() for _ in range(3)), strict=True)
        status, status_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        theirs = (fuse_theirs, extra_theirs, notify_theirs, *slow_theirs, status_theirs)
        config = WorkerConfig(
            options=options,
            address=address,
            volume=volume,
            fuse_fd=fuse_theirs.fileno(),
            extra_fd=extra_theirs.fileno(),
            notify_fd=notify_theirs.fileno(),
            slow_fds=(slow_theirs[0].fileno(), slow_theirs[1].fileno(), slow_theirs[2].fileno()),
            status_fd=status_theirs.fileno(),
            generation=generation,
            maps=maps,
            session=session,
            locks_fd=locks_fd,
            metaservers_fd=metaservers_fd,
        )
        with contextlib.ExitStack() as ours:
            for mine in (fuse, extra, notify, *slow, status):
                ours.callback(mine.close)
            try:
                worker = cls("worker", await _spawn_worker(config, theirs))
            finally:
                for end in theirs:
                    end.close()
            await worker._take_ready(status)
            ours.pop_all()
        worker.fuse_socket, worker.extra_socket = fuse, extra
        worker.notify_socket, worker.slow_sockets = notify, slow
        return worker

    async def _take_ready(self, status: socket.socket) -> None:
        status.setblocking(False)
        self._status = status
        self._asking = asyncio.Lock()
        self._said, self._asked = bytearray(), 0
        line = await _read_line(status.fileno(), self)
        try:
            said = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError:
            said = {}
        if "session" not in said:
            await self.stop(1.0)
            raise StartError(str(said.get("error", "the worker ended before it was ready; see the log")))
        self.session = said["session"]

    async def figures(self) -> dict[str, Any] | None:
        """Ask the worker for its figures; ``None`` if it does not answer in time."""
        reply = await self._ask("figures", {}, _FIGURES_S)
        return reply.answer if reply is not None else None

    async def answer(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Ask the worker something; raise :exc:`UserError` with what it says is wrong, or if it does not answer."""
        reply = await self._ask(name, arguments, _ANSWER_S)
        if reply is None or reply.error is not None:
            raise UserError((reply and reply.error) or "the mount's worker does not answer at this moment")
        return reply.answer

    async def _ask(self, name: str, arguments: dict[str, Any], timeout_s: float) -> questions.Reply | None:
        async with self._asking:
            self._asked += 1
            line = questions.encode(questions.Question(name=name, id=self._asked, arguments=arguments))
            try:
                async with asyncio.timeout(timeout_s):
                    await asyncio.get_running_loop().sock_sendall(self._status, line)
                    return await self._reply(self._asked)
            except (OSError, TimeoutError, msgspec.DecodeError):
                return None

    async def _reply(self, number: int) -> questions.Reply:
        """Return the answer to a question; those to earlier ones, which came too late, are passed over."""
        while True:
            while b"\n" not in self._said:
                piece = await asyncio.get_running_loop().sock_recv(self._status, 65536)
                if not piece or len(self._said) > _LINE_MAX:
                    raise ConnectionResetError("the worker ended its answer in the middle, or it is too long")
                self._said += piece
            line, _, rest = bytes(self._said).partition(b"\n")
            self._said = bytearray(rest)
            reply = msgspec.json.decode(line, type=questions.Reply)
            if reply.id == number:
                return reply

    def say_unmounted(self) -> None:
        """Tell the worker that the mount is gone, so that it may end its session."""
        with contextlib.suppress(OSError):
            self._status.send(questions.encode(questions.UNMOUNTED))

    def release(self) -> None:
        """Close what is left of the sockets of a worker that has ended."""
        for end in (self.fuse_socket, self.extra_socket, self.notify_socket, *self.slow_sockets, self._status):
            end.close()


def _message_pair() -> tuple[socket.socket, socket.socket]:
    """Return two ends that carry messages of a FUSE request's or reply's largest size, several at a time."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BUFFER)
    return pair


async def _spawn(arguments: Sequence[str], descriptors: Sequence[int]) -> asyncio.subprocess.Process:
    """Start this interpreter in its own process group, so that a terminal's Ctrl-C reaches the channel only."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        pass_fds=descriptors,
        process_group=0,
    )


async def _spawn_worker(config: WorkerConfig, sockets: Sequence[socket.socket]) -> asyncio.subprocess.Process:
    descriptor = os.memfd_create("bpfuse-worker")
    try:
        os.write(descriptor, msgspec.json.encode(config))
        os.lseek(descriptor, 0, os.SEEK_SET)
        inherited = [descriptor, *(end.fileno() for end in sockets), *_descriptors(config.maps)]
        inherited += [each for each in (config.locks_fd, config.metaservers_fd) if each is not None]
        return await _spawn(["-m", "fuseclient.worker", str(descriptor)], inherited)
    finally:
        os.close(descriptor)


def _descriptors(maps: MapFds | None) -> list[int]:
    if maps is None:
        return []
    shared = [maps.control, maps.names, maps.inodes, maps.uses, maps.xattrs, maps.pages, maps.opens, maps.counters]
    return [descriptor for descriptor in (*shared, maps.count_program) if descriptor >= 0]


async def _read_line(descriptor: int, child: Child) -> bytes:
    """Read what a child says first; empty if it ends, or says nothing in time."""
    loop = asyncio.get_running_loop()
    received = bytearray()
    readable = asyncio.Event()
    os.set_blocking(descriptor, False)
    loop.add_reader(descriptor, readable.set)
    try:
        async with asyncio.timeout(_START_S):
            while not received.endswith(b"\n"):
                await readable.wait()
                readable.clear()
                piece = os.read(descriptor, 4096)
                if not piece:
                    return b""
                received += piece
    except TimeoutError:
        _log.error("the %s (pid %d) said nothing within %g s", child.role, child.pid, _START_S)
        return b""
    finally:
        loop.remove_reader(descriptor)
    return bytes(received)
