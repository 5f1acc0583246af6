"""Attributes as the metaserver has them to what pyfuse3 replies with."""

from __future__ import annotations

import stat
from typing import Final

import pyfuse3

from metaserver import wire

_BLOCK: Final = 4096


def entry_of(attributes: wire.Attributes, ttl_s: float) -> pyfuse3.EntryAttributes:
    """Return attributes that the kernel may keep for ``ttl_s`` seconds, and the name that led to them as well."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = attributes.ino
    entry.st_mode = attributes.mode
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = attributes.rdev
    entry.st_size = attributes.size
    entry.st_blocks = -(-attributes.stored // 512)
    entry.st_blksize = _BLOCK
    entry.st_atime_ns = attributes.atime_ns
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns
    entry.entry_timeout = entry.attr_timeout = ttl_s
    return entry


def absent_entry(ttl_s: float) -> pyfuse3.EntryAttributes:
    """Return what tells the kernel that a name is absent, and will be for ``ttl_s`` seconds."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = ttl_s
    return entry


def dot_entry(ino: int) -> pyfuse3.EntryAttributes:
    """Return what stands for "." and ".." in a listing; the kernel takes only the type from it."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = ino
    entry.st_mode = stat.S_IFDIR
    return entry


def statistics_of(statistics: wire.Statistics) -> pyfuse3.StatvfsData:
    """Return a volume's figures; each free block counts as a file that can still be made."""
    free = statistics.free_bytes // _BLOCK
    data = pyfuse3.StatvfsData()
    data.f_bsize = data.f_frsize = _BLOCK
    data.f_blocks = statistics.total_bytes // _BLOCK
    data.f_bfree = data.f_bavail = free
    data.f_files = statistics.inodes + free
    data.f_ffree = data.f_favail = free
    data.f_namemax = wire.MAX_NAME
    return data
