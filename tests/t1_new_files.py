"""Files that come whole: names, inodes and content in one transaction, with numbers that were reserved."""

from __future__ import annotations

import msgspec
from namespaces import DIRECTORY, FILE, INLINE_LIMIT, ROOT, SESSION, Files

from metaserver import new_files, wire
from metaserver.volumes import Context
from metaserver.wire import ErrorCode

PLAIN = wire.NewFile(ROOT, b"f", 1, FILE, 10, 20, 2_000, 5, 6, 7, b"content")


async def reserved(fs: Files, count: int) -> list[int]:
    context = Context(fs.volume, SESSION, 0)
    given = await fs.engine.write(lambda txn: new_files.reserve_inodes(txn, context, wire.ReserveInodes(count)))
    return list(range(given.first, given.first + given.step * given.count, given.step))


async def test_files_are_made_as_they_are_told(fs: Files) -> None:
    below = await fs.mkdir(b"below")
    numbers = await reserved(fs, 3)
    one, two, three = (
        msgspec.structs.replace(PLAIN, ino=ino, name=name, parent=parent, content=content, made_ns=made_ns)
        for ino, name, parent, content, made_ns in zip(
            numbers, (b"a", b"b", b"c"), (below, ROOT, below), (b"one", b"", b"three"), (9, 10**6, 8), strict=True
        )
    )
    changed = await fs.change(wire.MakeFiles([one, two, three]))
    assert [each.ino for each in changed.attributes] == [*numbers, below, ROOT]
    assert changed.attributes[0] == wire.Attributes(numbers[0], FILE, 1, 10, 20, 0, 3, 5, 6, 7, 2, 1, 3)
    assert await fs.names(below) == [b"a", b"c"]
    assert [await fs.read(ino) for ino in numbers] == [b"one", b"", b"three"]
    assert (await fs.stat(below)).mtime_ns > 9, "what was changed later stays so"
    assert (await fs.stat(ROOT)).mtime_ns == (await fs.stat(ROOT)).ctime_ns == 10**6
    later = await fs.make(b"later", parent=below)
    assert later not in numbers
    assert await fs.names(below) == [b"a", b"c", b"later"]


async def test_none_is_made_if_one_cannot_be(fs: Files) -> None:
    taken, file, gone = await fs.make(b"taken"), await fs.make(b"file"), await fs.mkdir(b"gone")
    await fs.change(wire.Remove(ROOT, b"gone", True))
    first, second = await reserved(fs, 2)
    good = msgspec.structs.replace(PLAIN, ino=first)

    async def refused(code: ErrorCode, **what: object) -> None:
        await fs.refused(code, wire.MakeFiles([good, msgspec.structs.replace(good, **{"ino": second, **what})]))

    await refused(ErrorCode.EXISTS)
    await refused(ErrorCode.EXISTS, name=b"taken")
    await refused(ErrorCode.NAME_TOO_LONG, name=b"n" * 256)
    await refused(ErrorCode.INVALID, name=b"a/b")
    await refused(ErrorCode.INVALID, name=b"g", ino=first)
    await refused(ErrorCode.INVALID, name=b"g", ino=taken)
    await refused(ErrorCode.INVALID, name=b"g", ino=second + 16)
    await refused(ErrorCode.INVALID, name=b"g", ino=ROOT)
    await refused(ErrorCode.TOO_LARGE, name=b"g", content=bytes(INLINE_LIMIT + 1))
    await refused(ErrorCode.NOT_FOUND, name=b"g", parent=2**40)
    await refused(ErrorCode.NOT_FOUND, name=b"g", parent=gone)
    await refused(ErrorCode.NOT_A_DIRECTORY, name=b"g", parent=file)
    await fs.change(wire.MakeFiles([msgspec.structs.replace(good, mode=DIRECTORY)]))
    assert (await fs.stat(first)).mode == FILE | 0o111, "the type is not the client's to say"


async def test_as_many_as_a_request_may_hold_fit_into_a_transaction(fs: Files) -> None:
    numbers = await reserved(fs, wire.MAX_NEW_FILES)
    parents = [await fs.mkdir(b"d%d" % number) for number in range(len(numbers))]
    await fs.change(
        wire.MakeFiles(
            [
                msgspec.structs.replace(PLAIN, ino=ino, parent=parent)
                for ino, parent in zip(numbers, parents, strict=True)
            ]
        )
    )
    assert [await fs.names(parent) for parent in parents] == [[b"f"]] * len(parents)
