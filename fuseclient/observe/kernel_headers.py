"""What bcc needs on this machine before it can compile: a kernel's headers, and the names of the tracepoints.

bcc looks for the headers of the very kernel that runs. Where there are none, those of another kernel serve as well for
a program that reads nothing but tracepoints, whose form the running kernel tells. Debian splits them into a package of
an architecture and a common one, which bcc finds by itself only below /lib/modules of the running kernel.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from fuseclient.errors import UserError

_MODULES: Final = Path("/lib/modules")
_IN_KERNEL: Final = Path("/sys/kernel/kheaders.tar.xz")
_TRACEFS: Final = Path("/sys/kernel/tracing")
_ARCHITECTURES: Final = {"x86_64": "x86", "aarch64": "arm64"}


class Headers(NamedTuple):
    """Where headers lie. ``source`` None: bcc finds them; else the tree it is to be told of, with further flags."""

    source: Path | None
    flags: list[str]


def find(modules: Path = _MODULES, release: str | None = None) -> Headers:
    """Return the headers of the running kernel, or of the newest other one; raise :exc:`UserError`."""
    if (modules / (release or os.uname().release) / "build").exists() or _IN_KERNEL.exists():
        return Headers(None, [])
    others = sorted(each for each in modules.glob("*") if (each / "build" / "include").is_dir())
    if not others:
        raise UserError("there are no kernel headers to compile with; on Debian: apt-get install linux-headers-amd64")
    build = (others[-1] / "build").resolve()
    source = (others[-1] / "source").resolve()
    if source == build or not source.is_dir():
        return Headers(build, [])
    arch = _ARCHITECTURES.get(platform.machine(), platform.machine())
    parts = (
        f"arch/{arch}/include/generated",
        "include",
        f"arch/{arch}/include/generated/uapi",
        "include/generated/uapi",
    )
    return Headers(source, [f"-I{build / part}" for part in parts])


def have_tracepoints() -> None:
    """Mount the list of tracepoints where it belongs, unless it is there; raise :exc:`UserError`.

    It stays, as where systemd mounts it: another tracer may have come to use it.
    """
    if _is_listing_tracepoints() or Path("/sys/kernel/debug/tracing/events").is_dir():
        return
    command = ("mount", "-t", "tracefs", "tracefs", str(_TRACEFS))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and not _is_listing_tracepoints():  # nor did another process mount it meanwhile
        raise UserError(f"{' '.join(command)}: {done.stderr.strip() or 'it failed'}")


def _is_listing_tracepoints() -> bool:
    return (_TRACEFS / "events").is_dir()
