"""The one table of what a mount answers otherwise than ext4 does, with the reasons. Everything else is a failure."""

from __future__ import annotations

from typing import Final, NamedTuple


class Limit(NamedTuple):
    """A difference in a case (its name without "case_"), at labels that match a pattern of shell wildcards."""

    case: str
    label: str
    reason: str


_SETGID: Final = (
    "setgid without execution for the group stays when another user writes or the owner changes: the kernel's FUSE "
    "leaves it, as a mark for mandatory locks, which are no more"
)
_ATIME: Final = "reading sets no access times, as with noatime: each read would be a change for every client"
_NOSUID: Final = "mounts are nosuid and nodev unless --trusted is given: a volume may come from elsewhere"
_SEEK: Final = "lseek takes positions up to 2^63 - 1, as on XFS; files are 2^56 bytes at most, on ext4 2^44"
LIMITS: Final[tuple[Limit, ...]] = (
    Limit("chown_by_others", "2745 *", _SETGID),
    Limit("setuid_goes_with_writing", "* of 2767 by *", _SETGID),
    Limit("capable_users", "* 6700 with override: then", _SETGID),
    Limit("flags_of_one_call", "* RWF_DONTCACHE", "the kernel's FUSE takes no RWF_DONTCACHE (EOPNOTSUPP)"),
    Limit(
        "far_times", "year 2400: set", "times are kept from 1677 to 2262, to the nanosecond; others become the nearest"
    ),
    Limit(
        "rename_open_files",
        "whiteout",
        "no RENAME_WHITEOUT (EINVAL): only overlayfs asks for it, and the kernel takes no FUSE as its upper",
    ),
    Limit(
        "forgotten_handles",
        "by handle",
        "a file handle (name_to_handle_at) is good while the kernel knows the file, as with most of FUSE; later it is "
        "ESTALE",
    ),
    Limit("bad_arguments", "seek *", _SEEK),
    Limit("what_is_not_kept", "read: times of *", _ATIME),
    Limit("what_is_not_kept", "listing: times of *", _ATIME),
    Limit("what_is_not_kept", "readlink: times of *", _ATIME),
    Limit("what_is_not_kept", "birth time", "no birth time: none is recorded"),
    Limit(
        "what_is_not_kept", "chattr", "no inode flags (chattr) and no FIEMAP: both are ioctls, of which there are none"
    ),
    Limit(
        "what_is_not_kept",
        "access control list",
        "no access control lists (EOPNOTSUPP): they would have to be obeyed, not just kept",
    ),
    Limit("what_is_not_kept", "device", _NOSUID),
    Limit("what_is_not_kept", "setuid program", _NOSUID),
    Limit("direct", "unaligned *", "O_DIRECT needs no alignment, which is more than ext4 allows"),
    Limit(
        "mapping_grows_and_shrinks",
        "behind the end",
        "bytes stored through a mapping behind a file's end, in its last page, are seen when the file grows: the "
        "kernel's FUSE writes the page whole, and does not tell them from bytes stored after",
    ),
)
