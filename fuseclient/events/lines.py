"""Events as lines: for people, with paths as far as they are known, and as JSON, without loss.

A path is put together from the entries that the events themselves have told of, as they were at that time. Below a
directory that none has told of, it begins with the directory's inode.
"""

from __future__ import annotations

import base64
import json
import stat
import time
from collections import OrderedDict
from typing import Any, Final

from metaserver import wire
from metaserver.wire import Event, Operation

#: Inodes whose place is remembered.
_REMEMBERED: Final = 100_000
_DEEPEST: Final = 256

_KINDS: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}
_SIZED: Final = (Operation.CONTENT, Operation.ATTRIBUTES, Operation.LINK, Operation.RENAME)


def as_json(event: Event) -> str:
    """Return an event as one line of JSON, in ASCII; what does not apply is left out.

    A name that is not valid UTF-8 is shown with replacement characters, and is whole in the same field with the suffix
    ``_base64``.
    """
    fields: dict[str, Any] = {
        "version": event.version,
        "time_ns": event.time_ns,
        "operation": event.operation.name.lower(),
    }
    if event.ino:
        fields |= {"inode": event.ino, "kind": _KINDS.get(event.kind, "unknown"), "size": event.size}
    for parent, name, prefix in ((event.parent, event.name, ""), (event.new_parent, event.new_name, "new_")):
        if parent:
            fields |= {f"{prefix}parent": parent, **_name(f"{prefix}name", name)}
    if event.other:
        fields["other"] = event.other
    return json.dumps({**fields, "client": event.client})


def _name(field: str, name: bytes) -> dict[str, str]:
    try:
        return {field: name.decode()}
    except UnicodeDecodeError:
        return {field: name.decode(errors="replace"), f"{field}_base64": base64.b64encode(name).decode()}


class Lines:
    """Events as lines for people. To be told of all events in their order."""

    def __init__(self) -> None:
        self._places = _Places()

    def line(self, event: Event) -> str:
        """Return an event's line."""
        seconds, rest = divmod(event.time_ns, 1_000_000_000)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
        what = self._what(event)
        self._places.learn(event)
        return f"{when}.{rest // 1_000_000:03}  {event.version:>7}  {event.operation.name.lower():<10}  {what}"

    def _what(self, event: Event) -> str:
        if event.operation is Operation.REPAIR:
            return "fsck has repaired the volume: anything may have changed"
        text = self._places.path(event.ino)
        if event.parent:
            text = self._places.below(event.parent, event.name)
        if event.new_parent:
            arrow = "<->" if event.operation is Operation.EXCHANGE else "->"
            text += f" {arrow} {self._places.below(event.new_parent, event.new_name)}"
        if event.kind == stat.S_IFREG and event.operation in _SIZED:
            text += f"  ({event.size:,} bytes)"
        return f"{text}  [{printable(event.client.encode())}]"


class _Places:
    """Where inodes are, as far as events have told."""

    def __init__(self) -> None:
        self._places: OrderedDict[int, tuple[int, bytes]] = OrderedDict()

    def learn(self, event: Event) -> None:
        if event.operation is Operation.REPAIR:
            self._places.clear()
        elif event.operation in (Operation.UNLINK, Operation.RMDIR):
            if self._places.get(event.ino) == (event.parent, event.name):
                del self._places[event.ino]
        elif event.new_parent:
            self._put(event.ino, event.new_parent, event.new_name)
            if event.operation is Operation.EXCHANGE:
                self._put(event.other, event.parent, event.name)
            elif self._places.get(event.other) == (event.new_parent, event.new_name):
                del self._places[event.other]
        elif event.parent:
            self._put(event.ino, event.parent, event.name)

    def _put(self, ino: int, parent: int, name: bytes) -> None:
        self._places[ino] = parent, name
        self._places.move_to_end(ino)
        if len(self._places) > _REMEMBERED:
            self._places.popitem(last=False)

    def below(self, parent: int, name: bytes) -> str:
        return f"{self.path(parent).removesuffix('/')}/{printable(name)}"

    def path(self, ino: int) -> str:
        names: list[str] = []
        while ino != wire.ROOT_INO and len(names) < _DEEPEST:
            place = self._places.get(ino)
            if place is None:
                return "/".join([f"inode {ino}", *reversed(names)])
            ino, name = place
            names.append(printable(name))
        return "/" + "/".join(reversed(names))


def printable(name: bytes) -> str:
    """Return a name as text that leaves a terminal as it is."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
