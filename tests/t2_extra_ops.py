"""The requests that pyfuse3 has no method for, over a socket as the channel sends them, against a real metaserver."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from worker_rig import INLINE_LIMIT, ME, ROOT, Rig, rigged

from fuseclient.worker.extra_messages import Opcode
from fuseclient.worker.extra_ops import ExtraOps
from metaserver import wire

DEADLINE_S = 10.0
_IN = struct.Struct("=IIQQIIIHH")
_OUT = struct.Struct("=IiQ")


class Channel:
    """The channel's end of the socket."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        self.extra = ExtraOps(theirs.detach(), rig.ops, rig.mount.ranges, rig.mount.locks)
        self._unique = 0

    def send(self, opcode: int, nodeid: int, body: bytes) -> int:
        """Send a request and return its unique."""
        self._unique += 2
        header = _IN.pack(_IN.size + len(body), opcode, self._unique, nodeid, 0, 0, 1, 0, 0)
        self.socket.send(header + body)
        return self._unique

    async def receive(self) -> tuple[int, int, bytes]:
        """Return the next reply's unique, errno and body."""
        async with asyncio.timeout(DEADLINE_S):
            reply = await asyncio.get_running_loop().sock_recv(self.socket, 4096)
        length, error, unique = _OUT.unpack_from(reply)
        assert length == len(reply)
        return unique, -error, reply[_OUT.size :]

    async def request(self, opcode: int, nodeid: int, body: bytes) -> bytes:
        """Return the body of the reply; raise OSError."""
        sent = self.send(opcode, nodeid, body)
        unique, error, body = await self.receive()
        assert unique == sent
        if error:
            raise OSError(error, os.strerror(error))
        return body

    async def fallocate(self, fh: int, ino: int, mode: int, offset: int, length: int) -> None:
        assert await self.request(Opcode.FALLOCATE, ino, struct.pack("=QQQII", fh, offset, length, mode, 0)) == b""

    async def lseek(self, ino: int, offset: int, whence: int) -> int:
        body = await self.request(Opcode.LSEEK, ino, struct.pack("=QqII", 0, offset, whence, 0))
        return int(struct.unpack("=Q", body)[0])

    async def copy(self, source: int, ino: int, fh: int, length: int, *, flags: int = 0, offset: int = 0) -> int:
        body = struct.pack("=7Q", 0, 0, ino, fh, offset, length, flags)
        return int(struct.unpack("=Q", await self.request(Opcode.COPY_FILE_RANGE_64, source, body))[0])


@pytest.fixture(params=[True, False], ids=["maps", "no maps"])
async def channel(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Channel]:
    async with rigged(tmp_path, monkeypatch, maps=request.param) as rig:
        made = Channel(rig)
        made.extra.start()
        yield made
        await made.extra.close()
        made.socket.close()
        await rig.assert_maps_are_right()


@contextlib.contextmanager
def fails(number: int) -> Any:
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        yield


async def _open(channel: Channel, name: bytes, data: bytes = b"") -> tuple[int, int]:
    """Make a file, and return its inode and a writing handle."""
    info, entry = await channel.rig.ops.create(ROOT, name, 0o100644, os.O_RDWR, ME)
    if data:
        await channel.rig.ops.write(info.fh, 0, data)
    return entry.st_ino, info.fh


async def test_what_is_not_known(channel: Channel) -> None:
    with fails(errno.ENOSYS):
        await channel.request(52, ROOT, b"anything")
    with fails(errno.EINVAL):
        await channel.lseek(ROOT, 0, os.SEEK_END)


async def test_malformed_requests_are_refused(channel: Channel, caplog: pytest.LogCaptureFixture) -> None:
    for body in (b"", bytes(31), bytes(5000)):
        with fails(errno.EIO):
            await channel.request(Opcode.FALLOCATE, ROOT, body)
    channel.socket.send(b"abc")
    with fails(errno.ENOSYS):
        await channel.request(52, ROOT, b"")
    assert caplog.text.count("the channel sent what cannot be") == 4


async def test_files_that_are_not_there(channel: Channel) -> None:
    with fails(errno.ESTALE):
        await channel.lseek(12345, 0, os.SEEK_DATA)
    with fails(errno.ESTALE):
        await channel.fallocate(12345, 12345, 0, 0, 10)
    with fails(errno.EISDIR):
        await channel.lseek(ROOT, 0, os.SEEK_DATA)


async def test_fallocate_comes_after_what_was_written(channel: Channel) -> None:
    ops = channel.rig.ops
    ino, fh = await _open(channel, b"f", b"x" * 1000)
    await channel.fallocate(fh, ino, 3, 100, 200)
    await ops.write(fh, 150, b"y")
    assert await ops.read(fh, 0, 2000) == b"x" * 100 + bytes(50) + b"y" + bytes(149) + b"x" * 700
    await channel.fallocate(fh, ino, 0, 0, INLINE_LIMIT * 10)
    assert (await ops.getattr(ino, ME)).st_size == INLINE_LIMIT * 10
    await channel.fallocate(fh, ino, 1, 0, INLINE_LIMIT * 20)
    assert (await ops.getattr(ino, ME)).st_size == INLINE_LIMIT * 10
    for mode in (2, 8, 0x20, 0x12, 0x40):
        with fails(errno.EOPNOTSUPP):
            await channel.fallocate(fh, ino, mode, 0, 10)
    await channel.rig.close(fh)
    assert (await channel.rig.content(ino))[:200] == b"x" * 100 + bytes(50) + b"y" + bytes(49)


async def test_lseek_sees_what_was_written(channel: Channel) -> None:
    ino, fh = await _open(channel, b"f")
    await channel.rig.ops.write(fh, 50_000, b"x" * 10)
    assert await channel.lseek(ino, 0, os.SEEK_DATA) == 50_000
    assert await channel.lseek(ino, 0, os.SEEK_HOLE) == 0
    assert await channel.lseek(ino, 50_001, os.SEEK_HOLE) == 50_010
    for offset in (50_010, -1):
        with fails(errno.ENXIO):
            await channel.lseek(ino, offset, os.SEEK_DATA)
    assert ("written", ino) in channel.rig.kernel.log  # so that it writes back what came through mappings
    await channel.rig.close(fh)
    before = len(channel.rig.kernel.log)
    assert await channel.lseek(ino, 0, os.SEEK_DATA) == 50_000
    assert len(channel.rig.kernel.log) == before


@pytest.mark.parametrize("size", [100, 50_000])
async def test_copies(channel: Channel, size: int) -> None:
    ops, data = channel.rig.ops, bytes(range(1, 251)) * (size // 50)
    source, reading = await _open(channel, b"f", data)
    ino, fh = await _open(channel, b"g", b"g" * 20)
    assert await channel.copy(source, ino, fh, 10**9, offset=10) == len(data)
    assert await ops.read(fh, 0, 10**6) == b"g" * 10 + data
    assert await channel.copy(source, ino, fh, 0) == 0
    with fails(errno.EINVAL):
        await channel.copy(source, ino, fh, 10, flags=1)
    with fails(errno.EINVAL):
        await channel.copy(ino, ino, fh, 10, offset=5)
    body = struct.pack("=7Q", 0, 0, ino, fh, 0, 2**40, 0)
    assert await channel.request(Opcode.COPY_FILE_RANGE, source, body) == struct.pack("=II", len(data), 0)
    for each in (fh, reading):
        await channel.rig.close(each)


async def test_a_copy_is_interrupted(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    ino, fh = await _open(channel, b"f")
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def some(*where: int) -> int:
        begun.set()
        await go_on.wait()
        return 5

    monkeypatch.setattr(channel.rig.mount.ranges, "_copy_some", some)
    unique = channel.send(Opcode.COPY_FILE_RANGE_64, ino, struct.pack("=7Q", 0, 0, ino, fh, 1000, 1000, 0))
    async with asyncio.timeout(DEADLINE_S):
        await begun.wait()
    channel.send(Opcode.INTERRUPT, 0, struct.pack("=Q", 1234))
    channel.send(Opcode.INTERRUPT, 0, struct.pack("=Q", unique))
    with fails(errno.ENOSYS):  # another request is answered first: they run at once
        await channel.request(52, ROOT, b"")
    go_on.set()
    assert await channel.receive() == (unique, 0, struct.pack("=Q", 5))
    await channel.rig.close(fh)


async def test_a_nameless_file(channel: Channel) -> None:
    rig = channel.rig
    reply = await channel.request(Opcode.TMPFILE, ROOT, struct.pack("=IIII", os.O_RDWR, 0o100600, 0, 0) + b"/\0")
    ino, (fh, flags, _) = struct.unpack_from("=Q", reply)[0], struct.unpack_from("=QII", reply, 128)
    assert flags == 2
    await rig.ops.write(fh, 0, b"text")
    assert ino not in rig.maps.inodes
    entry = await rig.ops.link(ino, ROOT, b"name", ME)
    assert (entry.st_nlink, entry.st_size) == (1, 4)
    await rig.close(fh)
    assert await rig.content(await rig.ino(b"name")) == b"text"
    reply = await channel.request(Opcode.TMPFILE, ROOT, struct.pack("=IIII", os.O_RDWR, 0o100600, 0, 0) + b"/\0")
    gone, fh = struct.unpack_from("=Q", reply)[0], struct.unpack_from("=Q", reply, 128)[0]
    await rig.close(fh)
    await rig.ops.forget([(gone, 1), (ino, 1)])
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await rig.other.attributes(gone)
            except Exception:
                break
            await asyncio.sleep(0.01)
    assert (await rig.other.connection.call(wire.Lookup(ROOT, b"name"), wire.Found)).attributes.ino == ino


async def test_the_end_of_the_socket(channel: Channel) -> None:
    channel.send(Opcode.LSEEK, ROOT, bytes(24))
    channel.socket.close()
    await channel.extra.close()


async def _set_xattr(channel: Channel, ino: int, name: bytes, value: bytes, flags: int) -> None:
    body = struct.pack("=II", len(value), flags) + name + b"\0" + value
    assert await channel.request(Opcode.SETXATTR, ino, body) == b""


async def test_extended_attributes_that_must_or_must_not_be_there(channel: Channel) -> None:
    ino, _ = await _open(channel, b"file")
    with fails(errno.ENODATA):
        await _set_xattr(channel, ino, b"user.a", b"1", os.XATTR_REPLACE)
    await _set_xattr(channel, ino, b"user.a", b"2", os.XATTR_CREATE)
    with fails(errno.EEXIST):
        await _set_xattr(channel, ino, b"user.a", b"3", os.XATTR_CREATE)
    await _set_xattr(channel, ino, b"user.a", bytes(wire.MAX_XATTR_VALUE), os.XATTR_REPLACE)
    assert await channel.rig.ops.getxattr(ino, b"user.a", ME) == bytes(wire.MAX_XATTR_VALUE)
    for name, value, number in (
        (b"user.b", bytes(wire.MAX_XATTR_VALUE + 1), errno.ENOSPC),
        (b"system.posix_acl_access", b"", errno.EOPNOTSUPP),
        (b"other.name", b"", errno.EOPNOTSUPP),
    ):
        with fails(number):
            await _set_xattr(channel, ino, name, value, 0)
