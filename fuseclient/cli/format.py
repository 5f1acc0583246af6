"""``bpfuse format``: make a volume."""

from __future__ import annotations

from typing import Annotated

import typer

from fuseclient import formatting
from fuseclient.cli.values import format_size, parse_size
from metaserver import wire


def register(app: typer.Typer) -> None:
    app.command("format")(format_volume)


def format_volume(
    url: Annotated[str, typer.Argument(help="file:///directory, or bpfuse://host:port/volume")],
    store: Annotated[str | None, typer.Option(help="where data goes: file:///directory")] = None,
    inline_limit: Annotated[
        str, typer.Option(metavar="SIZE", help="files up to this size lie in the metadata engine")
    ] = format_size(wire.MAX_INLINE),
) -> None:
    """Make a volume: embedded in a directory, or on a metaserver that runs."""
    made = formatting.format_volume(url, store, parse_size(inline_limit))
    print(f"{made} is ready to be mounted")
