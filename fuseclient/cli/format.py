"""``bpfuse format``: make a volume."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from fuseclient import formatting
from fuseclient.cli.connecting import connecting
from fuseclient.cli.values import format_size, parse_size
from metaserver import wire


def register(app: typer.Typer) -> None:
    app.command("format")(connecting(format_volume))


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
    reuse_store: Annotated[
        bool, typer.Option("--reuse-store", help="take a store that is not empty, and give up what is in it")
    ] = False,
    keep_events: Annotated[
        int, typer.Option(metavar="COUNT", min=1, max=2**40, help="how many changes bpfuse events can go back")
    ] = wire.KEPT_EVENTS,
    keep_events_days: Annotated[
        float, typer.Option(metavar="DAYS", min=0.0001, max=36500, help="and for how long")
    ] = wire.KEPT_S / 86400,
) -> None:
    """Make a volume: embedded in a directory, or on a metaserver that runs."""
    settings = formatting.Settings(
        inline_limit=parse_size(inline_limit),
        compression=compression,
        reuse_store=reuse_store,
        kept_events=keep_events,
        kept_s=max(1, round(keep_events_days * 86400)),
    )
    made = formatting.format_volume(url, store, settings)
    print(f"{made} is ready to be mounted")
