"""Faults on the way of what is written: a full, read-only or damaged store, a full engine, a killed metaserver."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import rig
from conftest import MountFactory

from fuseclient import processes
from fuseclient.data import object_names

#: What the log says while a store or an engine refuses.
REFUSED = (
    r"writing to inode \d+ failed",
    r"ERROR fuseclient.worker.errors: (write|flush|fsync|create|setattr|mkdir)",
    r"data written to inode \d+ was lost",
    r"LMDB",
    r"the (object|map)",
    r"client .*EngineFull|local client: ",
)


@pytest.fixture
def small_store(sandbox: rig.Sandbox) -> Iterator[Path]:
    """A file system of 24 MiB for a store."""
    rig.require_mounts()
    path = sandbox.directory("store")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "bpfuse-test", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)


def write_until_refused(descriptor: int, data: bytes) -> tuple[int, int]:
    """Write until an error comes, be it of an fsync at the end; return the bytes that were taken, and the errno."""
    done = 0
    try:
        while done < len(data):
            done += os.write(descriptor, data[done : done + (1 << 20)])
        os.fsync(descriptor)
    except OSError as error:
        return done, error.errno or -1
    return done, 0


def test_a_full_store(sandbox: rig.Sandbox, mount: MountFactory, accel: str, small_store: Path) -> None:
    mounted = mount(accel, url=sandbox.format("volume", "--store", f"file://{small_store}"), allowed=REFUSED)
    data = random.Random(1).randbytes(1 << 20) * 60
    descriptor = os.open(mounted.path / "f", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        done, code = write_until_refused(descriptor, data)
        assert code == errno.ENOSPC
        with pytest.raises(OSError, match="No space"):
            os.fsync(descriptor)
        remount(small_store, "size=100m")
        os.fsync(descriptor)
        assert os.write(descriptor, b"tail") == 4
        os.fsync(descriptor)
        # One byte more than there is: all of it may have been taken, and the first to tell of the store is fsync.
        assert os.pread(descriptor, done + 5, 0) == data[:done] + b"tail"
    finally:
        os.close(descriptor)
    mounted.remount()
    assert (mounted.path / "f").read_bytes() == data[:done] + b"tail"


def test_room_is_made_by_deleting(sandbox: rig.Sandbox, mount: MountFactory, small_store: Path) -> None:
    """What cannot be stored can be cut away, and a close tells of it."""
    volume = sandbox.format("volume", "--store", f"file://{small_store}")
    mounted = mount("off", "--lease", "0.5", url=volume, allowed=REFUSED)
    descriptor = os.open(mounted.path / "f", os.O_RDWR | os.O_CREAT, 0o644)
    assert write_until_refused(descriptor, os.urandom(1 << 20) * 40)[1] == errno.ENOSPC
    os.ftruncate(descriptor, 1 << 20)
    with contextlib.suppress(OSError):  # an object may still be in the way, which goes in the background
        os.fsync(descriptor)
    rig.wait_for(lambda: fsynced(descriptor), "there is room again")
    os.close(descriptor)
    assert (mounted.path / "f").stat().st_size == 1 << 20
    descriptor = os.open(mounted.path / "g", os.O_RDWR | os.O_CREAT, 0o644)
    write_until_refused(descriptor, os.urandom(1 << 20) * 40)
    with pytest.raises(OSError, match="No space"):
        os.close(descriptor)


def fsynced(descriptor: int) -> bool:
    try:
        os.fsync(descriptor)
    except OSError:
        return False
    return True


def test_a_read_only_store(sandbox: rig.Sandbox, mount: MountFactory, small_store: Path) -> None:
    mounted = mount("off", url=sandbox.format("volume", "--store", f"file://{small_store}"), allowed=REFUSED)
    data = os.urandom(3 << 20)
    with open(mounted.path / "f", "wb", buffering=0) as file:
        remount(small_store, "ro")
        assert write_until_refused(file.fileno(), data)[1] in (errno.EIO, errno.EROFS)
        (mounted.path / "small").write_bytes(b"is kept by the metaserver")
        remount(small_store, "rw")
        os.fsync(file.fileno())
    mounted.remount()
    assert (mounted.path / "f").read_bytes() == data


def test_a_damaged_object_is_never_read(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel, allowed=(*REFUSED, r"object \d+ is (damaged|missing)", r"ERROR .* read: "))
    data = random.Random(2).randbytes(3 << 20)
    (mounted.path / "f").write_bytes(data)
    mounted.unmount()
    blocks = Path(mounted.url.removeprefix("file://")) / "blocks"
    (stored,) = [path for path in blocks.rglob("*") if path.is_file() and path.name != object_names.OWNER]
    good = stored.read_bytes()
    stored.write_bytes(good[:2_000_000] + bytes([good[2_000_000] ^ 1]) + good[2_000_001:])
    mounted.options = ("--cache-size", "0")
    mounted.mount()
    with open(mounted.path / "f", "rb", buffering=0) as file:
        assert file.read(1000) == data[:1000], "what is whole can be read"
        file.seek(1_999_000)
        with pytest.raises(OSError, match="Input/output"):
            file.read(4096)
    assert re.search(rf"object \d+ is damaged: .*{stored.name}", mounted.read_log())
    stored.write_bytes(good)
    assert (mounted.path / "f").read_bytes() == data


@pytest.fixture
def small_engine(sandbox: rig.Sandbox) -> str:
    """The URL of a volume whose metaserver has room for very little."""
    engine = f"lmdb://{sandbox.path}/engine?map_size={2 << 20}"
    server = sandbox.start("metaserver", "--engine", engine, "--listen", "127.0.0.1:0")
    assert server.stderr is not None
    address = re.search(r"tcp:(127\.0\.0\.1:\d+)", server.stderr.readline())
    assert address is not None
    url = f"bpfuse://{address[1]}/v"
    sandbox.run("format", url, "--store", f"file://{sandbox.path}/blocks").expect_success()
    return url


def test_a_full_engine(sandbox: rig.Sandbox, mount: MountFactory, small_engine: str) -> None:
    mounted = mount("off", url=small_engine, allowed=REFUSED)
    written: dict[str, bytes] = {}

    def fill() -> None:
        for number in range(1000):
            content = random.Random(number).randbytes(20_000)
            with open(mounted.path / f"f{number}", "xb", buffering=0) as file:
                file.write(content)
            written[f"f{number}"] = content

    with pytest.raises(OSError, match="No space"):
        fill()
    assert 10 < len(written) < 200
    for name in list(written)[:10]:
        (mounted.path / name).unlink()
        del written[name]
    (mounted.path / "again").write_bytes(b"there is room")
    written["again"] = b"there is room"
    mounted.unmount()
    mounted.mount()
    for name, content in written.items():
        assert (mounted.path / name).read_bytes() == content
    mounted.unmount()
    for process in sandbox._extra_processes:
        process.terminate()
        process.wait(rig.WAIT_S)


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC], ids=["sync", "dsync"])
def test_what_a_synchronous_write_has_written_outlives_every_process(
    sandbox: rig.Sandbox, mount: MountFactory, accel: str, flag: int
) -> None:
    """Everything of the mount is killed as soon as a write has returned; the descriptor is still open."""
    mounted = mount(accel, "--durability", "interval")
    expected = {"inline": b"", "large": b"", "patched": os.urandom(6 << 20)}
    (mounted.path / "patched").write_bytes(expected["patched"])
    descriptors = {name: os.open(mounted.path / name, os.O_RDWR | os.O_CREAT | flag, 0o644) for name in expected}
    for name, offset, data in (
        ("inline", 0, b"first"),
        ("inline", 3, b"and second"),
        ("large", 100_000, os.urandom(5 << 20)),
        ("patched", 4_194_000, os.urandom(1000)),
        ("patched", 6 << 20, os.urandom(10)),
    ):
        assert os.pwrite(descriptors[name], data, offset) == len(data)
        before = expected[name].ljust(offset, b"\0")
        expected[name] = before[:offset] + data + before[offset + len(data) :]
    record = mounted.record
    for each in sorted(record.processes, key=lambda each: each.role):  # the channel first: it starts the others again
        os.kill(each.pid, signal.SIGKILL)
    assert processes.wait_ended(record.processes, rig.WAIT_S) == []
    for descriptor in descriptors.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)
    sandbox.run("umount", mounted.path).expect_success()
    mounted.mount()
    assert {name: (mounted.path / name).read_bytes() for name in expected} == expected


@pytest.mark.parametrize(("accel", "durability"), [("bpf", "commit"), ("bpf", "interval"), ("off", "interval")])
def test_a_killed_metaserver_loses_nothing_that_was_synced(mount: MountFactory, accel: str, durability: str) -> None:
    mounted = mount(
        accel,
        "--durability",
        durability,
        allowed=(*REFUSED, r"the metaserver \(pid \d+\) ended with -9", "may have lost"),
    )
    directory = os.open(mounted.path, os.O_RDONLY | os.O_DIRECTORY)
    synced: dict[str, bytes] = {}
    for number in range(30):
        before = mounted.process("metaserver").pid if number % 10 == 9 else 0
        content = os.urandom(random.Random(number).choice([0, 100, 30_000, 200_000]))
        synchronous = os.O_SYNC if number % 4 == 1 and content else 0
        descriptor = os.open(mounted.path / f"f{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | synchronous, 0o640)
        os.write(descriptor, content)
        if not synchronous:
            os.fsync(descriptor)
        if number % 3 == 0:
            os.rename(mounted.path / f"f{number}", mounted.path / f"g{number}")
            os.fsync(directory)
        synced[f"{'g' if number % 3 == 0 else 'f'}{number}"] = content
        if before:
            os.kill(before, signal.SIGKILL)
            rig.wait_for(lambda old=before: mounted.process("metaserver").pid != old, "it is started again")  # type: ignore[misc]
        with contextlib.suppress(OSError):
            os.close(descriptor)
        assert {name: (mounted.path / name).read_bytes() for name in synced} == synced
    os.close(directory)
    mounted.remount(*mounted.options)
    assert {path.name: path.read_bytes() for path in mounted.path.iterdir()} == synced


@pytest.mark.parametrize("synced", [True, False])
def test_a_new_file_that_is_lost_with_the_metaserver_is_an_error_of_its_data(mount: MountFactory, synced: bool) -> None:
    """By fsync, or by close: not of its name (ESTALE), which nobody has asked for."""
    died = r"the metaserver \(pid \d+\) ended with -9"
    mounted = mount("off", "--durability", "interval", allowed=(*REFUSED, died, "may have lost", "NOT_FOUND"))
    for number in range(20):
        before = mounted.process("metaserver").pid
        descriptor = os.open(mounted.path / f"f{number}", os.O_WRONLY | os.O_CREAT)
        os.kill(before, signal.SIGKILL)
        os.write(descriptor, b"data")
        rig.wait_for(lambda old=before: mounted.process("metaserver").pid != old, "it is started again")  # type: ignore[misc]
        try:
            if synced:
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            else:
                os.close(descriptor)
        except OSError as error:
            assert error.errno == errno.EIO  # noqa: PT017 - it need not be raised
            assert not (mounted.path / f"f{number}").exists()
            return
        assert (mounted.path / f"f{number}").read_bytes() == b"data"
    pytest.fail("no file was lost")


def test_the_durability_of_a_remote_volume_is_its_metaservers(sandbox: rig.Sandbox, small_engine: str) -> None:
    rig.require_mounts()
    outcome = sandbox.run("mount", small_engine, sandbox.directory("mnt"), "--durability", "interval")
    outcome.expect_error("option of their metaserver")
    for process in sandbox._extra_processes:
        process.terminate()
        process.wait(rig.WAIT_S)
