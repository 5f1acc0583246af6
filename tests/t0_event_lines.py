"""Events as lines: JSON without loss, and paths as far as the events tell them."""

from __future__ import annotations

import base64
import json
import stat
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fuseclient.events.lines import Lines, as_json
from metaserver import wire
from metaserver.wire import Event, Operation

DIRECTORY = stat.S_IFDIR
FILE = stat.S_IFREG
#: Where a line says what was changed.
WHAT_AT = len("2026-01-01 00:00:00.000  1234567  operations  ")


def event(version: int, operation: Operation, ino: int, kind: int = FILE, **more: Any) -> Event:
    return Event(version, 1_700_000_000_123_456_789, operation, ino, kind, client="me", **more)


@given(st.binary(min_size=1, max_size=255), st.binary(min_size=1, max_size=255))
def test_every_name_comes_back_from_json(name: bytes, new_name: bytes) -> None:
    told = event(1, Operation.RENAME, 2, parent=1, name=name, new_parent=3, new_name=new_name, other=4)
    line = as_json(told)
    assert line.isprintable()
    fields = json.loads(line)
    json.loads(line)["name"].encode()  # no lone surrogates, which other languages refuse
    for field, expected in (("name", name), ("new_name", new_name)):
        whole = fields.get(f"{field}_base64")
        assert (fields[field].encode() if whole is None else base64.b64decode(whole)) == expected


def test_json_says_all_there_is_and_nothing_else() -> None:
    made = event(7, Operation.CREATE, 5, parent=1, name=b"a")
    assert json.loads(as_json(made)) == {
        "version": 7, "time_ns": 1_700_000_000_123_456_789, "operation": "create", "inode": 5, "kind": "file",
        "size": 0, "parent": 1, "name": "a", "client": "me",
    }  # fmt: skip
    assert set(json.loads(as_json(Event(8, 1, Operation.REPAIR, client="fsck")))) == {
        "version", "time_ns", "operation", "client",
    }  # fmt: skip


def test_every_operation_has_a_line() -> None:
    for operation in Operation:
        line = Lines().line(event(1, operation, 9, parent=wire.ROOT_INO, name=b"n"))
        assert operation.name.lower() in line


def whats(*events: Event) -> list[str]:
    lines = Lines()
    return [lines.line(each)[WHAT_AT:] for each in events]


def test_paths_follow_what_the_events_tell() -> None:
    assert whats(
        event(1, Operation.MKDIR, 10, DIRECTORY, parent=1, name=b"d"),
        event(2, Operation.CREATE, 11, parent=10, name=b"f"),
        event(3, Operation.CONTENT, 11, size=1234),
        event(4, Operation.RENAME, 10, DIRECTORY, parent=1, name=b"d", new_parent=1, new_name=b"e"),
        event(5, Operation.ATTRIBUTES, 11, size=1234),
        event(6, Operation.CREATE, 13, parent=99, name=b"x"),
        event(7, Operation.XATTR, 13),
        event(8, Operation.EXCHANGE, 11, parent=10, name=b"f", new_parent=99, new_name=b"x", other=13),
        event(9, Operation.XATTR, 13),
        event(10, Operation.UNLINK, 13, parent=10, name=b"f"),
        event(11, Operation.XATTR, 13),
        Event(12, 0, Operation.REPAIR),
        event(13, Operation.XATTR, 11),
    ) == [
        "/d  [me]",
        "/d/f  [me]",
        "/d/f  (1,234 bytes)  [me]",
        "/d -> /e  [me]",
        "/e/f  (1,234 bytes)  [me]",
        "inode 99/x  [me]",
        "inode 99/x  [me]",
        "/e/f <-> inode 99/x  [me]",
        "/e/f  [me]",
        "/e/f  [me]",
        "inode 13  [me]",
        "fsck has repaired the volume: anything may have changed",
        "inode 11  [me]",
    ]


def test_a_name_cannot_write_to_the_terminal() -> None:
    (what,) = whats(event(1, Operation.CREATE, 9, parent=1, name=b"\x1b[2J\n\xff"))
    assert what == "/\\x1b[2J\\x0a\\xff  [me]"
