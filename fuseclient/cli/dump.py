"""``bpfuse dump`` and ``bpfuse load``: move a volume's metadata between engines, or keep a copy of it."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated

import msgspec
import typer

from fuseclient.cli.progress import ProgressLine
from fuseclient.cli.values import format_bytes
from fuseclient.maintenance import moving
from fuseclient.maintenance.job import Moved

_Volume = Annotated[str, typer.Option(metavar="NAME", help="the volume's name")]
_Json = Annotated[bool, typer.Option("--json", help="one line of JSON")]


def register(app: typer.Typer) -> None:
    app.command("dump")(dump)
    app.command("load")(load)


def dump(
    url: Annotated[str, typer.Argument(help="the engine's URL, or file:///directory of an embedded volume")],
    file: Annotated[str, typer.Argument(help="the file to be made")],
    volume: _Volume = "",
    as_json: _Json = False,
) -> None:
    """Write a volume's metadata to a file, as it is at one moment. Its data stays in its store."""
    with ProgressLine() as line:
        moved = asyncio.run(moving.dump(url, os.path.abspath(file), volume, line))
    _show(f"dumped to {file}", moved, as_json)


def load(
    file: Annotated[str, typer.Argument(help="what dump has written")],
    url: Annotated[str, typer.Argument(help="the engine's URL")],
    volume: _Volume = "",
    as_json: _Json = False,
) -> None:
    """Make a volume of a dump on an engine that has none of its name; it is read back and compared."""
    with ProgressLine() as line:
        moved = asyncio.run(moving.load(os.path.abspath(file), url, volume, line))
    _show(f"loaded from {file}, read back and found the same", moved, as_json)


def _show(done: str, moved: Moved, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(moved).decode())
    else:
        print(f"{moved.name}: {moved.inodes:,} inodes, {moved.rows:,} rows of {format_bytes(moved.bytes)} {done}")
