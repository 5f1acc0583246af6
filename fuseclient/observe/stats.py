"""A mount's figures as ``bpfuse stats --json`` gives them, put together from those of its parts.

Everything is counted where it happens: answers in the kernel by the BPF program, what was forwarded by the channel,
caches and the data path by the worker.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

from fuseclient import native
from fuseclient.channel import acceleration
from fuseclient.channel.transport import Figures
from fuseclient.config import MountOptions
from fuseclient.observe.opcodes import opcode_name

_ANSWERED: Final = ("answered", "answered_absent", "answered_passthrough")


def assemble(
    *,
    options: MountOptions,
    accel: str,
    transport: Figures,
    bpf: native.Bpf | None,
    worker: dict[str, Any] | None,
    worker_pid: int | None,
    restarts: int,
) -> dict[str, Any]:
    """Return all figures. ``bpf`` is ``None`` if the mount is not accelerated, ``worker`` if it did not answer."""
    figures: dict[str, Any] = {"maps": {}, "counters": {}, "epoch": None}
    if bpf is not None:
        figures = native.figures(acceleration.map_fds(bpf, options))
    channel = {name: getattr(transport, name) for name in transport.__struct_fields__ if name != "forwarded"}
    requests = _requests(figures["counters"], transport.forwarded)
    return {
        "accel": accel,
        "profile": options.profile,
        "epoch": figures["epoch"],
        "lease_remaining_s": _remaining_s(figures["deadline_ns"]) if "deadline_ns" in figures else None,
        "worker": {"pid": worker_pid, "rss_bytes": _resident_bytes(worker_pid), "restarts": restarts},
        "requests": requests,
        "levels": _levels(requests, (worker or {}).get("levels", {})),
        "maps": figures["maps"],
        "outcomes": figures["counters"],
        "channel": channel,
        "caches": worker or {},
    }


def _requests(counters: dict[str, dict[str, int]], forwarded: list[int]) -> dict[str, dict[str, int]]:
    """Return who answered how many requests, by the name of the request; those that never came are left out."""
    requests = {
        opcode: {"kernel": sum(outcomes.get(each, 0) for each in _ANSWERED), "daemon": 0}
        for opcode, outcomes in counters.items()
    }
    for opcode, count in enumerate(forwarded):
        if count:
            requests.setdefault(opcode_name(opcode), {"kernel": 0, "daemon": 0})["daemon"] = count
    return {opcode: answers for opcode, answers in requests.items() if any(answers.values())}


def _levels(requests: dict[str, dict[str, int]], worker: dict[str, int]) -> dict[str, int]:
    """Return who had what it took to answer how many requests, the nearest first.

    ``uncounted``: those that need no answer, that are in hand, or that an earlier worker answered.
    """
    kernel, daemon = (sum(each[who] for each in requests.values()) for who in ("kernel", "daemon"))
    return {"kernel": kernel, **worker, "uncounted": max(0, daemon - sum(worker.values()))}


def _remaining_s(deadline_ns: int) -> float:
    left_ns = deadline_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return max(0.0, left_ns / 1e9)


def _resident_bytes(pid: int | None) -> int:
    """Return the memory a process holds; 0 if there is none."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    kib = next((line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")), "0")
    return int(kib) * 1024
