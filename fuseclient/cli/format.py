"""``bpfuse format``: make a volume."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from fuseclient import formatting
from fuseclient.cli.values import format_size, parse_size
from metaserver import wire


def register(app: typer.Typer) -> None:
    app.command("format")(format_volume)


def format_volume(
    url: Annotated[str, typer.Argument(help="file:///directory, or bpfuse://host:port/volume")],
    store: Annotated[
        str | None,
        typer.Option(metavar="URL", help="where data goes: file:///directory or s3://bucket/prefix?endpoint=URL"),
    ] = None,
    compression: Annotated[
        Literal["none", "lz4", "zstd"] | None, typer.Option(help="of data in the store; none unless given")
    ] = None,
    inline_limit: Annotated[
        str, typer.Option(metavar="SIZE", help="files up to this size lie in the metadata engine")
    ] = format_size(wire.MAX_INLINE),
) -> None:
    """Make a volume: embedded in a directory, or on a metaserver that runs."""
    made = formatting.format_volume(url, store, parse_size(inline_limit), compression)
    print(f"{made} is ready to be mounted")
