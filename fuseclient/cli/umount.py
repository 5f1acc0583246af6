"""``bpfuse umount``: unmount, or clear a dead mount point."""

from __future__ import annotations

from typing import Annotated

import typer

from fuseclient import unmounting


def register(app: typer.Typer) -> None:
    app.command("umount")(umount)


def umount(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="the mount point")],
    force: Annotated[
        bool, typer.Option("--force", help="even while it is in use: what is in flight fails, open files are cut off")
    ] = False,
) -> None:
    """Unmount, and return when every process of the mount has ended. Clears dead mount points too."""
    unmounting.unmount(directory, force=force)
