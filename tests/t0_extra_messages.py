"""The decoder of the requests that pyfuse3 has no method for: every length is checked, nothing else gets through."""

from __future__ import annotations

import contextlib
import struct

import pyfuse3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseclient.worker import extra_messages as messages
from fuseclient.worker.extra_messages import Opcode

_IN = struct.Struct("=IIQQIIIHH")
#: A whole body of each opcode, and what it is decoded to.
WHOLE: dict[int, tuple[bytes, messages.Body]] = {
    Opcode.INTERRUPT: (struct.pack("=Q", 7), messages.Interrupt(7)),
    Opcode.FALLOCATE: (struct.pack("=QQQII", 1, 2, 3, 4, 0), messages.Fallocate(1, 2, 3, 4)),
    Opcode.LSEEK: (struct.pack("=QqII", 1, -2, 3, 0), messages.Lseek(1, -2, 3)),
    Opcode.COPY_FILE_RANGE: (
        struct.pack("=7Q", 1, 2, 3, 4, 5, 6, 7),
        messages.CopyFileRange(1, 2, 3, 4, 5, 6, 7, size_64=False),
    ),
    Opcode.COPY_FILE_RANGE_64: (
        struct.pack("=7Q", 1, 2, 3, 4, 5, 6, 7),
        messages.CopyFileRange(1, 2, 3, 4, 5, 6, 7, size_64=True),
    ),
    Opcode.SETXATTR: (struct.pack("=II", 3, 2) + b"user.a\0v\0w", messages.SetXattr(b"user.a", b"v\0w", 2)),
    Opcode.TMPFILE: (struct.pack("=IIII", 2, 0o644, 0o22, 0) + b"/\0", messages.Tmpfile(2, 0o644)),
}


def message(opcode: int, body: bytes, length: int | None = None) -> bytes:
    size = _IN.size + len(body) if length is None else length
    return _IN.pack(size, opcode, 2, 10, 11, 12, 13, 0, 0) + body


@pytest.mark.parametrize("opcode", WHOLE)
def test_whole_requests(opcode: int) -> None:
    body, expected = WHOLE[opcode]
    header, decoded = messages.decode(message(opcode, body))
    assert header == messages.Header(opcode, 2, 10, 11, 12, 13)
    assert decoded == expected


@pytest.mark.parametrize("opcode", WHOLE)
def test_requests_of_another_length(opcode: int) -> None:
    body, _ = WHOLE[opcode]
    for wrong in (b"", body[:-1], body + b"x"):
        with pytest.raises(messages.Malformed) as caught:
            messages.decode(message(opcode, wrong))
        assert caught.value.unique == 2
    for length in (0, _IN.size + len(body) + 1):
        with pytest.raises(messages.Malformed):
            messages.decode(message(opcode, body, length))


def test_what_has_no_header() -> None:
    for length in range(_IN.size):
        with pytest.raises(messages.Malformed) as caught:
            messages.decode(bytes(length))
        assert caught.value.unique == messages.unique_of(bytes(length)) == 0


def test_unknown_opcodes() -> None:
    assert messages.decode(message(99, b"anything"))[1] == messages.Unknown()


@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (Opcode.FALLOCATE, struct.pack("=QQQII", 1, 2**63 - 1, 1, 0, 0)),
        (Opcode.COPY_FILE_RANGE, struct.pack("=7Q", 1, 2**63 - 1, 1, 1, 0, 1, 0)),
        (Opcode.COPY_FILE_RANGE_64, struct.pack("=7Q", 1, 0, 1, 1, 5, 2**63 - 5, 0)),
    ],
)
def test_ranges_beyond_every_file(opcode: int, body: bytes) -> None:
    with pytest.raises(messages.Malformed):
        messages.decode(message(opcode, body))


@given(st.sampled_from([*WHOLE, 14, 0, 99]), st.binary(max_size=200))
def test_nothing_but_malformed_is_raised(opcode: int, body: bytes) -> None:
    for text in (body, message(opcode, body)):
        with contextlib.suppress(messages.Malformed):
            messages.decode(text)


def test_replies() -> None:
    assert messages.encode(5, b"abc") == struct.pack("=IiQ", 19, 0, 5) + b"abc"
    assert messages.encode_error(5, 22) == struct.pack("=IiQ", 16, -22, 5)
    assert messages.encode_offset(2**62) == struct.pack("=Q", 2**62)
    assert messages.encode_count(7, size_64=False) == struct.pack("=II", 7, 0)
    assert messages.encode_count(2**40, size_64=True) == struct.pack("=Q", 2**40)


def test_the_reply_to_tmpfile() -> None:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino, entry.st_mode, entry.st_nlink, entry.st_size = 77, 0o100644, 0, 5
    entry.entry_timeout, entry.attr_timeout = 1.5, 0.25
    entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = 3_000_000_007, -1, 0
    reply = messages.encode_opened(entry, pyfuse3.FileInfo(fh=9, keep_cache=True))
    assert len(reply) == 128 + 16
    nodeid, generation, valid, attr_valid, valid_ns, attr_valid_ns = struct.unpack_from("=QQQQII", reply)
    assert (nodeid, generation, valid, valid_ns, attr_valid, attr_valid_ns) == (77, 0, 1, 500_000_000, 0, 250_000_000)
    times = struct.unpack_from("=qqqIII", reply, 40 + 24)
    assert times == (3, -1, 0, 7, 999_999_999, 0)
    assert struct.unpack_from("=II", reply, 40 + 60) == (0o100644, 0)
    assert struct.unpack_from("=QII", reply, 128) == (9, 2, 0)
