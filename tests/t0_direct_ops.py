"""The decoder of the frequent requests: every length is checked, and what is at hand is answered at once."""

from __future__ import annotations

import struct
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseclient.data.grants import Grant
from fuseclient.worker.direct_ops import Asked, DirectOps
from fuseclient.worker.extra_messages import Malformed, Opcode
from metaserver import wire

_SETATTR = struct.Struct("=IIQQQqqqIIIIIIII")


class Recorder:
    """Operations that do nothing, at once, and say what they were asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.asked.append((name, *arguments))
            if name == "grant":
                return Grant(4096, 2048)
            if name == "take_posted":
                return 512 * 1024
            if name == "create_now":
                return None
            return True if name == "write_now" else _entry()

        return call


def _entry() -> Any:
    times = dict.fromkeys(("st_atime_ns", "st_mtime_ns", "st_ctime_ns"), -1)
    fields = ("st_ino", "st_size", "st_blocks", "st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_blksize")
    return SimpleNamespace(**dict.fromkeys(fields, 7), **times, entry_timeout=1.5, attr_timeout=0.0)


def asked(body: bytes) -> Asked:
    return Asked(2, 10, 11, 12, memoryview(body))


#: A whole body of each opcode that is answered at once, what it is asked for, and how long the reply's body is.
AT_ONCE: dict[Opcode, tuple[bytes, tuple[Any, ...], int]] = {
    Opcode.LOOKUP: (b"name\0", ("lookup_now", 2, b"name"), 128),
    Opcode.GETATTR: (struct.pack("=IIQ", 0, 0, 0), ("getattr_now", 2), 104),
    Opcode.SETATTR: (
        _SETATTR.pack(1 | 32, 0, 0, 0, 0, 0, -2, 0, 0, 5, 0, 0o100640, 0, 3, 4, 0),
        ("change_now", wire.SetAttributes(2, mode=0o640, mtime_ns=-1_999_999_995)),
        104,
    ),
    Opcode.WRITE: (struct.pack("=QQIIQII", 9, 8, 3, 0, 0, 0, 0) + b"abc", ("write_now", 9, 8, b"abc"), 8),
    Opcode.RENAME: (struct.pack("=Q", 3) + b"old\0new\0", ("rename_now", 2, b"old", 3, b"new", 0), 0),
    Opcode.RENAME2: (struct.pack("=QII", 3, 1, 0) + b"old\0new\0", ("rename_now", 2, b"old", 3, b"new", 1), 0),
}
#: The least that a request of each opcode has, and how many names follow.
LEAST = {
    Opcode.LOOKUP: (0, 1), Opcode.GETATTR: (16, 0), Opcode.SETATTR: (88, 0), Opcode.MKDIR: (8, 1),
    Opcode.UNLINK: (0, 1), Opcode.RMDIR: (0, 1), Opcode.WRITE: (40, 0), Opcode.CREATE: (16, 1),
    Opcode.READ: (40, 0), Opcode.FSYNC: (16, 0), Opcode.RENAME: (8, 2), Opcode.RENAME2: (16, 2),
}  # fmt: skip


@pytest.mark.parametrize("opcode", AT_ONCE)
def test_what_is_at_hand_is_answered_at_once(opcode: Opcode) -> None:
    body, expected, length = AT_ONCE[opcode]
    operations = Recorder()
    answer = DirectOps(operations).handlers[opcode](asked(body))  # type: ignore[arg-type]
    assert operations.asked[0] == expected
    assert isinstance(answer, bytes)
    assert len(answer) == length


def test_a_posted_write_has_no_answer_and_others_say_what_may_be_posted() -> None:
    operations = Recorder()
    told: list[bytes] = []
    handler = DirectOps(operations, told.append).handlers[Opcode.WRITE]  # type: ignore[arg-type]
    assert handler(asked(struct.pack("=QQIIQII", 9, 8, 3, 0, 0, 0, 0) + b"abc")) == struct.pack("=IHH", 3, 4, 2)
    assert handler(asked(struct.pack("=QQIIQII", 9, 8, 3, 0, 55, 0, 1) + b"abc")) is None
    assert operations.asked == [("write_now", 9, 8, b"abc"), ("grant", 9), ("take_posted", 9, 8, b"abc", 55)]
    assert told == [struct.pack("=IiQQII", 32, 0, 6, 9, 512, 0)]


def test_a_posted_change_has_no_answer_and_says_when_it_was_made() -> None:
    operations = Recorder()
    handler = DirectOps(operations).handlers[Opcode.SETATTR]  # type: ignore[arg-type]
    assert handler(asked(_SETATTR.pack(1 | 1024, 2, 0, 0, 0, 0, 0, 5, 0, 0, 6, 0o100640, 0, 3, 4, 0))) is None
    assert operations.asked == [("take_change", wire.SetAttributes(2, mode=0o640, changed_ns=5_000_000_006))]


def test_every_opcode_is_covered() -> None:
    assert DirectOps(Recorder()).handlers.keys() == LEAST.keys()  # type: ignore[arg-type]


@pytest.mark.parametrize("opcode", LEAST)
def test_a_body_that_is_cut_off_is_refused(opcode: Opcode) -> None:
    operations = Recorder()
    handler = DirectOps(operations).handlers[opcode]  # type: ignore[arg-type]
    least, names = LEAST[opcode]
    bodies = [bytes(length) for length in range(least)]
    if names:
        others = (b"", b"name", b"name\0" * (names - 1), b"name\0" * (names + 1), b"name\0" * (names - 1) + b"name")
        bodies += [bytes(least) + each for each in others]
    for body in bodies:
        with pytest.raises(Malformed):
            handler(asked(body))
    assert not operations.asked


def test_a_write_that_does_not_have_what_it_says_is_refused() -> None:
    handler = DirectOps(Recorder()).handlers[Opcode.WRITE]  # type: ignore[arg-type]
    for size in (2, 4):
        with pytest.raises(Malformed, match="3 bytes"):
            handler(asked(struct.pack("=QQIIQII", 9, 8, size, 0, 0, 0, 0) + b"abc"))


@given(st.sampled_from(list(LEAST)), st.binary(max_size=120))
def test_nothing_else_is_raised(opcode: Opcode, body: bytes) -> None:
    try:
        answer = DirectOps(Recorder()).handlers[opcode](asked(body))  # type: ignore[arg-type]
    except Malformed:
        return
    if isinstance(answer, Coroutine):
        answer.close()


def test_times_that_cannot_be_kept_become_the_nearest() -> None:
    operations = Recorder()
    handler = DirectOps(operations).handlers[Opcode.SETATTR]  # type: ignore[arg-type]
    handler(asked(_SETATTR.pack(16 | 32, 0, 0, 0, 0, 2**62, -(2**62), 0, 0, 0, 0, 0, 0, 0, 0, 0)))
    handler(asked(_SETATTR.pack(128 | 256, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)))
    (_, kept), (_, now) = operations.asked
    assert (kept.atime_ns, kept.mtime_ns) == (2**63 - 1, -(2**63))
    assert now.atime_ns == now.mtime_ns
    assert now.atime_ns > 1_700_000_000 * 10**9
