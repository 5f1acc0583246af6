"""``bpfuse events``: what changes on a volume."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fuseclient.cli.connecting import connecting
from fuseclient.events import source
from fuseclient.events.lines import Lines, as_json


def register(app: typer.Typer) -> None:
    app.command("events")(connecting(events))


def events(
    url: Annotated[str, typer.Argument(help="file:///directory, or bpfuse://host:port/volume; mounted or not")],
    since: Annotated[
        int | None,
        typer.Option(metavar="VERSION", min=0, max=2**63 - 1, help="after this event (0: all kept); default: from now"),
    ] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="a line of JSON for each")] = False,
    until_now: Annotated[
        bool, typer.Option("--until-now", "--no-follow", help="end with what has happened when the command begins")
    ] = False,
) -> None:
    """Show the changes of a volume's names, attributes and content, in the order of their commits, as they come.

    Exit code 3: some of the events that were asked for are not kept any more.
    """
    lines = Lines()
    text = as_json if json_lines else lines.line
    for page in source.pages(url, since, live=not until_now, note=_note):
        for event in page.events:
            sys.stdout.write(f"{text(event)}\n")
        sys.stdout.flush()


def _note(text: str) -> None:
    print(f"bpfuse: note: {text}", file=sys.stderr, flush=True)
