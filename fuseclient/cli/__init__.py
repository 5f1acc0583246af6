"""The command ``bpfuse``: one module a command, which turns arguments into a call and its outcome into text.

A user's mistake (:exc:`UserError`, or arguments that cannot be parsed) is one line on standard error and a non-zero
exit code. Anything else that is raised is a bug and shows its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from fuseclient.cli import (
    bench,
    doctor,
    dump,
    events,
    format,
    fsck,
    gc,
    metaserver,
    mount,
    stats,
    status,
    token,
    top,
    trace,
    umount,
    version,
    warmup,
)
from fuseclient.errors import UserError
from fuseclient.leaving import leave

_HELP = "A distributed file system whose FUSE requests BPF programs answer in the kernel."

app = typer.Typer(name="bpfuse", help=_HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_COMMANDS = (
    *(format, metaserver, mount, umount, warmup, stats, status, bench, events),
    *(token, top, trace, fsck, gc, dump, doctor, version),
)
for _module in _COMMANDS:
    _module.register(app)


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
        code = app(standalone_mode=False)
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
