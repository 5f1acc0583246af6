"""``bpfuse gc``: delete what no file needs."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from fuseclient.cli.connecting import connecting
from fuseclient.cli.progress import ProgressLine
from fuseclient.cli.values import format_bytes
from fuseclient.maintenance.gc import Collected, collect
from fuseclient.maintenance.job import Amount


def register(app: typer.Typer) -> None:
    app.command("gc")(connecting(gc))


def gc(
    url: Annotated[str, typer.Argument(help="file:///directory, or bpfuse://host:port/volume; it may be mounted")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only count")] = False,
    age: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="how old an object must be that no file uses yet (3600; unless mounted, any age will do)",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one line of JSON")] = False,
) -> None:
    """Delete objects that no file needs, uploads that were broken off, and what ended sessions left."""
    with ProgressLine() as line:
        collected = collect(url, dry_run=dry_run, age_s=age, listener=line)
    print(msgspec.json.encode(collected).decode() if as_json else _text(collected))


def _text(collected: Collected) -> str:
    would = "to be deleted" if collected.dry_run else "deleted"
    rows: list[tuple[str, Amount, str]] = [
        ("unlinked inodes of ended sessions", collected.orphans, would),
        ("objects of deleted or overwritten data", collected.unused, would),
        ("objects that no file came to use", collected.uncommitted, would),
        ("unfinished uploads", collected.unfinished, would),
        ("objects that may be on their way into a file", collected.young, "left"),
        ("objects that this volume never stored", collected.foreign, "left: is it another volume's store, too?"),
    ]
    lines = [f"{a.count:,} {name} ({format_bytes(a.bytes)}) {done}" for name, a, done in rows if a.count]
    return "\n".join(lines) or f"{collected.url} has no garbage"
