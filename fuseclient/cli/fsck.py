"""``bpfuse fsck``: check a volume, and repair it."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

import msgspec
import typer

from fuseclient.cli.progress import ProgressLine
from fuseclient.cli.values import format_bytes
from fuseclient.maintenance.fsck import Options, Outcome, check
from fuseclient.maintenance.job import Finding


def register(app: typer.Typer) -> None:
    app.command("fsck")(fsck)


def fsck(
    url: Annotated[str, typer.Argument(help="file:///directory, or bpfuse://host:port/volume with --engine")],
    repair: Annotated[
        bool, typer.Option("--repair", help="repair what is found; what lost objects held will read as zeros")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="read all data and compare it with its checksums")] = False,
    metadata_only: Annotated[bool, typer.Option("--metadata-only", help="do not look into the store")] = False,
    engine: Annotated[
        str | None,
        typer.Option(metavar="URL", help="for bpfuse://...: where its metaserver keeps metadata"),
    ] = None,
    accept_empty_store: Annotated[
        bool, typer.Option("--accept-empty-store", help="repair even if the store has none of the objects needed")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="a line of JSON for each finding, and a last one")] = False,
) -> int:
    """Check a volume that is not mounted. Exit code: 0 clean, 1 something is wrong (still), 2 it cannot be checked."""
    options = Options(
        repair=repair, verify=verify, store=not metadata_only, engine=engine, accept_empty_store=accept_empty_store
    )
    with ProgressLine() as line:
        outcome = asyncio.run(check(url, options, _JsonLines(line) if as_json else _Lines(line)))
    print(json.dumps(_summary(outcome)) if as_json else _text(outcome))
    return 1 if outcome.remaining else 0


class _Lines:
    """Findings as lines for people."""

    def __init__(self, line: ProgressLine) -> None:
        self._line = line
        self.progress = line.progress

    def finding(self, finding: Finding) -> None:
        done = " (repaired)" if finding.repaired else ""
        self._line.print(f"{finding.kind}: {finding.where} {finding.what}{done}")


class _JsonLines:
    """Findings as lines for programs."""

    def __init__(self, line: ProgressLine) -> None:
        self._line = line
        self.progress = line.progress

    def finding(self, finding: Finding) -> None:
        self._line.print(msgspec.json.encode({"finding": finding}).decode())


def _summary(outcome: Outcome) -> dict[str, Any]:
    totals = outcome.totals
    objects = outcome.objects
    summary = {
        "url": outcome.url,
        "found": outcome.found,
        "repaired": outcome.repaired,
        "remaining": outcome.remaining,
        **({key: getattr(totals, key) for key in ("entries", "inodes", "bytes", "slices")} if totals else {}),
        "objects": msgspec.to_builtins(objects) if objects else None,
        "unused": msgspec.to_builtins(outcome.unused),
    }
    return {"summary": summary}


def _text(outcome: Outcome) -> str:
    """Return what was looked at and what it came to, in a few lines."""
    lines = []
    if outcome.totals is not None:
        totals = outcome.totals
        lines.append(f"{totals.inodes:,} inodes, {totals.entries:,} entries, files of {format_bytes(totals.bytes)}")
    if outcome.objects is not None:
        waiting = f", {outcome.unused.count:,} of them to be deleted (bpfuse gc)" if outcome.unused.count else ""
        lines.append(f"{outcome.objects.count:,} objects of {format_bytes(outcome.objects.bytes)}{waiting}")
    if not outcome.found:
        lines.append(f"{outcome.url} is clean")
    elif not outcome.remaining:
        lines.append(f"{outcome.url}: {outcome.found:,} found and repaired")
    else:
        hint = "" if outcome.repaired else "; to repair it: --repair"
        lines.append(f"{outcome.url}: {outcome.found:,} found, {outcome.remaining:,} of them remain{hint}")
    return "\n".join(lines)
