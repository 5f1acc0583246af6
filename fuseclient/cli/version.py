"""``bpfuse version``."""

from __future__ import annotations

from importlib import metadata

import typer


def register(app: typer.Typer) -> None:
    app.command("version")(version)


def version() -> None:
    """Print the version."""
    print(f"bpfuse {metadata.version('bpfuse')}")
