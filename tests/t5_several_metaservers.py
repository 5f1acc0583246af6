"""A mount whose URL names one metaserver goes over to others that it was told of, though none it began with is left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import rig
from several_metaservers import Group
from several_mounts import VOLUME, WORKER_KILLED, Server, kill

pytestmark = pytest.mark.usefixtures("needs_mounts")

LEASE_S = 3.0


@pytest.fixture
def group(sandbox: rig.Sandbox) -> Iterator[Group]:
    made = Group(sandbox, [f"lmdb://{sandbox.path}/engine"] * 3, LEASE_S)
    try:
        yield made
    finally:
        made.close()


def _knows(mounted: rig.Mount, *servers: Server) -> None:
    """Wait until the mount was told of these last."""
    said = f"beside those of the URL: {', '.join(sorted(each.address for each in servers))}\n"
    rig.wait_for(lambda: said in mounted.read_log(), "the mount is told of them")


def test_a_mount_outlives_all_that_its_url_names(group: Group, sandbox: rig.Sandbox) -> None:
    one, two, three = group.servers
    one.start()
    url = f"bpfuse://127.0.0.1:{one.port}/{VOLUME}"
    sandbox.run("format", url, "--store", f"file://{sandbox.path}/blocks").expect_success()
    mounted = rig.Mount(sandbox, url, sandbox.directory("a"), "off", ("--log-level", "INFO"), [WORKER_KILLED])
    with contextlib.ExitStack() as stack:
        stack.enter_context(rig.watched(mounted))
        (mounted.path / "file").write_text("one")
        two.start()
        _knows(mounted, two)
        one.kill()
        (mounted.path / "file").write_text("two")
        three.start()
        _knows(mounted, two, three)
        two.kill()
        assert (mounted.path / "file").read_text() == "two"
        (mounted.path / "file").write_text("three")
        kill(mounted, "worker")
        assert (mounted.path / "file").read_text() == "three"
        (mounted.path / "more").write_text("the next worker knows it, too")
