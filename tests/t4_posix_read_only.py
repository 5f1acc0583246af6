"""A mount that is read-only answers each call as a read-only ext4 does: EROFS, or what comes before it."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from functools import partial

import posix_rig
import pytest
from posix_rig import KINDS, LIBC, OTHER, Place, check, user

pytestmark = [pytest.mark.usefixtures("needs_mounts"), pytest.mark.timeout(180)]


def open_and_close(path: str, flags: int) -> None:
    os.close(os.open(path, flags))


def everything(path: str) -> dict[str, Callable[[], object]]:
    """Return calls on a path, by name, that would change something or only look."""
    other = "new"
    opens = {
        f"open {flags:o}": partial(open_and_close, path, flags | os.O_NONBLOCK)
        for flags in (
            *(os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_CREAT, os.O_CREAT | os.O_EXCL),
            *(os.O_CREAT | os.O_WRONLY, os.O_RDWR | os.O_APPEND, os.O_PATH, os.O_DIRECTORY, os.O_TMPFILE | os.O_RDWR),
        )
    }
    return {
        **opens,
        "mkdir": partial(os.mkdir, path),
        "mkfifo": partial(os.mkfifo, path),
        "mknod": partial(os.mknod, path, stat.S_IFREG | 0o644),
        "symlink": partial(os.symlink, "target", path),
        "link from": partial(os.link, path, other),
        "link to": partial(os.link, "file", path),
        "unlink": partial(os.unlink, path),
        "rmdir": partial(os.rmdir, path),
        "rename from": partial(os.rename, path, other),
        "rename to": partial(os.rename, "file", path),
        "rename in place": partial(os.rename, path, path),
        "chmod": partial(os.chmod, path, 0o600),
        "chown": partial(os.chown, path, 1, 1),
        "lchown": partial(os.chown, path, 1, 1, follow_symlinks=False),
        "chown nobody": partial(os.chown, path, -1, -1),
        "truncate": partial(os.truncate, path, 5),
        "utime": partial(os.utime, path),
        "lutime": partial(os.utime, path, (1, 2), follow_symlinks=False),
        "setxattr": partial(os.setxattr, path, "user.new", b"value"),
        "removexattr": partial(os.removexattr, path, "user.old"),
        "read": partial(os.access, path, os.R_OK),
        "write": partial(os.access, path, os.W_OK),
        "execute": partial(os.access, path, os.X_OK),
    }


def case_read_only(p: Place) -> None:
    for path in (*KINDS, "missing", "missing/below", "file/below", "dir/below", "x" * 256, "loop", ""):
        for name, call in everything(path).items():
            for who in (None, user(OTHER)):
                p.do(f"{name} {path[:20]} by {who and who.user}", call, who=who)
    fd = p.open("open", "file", os.O_RDONLY)
    calls: dict[str, Callable[[], object]] = {
        "fchmod": partial(os.fchmod, fd, 0o600),
        "fchown": partial(os.fchown, fd, 1, 1),
        "futimens": partial(os.utime, fd, (1, 2)),
        "fsetxattr": partial(os.setxattr, fd, "user.new", b""),
        "ftruncate": partial(os.ftruncate, fd, 1),
        "fallocate": lambda: check(LIBC.fallocate(fd, 0, 0, 100)),
        "write": partial(os.write, fd, b"x"),
        "fsync": partial(os.fsync, fd),
        "syncfs": lambda: check(LIBC.syncfs(fd)),
        "read": partial(os.read, fd, 100),
        "flags": lambda: os.fstatvfs(fd).f_flag & os.ST_RDONLY,
    }
    for name, call in calls.items():
        p.do(name, call)
    p.note("names", sorted(os.listdir(".")))
    for kind in KINDS:
        p.facts(f"{kind} after", kind)


def fill(place: Place) -> None:
    before = os.getcwd()
    os.chdir(place.root)
    for kind in KINDS:
        if kind not in ("block", "char"):  # a mount is nodev, which comes before EROFS
            posix_rig.make(kind, kind)
    os.symlink("loop", "loop")
    os.setxattr("file", "user.old", b"")
    for path in ("file", "link.target"):
        os.chmod(
            path, 0o666
        )  # a bind mount asks for permissions first, a file system that is read-only itself does not
    os.chdir(before)


def test_as_on_a_read_only_ext4(accel: str) -> None:
    with posix_rig.ground(accel) as ground:
        places = ground.places("read_only")
        for place in places:
            fill(place)
        ground.mount.remount("--read-only")
        plain = places[0].root
        subprocess.run(["mount", "--bind", plain, plain], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", plain], check=True)
            ground.compare(case_read_only, places)
        finally:
            subprocess.run(["umount", "-l", plain], check=True)
