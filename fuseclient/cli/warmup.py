"""``bpfuse warmup``: a tree of a mount is made answerable from its caches, before anybody asks."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from fuseclient.cli.progress import ProgressLine
from fuseclient.cli.values import format_bytes
from fuseclient.warmup import Amount, Progress, warm

_INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    app.command("warmup")(warmup)


def warmup(
    path: Annotated[str, typer.Argument(help="a directory on a mount: it, and all below it")],
    data: Annotated[bool, typer.Option("--data", help="the files' content, too")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one line of JSON at the end")] = False,
) -> int:
    """Bring the metadata of a tree, or metadata and data, into the mount's caches.

    Ctrl-C ends it and keeps what is done: begun again it passes over what is there. What does not fit into the
    caches is said at the end.
    """
    with ProgressLine() as line:
        progress = warm(path, data=data, report=lambda each: _show(line, each))
    print(msgspec.json.encode(_json(progress)).decode() if as_json else "\n".join(_text(progress, data=data)))
    return _INTERRUPTED if progress.state == "stopped" else 0


def _show(line: ProgressLine, progress: Progress) -> None:
    if progress.files.files:
        line.progress("bytes of larger files", progress.files_done.bytes, progress.files.bytes)
    else:
        entries = progress.entries + progress.entries_passed_over
        line.progress("entries", entries, progress.entries_expected)


def _json(progress: Progress) -> dict[str, Any]:
    return {**msgspec.to_builtins(progress), "complete": progress.complete}


def _text(progress: Progress, *, data: bool) -> list[str]:
    entries, directories = progress.entries, progress.directories
    rate = f", {entries / progress.seconds:,.0f}/s" if progress.seconds > 1 else ""
    lines = [
        f"{entries:,} entries of {directories:,} directories are in the kernel cache ({progress.seconds:.1f} s{rate})"
    ]
    if progress.directories_passed_over:
        lines.append(
            f"passed over, as they are there: {progress.entries_passed_over:,} entries of "
            f"{progress.directories_passed_over:,} directories"
        )
    if data:
        lines += _data(progress)
    lines += _left_out(progress)
    if progress.state == "stopped":
        lines.append("stopped; the same command goes on from here")
    return lines


def _data(progress: Progress) -> list[str]:
    shown = (
        ("content in the kernel cache", progress.content),
        ("larger files brought into the disk cache", progress.files_brought),
        ("larger files passed over, as they are there", progress.files_passed_over),
        ("larger files left in the store, which is near (see --cache-size)", progress.files_in_store),
    )
    return [f"{what}: {_amount(amount)}" for what, amount in shown if amount.files]


def _left_out(progress: Progress) -> list[str]:
    lines = []
    if progress.directories_left_out:
        lines.append(
            f"NOT there: {progress.directories_left_out:,} directories, with all below them: the kernel cache has room "
            f"for {progress.room_entries:,} entries (--kernel-cache-size of the mount)"
        )
    if progress.content_left_out.files:
        room = format_bytes(progress.room_content_bytes)
        lines.append(
            f"NOT there: content of {_amount(progress.content_left_out)}: the kernel cache has room for {room}"
        )
    if progress.files_left_out.files:
        room = format_bytes(progress.room_disk_bytes)
        lines.append(f"NOT there: larger files, {_amount(progress.files_left_out)}: the disk cache has room for {room}")
    if progress.files_failed.files:
        lines.append(f"NOT there: files that cannot be read, {_amount(progress.files_failed)}: see the mount's log")
    return lines


def _amount(amount: Amount) -> str:
    return f"{amount.files:,} files of {format_bytes(amount.bytes)}"
