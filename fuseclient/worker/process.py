"""The worker's process: start, the parts put together, and a stop that loses nothing.

It is started by the channel with inherited descriptors (see :class:`~fuseclient.config.WorkerConfig`), opens the
session, says that it is ready, and serves FUSE requests from the channel's socket with pyfuse3. It ends cleanly, with
everything written committed and the session closed, on SIGTERM or SIGINT and when the channel closes the socket. It
dies with the channel, too: the kernel sends it SIGTERM then.

Only if the channel says that the mount is gone is the session ended. Else it is left to its lease, to be resumed by the
next worker, or because a mount whose channel died is still there: the kernel answers from what it was told to keep.

pyfuse3 takes the end of the socket for a broken device and raises in each of its tasks; so the socket is watched
for a hang-up, and the loop is told to end first.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import select
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final

import msgspec
import pyfuse3
import pyfuse3.asyncio
import uvloop

from fuseclient import diagnostics, questions
from fuseclient.config import WorkerConfig
from fuseclient.data.whole_files import LEAST_BYTES
from fuseclient.errors import UserError
from fuseclient.kernel_cache import Cache, KernelCache, NoKernelCache
from fuseclient.native import NativeError
from fuseclient.worker.extra_ops import ExtraOps
from fuseclient.worker.mount import CannotStart, Mount
from fuseclient.worker.notifier import Notifier
from fuseclient.worker.suspend import SuspendWatch

_log = logging.getLogger(__name__)

#: Answers a question of the channel's, with its arguments; raises UserError.
Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

_PR_SET_PDEATHSIG: Final = 1
#: Requests in hand at once, and idle tasks kept for them.
_MAX_TASKS: Final = 1024
_MIN_TASKS: Final = 16
#: Seconds that a clean stop may take before the process just ends.
_STOP_S: Final = 30
#: Seconds within which a channel that closes the socket says why.
_LAST_WORD_S: Final = 5.0


def main(argv: list[str]) -> int:
    """Run a worker; return the process's exit code."""
    _die_with_parent()
    config = read_config(int(argv[1]))
    diagnostics.start("worker", config.options.log_level)
    pyfuse3.asyncio.enable()
    status = Status(config.status_fd)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(Worker(config, status).run())
    except CannotStart as error:
        status.send({"error": str(error)})
        return 1
    except Exception as error:
        _log.exception("the worker failed")
        status.send({"error": f"internal error: {error}"})
        return 1
    return 0


def read_config(fd: int) -> WorkerConfig:
    """Read the configuration up to the end of the descriptor, and close it."""
    with os.fdopen(fd, "rb") as file:
        return msgspec.json.decode(file.read(), type=WorkerConfig)


def _die_with_parent() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


class Status:
    """The stream to the channel: what the worker says as it starts, then its answers to the channel's questions."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: Mapping[str, Answer] = {}
        self._told = bytearray()
        self._unmounted = False
        #: Set when nothing more is to be expected.
        self._last = asyncio.Event()
        os.set_blocking(fd, False)

    def send(self, message: dict[str, Any]) -> None:
        """Send an object, unless the channel does not read it."""
        self._send_line(json.dumps(message).encode() + b"\n")

    def _send_line(self, line: bytes) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            os.write(self._fd, line)

    async def is_unmounted(self) -> bool:
        """Say whether the mount is gone, when the channel has said so, or is gone itself, or is silent for long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORD_S):
                await self._last.wait()
        return self._unmounted

    @contextlib.contextmanager
    def answering(self, answers: Mapping[str, Answer]) -> Iterator[None]:
        """Listen to the channel, and answer each question by the answer of its name."""
        self._answers = answers
        loop = asyncio.get_running_loop()
        loop.add_reader(self._fd, self._on_readable)
        try:
            yield
        finally:
            loop.remove_reader(self._fd)

    def _on_readable(self) -> None:
        try:
            told = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            told = b""
        *lines, self._told = (self._told + told).split(b"\n")
        for line in lines:
            self._hear(msgspec.json.decode(line, type=questions.Question))
        if not told or self._unmounted:
            self._last.set()
            asyncio.get_running_loop().remove_reader(self._fd)

    def _hear(self, question: questions.Question) -> None:
        if question == questions.UNMOUNTED:
            self._unmounted = True
            return
        task = asyncio.create_task(self._answer(question))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, question: questions.Question) -> None:
        try:
            answer = await self._answers[question.name](question.arguments)
            reply = questions.Reply(id=question.id, answer=answer)
        except UserError as error:
            reply = questions.Reply(id=question.id, error=error.message)
        except Exception:
            _log.exception("the question %s cannot be answered", question.name)
            reply = questions.Reply(id=question.id, error="the mount's worker failed to answer; see the mount's log")
        self._send_line(questions.encode(reply))


class Worker:
    """One worker, from its configuration to its end."""

    def __init__(self, config: WorkerConfig, status: Status) -> None:
        self._config = config
        self._status = status
        self._ending = False
        self._hang_up = False

    async def run(self) -> None:
        """Serve until told to stop; raise :exc:`CannotStart`."""
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        async with contextlib.AsyncExitStack() as stack:
            cache = _open_cache(self._config)
            stack.callback(cache.close)
            notifier = Notifier(self._config.notify_fd, self._config.slow_fds)
            stack.callback(notifier.close)
            mount = Mount(self._config, cache, notifier)
            await mount.open()
            stack.enter_context(self._status.answering(mount.answers))
            stack.push_async_callback(self._leave, mount)
            stack.enter_context(SuspendWatch(mount.woken).watching())
            await self._serve(mount)

    async def _leave(self, mount: Mount) -> None:
        await mount.close(farewell=self._hang_up and await self._status.is_unmounted())

    async def _serve(self, mount: Mount) -> None:
        """Answer requests until the socket is closed or a signal comes."""
        options = set(pyfuse3.default_options) | {"fsname=bpfuse"}
        pyfuse3.init(mount.operations, f"/dev/fd/{self._config.fuse_fd}", options)
        extra = ExtraOps(self._config.extra_fd, mount.operations, mount.ranges, mount.locks)
        extra.start()
        try:
            with self._watched():
                self._status.send({"ready": True, "session": mount.session_id.hex()})
                await pyfuse3.main(_MIN_TASKS, _MAX_TASKS)
        finally:
            await extra.close()
            pyfuse3.close(unmount=False)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """End the loop at a hang-up of the socket, SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        with select.epoll() as hang_up:
            hang_up.register(self._config.fuse_fd, select.EPOLLRDHUP | select.EPOLLHUP)
            loop.add_reader(hang_up.fileno(), self._hung_up, hang_up.fileno())
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._end, signal.Signals(number).name)
            try:
                yield
            finally:
                loop.remove_reader(hang_up.fileno())

    def _hung_up(self, watch_fd: int) -> None:
        asyncio.get_running_loop().remove_reader(watch_fd)
        self._hang_up = True
        self._end("the channel closed the socket")

    def _end(self, why: str) -> None:
        """Have pyfuse3 return when the requests in hand are answered."""
        if self._ending:
            return
        self._ending = True
        _log.info("ending: %s", why)
        signal.alarm(_STOP_S)
        # The wait that this ends may have ended in the same turn of the loop.
        with contextlib.suppress(asyncio.InvalidStateError):
            pyfuse3.terminate()

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what is a defect.

        After the end pyfuse3's tasks raise OSError as the socket is closed, and its reader InvalidStateError as a
        request comes in the turn of the loop in which its wait was ended.
        """
        if isinstance(context.get("exception"), (OSError, asyncio.InvalidStateError)) and self._ending:
            _log.debug("after the end: %s", context["exception"])
        else:
            loop.default_exception_handler(context)


def _open_cache(config: WorkerConfig) -> Cache:
    if config.maps is None:
        return NoKernelCache()
    try:
        least = LEAST_BYTES if config.options.cache_bytes != 0 else None
        return KernelCache(
            config.maps, config.options.kernel_ttl_s, worker_opens_bytes=least, opens_nothing=config.opens_nothing
        )
    except NativeError as error:
        raise CannotStart(str(error)) from error
