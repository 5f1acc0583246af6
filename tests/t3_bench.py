"""Every part of the measurements runs, checks its data, and writes what it found. The figures mean nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import rig

from bench import measure
from bench.comparison import NAME, Comparison
from fuseclient.bench import works

pytestmark = pytest.mark.usefixtures("needs_mounts", "needs_uring")

#: What each part measures at least, as (workload, system).
MEASURED = {
    "yardstick": {("cold", "bpfuse bpf"), ("warm", "bpfuse off"), ("stat", "bpfuse bpf")},
    "large": {("read", "bpfuse"), ("read", "ext4"), ("pread", "bpfuse"), ("write", "bpfuse"), ("write", "ext4")},
    "writes": {("create", "bpfuse"), ("create", "bpfuse interval"), ("unpack", "bpfuse"), ("unpack", "ext4")},
    "coherence": {("visible", "bpfuse"), ("revalidate", "bpfuse"), ("break", "100 hold it")},
    "engines": {
        ("create", "bpfuse lmdb"),
        ("lookup", "bpfuse etcd"),
        ("directory", "bpfuse etcd"),
        ("break", "bpfuse etcd"),
    },
    "scale": {
        ("first epoch", "bpfuse bpf, four"),
        ("later epoch", "bpfuse dataset"),
        ("du, again", "ext4"),
        ("cp -a", "ext4"),
    },
    "million": {("warm-up", "bpfuse bpf"), ("stat, 1,000,000 cached", "bpfuse bpf")},
    "cost": {("create, commit", "bpfuse"), ("unpack, interval", "bpfuse")},
    "failover": {("authority", "bpfuse lmdb")},
}


@pytest.mark.parametrize("part", MEASURED)
def test_a_part_runs(sandbox: rig.Sandbox, tmp_path: Path, part: str) -> None:
    command = [sys.executable, "-m", "bench", part, "--small", "--rounds", "1", "--directory", str(tmp_path)]
    done = subprocess.run(
        command, cwd=rig.REPOSITORY, env=sandbox.environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / f"{part}.json").read_text())
    seconds = {(each["workload"], each["system"]): each["seconds"] for each in result["samples"]}
    assert seconds.keys() >= MEASURED[part]
    assert all(each > 0 for values in seconds.values() for each in values)


def test_a_comparison_runs(sandbox: rig.Sandbox, tmp_path: Path) -> None:
    words = ["small", "clients", "--small", "--systems", "ext4,bpfuse", "--directory", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *words],
        cwd=rig.REPOSITORY,
        env=sandbox.environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    read = Comparison.read(tmp_path / NAME)
    for measured in read.workloads:
        assert not measured.failed
        assert measured.figures.systems() == ["ext4", "bpfuse"][measured.name == "clients" :]
        assert all(row.values["bpfuse"] for row in measured.figures.rows.values())
    assert "| read 4 KiB shuffled, cold, us |" in (tmp_path / "comparison.md").read_text()


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "speed", "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=rig.REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "yardstick" in done.stderr


def test_wrong_content_is_found(tmp_path: Path) -> None:
    measure.create(str(tmp_path), 3)
    measure.check_created(str(tmp_path), 3)
    (tmp_path / "f1").write_bytes(bytes(4096))
    with pytest.raises(works.Wrong, match="f1"):
        measure.check_created(str(tmp_path), 3)
