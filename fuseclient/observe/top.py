"""``bpfuse top``: what a mount is asked at this moment: by request and level, by directory, by process."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import msgspec
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fuseclient.observe.figures import Answers, parse_stats, since, total

_ROWS: Final = 10
#: A directory of which the kernel knows no path any more.
_UNKNOWN: Final = "(not in the kernel's caches)"


class Busy(msgspec.Struct, frozen=True, array_like=True):
    """The requests of an inode or a process since somebody watches, as the channel counts them."""

    id: int
    requests: int
    answered: int


class Busiest(msgspec.Struct, frozen=True):
    """What the channel answers to "busiest"."""

    inodes: list[Busy]
    processes: list[Busy]


class Reading(msgspec.Struct, frozen=True):
    """The figures of one moment (seconds of the monotonic clock)."""

    at: float
    requests: dict[str, Answers]
    inodes: dict[int, Answers]
    processes: dict[int, Answers]


class Rate(msgspec.Struct, frozen=True):
    """Requests a second: by the BPF program, and by the worker."""

    what: str
    kernel: float
    worker: float


class View(msgspec.Struct, frozen=True):
    """What happened between two readings, the busiest first."""

    seconds: float
    requests: list[Rate]
    directories: list[Rate]
    processes: list[Rate]


def read(ask: Callable[[str], dict[str, Any]]) -> Reading:
    """Return the figures of now; ``ask`` asks the channel. Raises :exc:`~fuseclient.control.ControlError`."""
    busiest = msgspec.convert(ask("busiest"), Busiest)
    requests = parse_stats(ask("stats")).requests
    return Reading(time.monotonic(), requests, _answers(busiest.inodes), _answers(busiest.processes))


def _answers(counted: Iterable[Busy]) -> dict[int, Answers]:
    return {each.id: Answers(each.answered, each.requests - each.answered) for each in counted}


def view(later: Reading, earlier: Reading, directory: Callable[[int], bytes | None]) -> View:
    """Return what happened between two readings. ``directory`` gives the path of that which an inode is, or is in."""
    seconds = later.at - earlier.at
    processes = {_process(pid): each for pid, each in since(later.processes, earlier.processes).items()}
    return View(
        seconds,
        _rates(since(later.requests, earlier.requests), seconds),
        _rates(_by_directory(since(later.inodes, earlier.inodes), directory), seconds),
        _rates(processes, seconds),
    )


def _rates(answers: dict[str, Answers], seconds: float) -> list[Rate]:
    ordered = sorted(answers.items(), key=lambda item: -item[1].total)
    return [Rate(what, each.kernel / seconds, each.daemon / seconds) for what, each in ordered]


def _by_directory(inodes: dict[int, Answers], directory: Callable[[int], bytes | None]) -> dict[str, Answers]:
    """Add up over the directories: what concerns a name in one names it, all else names the file itself."""
    kernel, daemon = Counter[str](), Counter[str]()
    for ino, answers in inodes.items():
        path = directory(ino)
        shown = _UNKNOWN if path is None else path.decode(errors="replace")
        kernel[shown] += answers.kernel
        daemon[shown] += answers.daemon
    return {shown: Answers(kernel[shown], daemon[shown]) for shown in kernel}


def _process(pid: int) -> str:
    if pid == 0:
        return "the kernel"
    try:
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        name = "ended"
    return f"{pid} {name}"


def render(shown: View, title: str) -> RenderableType:
    """Return the tables of a view, for a terminal."""
    everything = total({each.what: Answers(round(each.kernel), round(each.worker)) for each in shown.requests})
    summary = f"{title}: {everything.total:,} requests/s, {everything.kernel_share:.1%} of them answered in the kernel"
    tables = [_table("request", shown.requests)]
    for heading, rates in (("directory", shown.directories), ("process", shown.processes)):
        if rates:
            tables.append(_table(heading, rates))
    return Group(Text(summary, style="bold"), *tables)


def _table(heading: str, rates: list[Rate]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, min_width=80)
    table.add_column(heading, ratio=1, no_wrap=True)
    table.add_column("kernel/s", justify="right")
    table.add_column("worker/s", justify="right")
    for each in rates[:_ROWS]:
        table.add_row(Text(each.what), f"{each.kernel:,.0f}", f"{each.worker:,.0f}")
    return table
