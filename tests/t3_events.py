"""``bpfuse events`` on an embedded volume: what programs do on its mount, across mounts."""

from __future__ import annotations

import os

import rig
from conftest import MountFactory
from t2_events_command import Listener


def test_what_programs_do_is_told(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    told = Listener(mounted.sandbox, mounted.url, "--since", "0", "--json")
    lines = Listener(mounted.sandbox, mounted.url, "--since", "0")
    (mounted.path / "d").mkdir()
    (mounted.path / "d" / "f").write_bytes(b"content")
    os.rename(mounted.path / "d" / "f", mounted.path / "g")
    os.symlink("g", mounted.path / "s")
    os.setxattr(mounted.path / "g", "user.a", b"1")
    os.unlink(mounted.path / "s")
    (mounted.path / "last").mkdir()
    told.said("last")
    events = told.events()
    assert [event["version"] for event in events] == list(range(1, len(events) + 1))
    operations = [event["operation"] for event in events]
    for expected in ("mkdir", "create", "content", "rename", "symlink", "xattr", "unlink"):
        assert expected in operations, operations
    content = next(event for event in events if event["operation"] == "content")
    assert (content["size"], content["inode"]) == (7, (mounted.path / "g").stat().st_ino)
    rig.wait_for(lambda: any(" /last " in line for line in lines.lines), "the same for people")
    assert any("rename" in line and "/d/f -> /g" in line for line in lines.lines)
    mounted.remount()
    (mounted.path / "after").mkdir()
    told.said("after")
    told.said("last")
    assert [event["version"] for event in told.events()] == list(range(1, len(told.events()) + 1))
    for listener in (told, lines):
        assert listener.interrupt() == 130
    mounted.unmount()
    kept = mounted.sandbox.run("events", mounted.url, "--since", "0", "--json", "--until-now").expect_success()
    assert kept.out.splitlines()[: len(told.lines)] == told.lines


def test_from_now_begins_while_nobody_has_it_mounted(mount: MountFactory) -> None:
    mounted = mount("off")
    (mounted.path / "before").mkdir()
    mounted.unmount()
    told = Listener(mounted.sandbox, mounted.url, "--json")
    rig.wait_for(lambda: len(mounted.sandbox.running()) > 1, "it looks into the volume")
    rig.wait_for(lambda: len(mounted.sandbox.running()) == 1, "it has let the volume go")
    mounted.mount()
    (mounted.path / "after").mkdir()
    told.said("after")
    assert told.names() == ["after"]
    assert told.interrupt() == 130
