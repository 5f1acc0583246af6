"""What may be done to an open file without asking: writes that are posted, changes of a new file's attributes, and the
closing of a small one.

Posted writes are answered before they come here: a grant has promised to take them. They are gathered whatever stands
in the way, which the next write that waits is told of, or a flush, as of what else is gathered. So is the closing of a
file that is held back and may wait, which fails in nothing: until it is committed, for which that promise is taken
back first, it is never given up. Changes of a file that is held back go with its making, before which what allows them
is taken back, too: nobody who is told of the file is told what they are to change.

A grant holds until something is appended to the file, a handle of it is closed, or it is taken back
(:attr:`~fuseclient.data.writer_hooks.WriterHooks.withdraw`).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from fuseclient.data.open_file import OpenFile

#: What may be posted to one file before a write waits again, in bytes; to as many files as the channel remembers.
CREDIT_BYTES: Final = 2 * 1024 * 1024
#: Whoever posts is told when so much of it was taken, so that he need not wait; a multiple of what is told in.
RENEW_BYTES: Final = CREDIT_BYTES // 4


class Grant(NamedTuple):
    """What may be done to a file without a word: so many bytes be written, and it be closed up to a size, in bytes;
    and its attributes be changed, all but the size."""

    credit: int
    closes: int
    changes: bool = False


NO_GRANT: Final = Grant(0, 0)


def may_grant(file: OpenFile) -> bool:
    """Say whether what is posted to a file from now on could be taken, and in order."""
    if file.error is not None or file.loss is not None or file.appending or file.has_enough_staged:
        return False
    return not (file.appended and file.uncommitted()) and file.memory.has_room(CREDIT_BYTES)


def grant(file: OpenFile, closes: int | None, *, changes: bool) -> Grant:
    """Grant what :func:`may_grant` allows; and the closing up to ``closes`` bytes, unless that is None; and, of a file
    that nobody was told of yet, changes of its attributes, if ``changes``."""
    file.taken = 0
    file.granted = True
    changes = changes and file.held
    file.changes_ahead |= changes
    if closes is None:
        return Grant(CREDIT_BYTES, 0, changes)
    file.closes_ahead = file.trusted = True
    return Grant(CREDIT_BYTES, closes, changes)


def take_posted(file: OpenFile, length: int) -> None:
    """Count a posted write. Raises RuntimeError if it could not have been granted."""
    if file.appended and file.uncommitted():
        raise RuntimeError(f"a write to inode {file.attributes.ino} was posted although something is appended")
    file.appended = False
    file.taken += length


def renewal(file: OpenFile) -> int:
    """Return by how many bytes what was granted is to be renewed, now that as much of it was taken; count them so."""
    if file.taken < RENEW_BYTES or not may_grant(file):
        return 0
    renewed = file.taken // RENEW_BYTES * RENEW_BYTES
    file.taken -= renewed
    return renewed
