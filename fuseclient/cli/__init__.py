"""The command ``bpfuse``: one module a command, which turns arguments into a call and its outcome into text.

A user's mistake (:exc:`UserError`, or arguments that cannot be parsed) is one line on standard error and a non-zero
exit code. Anything else that is raised is a bug and shows its traceback.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Final, NoReturn

import typer
from typer.exceptions import TyperException

from fuseclient.errors import UserError
from fuseclient.leaving import leave

_HELP = "A distributed file system whose FUSE requests BPF programs answer in the kernel."

#: The commands in the order of the help, and the module of each.
MODULES: Final = {
    **{name: name for name in ("format", "metaserver", "mount", "umount", "warmup", "stats", "status", "bench")},
    **{name: name for name in ("events", "token", "top", "trace", "fsck", "gc", "dump")},
    "load": "dump",
    "evict": "status",
    "doctor": "doctor",
    "version": "version",
}


def app_for(words: Sequence[str]) -> typer.Typer:
    """Return the command line, of which only the command that the words name is loaded; if they name none, all are."""
    app = typer.Typer(name="bpfuse", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    # With a callback even a single command is called by its name.
    app.callback(help=_HELP)(lambda: None)
    named = MODULES.get(words[0]) if words else None
    for name in dict.fromkeys(MODULES.values()) if named is None else (named,):
        importlib.import_module(f"fuseclient.cli.{name}").register(app)
    return app


def run() -> NoReturn:
    """Run the command line, and end the process."""
    try:
        main()
    except SystemExit as ended:
        leave(ended.code if isinstance(ended.code, int) else 0)


def main() -> NoReturn:
    """Run the command line and exit: raise SystemExit."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app_for(sys.argv[1:])(standalone_mode=False)
    except (UserError, TyperException) as error:
        _say(error)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # whoever read the output has gone; nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _say(error: UserError | TyperException) -> None:
    text = error.message if isinstance(error, UserError) else " ".join(error.format_message().split())
    if text:
        print(f"bpfuse: {text}", file=sys.stderr)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    """Make SIGTERM an exception, so that what was begun is undone."""
    raise SystemExit(128 + signal.SIGTERM)
