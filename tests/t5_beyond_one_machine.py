"""The page that leads from one directory to etcd, several metaservers, TLS and S3: its commands, run as they stand."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rig
import weed
from databases import free_ports

pytestmark = pytest.mark.usefixtures("needs_mounts")

_PAGE = rig.REPOSITORY / "docs" / "beyond-one-machine.md"
_LONGEST_S = 180.0
#: What runs when the commands end before their time.
_ENDING = "trap 'jobs=$(jobs -p); test -z \"$jobs\" || kill -9 $jobs' EXIT"


def _commands() -> str:
    """Return the page's commands: its indented lines."""
    return "\n".join(line.strip() for line in _PAGE.read_text().splitlines() if line.startswith("    "))


def test_the_commands_do_what_the_page_says(sandbox: rig.Sandbox) -> None:
    script = _commands()
    assert script.count("bpfuse ") > 15
    if shutil.which("etcd") is None:
        pytest.skip("there is no etcd")
    credentials = sandbox.path / "s3-credentials"
    credentials.write_text(f"[default]\naws_access_key_id = {weed.KEY}\naws_secret_access_key = {weed.SECRET}\n")
    with weed.running() as server:
        script = script.replace("/srv/bpfuse", str(sandbox.path)).replace("http://127.0.0.1:8333", server.endpoint)
        ports = sorted(set(re.findall(r"127\.0\.0\.1:([27]\d{3})\b", script)))
        moved = dict(zip(ports, free_ports(len(ports)), strict=True))
        script = re.sub(r"127\.0\.0\.1:([27]\d{3})\b", lambda found: f"127.0.0.1:{moved[found[1]]}", script)
        path = f"{Path(sys.executable).parent}:{sandbox.environment['PATH']}"
        environment = {**sandbox.environment, "PATH": path}
        for name in weed.Weed.environment:
            environment.pop(name, None)
        done = subprocess.run(
            ["bash", "-eu", "-c", f"{_ENDING}\n{script}"],
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
    assert re.search(r"\bauthority\s+tcp:", done.stdout), said
    assert re.search(r"standby", done.stdout), said
    assert re.search(r"offline", done.stdout), said
    assert "found the same" in done.stdout, said
    assert "clean" in done.stdout, said
    assert weed.SECRET not in said
