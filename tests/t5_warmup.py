"""What was warmed on one mount is not believed when another one changes it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import figures
import pytest
import rig
import several_mounts
from several_mounts import Cluster

pytestmark = pytest.mark.usefixtures("needs_mounts", "needs_uring")


@pytest.fixture
def cluster(sandbox: rig.Sandbox) -> Iterator[Cluster]:
    with several_mounts.cluster(sandbox, 30.0) as made:
        yield made


def warm(mounted: rig.Mount, *options: str) -> dict[str, Any]:
    outcome = mounted.sandbox.run("warmup", mounted.path / "top", "--json", *options).expect_success()
    progress: dict[str, Any] = json.loads(outcome.out)
    return progress


def test_changes_elsewhere_are_seen_and_warmed_anew(cluster: Cluster) -> None:
    a, b = cluster.mount("a", "bpf"), cluster.mount("b", "off")
    for directory in ("names", "content", "left"):
        (b.path / "top" / directory).mkdir(parents=True)
        (b.path / "top" / directory / "file").write_bytes(b"before")
    assert warm(a, "--data")["directories"] == 4
    (b.path / "top" / "names" / "new").write_bytes(b"new")
    (b.path / "top" / "content" / "file").write_bytes(b"and after")
    assert sorted(os.listdir(a.path / "top" / "names")) == ["file", "new"]
    assert (a.path / "top" / "content" / "file").read_bytes() == b"and after"
    assert (a.path / "top" / "names" / "new").read_bytes() == b"new"
    (b.path / "top" / "names" / "new").unlink()
    os.chmod(b.path / "top" / "content" / "file", 0o600)
    again = warm(a, "--data")
    # What was broken is fetched; what was not is passed over.
    assert again["directories_passed_over"] >= 1
    assert 1 <= again["directories"] <= 3
    assert warm(a, "--data")["directories"] == 0
    before = figures.answers(a, "LOOKUP").daemon, figures.answers(a, "READ").daemon
    assert os.listdir(a.path / "top" / "names") == ["file"]
    assert os.stat(a.path / "top" / "content" / "file").st_mode & 0o777 == 0o600
    assert (a.path / "top" / "content" / "file").read_bytes() == b"and after"
    assert (a.path / "top" / "left" / "file").read_bytes() == b"before"
    assert (figures.answers(a, "LOOKUP").daemon, figures.answers(a, "READ").daemon) == before


def test_content_brought_ahead_is_not_believed_when_it_changes(cluster: Cluster) -> None:
    """See content_ahead.py: what a reader in order has had brought, another mount changes before he comes there."""
    a, b = cluster.mount("a", "bpf"), cluster.mount("b", "off")
    (b.path / "top").mkdir()
    for number in range(60):
        (b.path / "top" / f"{number:02d}").write_bytes(b"before")
    warm(a)
    for number in range(60):
        if number == 20:
            rig.wait_for(lambda: figures.stats(a)["caches"]["content_ahead"]["files"] > 40, "content is brought")
            (b.path / "top" / "30").write_bytes(b"changed")
            (b.path / "top" / "40").unlink()
            (b.path / "top" / "40").write_bytes(b"another")
        expected = {30: b"changed", 40: b"another"}.get(number, b"before")
        assert (a.path / "top" / f"{number:02d}").read_bytes() == expected
    assert figures.answers(a, "READ").kernel > 20
