"""``bpfuse doctor``: what this machine offers of what is needed, and how to mend what is missing."""

from __future__ import annotations

import json
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.table import Table

from fuseclient import features
from fuseclient.cli.values import console


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="one line of JSON")] = False) -> None:
    """Try every kernel feature that is needed. The exit code is 1 if requests cannot be answered in the kernel."""
    found = features.probe()
    possible = not features.missing_for_bpf(found)
    if as_json:
        print(json.dumps({"acceleration": possible, "features": [msgspec.to_builtins(each) for each in found]}))
    else:
        _show(found, possible)
    raise typer.Exit(0 if possible else 1)


def _show(found: list[features.Feature], possible: bool) -> None:
    out = console()
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("feature", "", "seen", "what for"):
        table.add_column(heading)
    for feature in found:
        state = "[green]found[/green]" if feature.found else "[red]missing[/red]"
        table.add_row(feature.name, state, feature.detail, feature.purpose)
    out.print(table)
    for feature in features.missing_for_bpf(found):
        out.print(f"[bold]{feature.name}[/bold]: {feature.remedy}", highlight=False, soft_wrap=True)
    if possible:
        out.print("BPF programs can answer requests here.")
    elif features.missing_for_mount(found):
        out.print("Nothing can be mounted here.")
    else:
        out.print("Volumes can be mounted here, but not accelerated (--accel off).")
