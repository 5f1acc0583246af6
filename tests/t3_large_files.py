"""Large files on real mounts: every way of reading, passthrough and what ends it, caches warm, damaged and full.

Content is compared with the same bytes in memory. That the kernel reads by itself is proven by the requests that do
not come.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import figures
import pytest
import rig
from conftest import MountFactory

pytestmark = pytest.mark.usefixtures("needs_mounts")

MIB = 1 << 20
#: Of a length that no block divides.
SIZE = 40 * MIB + 12_345
CONTENT = random.Random(3).randbytes(SIZE)
SMALL = 3 * MIB + 7


def caches(mounted: rig.Mount) -> dict[str, Any]:
    found = figures.stats(mounted)["caches"]
    assert isinstance(found, dict)
    return found


def until_whole(mounted: rig.Mount, files: int = 1) -> None:
    """Wait until so many files lie whole in the disk cache."""
    rig.wait_for(lambda: caches(mounted)["whole_files"]["files"] >= files, "a file was put together")


def passthrough_opens(mounted: rig.Mount) -> int:
    """Return how many opens were in passthrough, whoever answered them."""
    return int(caches(mounted)["passthrough"]["opens"]) + figures.outcome(mounted, "answered_passthrough")


def cache_files(mounted: rig.Mount) -> list[Path]:
    found = (mounted.sandbox.path / "cache").rglob("*")
    return [path for path in found if path.is_file() and path.name != "lock"]


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def in_passthrough(mounted: rig.Mount, path: Path) -> Iterator[int]:
    """Have a file open for reading in passthrough."""
    before = passthrough_opens(mounted)
    with opened(path) as descriptor:
        assert passthrough_opens(mounted) == before + 1
        yield descriptor


def read_all(path: Path, flags: int = os.O_RDONLY, step: int = MIB) -> bytes:
    """Read a file by read(2) into aligned memory."""
    parts = []
    with opened(path, flags) as descriptor, mmap.mmap(-1, step) as buffer:
        while count := os.readv(descriptor, [buffer]):
            parts.append(buffer[:count])
    return b"".join(parts)


def make_whole(mounted: rig.Mount, name: str, content: bytes) -> Path:
    """Write a file, and have it put together in the disk cache."""
    path = mounted.path / name
    path.write_bytes(content)
    before = caches(mounted)["whole_files"]["files"]
    assert read_all(path) == content
    until_whole(mounted, before + 1)
    return path


def every_way(path: Path) -> None:
    """Read a file of CONTENT in every way."""
    assert read_all(path) == CONTENT
    assert read_all(path, os.O_DIRECT) == CONTENT
    assert read_all(path, step=3 * 4096) == CONTENT
    places = [random.Random(n).randrange(SIZE) for n in range(200)]
    with opened(path) as descriptor:
        for place in places:
            assert os.pread(descriptor, 5000, place) == CONTENT[place : place + 5000]
        assert os.pread(descriptor, 10, SIZE) == b""
        with mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ) as shared:
            assert shared[:] == CONTENT
        with mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as private:
            private[7:9] = b"xx"
            assert private[:7] == CONTENT[:7]
        assert os.pread(descriptor, 10, 0) == CONTENT[:10]


def test_every_way_of_reading(mount: MountFactory, accel: str) -> None:
    """Cold, from the page cache, and in passthrough; again after a remount."""
    mounted = mount(accel)
    path = mounted.path / "file"
    path.write_bytes(CONTENT)
    every_way(path)
    if accel == "bpf":
        until_whole(mounted)
        with in_passthrough(mounted, path):
            before = figures.answers(mounted, "READ")
            every_way(path)
            assert figures.answers(mounted, "READ") == before
            assert figures.outcome(mounted, "answered_passthrough") > 1
    mounted.remount()
    every_way(path)
    found = caches(mounted)
    if accel == "bpf":
        # Whole in the cache from before, and so in passthrough from the first open on.
        assert figures.answers(mounted, "READ").total == 0
        assert (found["passthrough"]["state"], found["passthrough"]["failed"]) == ("on", 0)
    else:
        assert found["passthrough"]["state"] == "off: the mount is not accelerated"
        assert found["layouts"]["misses"] <= 2


def test_without_a_cache(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel, "--cache-size", "0")
    path = mounted.path / "file"
    path.write_bytes(CONTENT[:SMALL])
    for _ in range(2):
        assert read_all(path, os.O_DIRECT) == CONTENT[:SMALL]
    found = caches(mounted)
    assert "disk" not in found
    assert found["passthrough"]["state"].startswith("off: ")
    assert not cache_files(mounted)


def test_a_cache_directory_that_cannot_be_one(sandbox: rig.Sandbox) -> None:
    url, point = sandbox.format(), sandbox.directory("mnt")
    (sandbox.path / "file").touch()
    for directory, words in ((point / "cache", "below the mount point"), (sandbox.path / "file", "cannot be made")):
        sandbox.run("mount", url, point, "--cache-dir", directory).expect_error("the cache directory", words)


def test_a_program_runs_from_it(mount: MountFactory) -> None:
    mounted = mount("bpf")
    path = make_whole(mounted, "python", Path("/usr/bin/python3").resolve().read_bytes())
    path.chmod(0o755)
    done = subprocess.run([path, "-S", "-c", "print(6 * 7)"], capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"
    assert passthrough_opens(mounted) >= 1


def test_opened_to_write_while_nobody_reads_it_is_a_file_like_any(mount: MountFactory) -> None:
    mounted = mount("bpf")
    path = make_whole(mounted, "file", CONTENT[:SMALL])
    read_all(path)
    with opened(path, os.O_RDWR) as descriptor:
        os.pwrite(descriptor, b"new", 5)
        assert os.pread(descriptor, 5, 4) == CONTENT[4:5] + b"new" + CONTENT[8:9]
        with mmap.mmap(descriptor, 0) as mapping:
            mapping[MIB : MIB + 3] = b"map"
    assert caches(mounted)["passthrough"]["direct_opens"] == 0
    expected = bytearray(CONTENT[:SMALL])
    expected[5:8], expected[MIB : MIB + 3] = b"new", b"map"
    assert read_all(path) == expected
    mounted.remount()
    assert read_all(path) == expected


def rewrite(path: Path, expected: bytearray, reader: int, accel: str) -> None:
    """Change a file that somebody reads in every way, and see that he sees it, as on any file system."""
    with opened(path, os.O_RDWR) as writer:
        for offset, data in ((0, b"first"), (MIB - 2, b"over a block"), (len(expected) + 10, b"behind the end")):
            os.pwrite(writer, data, offset)
            expected.extend(bytes(max(0, offset + len(data) - len(expected))))
            expected[offset : offset + len(data)] = data
            assert os.pread(reader, len(data), offset) == data
            assert os.pread(writer, len(data), offset) == data
            assert os.fstat(reader).st_size == len(expected)
        os.fsync(writer)
        with mmap.mmap(writer, 0) as mapping:
            mapping[2 * MIB : 2 * MIB + 6] = b"mapped"
            mapping.flush()
            expected[2 * MIB : 2 * MIB + 6] = b"mapped"
            assert os.pread(reader, 6, 2 * MIB) == b"mapped"
            os.pwrite(writer, b"and again", 2 * MIB + 3)
            expected[2 * MIB + 3 : 2 * MIB + 12] = b"and again"
        os.ftruncate(writer, 2 * MIB + 20)
        del expected[2 * MIB + 20 :]
        assert os.pread(reader, 100, 2 * MIB) == expected[2 * MIB :]
        os.ftruncate(writer, 3 * MIB)
        expected.extend(bytes(3 * MIB - len(expected)))
        os.posix_fallocate(writer, 0, 3 * MIB + 5)
        expected.extend(bytes(5))
        os.copy_file_range(writer, writer, 4096, 0, 2 * MIB + 4096)
        expected[2 * MIB + 4096 : 2 * MIB + 8192] = expected[:4096]
        assert os.pread(reader, len(expected) + 1, 0) == expected
    with opened(path, os.O_WRONLY | os.O_APPEND) as writer:
        os.write(writer, b"the end")
        expected.extend(b"the end")
    assert os.pread(reader, len(expected) + 1, 0) == expected
    assert read_all(path) == expected


def test_rewritten_while_it_is_open(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    path = mounted.path / "file"
    path.write_bytes(CONTENT[:SMALL])
    assert read_all(path) == CONTENT[:SMALL]
    if accel == "bpf":
        until_whole(mounted)
    expected = bytearray(CONTENT[:SMALL])
    with opened(path) as reader:
        rewrite(path, expected, reader, accel)
    if accel == "bpf":
        found = caches(mounted)["passthrough"]
        assert found["direct_opens"] == 2
        assert found["absorbed_blocks"] >= 1
        rig.wait_for(lambda: caches(mounted)["passthrough"]["live"] == 0, "the file is nobody's backing any more")
    mounted.remount()
    assert read_all(path) == expected


def test_written_through_a_mapping_that_outlives_its_descriptor(mount: MountFactory) -> None:
    mounted = mount("bpf")
    path = make_whole(mounted, "file", CONTENT[:SMALL])
    with in_passthrough(mounted, path):
        with opened(path, os.O_RDWR) as writer:
            mapping = mmap.mmap(writer, 0)
        mapping[100:104] = b"late"
        mapping.close()
        rig.wait_for(lambda: caches(mounted)["files_being_written"] == 0, "the mapping's end was noticed")
    mounted.remount()
    assert read_all(path) == CONTENT[:100] + b"late" + CONTENT[104:SMALL]


def test_truncated_and_removed_while_it_is_open(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    path = mounted.path / "file"
    path.write_bytes(CONTENT[:SMALL])
    assert read_all(path) == CONTENT[:SMALL]
    if accel == "bpf":
        until_whole(mounted)
    with opened(path) as reader:
        os.truncate(path, 2 * MIB)
        assert os.pread(reader, 100, 2 * MIB - 50) == CONTENT[2 * MIB - 50 : 2 * MIB]
        with opened(path, os.O_WRONLY | os.O_TRUNC) as writer:
            assert os.pread(reader, 10, 0) == b""
            os.write(writer, b"short")
        assert os.pread(reader, 10, 0) == b"short"
        assert path.read_bytes() == b"short"
        path.unlink()
        path.write_bytes(b"another")
        assert os.pread(reader, 10, 0) == b"short"
    assert path.read_bytes() == b"another"


def test_changed_by_another_client_while_it_is_open(sandbox: rig.Sandbox, mount: MountFactory, accel: str) -> None:
    engine = f"lmdb://{sandbox.path}/engine"
    server = sandbox.start("metaserver", "--engine", engine, "--listen", "127.0.0.1:0", "--lease", "1")
    assert server.stderr is not None
    address = re.search(r"tcp:(127\.0\.0\.1:\d+)", server.stderr.readline())
    assert address is not None
    url = f"bpfuse://{address[1]}/volume"
    sandbox.run("format", url, "--store", f"file://{sandbox.path}/blocks").expect_success()
    here, there = mount(accel, url=url, name="here"), mount(accel, url=url, name="there")
    path = here.path / "file"
    path.write_bytes(CONTENT[:SMALL])
    assert read_all(path) == CONTENT[:SMALL]
    if accel == "bpf":
        until_whole(here)
    with opened(path) as reader:
        with opened(there.path / "file", os.O_RDWR) as writer:
            os.pwrite(writer, b"elsewhere", MIB)
            os.ftruncate(writer, 2 * MIB)
        rig.wait_for(lambda: os.pread(reader, 9, MIB) == b"elsewhere", "the change is seen")
        expected = CONTENT[:MIB] + b"elsewhere" + CONTENT[MIB + 9 : 2 * MIB]
        assert read_all(path) == expected
        assert os.pread(reader, 3 * MIB, 0) == expected
    if accel == "bpf":
        assert caches(here)["passthrough"]["refreshed"] >= 1
    for each in (here, there):
        each.unmount()
    server.send_signal(signal.SIGTERM)
    assert server.wait(rig.WAIT_S) == 0


def test_a_worker_that_dies_leaves_passthrough_as_it_is(mount: MountFactory) -> None:
    mounted = mount("bpf", allowed=("the worker .* ended",))
    path = make_whole(mounted, "file", CONTENT[:SMALL])
    with in_passthrough(mounted, path) as reader:
        os.kill(mounted.process("worker").pid, signal.SIGKILL)
        assert os.pread(reader, SMALL, 0) == CONTENT[:SMALL]
        rig.wait_for(lambda: figures.stats(mounted)["worker"]["restarts"] == 1, "a new worker")
        with opened(path, os.O_RDWR) as writer:  # only in passthrough can it be opened now
            os.pwrite(writer, b"new", 10)
            assert os.pread(reader, 5, 9) == CONTENT[9:10] + b"new" + CONTENT[13:14]
        assert read_all(path) == CONTENT[:10] + b"new" + CONTENT[13:SMALL]
    mounted.remount()
    assert read_all(path) == CONTENT[:10] + b"new" + CONTENT[13:SMALL]


def test_a_worker_that_dies_with_a_cached_file_open(mount: MountFactory) -> None:
    """The new one does not know of the handle; it must not open the file in passthrough, which the kernel refuses."""
    mounted = mount("bpf", allowed=("the worker .* ended",))
    path = mounted.path / "file"
    path.write_bytes(CONTENT[:SMALL])
    with opened(path):
        os.kill(mounted.process("worker").pid, signal.SIGKILL)
        rig.wait_for(lambda: figures.stats(mounted)["worker"]["restarts"] == 1, "a new worker")
        assert read_all(path) == CONTENT[:SMALL]
        until_whole(mounted)
        assert read_all(path) == CONTENT[:SMALL]
        assert caches(mounted)["passthrough"]["busy"] == 1
    with in_passthrough(mounted, path):
        pass


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_damaged_cache_files_are_read_again(mount: MountFactory, accel: str, damage: str) -> None:
    mounted = mount(accel, "--cache-size", "200M")
    path = mounted.path / "file"
    path.write_bytes(CONTENT[:SMALL])
    assert read_all(path, os.O_DIRECT) == CONTENT[:SMALL]
    if accel == "bpf":
        until_whole(mounted)
    mounted.unmount()
    files = cache_files(mounted)
    assert files
    for each in files:
        with each.open("r+b") as file:
            if damage == "cut":
                file.truncate(each.stat().st_size // 2)
            else:
                file.seek(each.stat().st_size * 2 // 3)
                file.write(b"damage")
    mounted.mount()
    for _ in range(2):
        assert read_all(path) == CONTENT[:SMALL]
    assert caches(mounted)["disk"]["damaged"] > 0


def test_a_cache_directory_without_space(mount: MountFactory, accel: str, sandbox: rig.Sandbox) -> None:
    full = sandbox.directory("full")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", full], check=True)
    try:
        mounted = mount(accel, "--cache-dir", str(full), "--cache-size", "1G")
        path = mounted.path / "file"
        path.write_bytes(CONTENT[: 24 * MIB])
        for _ in range(2):
            assert read_all(path) == CONTENT[: 24 * MIB]
        assert caches(mounted)["disk"]["bytes"] <= 16 * MIB
        with contextlib.suppress(OSError):
            (full / "filler").write_bytes(bytes(16 * MIB))
        assert read_all(path, os.O_DIRECT) == CONTENT[: 24 * MIB]
        mounted.unmount()
    finally:
        subprocess.run(["umount", full], check=True)


def test_a_backing_file_that_cannot_grow(mount: MountFactory, sandbox: rig.Sandbox) -> None:
    """Whoever opens the file from then on reads it through the worker; no write is lost."""
    full = sandbox.directory("full")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", full], check=True)
    try:
        mounted = mount("bpf", "--cache-dir", str(full), allowed=("the backing file .* cannot be kept right",))
        path = make_whole(mounted, "file", CONTENT[:SMALL])
        with in_passthrough(mounted, path):
            with contextlib.suppress(OSError):
                (full / "filler").write_bytes(bytes(16 * MIB))
            with path.open("ab") as writer:
                writer.write(CONTENT[SMALL : 3 * SMALL])
            assert read_all(path) == CONTENT[: 3 * SMALL]
        assert read_all(path) == CONTENT[: 3 * SMALL]
        mounted.unmount()
    finally:
        subprocess.run(["umount", full], check=True)


def test_a_damaged_object_is_an_error_and_named(mount: MountFactory, accel: str, sandbox: rig.Sandbox) -> None:
    mounted = mount(accel, allowed=(r"object \d+",))
    path = mounted.path / "file"
    path.write_bytes(CONTENT[:SMALL])
    mounted.remount()
    damaged = max((sandbox.path / "mnt-volume" / "blocks").rglob("*"), key=lambda each: each.stat().st_size)
    with damaged.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(b"damage")
    with pytest.raises(OSError, match="Input/output error"):
        read_all(path)
    assert damaged.name.lstrip("0") in mounted.read_log()
    with opened(path) as descriptor:
        assert os.pread(descriptor, 1000, 0) == CONTENT[:1000]
