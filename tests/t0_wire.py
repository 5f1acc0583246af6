"""The wire protocol by itself: every message there and back, and nothing but Malformed for what is not one."""

from __future__ import annotations

import struct
import typing

import messages
import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metaserver import wire

_REQUEST_BODIES = [messages.body(1, message) for message in messages.REQUESTS]
_REPLY_BODIES = [messages.body(1, message) for message in messages.REPLIES]


def _refused(body: bytes) -> None:
    for decode in (wire.decode_request, wire.decode_reply):
        try:
            request_id, message = decode(body)
        except wire.Malformed:
            continue
        assert 0 <= request_id < 2**63
        assert isinstance(message, typing.get_args(wire.Request) + typing.get_args(wire.Reply))


def test_examples_are_complete() -> None:
    assert {type(message) for message in messages.REQUESTS} == set(typing.get_args(wire.Request))
    assert {type(message) for message in messages.REPLIES} == set(typing.get_args(wire.Reply))


@pytest.mark.parametrize("request_id", [0, 1, 2**63 - 1])
@pytest.mark.parametrize("message", messages.REQUESTS, ids=lambda message: type(message).__name__)
def test_request_round_trip(message: wire.Request, request_id: int) -> None:
    frame = wire.encode(request_id, message)
    length = wire.body_length(frame[: wire.HEADER_BYTES], wire.MAX_REQUEST)
    assert length == len(frame) - wire.HEADER_BYTES
    assert wire.decode_request(frame[wire.HEADER_BYTES :]) == (request_id, message)
    assert wire.decode_request(memoryview(frame)[wire.HEADER_BYTES :]) == (request_id, message)


@pytest.mark.parametrize("message", messages.REPLIES, ids=lambda message: type(message).__name__)
def test_reply_round_trip(message: wire.Reply) -> None:
    assert wire.decode_reply(messages.body(5, message)) == (5, message)


@pytest.mark.parametrize("body", _REQUEST_BODIES)
def test_a_request_is_not_a_reply(body: bytes) -> None:
    with pytest.raises(wire.Malformed):
        wire.decode_reply(body)


@pytest.mark.parametrize("body", _REPLY_BODIES)
def test_a_reply_is_not_a_request(body: bytes) -> None:
    with pytest.raises(wire.Malformed):
        wire.decode_request(body)


HOSTILE: list[tuple[str, typing.Any]] = [
    ("id too large", [2**63, [5]]),
    ("id negative", [-1, [5]]),
    ("id not a number", ["1", [5]]),
    ("no message", [1]),
    ("no array", 1),
    ("unknown tag", [1, [63]]),
    ("no tag", [1, []]),
    ("tag is bytes", [1, [b"\x05"]]),
    ("a map for an array", [1, {}]),
    ("field missing", [1, [6, 1]]),
    ("text for a name", [1, [6, 1, "name"]]),
    ("empty name", [1, [6, 1, b""]]),
    ("long name", [1, [6, 1, b"x" * 256]]),
    ("inode 0", [1, [8, 0]]),
    ("inode 2^48", [1, [8, 2**48]]),
    ("inode as text", [1, [8, "1"]]),
    ("inode as float", [1, [8, 1.0]]),
    ("inode as bool", [1, [8, True]]),
    ("none where a value belongs", [1, [8, None]]),
    ("negative size", [1, [9, 1, None, None, None, -1]]),
    ("mode over 32 bits", [1, [10, 1, b"a", 2**32, 0, 0]]),
    ("long target", [1, [10, 1, b"a", 0, 0, 0, 0, b"x" * 4096]]),
    ("number for a flag", [1, [12, 1, b"a", 1]]),
    ("too many inodes", [1, [14, [1] * 1025]]),
    ("long value", [1, [18, 1, b"user.a", b"x" * (60 * 1024 + 1)]]),
    ("long data", [1, [21, 1, 0, b"x" * 65537]]),
    ("no slice ids", [1, [22, 0]]),
    ("a slice too short", [1, [23, 1, [[0, 1, 2]], 0]]),
    ("session of 15 bytes", [1, [3, "volume", "client", b"x" * 15]]),
    ("volume with a slash", [1, [3, "a/b", "client"]]),
    ("volume with a newline", [1, [3, "volume\n", "client"]]),
    ("fetch of nothing", [1, [7, 1, 0, 0, 0, 0]]),
    ("fetch of too much", [1, [7, 1, 0, 4097, 0, 0]]),
    ("empty extension", [1, msgpack.ExtType(5, b"")]),
    ("extension", [1, msgpack.ExtType(5, b"12345")]),
    ("timestamp", [1, [8, msgpack.Timestamp(1, 0)]]),
    ("unknown error code", [1, [64, 99, ""]]),
    ("lease of nothing", [1, [68, 0, 0, [], [], False]]),
]


@pytest.mark.parametrize("frame", [frame for _, frame in HOSTILE], ids=[what for what, _ in HOSTILE])
def test_hostile_frames(frame: typing.Any) -> None:
    body = msgpack.packb(frame)
    for decode in (wire.decode_request, wire.decode_reply):
        with pytest.raises(wire.Malformed):
            decode(body)


BOMBS: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("array of 2^32-1", b"\xdd\xff\xff\xff\xff"),
    ("reaped inodes 2^32-1", b"\x92\x01\x92\x0e\xdd\xff\xff\xff\xff"),
    ("changed names 2^32-1", b"\x92\x01\x96\x44\xcd\x75\x30\x05\xdd\xff\xff\xff\xff"),
    ("map of 2^32-1", b"\x92\x01\xdf\xff\xff\xff\xff"),
    ("bytes of 2^32-1", b"\x92\x01\x93\x06\x01\xc6\xff\xff\xff\xff"),
    ("text of 2^32-1", b"\x92\x01\x93\x01\x01\xdb\xff\xff\xff\xff"),
    ("extension of 2^32-1", b"\x92\x01\xc9\xff\xff\xff\xff\x05"),
    ("nested", b"\x92\x01\x92\x05" + b"\x91" * 100_000),
    ("text that is not UTF-8", b"\x92\x01\x93\x01\x01\xa2\xff\xfe"),
    ("trailing bytes", b"\x92\x01\x91\x05\x00"),
    ("two messages", b"\x92\x01\x91\x05" * 2),
    ("reserved byte", b"\xc1"),
]


@pytest.mark.parametrize("body", [body for _, body in BOMBS], ids=[what for what, _ in BOMBS])
def test_bombs(body: bytes) -> None:
    for decode in (wire.decode_request, wire.decode_reply):
        with pytest.raises(wire.Malformed):
            decode(body)


@given(st.binary(max_size=512))
@settings(max_examples=400, deadline=None)
def test_random_bytes_only_raise_malformed(body: bytes) -> None:
    _refused(body)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=300)
    | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.integers(0, 5), inner, max_size=3),
    max_leaves=20,
)


@given(st.integers(0, 2**64 - 1), st.integers(0, 80), st.lists(_VALUES, max_size=8))
@settings(max_examples=400, deadline=None)
def test_random_fields_only_raise_malformed(request_id: int, tag: int, fields: list[typing.Any]) -> None:
    _refused(msgpack.packb([request_id, [tag, *fields]]))


@given(st.sampled_from(_REQUEST_BODIES + _REPLY_BODIES), st.data())
@settings(max_examples=600, deadline=None)
def test_mutated_frames_only_raise_malformed(body: bytes, data: st.DataObject) -> None:
    mutated = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated)))
        action = data.draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if action == "set" and at < len(mutated):
            mutated[at] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del mutated[at:]
        elif action == "insert":
            mutated[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            mutated[at:at] = mutated[:at]
    _refused(bytes(mutated))


@pytest.mark.parametrize("limit", [wire.MAX_HELLO, wire.MAX_REQUEST, wire.MAX_REPLY])
def test_a_length_is_checked_before_anything_is_kept(limit: int) -> None:
    for length in (0, limit + 1, 2**32 - 1):
        splitter = wire.FrameSplitter(limit)
        splitter.feed(struct.pack(">I", length))
        with pytest.raises(wire.Malformed, match="the limit is"):
            splitter.next_body()
    assert wire.body_length(struct.pack(">I", limit), limit) == limit


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=8), st.lists(st.integers(1, 400), max_size=30))
@example([b"abc", b"d"], [1] * 20)
@settings(max_examples=200, deadline=None)
def test_a_splitter_finds_the_frames_however_they_are_cut(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(struct.pack(">I", len(body)) + body for body in bodies)
    splitter = wire.FrameSplitter(300)
    found: list[bytes] = []
    for size in [*cuts, len(stream)]:
        splitter.feed(stream[:size])
        stream = stream[size:]
        while (body := splitter.next_body()) is not None:
            found.append(bytes(body))
    assert found == bodies


def test_content_is_not_copied_out_of_a_frame_that_came_in_one_piece() -> None:
    stream = bytes(wire.encode_reply(1, wire.DirectoryPage(messages.ATTRIBUTES, [messages.ENTRY], True, True, True)))
    splitter = wire.FrameSplitter(wire.MAX_REPLY)
    splitter.feed(stream)
    body = splitter.next_body()
    assert body is not None
    assert body.obj is stream
    _, page = wire.decode_reply(body)
    assert isinstance(page, wire.DirectoryPage)
    data = page.entries[0].data
    assert isinstance(data, memoryview)
    assert data == messages.ENTRY.data
    assert data.obj is stream


def test_a_splitter_obeys_a_limit_changed_between_frames() -> None:
    splitter = wire.FrameSplitter(4)
    splitter.feed(struct.pack(">I", 4) + b"abcd" + struct.pack(">I", 5) + b"efghi")
    assert bytes(splitter.next_body() or b"") == b"abcd"
    splitter.limit = 5
    assert bytes(splitter.next_body() or b"") == b"efghi"
    assert splitter.next_body() is None


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/a b", wire.UnixAddress("/run/a b")),
        ("tcp:127.0.0.1:7000", wire.TcpAddress("127.0.0.1", 7000)),
        ("tcp:[::1]:0", wire.TcpAddress("::1", 0)),
        ("tcp:localhost:65535", wire.TcpAddress("localhost", 65535)),
    ],
)
def test_addresses(text: str, address: wire.UnixAddress | wire.TcpAddress) -> None:
    assert wire.parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix:",
        "unix:relative",
        "unix:/a\0b",
        "tcp:",
        "tcp:host",
        "tcp::1",
        "tcp:host:",
        "tcp:h:65536",
        "tcp:h:-1",
        "tcp:h:²",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="not an address"):
        wire.parse_address(text)
