"""One example of every message, with every optional field in use: what the wire and server tests send around."""

from __future__ import annotations

from typing import Final

from metaserver import wire

ATTRIBUTES: Final = wire.Attributes(
    ino=2**48 - 1,
    mode=0o100644,
    nlink=1,
    uid=2**32 - 1,
    gid=0,
    rdev=0,
    size=2**63 - 1,
    atime_ns=-1,
    mtime_ns=2**63 - 1,
    ctime_ns=-(2**63),
    flags=wire.InodeFlag.INLINE,
    version=7,
)
ENTRY: Final = wire.DirectoryEntry(b"\xff name", 3, ATTRIBUTES, b"content")
SLICE: Final = wire.Slice(0, 4096, 5, 0)
EVENT: Final = wire.Event(
    7, -1, wire.Operation.RENAME, 2, 0o100000, 2**63 - 1, "client", 1, b"\xff name", 3, b"name", 4
)
LOCK: Final = wire.Lock(5, -(2**63), True, 0, 2**63 - 1, True, 2**32 - 1)
SESSION: Final = bytes(range(16))

IDENTITY: Final = wire.Identity(
    "name@host", True, ["volume"], b"/\xff/tree", True, wire.Squash.ALL, 1000, 1000, 2**63 - 1, True
)

REQUESTS: Final[list[wire.Request]] = [
    wire.Hello(1, "test", "name:secret"),
    wire.CreateIdentity(IDENTITY, bytes(32)),
    wire.RevokeIdentity("name"),
    wire.ListIdentities("name"),
    wire.GetStatus("volume"),
    wire.EvictSession("volume", SESSION),
    wire.CreateVolume("volume", "file:///blocks", 65536, 1000, 3600, 2**62),
    wire.OpenSession("volume", "client", SESSION, [5], "test 1"),
    wire.Renew(9),
    wire.CloseSession(),
    wire.Lookup(1, b"name"),
    wire.FetchDirectory(1, 0, 100, 65536, 2**63 - 1, b"around"),
    wire.GetAttributes(1),
    wire.SetAttributes(1, 0o644, 0, 0, 10, 11, 12, True, 13),
    wire.MakeNode(1, b"name", 0o120777, 0, 0, 0, b"target", True),
    wire.Link(2, 1, b"name"),
    wire.Remove(1, b"name", True),
    wire.Rename(1, b"a", 2, b"b", True, True),
    wire.Reap([2, 3]),
    wire.ReadLink(2),
    wire.GetXattr(2, b"user.a"),
    wire.ListXattrs(2),
    wire.SetXattr(2, b"user.a", b"value", True, True),
    wire.RemoveXattr(2, b"user.a"),
    wire.GetContent(2, 0, 4096),
    wire.WriteInline(2, 0, b"data", -1, True, wire.SetAttributes(2, 0o600)),
    wire.NewSlices(3),
    wire.CommitSlices(2, [SLICE], 4096, True, 7),
    wire.GetStatistics(),
    wire.ListSlices(100, 7),
    wire.ForgetSlices([1, 2]),
    wire.MakeTemporary(1, 0o100600, 0, 0),
    wire.Allocate(2, 0, 4096, True, True),
    wire.CopyRange(2, 0, 3, 4096, 2**63 - 1),
    wire.Seek(2, 4096, True),
    wire.OpenFile(5, True),
    wire.ClosedForWriting([5, 2**48 - 1]),
    wire.Sync(),
    wire.CompactSlices(2, 0, 1, bytes(16), [SLICE]),
    wire.InspectSlices([1, 2]),
    wire.FollowEvents("volume", 7, True),
    wire.RetireSlices([1, 2]),
    wire.TestLock(LOCK),
    wire.SetLock(LOCK, 2**63 - 1, True, True),
    wire.CancelLock(7),
    wire.HoldLocks([LOCK], True),
    wire.Acknowledge(7, [5, 2**48 - 1]),
    wire.ReturnLeases([1, 2**48 - 1], [5]),
    wire.ReserveInodes(100),
    wire.MakeFiles([wire.NewFile(1, b"name", 99, 0o644, 1, 2, -1, 0, 1, 2, b"content", True)], True),
    wire.RemoveNames([wire.RemovedName(1, b"name", 99, -1)]),
]

REPLIES: Final[list[wire.Reply]] = [
    wire.Failure(wire.ErrorCode.NOT_FOUND, "no such thing"),
    wire.Done(),
    wire.Welcome(1, "test", 2**63 - 1, "tcp:127.0.0.1:1", ["tcp:127.0.0.1:2"]),
    wire.Status(
        "test",
        1,
        "tcp:127.0.0.1:1",
        30_000,
        1000,
        2,
        [wire.SessionStatus(SESSION, "host:/mnt", "test", wire.SessionState.UNSTABLE, 1, 2, 3, 4, 5, 6)],
        [wire.Eviction(SESSION, "host:/mnt", "its lease had run out", 7)],
        ["tcp:127.0.0.1:2"],
    ),
    wire.SessionOpened(SESSION, 30_000, 5, "file:///blocks", 65536, False, SESSION, True, True, False),
    wire.Renewed(30_000, 6, [(1, b"name")], [1, 2], False, ["tcp:127.0.0.1:2"]),
    wire.Found(ATTRIBUTES, 4),
    wire.DirectoryPage(ATTRIBUTES, [ENTRY, wire.DirectoryEntry(b"b", 4, ATTRIBUTES)], True, True, True),
    wire.Changed([ATTRIBUTES], 8, 4096),
    wire.TargetIs(b"target"),
    wire.XattrIs(b""),
    wire.XattrNames([b"user.a", b"user.b"]),
    wire.Content(ATTRIBUTES, None, [SLICE]),
    wire.SliceIds([1, 2**63 - 1]),
    wire.Statistics(1, 2, 3, 4),
    wire.Sought(4096, True),
    wire.Identities([IDENTITY]),
    wire.EventPage(7, [EVENT, wire.Event(8, 0, wire.Operation.REPAIR)], True, SESSION),
    wire.SlicesInspected([1], [2], [3]),
    wire.LockIs(LOCK),
    wire.LockAnswer(wire.LockOutcome.DEADLOCK),
    wire.LocksLost([0, 2**32 - 1]),
    wire.LockSettled(7, wire.LockOutcome.CANCELLED),
    wire.Break(7, [(1, b"name")], [1, 2], True, [3], True),
    wire.InodesReserved(99, 16, 100),
]


def body(request_id: int, message: wire.Request | wire.Reply) -> bytes:
    """Return a message's frame without its header."""
    return wire.encode(request_id, message)[wire.HEADER_BYTES :]
