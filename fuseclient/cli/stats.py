"""``bpfuse stats``: the figures of a mount."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.live import Live

from fuseclient import control, runtime
from fuseclient.cli.values import console
from fuseclient.observe.figures import parse_stats, render


def register(app: typer.Typer) -> None:
    app.command("stats")(stats)


def stats(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="the mount point, or anything below it")],
    as_json: Annotated[bool, typer.Option("--json", help="one line of JSON")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="again and again, until interrupted")] = False,
    interval: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="how often, with --watch")] = 1.0,
) -> None:
    """Show who answers a mount's requests, and how full the kernel's maps are."""
    mount_directory, record = runtime.mount_of(directory)
    title = f"{record.url} at {record.mountpoint}"
    readings = _readings(mount_directory, interval if watch else None)
    if as_json:
        for reading in readings:
            print(json.dumps(reading), flush=True)
    elif watch:
        _show_live(readings, title)
    else:
        for reading in readings:
            console().print(render(parse_stats(reading), title))


def _readings(directory: runtime.MountDirectory, interval_s: float | None) -> Iterator[dict[str, Any]]:
    yield control.ask(directory.control_socket, "stats")
    while interval_s is not None:
        time.sleep(interval_s)
        yield control.ask(directory.control_socket, "stats")


def _show_live(readings: Iterator[dict[str, Any]], title: str) -> None:
    with Live(console=console(), auto_refresh=False) as live:
        for reading in readings:
            live.update(render(parse_stats(reading), title), refresh=True)
