"""``bpfuse status`` and ``bpfuse evict``: who serves a volume, who uses it, and the end of a session."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fuseclient.cli.connecting import connecting
from fuseclient.cli.values import console
from fuseclient.observe import status as observed

_URL = typer.Argument(help="bpfuse://host:port[,host:port...]/volume, or file:///directory that is mounted")


def register(app: typer.Typer) -> None:
    app.command("status")(connecting(status))
    app.command("evict")(connecting(evict))


def status(
    url: Annotated[str, _URL],
    as_json: Annotated[bool, typer.Option("--json", help="one line of JSON")] = False,
) -> None:
    """Show a volume's metaservers and the sessions of its mounts. Exit code 1: no metaserver serves it."""
    found = observed.read(url)
    if as_json:
        print(json.dumps(found), flush=True)
    else:
        console().print(observed.render(found))
    if found["authority"] is None:
        raise typer.Exit(1)


def evict(
    url: Annotated[str, _URL],
    session: Annotated[str, typer.Argument(metavar="SESSION", help="its id, its beginning, or host:/mountpoint")],
) -> None:
    """End the session of a mount: what it still sends is refused, and it comes back with empty caches."""
    print(f"evicted {observed.evict(url, session)}")
