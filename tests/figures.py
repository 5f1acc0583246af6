"""The figures of a mount under test, asked of its control socket; and processes that its requests hold up."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import rig

from fuseclient import control, runtime
from fuseclient.observe.figures import Answers

_NONE: Final = Answers(0, 0)


def stats(mounted: rig.Mount) -> dict[str, Any]:
    """Return what ``bpfuse stats --json`` shows, without a process for it."""
    with mounted.sandbox_environment():
        path = runtime.directory_of(str(mounted.path)).control_socket
    return control.ask(path, "stats", timeout_s=rig.WAIT_S)


def answers(mounted: rig.Mount, opcode: str) -> Answers:
    """Return how many requests of an opcode the kernel and the daemon have answered."""
    found = stats(mounted)["requests"].get(opcode)
    return _NONE if found is None else Answers(**found)


def outcome(mounted: rig.Mount, name: str) -> int:
    """Return how often the BPF programs came to an outcome, for whatever opcode."""
    return sum(counts.get(name, 0) for counts in stats(mounted)["outcomes"].values())


def until_blocked(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start a process and return when a FUSE request of its own holds it up."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    rig.wait_for(lambda: is_blocked(Path(f"/proc/{process.pid}")), f"{command} waits for a reply")
    return process


def is_blocked(task: Path) -> bool:
    """Say whether a task, by its directory in /proc, waits for the reply to a FUSE request."""
    return (task / "wchan").read_text() == "request_wait_answer"


def files_are_made_here(mounted: rig.Mount, accel: str) -> None:
    """Make files until one is made without asking the metaserver, as all are from then on; with acceleration."""

    def one_more() -> bool:
        (mounted.path / "first").unlink(missing_ok=True)
        (mounted.path / "first").touch()
        return accel == "off" or stats(mounted)["caches"]["new_files"]["files"] > 0

    rig.wait_for(one_more, "a file is made here")
