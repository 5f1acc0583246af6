"""Progress on standard error, where that is a terminal: what is being done, how much of it, and how fast."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

#: Seconds after which a rate says something.
_RATED_AFTER_S: Final = 0.5


class _Done(ProgressColumn):
    """How much is done, of how much if that is known, and the rate."""

    def render(self, task: Task) -> Text:
        done = f"{int(task.completed):,}"
        if task.total:
            done += f" of {int(task.total):,}"
        elapsed_s = task.elapsed or 0.0
        if elapsed_s < _RATED_AFTER_S:
            return Text(done)
        return Text(f"{done}  {(task.completed - task.fields['first']) / elapsed_s:,.0f}/s")


class _Remaining(TimeRemainingColumn):
    """The time that is left, where it is known how much there is."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text("")


class ProgressLine:
    """A context whose :meth:`progress` can be told of one kind of work after another."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            _Done(),
            TimeElapsedColumn(),
            _Remaining(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not console.is_terminal,
        )
        self._shares_terminal = console.is_terminal and sys.stdout.isatty()
        self._task: TaskID | None = None
        self._what = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._progress.stop()

    def progress(self, what: str, done: int, total: int) -> None:
        """So much of ``what`` is done; ``total`` is an estimate, 0 if there is none."""
        if self._task is None or what != self._what:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._what, self._task = what, self._progress.add_task(what, total=None, first=done)
        self._progress.update(self._task, completed=done, total=max(done, total) if total else None)

    def refresh(self) -> None:
        """Show the newest now."""
        self._progress.refresh()

    def print(self, text: str) -> None:
        """Print a line to standard output, above the progress if both are on the terminal."""
        if self._shares_terminal:
            self._progress.stop()
        print(text)
        if self._shares_terminal:
            self._progress.start()
