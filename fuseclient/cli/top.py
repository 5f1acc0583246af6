"""``bpfuse top``: what a mount is asked at this moment."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated

import msgspec
import typer
from rich.live import Live

from fuseclient import control, runtime
from fuseclient.cli.values import console
from fuseclient.observe.inode_paths import InodePaths
from fuseclient.observe.top import View, read, render, view


def register(app: typer.Typer) -> None:
    app.command("top")(top)


def top(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="the mount point, or anything below it")],
    interval: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, max=20, help="how often")] = 1.0,
    count: Annotated[int | None, typer.Option(metavar="N", min=1, help="how many times; else until Ctrl-C")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="a line of JSON each time")] = False,
) -> None:
    """Show live what a mount is asked, by request and who answers, and its busiest directories and processes."""
    mount_directory, record = runtime.mount_of(directory)
    views = _views(mount_directory, record.mountpoint, interval, count)
    if as_json:
        for each in views:
            print(msgspec.json.encode(each).decode(), flush=True)
        return
    screen = console()
    if not screen.is_terminal:
        for each in views:
            screen.print(render(each, record.mountpoint))
        return
    with Live(console=screen, auto_refresh=False) as live:
        for each in views:
            live.update(render(each, record.mountpoint), refresh=True)


def _views(directory: runtime.MountDirectory, mountpoint: str, interval_s: float, count: int | None) -> Iterator[View]:
    with InodePaths(mountpoint) as paths:
        earlier = read(lambda command: control.ask(directory.control_socket, command))
        while count is None or count > 0:
            time.sleep(interval_s)
            later = read(lambda command: control.ask(directory.control_socket, command))
            yield view(later, earlier, paths.directory)
            earlier, count = later, None if count is None else count - 1
