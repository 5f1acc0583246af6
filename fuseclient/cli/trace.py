"""``bpfuse trace``: how long a mount's requests take."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Annotated

import typer

from fuseclient import control, runtime
from fuseclient.cli.values import console
from fuseclient.observe.latency import as_json, render
from fuseclient.observe.trace import tracing


def register(app: typer.Typer) -> None:
    app.command("trace")(trace)


def trace(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="the mount point, or anything below it")],
    seconds: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="how long; Ctrl-C ends it sooner")] = 10.0,
    json_wanted: Annotated[bool, typer.Option("--json", help="one line of JSON")] = False,
) -> None:
    """Measure how long a mount's requests take, by opcode and by who answered: BPF or the worker."""
    mount_directory, record = runtime.mount_of(directory)
    recent = control.ask(mount_directory.control_socket, "trace")["recent"]
    with tracing(record.device_minor, recent) as tracer:
        begun = time.monotonic()
        with contextlib.suppress(KeyboardInterrupt):  # what was measured by then is shown
            print(f"tracing {record.mountpoint} for {seconds:g} s; Ctrl-C ends it", file=sys.stderr, flush=True)
            time.sleep(seconds)
        measured, took_s = tracer.latencies(), time.monotonic() - begun
    if json_wanted:
        print(json.dumps(as_json(measured, took_s)))
    else:
        console().print(render(measured, f"{record.mountpoint}, {took_s:.1f} s"))
