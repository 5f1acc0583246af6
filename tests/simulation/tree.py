"""The check of what is left in the engine at the end of a run: is it a file system?"""

from __future__ import annotations

import stat

from metaserver import wire
from metaserver.records import Inode


def check_tree(entries: dict[int, dict[bytes, int]], inodes: dict[int, Inode]) -> list[str]:
    """Return what is wrong with directories' entries and the inodes they lead to, a line each."""
    complaints: list[str] = []
    found = _walk(entries, inodes, complaints)
    for directory in entries:
        if directory not in found:
            complaints.append(f"directory {directory} has entries and cannot be reached")
    for ino, inode in inodes.items():
        expected = _links(ino, inode, found.get(ino, 0), entries, inodes)
        if inode.nlink != expected:
            complaints.append(f"inode {ino} has nlink {inode.nlink} and {expected} links")
    return complaints


def _walk(entries: dict[int, dict[bytes, int]], inodes: dict[int, Inode], complaints: list[str]) -> dict[int, int]:
    """Return how many names lead to each inode from the root."""
    names, waiting = {wire.ROOT_INO: 1}, [wire.ROOT_INO]
    while waiting:
        directory = waiting.pop()
        for name, ino in entries.get(directory, {}).items():
            if ino not in inodes:
                complaints.append(f"{name!r} in {directory} leads to inode {ino}, which does not exist")
                continue
            names[ino] = names.get(ino, 0) + 1
            if not stat.S_ISDIR(inodes[ino].mode):
                continue
            if names[ino] > 1:
                complaints.append(f"directory {ino} has two names")
                continue
            if inodes[ino].parent != directory:
                complaints.append(f"directory {ino} is in {directory}, and says {inodes[ino].parent}")
            waiting.append(ino)
    return names


def _links(ino: int, inode: Inode, names: int, entries: dict[int, dict[bytes, int]], inodes: dict[int, Inode]) -> int:
    if not stat.S_ISDIR(inode.mode) or not names:
        return names
    below = (inodes.get(each) for each in entries.get(ino, {}).values())
    return 2 + sum(each is not None and stat.S_ISDIR(each.mode) for each in below)
