"""The page that leads operators from one directory to several metaservers and S3: its commands, run as they stand."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import rig
import weed

pytestmark = pytest.mark.usefixtures("needs_mounts")

_PAGE = rig.REPOSITORY / "docs" / "beyond-one-machine.md"
_LONGEST_S = 180.0


def _commands() -> str:
    """Return the page's commands: its indented lines."""
    return "\n".join(line.strip() for line in _PAGE.read_text().splitlines() if line.startswith("    "))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_commands_do_what_the_page_says(sandbox: rig.Sandbox) -> None:
    script = _commands()
    assert script.count("bpfuse ") > 15
    credentials = sandbox.path / "s3-credentials"
    credentials.write_text(f"[default]\naws_access_key_id = {weed.KEY}\naws_secret_access_key = {weed.SECRET}\n")
    with weed.running() as server:
        script = script.replace("/srv/bpfuse", str(sandbox.path)).replace("http://127.0.0.1:8333", server.endpoint)
        for port in ("7000", "7001"):
            script = script.replace(f"127.0.0.1:{port}", f"127.0.0.1:{_free_port()}")
        path = f"{Path(sys.executable).parent}:{sandbox.environment['PATH']}"
        environment = {**sandbox.environment, "PATH": path}
        for name in weed.Weed.environment:
            environment.pop(name, None)
        done = subprocess.run(
            ["bash", "-eu", "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_LONGEST_S,
            check=False,
        )
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    shown = re.findall(r"^(hello|still here)$", done.stdout, re.MULTILINE)
    assert shown == ["hello", "hello", "still here", "hello", "still here"], said
    assert len(re.findall(r"\bauthority\s+tcp:", done.stdout)) >= 3, said
    assert re.search(r"standby", done.stdout), said
    assert re.search(r"offline", done.stdout), said
    assert weed.SECRET not in said
