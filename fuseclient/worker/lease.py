"""Until when answers may be kept: the deadline that the BPF programs check, and the time-to-live of replies."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fuseclient.worker.session import boottime_ns

if TYPE_CHECKING:
    from fuseclient.kernel_cache import Cache


class Lease:
    """The lease as the caches may use it. It is moved when the kernel has dropped what others changed, not before."""

    def __init__(self, cache: Cache, kernel_ttl_s: float | None, clock: Callable[[], int] = boottime_ns) -> None:
        self._cache = cache
        self._kernel_ttl_s = kernel_ttl_s
        self._clock = clock
        #: On CLOCK_BOOTTIME; 0: there is no lease.
        self.deadline_ns = 0

    def move(self, deadline_ns: int) -> None:
        """Let everything cached be used until ``deadline_ns``."""
        self.deadline_ns = deadline_ns
        self._cache.renew(deadline_ns)

    def until_ns(self, longest_ns: int) -> int:
        """Return the time, on CLOCK_BOOTTIME, until which something may be used that is kept ``longest_ns`` at most."""
        return min(self.deadline_ns, self._clock() + longest_ns)

    def ttl_s(self) -> float:
        """Return for how many seconds the kernel may keep what it is told now."""
        left_s = self.left_s()
        return left_s if self._kernel_ttl_s is None else min(left_s, self._kernel_ttl_s)

    def left_s(self) -> float:
        """Return for how many seconds the lease runs."""
        return max(0, self.deadline_ns - self._clock()) / 1e9
