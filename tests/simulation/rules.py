"""The safety rules, each of which can be switched off: to show that it is needed, and that the checker would notice."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Final, NamedTuple
from unittest import mock

from fuseclient.worker.creations import Creations
from fuseclient.worker.guard import Guard
from fuseclient.worker.invalidation import Invalidator
from fuseclient.worker.removals import Removals
from fuseclient.worker.returns import Returns
from metaserver import fencing, wire
from metaserver.breaks import Breaks
from metaserver.coherence import Change, _State
from metaserver.fencing import Tenure
from metaserver.grace import Grace
from simulation.bpf import Maps
from simulation.kernel import Kernel


async def _at_once(*args: Any) -> None:
    """Wait for nothing."""


def _nothing(*args: Any) -> None:
    """Find nothing, and nothing wrong."""


async def _straight(removals: Removals, request: wire.Request, reply_type: Any) -> Any:
    """Call, whatever is held back."""
    return await removals._session.call(request, reply_type)


def _straight_stream(removals: Removals, request: wire.FetchDirectory) -> AsyncGenerator[wire.DirectoryPage, None]:
    return removals._session.stream(request)


class Rule(NamedTuple):
    """A rule: what is put in whose place when it is off, and the faults that it is for; none: all."""

    replaced: tuple[tuple[Any, str, Any], ...]
    faults: tuple[str, ...] = ()
    #: It is for a client that is the only one for a while.
    late: bool = False
    #: It is for an engine that acknowledges before it is durable.
    lazy: bool = False
    #: It is for two metaservers.
    standby: bool = False


RULES: Final[dict[str, Rule]] = {
    "deadline": Rule(
        ((Maps, "checks_deadline", False), (Kernel, "keeps_forever", True)), ("partition", "freeze_a_worker")
    ),
    "whole directories": Rule(((Maps, "forgets_wholes", False),)),
    "acknowledgement": Rule(((Breaks, "wait", _at_once),), ("cut_a_connection",)),
    "version": Rule(((_State, "unsettled", lambda *args: ([], [])),)),
    "fetches in flight": Rule(((Guard, "may_put", lambda *args: True),)),
    "kernel before acknowledgement": Rule(((Invalidator, "drop", _at_once),)),
    "renewal after acknowledgement": Rule(((Breaks, "settled", _at_once),)),
    "epoch": Rule(((Maps, "bump_epoch", _nothing),)),
    "fencing": Rule(((Tenure, "check", _nothing), (fencing, "check_session", _nothing)), ("fail_over",)),
    "epoch of the authority": Rule(((Tenure, "check", _nothing),), ("freeze_a_metaserver",), standby=True),
    "grace": Rule(((Grace, "over", _at_once),), ("restart_the_server", "partition", "freeze_a_worker")),
    "remembered outcomes": Rule(((fencing, "outcome", _nothing),), ("cut_a_connection", "restart_the_server")),
    "new files before others": Rule(((Creations, "commit_all", _at_once),), ("cut_a_connection",), late=True),
    "new files in order": Rule(((Creations, "before", _at_once),), ("cut_a_connection",), late=True),
    "removed names before others": Rule(((Removals, "settle", _at_once),), ("cut_a_connection",), late=True, lazy=True),
    "removed names in order": Rule(
        ((Removals, "call", _straight), (Removals, "stream", _straight_stream)),
        ("cut_a_connection",),
        late=True,
        lazy=True,
    ),
    "leases returned when they are over": Rule(((Returns, "_wait_ns", lambda *args: 0),)),
    "leases returned without pages": Rule(((Invalidator, "drop_unused", _at_once),)),
    "leases returned of what was not told since": Rule(
        ((Returns, "_is_touched", lambda *args: False), (Returns, "_is_relisted", lambda *args: False))
    ),
    "leases returned of what is not open": Rule(((Returns, "_is_used", lambda *args: False),)),
    "leases returned of what enters no cache": Rule(((Returns, "_forget", _nothing),)),
    "one connection": Rule(((Change, "is_current", True),), ("kill_a_worker",)),
}


@contextlib.contextmanager
def switched_off(rule: str | None) -> Iterator[None]:
    """Run without a rule."""
    with contextlib.ExitStack() as stack:
        for target, name, value in RULES[rule].replaced if rule is not None else ():
            stack.enter_context(mock.patch.object(target, name, value))
        yield
