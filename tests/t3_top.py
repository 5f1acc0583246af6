"""``bpfuse top`` on real mounts: requests are found at their directories and processes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import rig
from conftest import MountFactory

from fuseclient.observe.inode_paths import InodePaths

pytestmark = pytest.mark.usefixtures("needs_mounts")


@pytest.fixture
def busy(mount: MountFactory, accel: str) -> Iterator[rig.Mount]:
    """A mount on which a process stats a file in a directory again and again."""
    mounted = mount(accel, "--kernel-ttl", "0")
    directory = mounted.path / "outer" / "inner"
    directory.mkdir(parents=True)
    (directory / "file").touch()
    script = "import os, sys\nwhile True: os.stat(sys.argv[1])"
    process = subprocess.Popen(["/usr/bin/python3", "-c", script, str(directory / "file")])
    try:
        yield mounted
    finally:
        process.kill()
        process.wait()


def views(mounted: rig.Mount, count: int) -> list[dict[str, Any]]:
    outcome = mounted.sandbox.run("top", mounted.path, "--json", "--count", str(count), "--interval", "0.2")
    return [json.loads(line) for line in outcome.expect_success().out.splitlines()]


def test_the_busiest_come_first(busy: rig.Mount) -> None:
    shown = views(busy, 2)[1]
    rates = {each["what"]: each for each in shown["requests"]}
    assert rates["LOOKUP"]["kernel"] + rates["LOOKUP"]["worker"] > 0
    accelerated = busy.record.accel == "bpf"
    assert (rates["LOOKUP"]["kernel"] > rates["LOOKUP"]["worker"]) == accelerated
    if accelerated:
        assert {"/outer", "/outer/inner"} <= {each["what"] for each in shown["directories"]}
        assert shown["processes"][0]["what"].endswith("python3")
    else:
        assert shown["directories"] == shown["processes"] == []


def test_it_is_shown_as_text(busy: rig.Mount) -> None:
    text = busy.sandbox.run("top", busy.path, "--count", "1", "--interval", "0.1").expect_success().out
    assert "LOOKUP" in text
    assert "answered in the kernel" in text


def test_a_directory_that_is_no_mount(sandbox: rig.Sandbox) -> None:
    sandbox.run("top", sandbox.directory("none")).expect_error("none")


def test_paths_of_inodes(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    directory = mounted.path / "directory \udcff"
    directory.mkdir()
    file = directory / "file"
    file.touch()
    with InodePaths(str(mounted.path)) as paths, file.open() as opened:
        assert paths.directory(1) == b"/"
        assert paths.directory(directory.stat().st_ino) == os.fsencode("/directory \udcff")
        ino = file.stat().st_ino
        assert paths.directory(ino) == os.fsencode("/directory \udcff")
        assert paths.directory(1 << 40) is None
        file.unlink()
        assert paths.directory(ino) is None
        opened.read()
