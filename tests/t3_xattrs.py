"""Extended attributes as a mount answers them: who answers, and that it is right, here and on another mount."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import figures
import pytest
import rig
import several_mounts
from conftest import MountFactory
from several_mounts import Cluster
from t3_listings import know

pytestmark = pytest.mark.usefixtures("needs_mounts")

#: Seconds: nothing here is right because something ran out.
LONG_LEASE_S: Final = 30.0
ASKED: Final = ("user.a", "user.b", "security.capability", "system.posix_acl_access")


def daemon(mounted: rig.Mount) -> int:
    return sum(figures.answers(mounted, opcode).daemon for opcode in ("GETXATTR", "LISTXATTR"))


def value(path: Path, name: str) -> bytes | str:
    try:
        return os.getxattr(path, name)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def look(path: Path) -> dict[str, Any]:
    """Return all that is seen of a path's xattrs."""
    return {"names": sorted(os.listxattr(path)), **{name: value(path, name) for name in ASKED}}


def expected(**values: bytes) -> dict[str, Any]:
    named = {f"user.{name}": content for name, content in values.items()}
    return {"names": sorted(named), **{name: named.get(name, "ENODATA") for name in ASKED}}


def test_nobody_asks_the_daemon_twice(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    top = mounted.path
    files: dict[str, dict[str, bytes]] = {"none": {}, "some": {"a": b"1", "b": b""}, "large": {"a": b"x" * 2000}}
    for name, xattrs in files.items():
        (top / name).write_bytes(b"x")
        for each, content in xattrs.items():
            os.setxattr(top / name, f"user.{each}", content)
    mounted.remount()
    know(top)
    asked = {}
    for name, xattrs in files.items():
        for turn in range(2):
            before = daemon(mounted)
            assert look(top / name) == expected(**xattrs)
            asked[name, turn] = daemon(mounted) - before
    if accel == "bpf":
        assert (asked["none", 0], asked["none", 1], asked["some", 1]) == (0, 0, 0)
        assert 1 <= asked["some", 0] <= 2
        assert asked["large", 1] > 0


def test_changes_here_are_seen_at_once(mount: MountFactory, accel: str) -> None:
    path = mount(accel).path / "file"
    path.write_bytes(b"x")
    for content in (b"1", b"22", b""):
        os.setxattr(path, "user.a", content)
        assert look(path) == look(path) == expected(a=content)
    os.setxattr(path, "user.b", b"b")
    assert look(path) == expected(a=b"", b=b"b")
    os.removexattr(path, "user.a")
    assert look(path) == expected(b=b"b")
    os.removexattr(path, "user.b")
    assert look(path) == expected()


def test_writes_to_a_file_with_xattrs_do_not_each_ask_the_daemon(mount: MountFactory, accel: str) -> None:
    """The kernel asks for security.capability before each."""
    mounted = mount(accel)
    path = mounted.path / "file"
    path.write_bytes(b"x")
    os.setxattr(path, "user.a", b"1")
    with path.open("r+b", buffering=0) as file:
        before = daemon(mounted)
        for index in range(20):
            os.pwrite(file.fileno(), b"y", index)
        if accel == "bpf":
            assert daemon(mounted) <= before + 2
        assert look(path) == expected(a=b"1")
        os.setxattr(path, "user.a", b"2")
        os.pwrite(file.fileno(), b"z", 0)
        assert look(path) == expected(a=b"2")
    assert look(path) == expected(a=b"2")


def test_trusted_names_are_for_root_alone(mount: MountFactory, accel: str) -> None:
    path = mount(accel).path / "file"
    path.write_bytes(b"x")
    os.setxattr(path, "user.a", b"1")
    os.setxattr(path, "trusted.b", b"2")
    for _ in range(2):
        assert sorted(os.listxattr(path)) == ["trusted.b", "user.a"]
        assert os.getxattr(path, "trusted.b") == b"2"
        assert look(path)["user.a"] == b"1"


@pytest.fixture(scope="module")
def both() -> Iterator[Cluster]:
    """One volume, mounted both ways, and to be changed as "other"."""
    sandbox = rig.Sandbox()
    try:
        with several_mounts.cluster(sandbox, LONG_LEASE_S) as cluster:
            for name, accel in (("bpf", "bpf"), ("off", "off"), ("other", "bpf")):
                cluster.mount(name, accel)
            yield cluster
        sandbox.assert_nothing_runs()
    finally:
        sandbox.close()


def test_changes_elsewhere_are_seen_at_once(both: Cluster, accel: str) -> None:
    here = next(each.path for each in both.mounts if each.path.name == accel) / f"{accel}-file"
    there = both.mounts[-1].path / here.name
    there.write_bytes(b"x")
    assert look(here) == expected()
    for content in (b"1", b"22"):
        os.setxattr(there, "user.a", content)
        assert look(here) == look(here) == expected(a=content)
    os.setxattr(there, "user.b", b"b")
    assert look(here) == expected(a=b"22", b=b"b")
    os.removexattr(there, "user.a")
    assert look(here) == expected(b=b"b")
