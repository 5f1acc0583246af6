"""``bpfuse fsck`` and ``bpfuse gc`` around real mounts: refused, harmless, and silent about what programs have done."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import file_steps
import pytest
import rig
from conftest import MountFactory

from fuseclient import runtime
from fuseclient.data.objects import object_name
from fuseclient.worker import rpc
from metaserver import wire

pytestmark = pytest.mark.usefixtures("needs_mounts")

MIB = 1 << 20


def blocks(mount: rig.Mount) -> Path:
    return Path(mount.url.removeprefix("file://")) / "blocks"


async def reserve(mount: rig.Mount, count: int) -> list[int]:
    """Return new slice ids of a mounted volume, as another writer would get them."""
    with mount.sandbox_environment():
        socket = runtime.directory_of(str(mount.path)).metaserver_socket
    connection = await rpc.connect(f"unix:{socket}")
    await connection.call(wire.OpenSession("volume", "test"), wire.SessionOpened)
    ids = (await connection.call(wire.NewSlices(count), wire.SliceIds)).ids
    connection.abort()
    return ids


def write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())


def test_a_mounted_volume_is_not_checked(sandbox: rig.Sandbox, mount: MountFactory) -> None:
    mounted = mount()
    write(mounted.path / "f", b"content")
    for options in ((), ("--repair",)):
        refused = sandbox.run("fsck", mounted.url, *options)
        refused.expect_error("is mounted at", str(mounted.path), "unmount it first", code=2)
    elsewhere = {"BPFUSE_RUNTIME_DIR": str(sandbox.path / "run2")}
    sandbox.run("fsck", mounted.url, env=elsewhere).expect_error("in use by another metaserver", code=2)
    sandbox.run("gc", mounted.url, env=elsewhere).expect_error("in use by another metaserver")
    assert (mounted.path / "f").read_bytes() == b"content"


def test_what_programs_did_is_no_damage(sandbox: rig.Sandbox, mount: MountFactory, accel: str) -> None:
    """Random steps with files left open and unlinked; the volume is clean at once when it is unmounted."""
    mounted = mount(accel)
    top = mounted.path / "top"
    for seed in (3, 4):
        top.mkdir(exist_ok=True)
        player = file_steps.Player(top)
        for step in file_steps.at_random(seed, 250)(player):
            player.play(step)
        player.close_all()
    dice = random.Random(accel)
    for n in range(12):
        write(mounted.path / f"large{n % 5}", dice.randbytes(dice.randrange(3 * MIB)))
        os.truncate(mounted.path / f"large{n % 3}", dice.randrange(2 * MIB))
    (mounted.path / "large4").unlink()
    before = file_steps.tree(mounted.path)
    mounted.unmount()
    checked = sandbox.run("fsck", mounted.url, "--verify")
    assert checked.code == 0, checked.out
    sandbox.run("gc", mounted.url).expect_success()
    assert "has no garbage" in sandbox.run("gc", mounted.url).out
    mounted.mount()
    assert file_steps.compare_trees(before, file_steps.tree(mounted.path)) is None


def test_collecting_under_a_writer_takes_nothing_that_is_needed(
    sandbox: rig.Sandbox, mount: MountFactory, accel: str
) -> None:
    mounted = mount(accel, "--lease", "1")
    leaked, young = (blocks(mounted) / object_name(slice_id) for slice_id in asyncio.run(reserve(mounted, 2)))
    for path in (leaked, young):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"perhaps no garbage")
    os.utime(leaked, (time.time() - 7200,) * 2)
    with _writing(mounted.path) as written:
        for _ in range(3):
            _wait_for_more(written)
            sandbox.run("gc", mounted.url).expect_success()
    assert not leaked.exists()
    assert young.exists()
    for name, data in written.items():
        assert (mounted.path / name).read_bytes() == data
    mounted.unmount()
    sandbox.run("gc", mounted.url).expect_success()
    assert not young.exists()
    outcome = sandbox.run("fsck", mounted.url, "--verify")
    assert outcome.code == 0, outcome.out
    mounted.mount()
    for name, data in written.items():
        assert (mounted.path / name).read_bytes() == data


def _wait_for_more(written: dict[str, bytes]) -> None:
    before = len(written)
    rig.wait_for(lambda: len(written) > before + 3, "the writer goes on")


class _writing:
    """Write files, and write over them, in a thread; gives what each is at last."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written: dict[str, bytes] = {}
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> dict[str, bytes]:
        self._thread.start()
        return self._written

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        dice = random.Random(1)
        try:
            for n in range(10_000):
                if self._stop.is_set():
                    return
                data = dice.randbytes(100_000 + dice.randrange(MIB))
                for name in (f"w{n}", f"again{n % 3}"):
                    write(self._directory / name, data)
                    self._written[name] = data
        except OSError as error:
            self._error = error


def test_what_a_killed_mount_leaves_is_repaired(sandbox: rig.Sandbox, mount: MountFactory, accel: str) -> None:
    """Nothing that was acknowledged is lost by it."""
    mounted = mount(accel, allowed=(".*",))
    write(mounted.path / "kept", b"k" * MIB)
    write(mounted.path / "unlinked", b"u" * MIB)
    held = (mounted.path / "unlinked").open("rb")
    (mounted.path / "unlinked").unlink()
    (mounted.path / "later").write_bytes(b"l" * 5 * MIB)
    for process in reversed(mounted.record.processes):
        os.kill(process.pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        held.close()
    sandbox.run("umount", mounted.path).expect_success()
    leaked = blocks(mounted) / object_name(1000)
    leaked.parent.mkdir(parents=True, exist_ok=True)
    leaked.write_bytes(b"not committed")
    found = sandbox.run("fsck", mounted.url)
    assert found.code == 1
    assert "orphan: inode" in found.out
    assert "leaked-object: " in found.out
    sandbox.run("fsck", mounted.url, "--repair").expect_success()
    assert "is clean" in sandbox.run("fsck", mounted.url, "--verify").expect_success().out
    sandbox.run("gc", mounted.url).expect_success()
    mounted.mount()
    assert (mounted.path / "kept").read_bytes() == b"k" * MIB
    assert (mounted.path / "later").read_bytes() == b"l" * 5 * MIB


def test_lost_bytes_read_as_zeros_after_the_repair_and_not_before(
    sandbox: rig.Sandbox, mount: MountFactory, accel: str
) -> None:
    mounted = mount(accel, "--cache-size", "0", allowed=("is missing",))
    write(mounted.path / "f", b"x" * MIB)
    write(mounted.path / "other", b"y" * MIB)
    mounted.unmount()
    first = min(blocks(mounted).glob("*/*/*"))
    first.unlink()
    mounted.mount()
    with pytest.raises(OSError, match="Input/output error"):
        (mounted.path / "f").read_bytes()
    mounted.unmount()
    assert "missing-object: /f has lost bytes" in sandbox.run("fsck", mounted.url).out
    sandbox.run("fsck", mounted.url, "--repair").expect_success()
    sandbox.run("fsck", mounted.url).expect_success()
    mounted.mount()
    data = (mounted.path / "f").read_bytes()
    assert len(data) == MIB
    assert data.count(b"\0") == MIB or set(data) == {0, ord("x")}
    assert (mounted.path / "other").read_bytes() == b"y" * MIB
