"""Extended attributes as a mount answers them: who answers, and that it is right, here and on another mount."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import subprocess
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
ASKED: Final = ("user.a", "user.b", "security.capability", "security.selinux", "system.posix_acl_access")
#: That nobody but user 65534 may read it, as setfacl would set it.
_ACL: Final = struct.pack(
    "<I" + "HHI" * 5, 2, 1, 6, 2**32 - 1, 2, 4, 65534, 4, 0, 2**32 - 1, 16, 4, 2**32 - 1, 32, 0, 2**32 - 1
)


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
    return {"names": sorted(named), **{name: named.get(name, _lacking(name)) for name in ASKED}}


def _lacking(name: str) -> str:
    """Return what is said of an xattr that is not there."""
    return errno.errorcode[errno.EOPNOTSUPP] if name == "security.selinux" else "ENODATA"


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


def test_a_long_listing_asks_for_one_label(mount: MountFactory, accel: str) -> None:
    """ls -l looks for a label and an access control list at each file, for labels no more when one is unsupported."""
    mounted = mount(accel)
    top, files = mounted.path / "top", 50
    top.mkdir()
    for number in range(files):
        (top / str(number)).write_bytes(b"x")
    mounted.remount()
    for _ in range(2):
        before = figures.answers(mounted, "GETXATTR").total
        subprocess.run(["ls", "-l", top], check=True, stdout=subprocess.DEVNULL)
        assert files <= figures.answers(mounted, "GETXATTR").total - before < files + 10


def test_no_path_asks_who_may_take_it(mount: MountFactory, accel: str) -> None:
    """The kernel keeps that, for others than the owner, too."""
    mounted = mount(accel)
    for each in (mounted.sandbox.path, mounted.path):
        each.chmod(0o755)
    (mounted.path / "file").write_bytes(b"x")
    before = figures.answers(mounted, "GETXATTR").total
    for _ in range(3):
        read = subprocess.run(
            ["cat", mounted.path / "file"], user=65534, group=65534, extra_groups=[], stdout=-1, check=True
        )
        assert read.stdout == b"x"
    assert figures.answers(mounted, "GETXATTR").total == before


def test_whoever_is_let_in_by_the_mode(mount: MountFactory, accel: str) -> None:
    """By that alone, whatever list somebody tried to set."""
    mounted = mount(accel)
    for each in (mounted.sandbox.path, mounted.path):
        each.chmod(0o711)
    path = mounted.path / "file"
    path.write_bytes(b"x")
    for mode in (0o644, 0o640, 0o644, 0o600, 0o604):
        path.chmod(mode)
        with contextlib.suppress(OSError):
            os.setxattr(path, "system.posix_acl_access", _ACL)
        for _ in range(2):
            read = subprocess.run(
                ["cat", path], user=65534, group=65534, extra_groups=[], capture_output=True, check=False
            )
            assert (read.stdout == b"x") == bool(mode & 0o004), oct(mode)
        assert path.stat().st_mode & 0o777 == mode


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
