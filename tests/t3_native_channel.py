"""The native channel under AddressSanitizer (with UBSan) and ThreadSanitizer; see native/channel_test.c."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest
import rig

from fuseclient import mounts
from fuseclient.channel import acceleration

_CHANNEL = ("pending", "posting", "attributes", "queue", "device", "requests", "bridge", "notify")
_SOURCES = [
    rig.REPOSITORY / "tests/native/channel_test.c",
    *(rig.REPOSITORY / f"fuseclient/channel/native/{name}.c" for name in _CHANNEL),
]
_SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
_CHECKS = 13


@pytest.fixture(scope="module", params=_SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("native") / "channel_test"
    flags = ["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", *_SANITIZERS[request.param]]
    subprocess.run(["gcc", *flags, *_SOURCES, "-o", made, "-luring", "-lpthread"], check=True)
    return made


@pytest.mark.parametrize("transport", ["devfuse", "uring"])
def test_channel(program: Path, transport: str, sandbox: rig.Sandbox, runtime_root: Path) -> None:
    rig.require_mounts()
    if transport == "uring":
        rig.require_uring()
    runtime_root.mkdir()
    directory = sandbox.directory("mnt")
    try:
        with acceleration.uring_enabled() if transport == "uring" else contextlib.nullcontext():
            done = subprocess.run(
                [program, directory, transport], capture_output=True, text=True, timeout=rig.WATCHDOG_S, check=False
            )
    finally:
        if mounts.find_mount(str(directory)) is not None:
            mounts.unmount(str(directory), lazy=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok: ") == _CHECKS
