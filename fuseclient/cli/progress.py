"""Progress on standard error, where that is a terminal: what is being done, how much of it, and how fast."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text


class _Done(ProgressColumn):
    """How much is done, of how much if that is known, and the rate."""

    def render(self, task: Task) -> Text:
        done = f"{int(task.completed):,}"
        if task.total:
            done += f" of {int(task.total):,}"
        rate = task.finished_speed or task.speed
        return Text(f"{done}  {rate:,.0f}/s" if rate else done)


class ProgressLine:
    """A context whose :meth:`progress` can be told of one kind of work after another."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), _Done(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("", visible=False)
        self._what = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._progress.stop()

    def progress(self, what: str, done: int, total: int) -> None:
        """So much of ``what`` is done; ``total`` is an estimate, 0 if there is none."""
        if what != self._what:
            self._what = what
            self._progress.reset(self._task, description=what, visible=True)
        self._progress.update(self._task, completed=done, total=max(done, total) if total else None)

    def refresh(self) -> None:
        """Show the newest now."""
        self._progress.refresh()

    def print(self, text: str) -> None:
        """Print a line to standard output, above the progress if both are on the terminal."""
        self._progress.stop()
        print(text)
        self._progress.start()
