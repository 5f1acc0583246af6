"""Real mounts of volumes on every engine: programs see the same files on both, and servers may be killed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import file_exerciser
import pytest
import rig
import several_mounts
from databases import SERVERS, Databases, Server
from file_exerciser import OneFile, OneTree
from several_mounts import Cluster

pytestmark = pytest.mark.usefixtures("needs_mounts", "needs_uring")

_LEASE_S = 10.0
_SEED = 1
#: What a metaserver says when the server of its engine is away for so long that it cannot be sure of its authority.
_ALLOWED = "the authority (is lost|cannot be taken)"


@pytest.fixture(params=SERVERS)
def database(request: pytest.FixtureRequest, databases: Databases) -> Server:
    return databases.server(request.param)


@pytest.fixture
def cluster(sandbox: rig.Sandbox, database: Server) -> Iterator[Cluster]:
    with several_mounts.cluster(sandbox, _LEASE_S, engine=database.url(), allowed=_ALLOWED) as made:
        yield made


def test_two_mounts(cluster: Cluster, database: Server) -> None:
    """One accelerated, one not: random work on one is seen on the other, and what each changes at once.

    Then the engine's server is killed and started again while files are made, and nothing that was acknowledged is
    lost: what fsck finds after that is nothing.
    """
    a, b = cluster.mount("a", "bpf"), cluster.mount("b", "off")
    for first, second in ((a, b), (b, a)):
        name = f"by-{first.path.name}"
        (first.path / name).mkdir()
        assert os.listdir(second.path / name) == []
        (first.path / name / "file").write_bytes(b"one")
        assert (second.path / name / "file").read_bytes() == b"one"
        (second.path / name / "file").write_bytes(b"another")
        assert (first.path / name / "file").read_bytes() == b"another"
        os.rename(second.path / name / "file", second.path / name / "moved")
        assert os.listdir(first.path / name) == ["moved"]
        assert not (first.path / name / "file").exists()
        tree = first.path / f"tree-{first.path.name}"
        tree.mkdir()
        OneTree(tree, _SEED).run(100)
        assert file_exerciser.check_tree(tree) == file_exerciser.check_tree(second.path / tree.name)
    file = OneFile(a.path / "random", _SEED, 200_000)
    file.run(60)
    assert (b.path / "random").read_bytes() == bytes(file.model)
    _survives_its_server(a.path / "many", b.path / "many", database)
    assert len(os.listdir(a.path)) == 6


def _survives_its_server(here: Path, there: Path, database: Server) -> None:
    """Make files, one by one, while the engine's server is killed and started again."""
    here.mkdir()
    made: list[str] = []
    ended = threading.Event()

    def make() -> None:
        while not ended.is_set():
            name = f"file{len(made)}"
            (here / name).write_text(name)
            made.append(name)

    maker = threading.Thread(target=make)
    maker.start()
    try:
        rig.wait_for(lambda: len(made) > 5, "files are made")
        database.kill()
        database.start()
        before = len(made)
        rig.wait_for(lambda: len(made) > before + 5, "files are made again", 60.0)
    finally:
        ended.set()
        maker.join()
    assert {path.name: path.read_text() for path in there.iterdir()} == {name: name for name in made}


def test_a_volume_is_checked_and_moved(sandbox: rig.Sandbox, databases: Databases) -> None:
    """fsck needs the authority, and finds nothing wrong in what mounts have left; a dump is mounted from LMDB.

    On one engine: what is dumped and loaded on each is in t2_dump.py.
    """
    url = databases.server("etcd").url()
    with several_mounts.cluster(sandbox, _LEASE_S, engine=url) as cluster:
        mounted = cluster.mount("a", "bpf")
        (mounted.path / "tree").mkdir()
        OneTree(mounted.path / "tree", _SEED).run(150)
        before = file_exerciser.check_tree(mounted.path / "tree")
        mounted.unmount()
        volume = cluster.server.url
        sandbox.run("fsck", volume, "--engine", url).expect_error("has the authority", code=2)
    said = sandbox.run("fsck", volume, "--engine", url).expect_success()
    assert "clean" in said.out
    dumped, moved = sandbox.path / "home.dump", f"lmdb://{sandbox.path}/moved"
    sandbox.run("dump", url, dumped).expect_success()
    sandbox.run("dump", url, dumped).expect_error("exists already")
    sandbox.run("load", dumped, url).expect_error("has a volume 'home' already")
    sandbox.run("dump", url, sandbox.path / "none", "--volume", "none").expect_error("no volume 'none'")
    assert "found the same" in sandbox.run("load", dumped, moved).expect_success().out
    with several_mounts.cluster(sandbox, _LEASE_S, engine=moved, is_new=False) as cluster:
        assert file_exerciser.check_tree(cluster.mount("b", "bpf").path / "tree") == before
