"""A volume's data in S3, on a real server: the store by itself, a server that crashes or hangs, and mounts."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import rig
import weed
from conftest import MountFactory

from fuseclient.data.objects import ObjectExists, ObjectMissing, ObjectStore, StoreError, StoreUrl, open_store

_PROVOKED = (
    r"writing to inode \d+ failed",
    r"(flush|fsync|write|release|read): ",
    r"data written to inode \d+ was lost",
)


@pytest.fixture(scope="module")
def server() -> Iterator[weed.Weed]:
    with weed.running() as running:
        yield running


async def listed(store: ObjectStore) -> dict[int, int]:
    return {each.slice_id: each.bytes for page in [page async for page in store.list()] for each in page}


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
async def test_objects_are_put_read_listed_and_deleted(server: weed.Weed, compression: str) -> None:
    store = open_store(server.url(f"plain-{compression}", compression=compression))
    data = b"".join(b"line %d\n" % number for number in range(60_000)) + random.Random(1).randbytes(70_000)
    await store.put(7, data)
    await store.put(2**40, b"")
    other = open_store(server.url(f"plain-{compression}"))  # which would not compress, and reads what is there
    for start, length in ((0, 10), (65_530, 20), (300_000, 200_000), (len(data) - 5, 5), (0, len(data))):
        assert await other.read(7, start, length) == data[start : start + length]
    assert await other.verify(7) == len(data)
    sizes = await listed(other)
    assert set(sizes) == {7, 2**40}
    assert (sizes[7] < len(data)) == (compression != "none")
    with pytest.raises(ObjectMissing, match="object 8 is missing"):
        await store.read(8, 0, 1)
    await store.delete([7, 8, 2**40])
    assert await listed(store) == {}


async def test_nothing_is_overwritten(server: weed.Weed) -> None:
    store = open_store(server.url("absent"))
    await store.put(1, b"first")
    await store.put(1, b"first")  # as after a put whose answer was lost
    with pytest.raises(ObjectExists, match="do two volumes share"):
        await store.put(1, b"other")
    assert bytes(await store.read(1, 0, 5)) == b"first"


async def test_wrong_credentials_are_one_line_without_a_secret(
    server: weed.Weed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "quite-another-secret")
    with pytest.raises(StoreError) as refused:
        await open_store(server.url("denied", timeout=3)).put(1, b"x")
    assert "\n" not in str(refused.value)
    assert "another-secret" not in str(refused.value)


async def test_credentials_are_in_a_file_that_nobody_else_reads(
    server: weed.Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in weed.Weed.environment:
        monkeypatch.delenv(name)
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    lines = f"aws_access_key_id = {weed.KEY}\naws_secret_access_key = {weed.SECRET}\n"
    wrong = {
        "cannot be read: No such file": None,
        "make it private: chmod 600": f"[default]\n{lines}",
        "not a file of credentials": lines,
        r"no section \[default\]": f"[other]\n{lines}",
        "no aws_secret_access_key in section": f"[default]\naws_access_key_id = {weed.KEY}\n",
    }
    for what, text in wrong.items():
        if text is not None:
            path.write_text(text)
            path.chmod(0o640 if "chmod" in what else 0o600)
        with pytest.raises(StoreError, match=what) as refused:
            open_store(server.url("file"))
        assert weed.SECRET not in str(refused.value)
    for profile in ("default", "mine"):
        path.write_text(f"[{profile}]\n{lines}")
        monkeypatch.setenv("AWS_PROFILE", profile)
        store = open_store(server.url("file"))
        await store.put(1, b"content")
        assert bytes(await store.read(1, 0, 7)) == b"content"
    assert weed.SECRET not in repr(vars(store))


async def test_a_server_that_hangs_is_given_up_in_time(server: weed.Weed) -> None:
    store = open_store(server.url("hang", timeout=1.5))
    await store.put(1, b"before")
    server.hang()
    try:
        loop = asyncio.get_running_loop()
        start = loop.time()
        with pytest.raises(StoreError):
            await store.put(2, b"never")
        with pytest.raises(StoreError):
            await store.read(1, 0, 6)
        assert loop.time() - start < 6
    finally:
        server.go_on()
    assert bytes(await store.read(1, 0, 6)) == b"before"
    await store.put(3, b"after")


async def test_what_was_acknowledged_survives_a_crash_during_writes(server: weed.Weed) -> None:
    store = open_store(server.url("crash", timeout=2))
    contents = {number: random.Random(number).randbytes(300_000) for number in range(1, 25)}
    stored: set[int] = set()
    some = asyncio.Event()

    async def put(number: int) -> None:
        await store.put(number, contents[number])
        stored.add(number)
        if len(stored) == 6:
            some.set()

    puts = [asyncio.create_task(put(number)) for number in contents]
    await asyncio.wait_for(some.wait(), 20)
    await asyncio.to_thread(server.kill)
    outcomes = await asyncio.gather(*puts, return_exceptions=True)
    assert all(outcome is None or isinstance(outcome, StoreError) for outcome in outcomes)
    await asyncio.to_thread(server.start)
    for number in contents:
        if number not in stored:
            await store.put(number, contents[number])
        assert await store.read(number, 0, 300_000) == contents[number]


def test_a_mount_on_s3(server: weed.Weed, sandbox: rig.Sandbox, mount: MountFactory, accel: str) -> None:
    volume = sandbox.format("volume", "--store", server.url(f"mount-{accel}"), "--compression", "zstd")
    mounted = mount(accel, url=volume)
    content = random.Random(3).randbytes(1 << 20) * 9
    (mounted.path / "large").write_bytes(content)
    assert (mounted.path / "large").read_bytes() == content
    mounted.remount()
    assert (mounted.path / "large").read_bytes() == content
    assert weed.SECRET not in mounted.read_log()


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_mount_outlives_its_store(server: weed.Weed, sandbox: rig.Sandbox, mount: MountFactory, fault: str) -> None:
    volume = sandbox.format("volume", "--store", server.url(f"outlive-{fault}", timeout=2))
    mounted = mount("off", url=volume, allowed=_PROVOKED)
    first, second = os.urandom(5 << 20), os.urandom(5 << 20)
    descriptor = os.open(mounted.path / "file", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, first)
        os.fsync(descriptor)
        server.kill() if fault == "dies" else server.hang()
        _write_all(descriptor, second)
        with pytest.raises(OSError, match="Input/output") as failed:
            os.fsync(descriptor)
        assert failed.value.errno == errno.EIO
        server.start() if fault == "dies" else server.go_on()
        # A server that was stopped may be slow at first; what was written is kept for as long as it takes.
        rig.wait_for(lambda: _is_synced(descriptor), "the store takes what was written")
    finally:
        os.close(descriptor)
    mounted.remount()
    assert (mounted.path / "file").read_bytes() == first + second


def _is_synced(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
        return True
    return False


def _write_all(descriptor: int, data: bytes) -> None:
    """Write everything; an error of what was written before is told once, and does not count."""
    rest = memoryview(data)
    told = 0
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except OSError:
            told += 1
            assert told < 5


def test_the_url_of_a_store_has_no_secret() -> None:
    url = str(StoreUrl(path="p", bucket="b", endpoint="https://s3.example", compression="lz4"))
    assert url == "s3://b/p?endpoint=https://s3.example&compression=lz4"
