"""``bpfuse bench``: how fast a mount is, here and now, beside other directories if wanted."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fuseclient.bench.directories import Size, measure
from fuseclient.bench.figures import Figures, show
from fuseclient.cli.values import console, format_size, parse_size

_DEFAULT = Size()


def register(app: typer.Typer) -> None:
    app.command("bench")(bench)


def bench(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="a directory of the mount; all goes into a new one below it")
    ],
    beside: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="another directory to measure in turns; can be repeated")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="each directory's turns")] = 5,
    files: Annotated[int, typer.Option(min=10, max=10_000_000, help="small files")] = _DEFAULT.files,
    size: Annotated[str, typer.Option(metavar="SIZE", help="of each")] = format_size(_DEFAULT.file_bytes),
    processes: Annotated[int, typer.Option(min=1, max=64, help="that share them")] = _DEFAULT.processes,
    large: Annotated[str, typer.Option(metavar="SIZE", help="the large file, 0: none")] = format_size(
        _DEFAULT.large_bytes
    ),
    as_json: Annotated[bool, typer.Option("--json", help="JSON, with every round's value")] = False,
) -> None:
    """Measure small files and a large one in a directory. What is read is compared with what was written."""
    out, directories = console(), list(dict.fromkeys([directory, *(beside or [])]))
    much = Size(files, parse_size(size), processes, parse_size(large))
    with Console(stderr=True).status("") as status:
        figures = measure(directories, much, rounds, status.update)
    if as_json:
        print(json.dumps(figures.to_json()))
    else:
        out.print(_table(figures, directories))


def _table(figures: Figures, directories: list[str]) -> Table:
    table = Table(title="medians, with the least and the most", title_justify="left")
    table.add_column("")
    for name in directories:
        table.add_column(name, justify="right")
    for other in directories[1:]:
        table.add_column(f"times as fast as {other}", justify="right")
    for row in figures.rows.values():
        cells = []
        for name in directories:
            found = row.summary(name)
            cells.append("" if found is None else f"{show(found.median)} ({show(found.low)}-{show(found.high)})")
        ratios = [row.speed(directories[0], other) for other in directories[1:]]
        table.add_row(f"{row.name}, {row.unit}", *cells, *("" if each is None else show(each) for each in ratios))
    return table
