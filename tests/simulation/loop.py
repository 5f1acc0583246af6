"""An event loop of virtual time, on which several processes run: nodes that can be stopped, killed and suspended.

A callback belongs to the node in whose context it was scheduled, so tasks, timers and what arrives for a node stay with
it. Callbacks of one node run in order, as in any event loop; which node goes next is drawn from the seed. Time passes
only when nobody can run.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import itertools
import random
import zlib
from asyncio.base_events import BaseEventLoop
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

#: Where every simulation's time begins, in seconds.
START_S: Final = 1000.0
#: Callbacks after which a run is taken to go round in circles.
MAX_STEPS: Final = 1_000_000


class Stuck(Exception):
    """Nothing is left to run and no timer is set, or it goes on for ever."""


class Node:
    """A process. ``boot_offset_ns`` and ``wall_offset_ns`` are its machine's clocks against virtual time."""

    def __init__(self, name: str, boot_offset_ns: int = 0) -> None:
        self.name = name
        self.number = zlib.crc32(name.encode())
        self.boot_offset_ns = boot_offset_ns
        self.wall_offset_ns = 0
        self.frozen = False
        self.dead = False
        #: Seconds that its machine has been suspended in all: its monotonic clock is late by so much.
        self.suspended_s = 0.0
        self.ready: deque[asyncio.Handle] = deque()
        self.context = contextvars.copy_context()
        self.context.run(_NODE.set, self)

    def __repr__(self) -> str:
        return f"<{self.name}>"


_NODE: Final[contextvars.ContextVar[Node | None]] = contextvars.ContextVar("node", default=None)
#: What runs in no node's context.
_OUTSIDE: Final = Node("outside")


def current_node() -> Node:
    """Return the node that runs."""
    return _NODE.get() or _OUTSIDE


class VirtualLoop(BaseEventLoop):
    """The loop; ``rng`` decides who goes next."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.now = START_S
        self.steps = 0
        self._rng = rng
        self._stamps = itertools.count(1)
        self._numbers = itertools.count()
        self._timers: list[tuple[float, int, asyncio.TimerHandle, Node]] = []
        self._active: list[Node] = []
        #: What dead nodes leave: kept, so that no finaliser of theirs ever runs.
        self._graves: list[object] = []
        #: A running digest of what ran when: two runs of a seed end with the same.
        self.digest = 0
        self._discarded = False

    # What nodes see

    def time(self) -> float:
        return self.now - current_node().suspended_s

    def stamp(self) -> int:
        """Return a number larger than all before: the order of things in the whole simulation."""
        return next(self._stamps)

    # Scheduling

    def _call_soon(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._enqueue(handle, _node_of(context))
        return handle

    def _enqueue(self, handle: asyncio.Handle, node: Node) -> None:
        if self._discarded:
            return
        if node.dead:
            self._graves.append(handle)
            return
        if not node.ready:
            self._active.append(node)
        node.ready.append(handle)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        node = _node_of(context)
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when + current_node().suspended_s, next(self._numbers), timer, node))
        return timer

    def after(self, delay_s: float, node: Node, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        """Have a node called back when virtual time has advanced by ``delay_s``."""
        return self.call_at(self.time() + delay_s, callback, *args, context=node.context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _asyncgen_finalizer_hook(self, agen: object) -> None:
        """Generators that nobody finished just go."""

    def run_in_executor(self, executor: Any, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Run it here and now."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _run_once(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Stuck(f"no end after {MAX_STEPS} steps, at {self.now - START_S:.3f} s")
        node = self._choose()
        while node is None:
            self._advance()
            node = self._choose()
        handle = node.ready.popleft()
        if not node.ready:
            self._active.remove(node)
        if not handle.cancelled():
            self.digest = hash((self.digest, self.now, node.number))
            handle._run()

    def _choose(self) -> Node | None:
        active = self._active
        if not active:
            return None
        chosen = active[int(self._rng.random() * len(active))]
        if not chosen.frozen:
            return chosen
        runnable = [node for node in active if not node.frozen]
        return runnable[int(self._rng.random() * len(runnable))] if runnable else None

    def _advance(self) -> None:
        """Let time pass up to the next timer, and make all ready that is due."""
        while self._timers and (self._timers[0][2].cancelled() or self._timers[0][3].dead):
            self._graves.append(heapq.heappop(self._timers))
        if not self._timers:
            raise Stuck(f"nothing is left to do at {self.now - START_S:.3f} s")
        self.now = max(self.now, self._timers[0][0])
        while self._timers and self._timers[0][0] <= self.now:
            _, _, timer, node = heapq.heappop(self._timers)
            if not timer.cancelled():
                self._enqueue(timer, node)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        """Start a task; one that a finaliser of what a run left would start does not run."""
        if self._discarded:
            coro.close()
        return super().create_task(coro, **options)

    # Faults

    def spawn(self, node: Node, coroutine: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
        """Start a task of a node."""
        return self.create_task(coroutine, name=name, context=node.context)

    def post(self, node: Node, callback: Callable[..., object], *args: Any) -> None:
        """Have a node run a callback."""
        self._call_soon(callback, args, node.context)

    def kill(self, node: Node) -> None:
        """Nothing of a node runs any more, not even what its tasks would do at their end."""
        node.dead = True
        self._graves += node.ready
        node.ready.clear()
        if node in self._active:
            self._active.remove(node)

    def suspend(self, nodes: list[Node], seconds: float) -> None:
        """A machine's suspend: its nodes' monotonic clocks stand still for so long, and time is advanced by it."""
        begun = self.now
        for node in nodes:
            node.frozen = True
            node.suspended_s += seconds
        moved = [
            (when + seconds if node in nodes and when > begun else when, number, timer, node)
            for when, number, timer, node in self._timers
        ]
        heapq.heapify(moved)
        self._timers = moved

    def discard(self) -> None:
        """Let everything go without a word: the run is over."""
        self._discarded = True
        self.set_exception_handler(lambda loop, context: None)
        asyncio._set_running_loop(self)  # or what is closed would make tasks of no loop, which nobody awaits
        try:
            self._close_tasks()
        finally:
            asyncio._set_running_loop(None)
        for each in (self._graves, self._timers, self._active):
            each.clear()
        self.close()

    def _close_tasks(self) -> None:
        closed: set[asyncio.Task[Any]] = set()
        while left := asyncio.all_tasks(self) - closed:  # closing one may start another
            closed |= left
            for task in left:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                with contextlib.suppress(BaseException):
                    task.get_coro().close()

    def _check_closed(self) -> None:
        """Finalisers of what a run leaves may still call: nothing comes of it."""


def _node_of(context: contextvars.Context | None) -> Node:
    if context is None:
        return current_node()
    node: Node | None = context.get(_NODE, None)
    return node or _OUTSIDE
