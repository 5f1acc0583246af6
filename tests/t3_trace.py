"""``bpfuse trace`` on real mounts: the tracer sees the requests, and who answered them."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest
import rig
from conftest import MountFactory

pytestmark = pytest.mark.usefixtures("needs_mounts")
#: More seconds than a test lasts: it ends the tracer itself.
LONG = "600"


def begin(mount: rig.Mount) -> subprocess.Popen[str]:
    """Start a tracer, and return when it says that it traces."""
    tracer = mount.sandbox.start("trace", mount.path, "--seconds", LONG, "--json")
    assert tracer.stderr is not None
    line = tracer.stderr.readline()
    if "headers" in line:
        pytest.skip(line.strip())
    assert line.startswith("tracing"), line
    return tracer


def end(tracer: subprocess.Popen[str]) -> dict[tuple[str, str], int]:
    """End a tracer by Ctrl-C and return how many requests it saw of each opcode and who answered."""
    tracer.send_signal(signal.SIGINT)
    output, errors = tracer.communicate(timeout=rig.WAIT_S)
    assert tracer.returncode == 0, errors
    return {(each["opcode"], each["answered_by"]): each["count"] for each in json.loads(output)["latencies"]}


def test_it_tells_who_answered(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel, "--kernel-ttl", "0")
    path = mounted.path / "file"
    path.write_bytes(b"content")
    path.read_bytes()
    tracer = begin(mounted)
    before = mounted.answered("LOOKUP")
    for _ in range(50):
        os.stat(path)
    kernel, worker = (now - then for now, then in zip(mounted.answered("LOOKUP"), before, strict=True))
    seen = end(tracer)
    assert kernel + worker >= 50
    assert seen.get(("LOOKUP", "kernel"), 0) == kernel
    assert seen.get(("LOOKUP", "worker"), 0) == worker
    assert (kernel > 0) == (accel == "bpf")


def test_another_mount_is_not_counted(mount: MountFactory, accel: str) -> None:
    traced, other = mount(accel, name="traced"), mount(accel, name="other")
    tracer = begin(traced)
    (other.path / "directory").mkdir()
    assert ("MKDIR", "worker") not in end(tracer)


def test_a_directory_that_is_no_mount(sandbox: rig.Sandbox) -> None:
    sandbox.run("trace", sandbox.directory("none")).expect_error("none")
