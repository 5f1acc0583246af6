"""``bpfuse trace``: measures a mount's requests by a bcc program on the kernel's own FUSE tracepoints.

The mount's BPF program leaves the numbers of the requests that it answered in a map; the tracer looks there, at the end
of each request, to see who answered.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from fuseclient.errors import UserError
from fuseclient.native import open_map, recent_slots
from fuseclient.observe import kernel_headers
from fuseclient.observe.latency import Kind, Latency, latencies
from fuseclient.observe.opcodes import opcode_name

_SOURCE: Final = Path(__file__).with_name("latency.bcc.c")


class Tracer:
    """Measures from when it is made on. ``recent``: the number of the mount's map of that name, if it has one."""

    def __init__(self, program: Any, recent: int | None) -> None:
        self._program = program
        if recent is not None:
            descriptor = open_map(recent)
            try:
                program["answering"][ctypes.c_int(0)] = ctypes.c_int(descriptor)
            finally:
                os.close(descriptor)

    def latencies(self) -> list[Latency]:
        """Return what was measured so far."""
        buckets = [(_kind(key.kind), key.power, sum(counts)) for key, counts in self._program["buckets"].items()]
        sums: dict[Kind, tuple[int, int, int]] = {}
        for key, parts in self._program["sums"].items():
            count, ns = sum(part.count for part in parts), sum(part.ns for part in parts)
            if count:
                sums[_kind(key)] = count, ns, max(part.longest_ns for part in parts)
        return latencies(buckets, sums)


def _kind(key: Any) -> Kind:
    return Kind(opcode_name(key.opcode), bool(key.in_kernel))


@contextmanager
def tracing(device_minor: int, recent: int | None) -> Iterator[Tracer]:
    """A :class:`Tracer` of the mount on a device; raise :exc:`UserError` if this machine cannot trace."""
    try:
        import bcc
    except ImportError:
        raise UserError("bpfuse trace needs bcc; on Debian: apt-get install python3-bpfcc") from None
    headers = kernel_headers.find()
    flags = [f"-DDEVICE={device_minor}", f"-DRECENT_SLOTS={recent_slots()}", *headers.flags]
    kernel_headers.have_tracepoints()
    program = _compile(bcc, headers, flags)
    try:
        yield Tracer(program, recent)
    finally:
        program.cleanup()


def _compile(bcc: Any, headers: kernel_headers.Headers, flags: list[str]) -> Any:
    if headers.source is not None:
        os.environ["BCC_KERNEL_SOURCE"] = str(headers.source)
    try:
        return bcc.BPF(src_file=str(_SOURCE).encode(), cflags=flags)
    except Exception as error:  # bcc raises nothing more special
        raise UserError(
            f"bcc cannot compile for kernel {os.uname().release}: {error}; what is above says why"
        ) from None
