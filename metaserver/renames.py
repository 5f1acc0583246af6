"""Rename: moving an entry, replacing what is at its new place, and exchanging two entries.

An entry that is replaced or exchanged keeps its place in the listing, so that a listing in progress shows its name
once. A directory knows its parent, which is how a move of a directory into itself is found.
"""

from __future__ import annotations

import stat

from metaserver import wire
from metaserver.engine.base import Transaction
from metaserver.errors import Refused
from metaserver.inodes import Edit, check_name
from metaserver.records import Entry, Inode
from metaserver.volumes import Context
from metaserver.wire import ErrorCode


def rename(txn: Transaction, context: Context, request: wire.Rename) -> wire.Changed:
    """Move an entry as rename(2) does; two names of one inode are left as they are."""
    check_name(request.name)
    check_name(request.new_name)
    if request.no_replace and request.exchange:
        raise Refused(ErrorCode.INVALID, "a rename cannot both exchange and not replace")
    edit = Edit(txn, context)
    old, new = edit.directory(request.parent), edit.directory(request.new_parent)
    source = edit.existing(old, request.name)
    target = edit.existing(new, request.new_name) if request.exchange else edit.entry(new, request.new_name)
    if target is not None and request.no_replace:
        raise Refused(ErrorCode.EXISTS, f"directory {new.ino} has {request.new_name!r} already")
    if target is not None and target.ino == source.ino:
        return edit.changed(edit.inode(source.ino), old, new, cookie=target.cookie)
    if request.exchange:
        assert target is not None
        return _exchange(edit, request, source, target)
    return _move(edit, request, source, target)


def _move(edit: Edit, request: wire.Rename, source: Entry, target: Entry | None) -> wire.Changed:
    old, new = edit.directory(request.parent), edit.directory(request.new_parent)
    moved = edit.inode(source.ino)
    replaced = [edit.inode(target.ino)] if target else []
    _check_no_loop(edit, moved, new)
    for inode in replaced:
        _check_replaceable(edit, moved, inode)
    edit.leave(old, request.name, source)
    cookie = edit.enter(new, request.new_name, moved.ino, target.cookie if target else None)
    _moved(edit, moved, old, new)
    for inode in replaced:
        new.nlink -= stat.S_ISDIR(inode.mode)
        edit.unlink(inode, new)
    return edit.changed(moved, old, new, *replaced, cookie=cookie)


def _exchange(edit: Edit, request: wire.Rename, source: Entry, target: Entry) -> wire.Changed:
    old, new = edit.directory(request.parent), edit.directory(request.new_parent)
    moved, other = edit.inode(source.ino), edit.inode(target.ino)
    _check_no_loop(edit, moved, new)
    _check_no_loop(edit, other, old)
    edit.enter(old, request.name, other.ino, source.cookie)
    edit.enter(new, request.new_name, moved.ino, target.cookie)
    _moved(edit, moved, old, new)
    _moved(edit, other, new, old)
    return edit.changed(moved, old, new, other, cookie=target.cookie)


def _moved(edit: Edit, inode: Inode, old: Inode, new: Inode) -> None:
    """Account for an inode whose entry went from one directory to another."""
    edit.touch(inode)
    if stat.S_ISDIR(inode.mode):
        old.nlink -= 1
        new.nlink += 1
    inode.parent = new.ino


def _check_no_loop(edit: Edit, moved: Inode, into: Inode) -> None:
    """Refuse to move a directory into itself or below."""
    if not stat.S_ISDIR(moved.mode):
        return
    above = into
    while above.ino != moved.ino:
        if above.ino == wire.ROOT_INO:
            return
        above = edit.inode(above.parent)
    raise Refused(ErrorCode.INVALID, f"directory {moved.ino} cannot be moved below itself")


def _check_replaceable(edit: Edit, moved: Inode, replaced: Inode) -> None:
    if not stat.S_ISDIR(moved.mode):
        if stat.S_ISDIR(replaced.mode):
            raise Refused(ErrorCode.IS_A_DIRECTORY, "a directory is replaced by a directory only")
    elif not stat.S_ISDIR(replaced.mode):
        raise Refused(ErrorCode.NOT_A_DIRECTORY, "a directory cannot replace anything else")
    elif not edit.is_empty(replaced):
        raise Refused(ErrorCode.NOT_EMPTY, f"directory {replaced.ino} is not empty")
