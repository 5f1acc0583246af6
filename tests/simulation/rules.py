"""The safety rules, each of which can be switched off: to show that it is needed, and that the checker would notice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final
from unittest import mock

from fuseclient.worker.guard import Guard
from fuseclient.worker.invalidation import Invalidator
from metaserver import fencing
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


_Replaced = tuple[Any, str, Any]

#: What is put in whose place when a rule is off.
RULES: Final[dict[str, tuple[_Replaced, ...]]] = {
    "deadline": ((Maps, "checks_deadline", False), (Kernel, "keeps_forever", True)),
    "acknowledgement": ((Breaks, "wait", _at_once),),
    "version": ((_State, "unsettled", lambda *args: ([], [])),),
    "fetches in flight": ((Guard, "may_put", lambda *args: True),),
    "kernel before acknowledgement": ((Invalidator, "drop", _at_once),),
    "renewal after acknowledgement": ((Breaks, "settled", _at_once),),
    "epoch": ((Maps, "bump_epoch", _nothing),),
    "fencing": ((Tenure, "check", _nothing), (fencing, "check_session", _nothing)),
    "grace": ((Grace, "over", _at_once),),
    "remembered outcomes": ((fencing, "outcome", _nothing),),
    "one connection": ((Change, "is_current", True),),
}


@contextlib.contextmanager
def switched_off(rule: str | None) -> Iterator[None]:
    """Run without a rule."""
    with contextlib.ExitStack() as stack:
        for target, name, value in RULES[rule] if rule is not None else ():
            stack.enter_context(mock.patch.object(target, name, value))
        yield
