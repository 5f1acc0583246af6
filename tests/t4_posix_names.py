"""Calls that make, move and remove names: what they answer, and which times they change, as on ext4."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import posix_rig
import pytest
from posix_rig import AT_FDCWD, AT_SYMLINK_FOLLOW, KINDS, LIBC, OTHER, USER, Place, check, product, user

pytestmark = pytest.mark.usefixtures("needs_mounts")

NAME_255 = "n" * 255
NAME_256 = "n" * 256
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4


@pytest.fixture(scope="module", params=["bpf", "off"])
def ground(request: pytest.FixtureRequest) -> Iterator[posix_rig.Ground]:
    with posix_rig.ground(request.param) as made:
        yield made


def bind(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


def create(path: str | bytes, mode: int = 0o644) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))


def open_and_close(path: str, flags: int, mode: int = 0o644) -> None:
    os.close(os.open(path, flags, mode))


def go_and_come_back(path: str) -> None:
    here = os.getcwd()
    os.chdir(path)
    os.chdir(here)


def rename(old: str, new: str, flags: int = 0) -> None:
    check(LIBC.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))


#: Calls that make the name they are given.
MAKERS: dict[str, Callable[[str], Any]] = {
    "open": create,
    "mkdir": os.mkdir,
    "mkfifo": os.mkfifo,
    "mknod": lambda path: os.mknod(path, stat.S_IFCHR | 0o644, os.makedev(1, 3)),
    "symlink": lambda path: os.symlink("anything", path),
    "link": lambda path: os.link("a-file", path),
    "rename": lambda path: os.rename("a-file", path),
    "bind": bind,
}

#: Calls that look at, or change, the name they are given.
USERS: dict[str, Callable[[str], Any]] = {
    "open": lambda path: open_and_close(path, os.O_RDONLY),
    "stat": lambda path: os.stat(path) and None,
    "lstat": lambda path: os.lstat(path) and None,
    "unlink": os.unlink,
    "rmdir": os.rmdir,
    "rename from": lambda path: os.rename(path, "elsewhere"),
    "link from": lambda path: os.link(path, "elsewhere"),
    "chmod": lambda path: os.chmod(path, 0o644),
    "chown": lambda path: os.chown(path, 1, 1),
    "lchown": lambda path: os.lchown(path, 1, 1),
    "truncate": lambda path: os.truncate(path, 10),
    "utime": lambda path: os.utime(path, (1, 1)),
    "readlink": os.readlink,
    "getxattr": lambda path: os.getxattr(path, "user.x"),
    "setxattr": lambda path: os.setxattr(path, "user.x", b"1"),
    "listxattr": os.listxattr,
    "chdir": go_and_come_back,
    "access": lambda path: os.access(path, os.F_OK),
    "listdir": lambda path: sorted(os.listdir(path)),
    "statvfs": lambda path: os.statvfs(path).f_namemax,
    "exec": lambda path: os.posix_spawn(path, ["x"], {}) and None,
}


def deep_path(place: Place, length: int) -> str:
    """Return a path of so many bytes to something that does not exist, in directories that do."""
    name, path = "d" * 200, ""
    while len(path) + 2 * 201 < length:
        path += f"{name}/"
        if not os.path.isdir(path):
            os.mkdir(path)
    return path + "f" * min(255, length - len(path)) if length - len(path) <= 255 else _padded(path, length)


def _padded(path: str, length: int) -> str:
    spare = length - len(path) - 100
    return path + "./" * (spare // 2) + "f" * (length - len(path) - spare // 2 * 2)


# What has to fail


def case_errors_of_makers(p: Place) -> None:
    create("a-file")
    os.symlink("loop", "loop")
    os.symlink("loop2", "loop1")
    os.symlink("loop1", "loop2")
    os.mkdir("dir")
    os.mkdir("closed", 0o755)
    paths = {
        "a file as directory": "a-file/x",
        "no directory": "none/x",
        "a loop": "loop/x",
        "a loop of two": "loop1/x",
        "an empty path": "",
        "a name of 255": NAME_255,
        "a name of 256": NAME_256,
        "a directory of 256": f"{NAME_256}/x",
        "a path of 4095": deep_path(p, 4095),
        "a path of 4096": deep_path(p, 4095) + "f",
        "dot": "dir/.",
        "dots": "dir/..",
        "a slash behind": "made/",
        "any bytes": os.fsdecode(b"\xff\x01\n \\\"'"),
    }
    for (call, make), (what, path) in product(MAKERS.items(), paths.items()):
        if call == "bind" and len(path) > 100:
            continue
        p.do(f"{call} of {what}", make, path)
        if not os.path.lexists("a-file"):
            create("a-file")
        if os.path.lexists(path) and path not in ("dir/.", "dir/.."):
            posix_rig.remove(path.rstrip("/"))


def case_makers_of_what_exists(p: Place) -> None:
    def create_old() -> None:
        create("a-file")
        os.utime("a-file", (1, 1))  # else it may be as old as what it replaces, or not

    create_old()
    for (call, make), kind in product(MAKERS.items(), KINDS):
        path = p.fresh(kind)
        with p.stamps(f"{call} over {kind}", path, "."):
            p.do(f"{call} over {kind}", make, path)
        p.facts(f"{call} over {kind}: after", path)
        if not os.path.lexists("a-file"):
            create_old()


def case_errors_of_users(p: Place) -> None:
    create("a-file")
    os.symlink("loop", "loop")
    os.symlink("nothing", "dangling")
    os.mkdir("dir")
    paths = {
        "nothing": "none",
        "a file as directory": "a-file/x",
        "a file with a slash": "a-file/",
        "no directory": "none/x",
        "a loop": "loop",
        "through a loop": "loop/x",
        "a dangling link": "dangling",
        "a dangling link with a slash": "dangling/",
        "an empty path": "",
        "a name of 256": NAME_256,
        "a path of 4095": deep_path(p, 4095),
        "a path of 4096": deep_path(p, 4095) + "f",
    }
    for (call, use), (what, path) in product(USERS.items(), paths.items()):
        p.do(f"{call} of {what}", use, path)
        if not os.path.lexists("loop"):
            os.symlink("loop", "loop")
        if not os.path.lexists("dangling"):
            os.symlink("nothing", "dangling")
        if os.path.lexists("elsewhere"):
            os.unlink("elsewhere")


def case_users_of_each_kind(p: Place) -> None:
    skipped = {("open", "fifo"), ("open", "block"), ("open", "char"), ("exec", "link")}
    for (call, use), kind in product(USERS.items(), KINDS):
        if (call, kind) in skipped:
            continue
        path = p.fresh(kind)
        with p.stamps(f"{call} of {kind}", path, "."):
            p.do(f"{call} of {kind}", use, path)
        p.facts(f"{call} of {kind}: after", path)
        if os.path.lexists("elsewhere"):
            posix_rig.remove("elsewhere")


def case_symlink_chains(p: Place) -> None:
    create("link0")
    for number in range(1, 45):
        os.symlink(f"link{number - 1}", f"link{number}")
    for number in (1, 8, 39, 40, 41, 44):
        p.do(f"stat through {number} links", lambda path: os.stat(path).st_size, f"link{number}")
        p.do(f"open through {number} links", open_and_close, f"link{number}", os.O_RDWR)
        p.do(f"chmod through {number} links", os.chmod, f"link{number}", 0o600)


# Makers: what is made, and the times


def case_made_nodes(p: Place) -> None:
    create("a-file")
    os.mkdir("dir")
    for (call, make), mask in product(MAKERS.items(), (0, 0o022, 0o077, 0o777)):
        path = p.unused("dir")
        os.umask(mask)
        with p.stamps(f"{call}, umask {mask:o}", "dir", "."):
            p.do(f"{call}, umask {mask:o}", make, path)
        os.umask(0o022)
        p.facts(f"{call}, umask {mask:o}: made", path)
        if call not in ("link", "rename"):
            p.new_is_now(f"{call}: times of the new node", path)
        if not os.path.lexists("a-file"):
            create("a-file")


def case_modes_of_new_nodes(p: Place) -> None:
    os.umask(0)
    for mode in (0, 0o777, 0o1777, 0o2755, 0o4755, 0o6711, 0o7777, 0o640):
        for call, make in (
            ("open", create),
            ("mkdir", os.mkdir),
            ("mkfifo", os.mkfifo),
            ("mknod file", lambda path, mode: os.mknod(path, stat.S_IFREG | mode)),
            ("mknod socket", lambda path, mode: os.mknod(path, stat.S_IFSOCK | mode)),
            ("mknod block", lambda path, mode: os.mknod(path, stat.S_IFBLK | mode, os.makedev(259, 1048575))),
            ("mknod char", lambda path, mode: os.mknod(path, stat.S_IFCHR | mode, os.makedev(4095, 7))),
            ("mknod none", lambda path, mode: os.mknod(path, mode)),
            ("mknod dir", lambda path, mode: os.mknod(path, stat.S_IFDIR | mode)),
        ):
            path = p.unused()
            p.do(f"{call} {mode:o}", make, path, mode)
            p.facts(f"{call} {mode:o}: made", path)


def case_owners_of_new_nodes(p: Place) -> None:
    os.umask(0)
    for mode, group in product((0o777, 0o2777, 0o3777), (0, USER, OTHER)):
        os.mkdir(directory := p.unused())
        os.chown(directory, OTHER, group)
        os.chmod(directory, mode)
        for call, who in product(("open", "mkdir", "mkfifo", "symlink", "bind"), (user(USER), user(USER, OTHER), None)):
            path = p.unused(directory)
            p.do(f"{call} in {mode:o} of {group} by {who}", MAKERS[call], path, who=who)
            p.facts(f"{call} in {mode:o} of {group} by {who}: made", path)
        for bits, who in product((0o2755, 0o2745, 0o6777), (user(USER), user(USER, OTHER), None)):
            path = p.unused(directory)
            p.do(f"open {bits:o} in {mode:o} of {group} by {who}", create, path, bits, who=who)
            p.facts(f"open {bits:o} in {mode:o} of {group} by {who}: made", path)
            path = p.unused(directory)
            p.do(f"mkdir {bits:o} in {mode:o} of {group} by {who}", os.mkdir, path, bits, who=who)
            p.facts(f"mkdir {bits:o} in {mode:o} of {group} by {who}: made", path)


def case_names_in_any_bytes(p: Place) -> None:
    names = [bytes([byte]) for byte in range(1, 256) if byte not in b"/."]
    names += [b"...", b"..a", b"\xff\xfe\xfd", "käse-語".encode(), b"  ", b"-rf", b"\xc3(", b"%s%n", b"a" * 255]
    for name in names:
        create(name)
    p.note("listing", sorted(os.listdir(b".")))
    p.note("read back", [os.path.lexists(name) for name in names])
    for name in names:
        os.rename(name, name + b"-x" if len(name) < 255 else b"short")
    p.note("renamed", sorted(os.listdir(b".")))


def case_symlinks(p: Place) -> None:
    os.mkdir("dir")
    for length in (1, 59, 60, 255, 1023, 4094, 4095, 4096):
        target = "t" * length
        path = p.unused()
        p.do(f"a target of {length}", os.symlink, target, path)
        p.facts(f"a target of {length}: made", path)
        p.do(f"a target of {length}: read", os.readlink, path)
    for target in ("dir", "dir/", "./dir", "//", "a\nb", "../symlinks/dir"):
        path = p.unused()
        os.symlink(target, path)
        p.do(f"target {target!r}: mkdir over", os.mkdir, path)
        p.do(f"target {target!r}: is a directory", os.path.isdir, path)
        p.do(f"target {target!r}: rmdir", os.rmdir, path)
        p.do(f"target {target!r}: rmdir with a slash", os.rmdir, f"{path}/")
        p.do(f"target {target!r}: unlink with a slash", os.unlink, f"{path}/")
        p.do(f"target {target!r}: rename with a slash", os.rename, f"{path}/", "renamed")
    p.do("no target", os.symlink, "", p.unused())
    p.do("create through a dangling link", os.symlink, "made-by-link", "dangling")
    p.do("O_EXCL through it", open_and_close, "dangling", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    p.do("O_CREAT through it", open_and_close, "dangling", os.O_CREAT | os.O_WRONLY)
    p.facts("made", "made-by-link")


# Removing


def case_unlink_and_rmdir(p: Place) -> None:
    for kind, call in product(KINDS, ("unlink", "rmdir")):
        os.mkdir(directory := p.unused())
        path = p.fresh(kind, below=directory)
        with p.stamps(f"{call} of {kind}", directory, "."):
            p.do(f"{call} of {kind}", getattr(os, call), path)
        p.note(f"{call} of {kind}: left", sorted(os.listdir(directory))[-1:] == [] or os.path.lexists(path))
    os.makedirs("full/below")
    for path in ("full", ".", "full/.", "full/..", "full/below/..", "/", "full/below/", "full/"):
        with p.stamps(f"rmdir {path}", "."):
            p.do(f"rmdir {path}", os.rmdir, path)
    os.mkdir("links")
    create("links/a")
    os.link("links/a", "b")
    with p.stamps("unlink of one of two names", "b", "links"):
        p.do("unlink of one of two names", os.unlink, "links/a")
    p.facts("the other name", "b")


def case_removed_and_open(p: Place) -> None:
    fd = p.open("create", "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"0123456789" * 20_000)
    os.link("file", "second")
    with p.stamps("first unlink", fd):
        os.unlink("file")
    p.facts("one name left", fd)
    with p.stamps("last unlink", fd):
        os.unlink("second")
    p.facts("no name left", fd)
    p.do("read", os.pread, fd, 30, 199_990)
    p.do("write", os.pwrite, fd, b"x" * 100, 150_000)
    p.do("ftruncate", os.ftruncate, fd, 300_000)
    p.do("read the hole", os.pread, fd, 10, 250_000)
    p.do("read what was written", os.pread, fd, 10, 149_995)
    p.do("fchmod", os.fchmod, fd, 0o600)
    p.do("fchown", os.fchown, fd, 1, 2)
    p.do("futimens", os.utime, fd, ns=(5, 7))
    p.do("setxattr", os.setxattr, fd, "user.a", b"1")
    p.do("getxattr", os.getxattr, fd, "user.a")
    p.do("fsync", os.fsync, fd)
    p.facts("after all", fd)
    again = p.open("open through /proc", f"/proc/self/fd/{fd}", os.O_RDONLY)
    p.do("read through /proc", os.pread, again, 10, 149_995)
    linkat = lambda: check(  # noqa: E731
        LIBC.linkat(AT_FDCWD, f"/proc/self/fd/{fd}".encode(), AT_FDCWD, b"back", AT_SYMLINK_FOLLOW)
    )
    p.do("link it back", linkat)
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY))
    p.facts("another of its name", "file")


def case_removed_directory(p: Place) -> None:
    os.mkdir("gone")
    fd = p.open("open", "gone", os.O_RDONLY | os.O_DIRECTORY)
    os.chdir("gone")
    os.rmdir("../gone")
    p.facts("it", fd)
    p.do("getcwd", os.getcwd)
    p.do("listdir", os.listdir, ".")
    p.do("listdir by descriptor", os.listdir, fd)
    for call, make in MAKERS.items():
        if call not in ("link", "rename"):
            p.do(f"{call} in it", make, "x")
    p.do("rename into it", os.rename, "..", "x")
    p.do("stat .", lambda: os.stat(".").st_nlink)
    p.do("stat ..", lambda: stat.S_ISDIR(os.stat("..").st_mode))
    p.do("open .", open_and_close, ".", os.O_RDONLY)
    p.do("open x", open_and_close, "x", os.O_RDONLY)
    p.do("chmod", os.chmod, ".", 0o700)
    p.do("fsync", os.fsync, fd)
    p.do("rmdir again", os.rmdir, "../gone")
    p.do("chdir ..", os.chdir, "..")
    p.do("make it again", os.mkdir, "gone")
    p.do("the old one is empty", os.listdir, fd)


# Links


def case_hard_links(p: Place) -> None:
    os.mkdir("dir")
    for kind in KINDS:
        path, new = p.fresh(kind), p.unused("dir")
        with p.stamps(f"link of {kind}", path, "dir", "."):
            p.do(f"link of {kind}", os.link, path, new, follow_symlinks=False)
        p.facts(f"link of {kind}: old", path)
        p.facts(f"link of {kind}: new", new)
        p.do(f"link of {kind} again", os.link, path, new, follow_symlinks=False)
        p.do(f"link of {kind}: same", lambda one, two: os.path.samestat(os.lstat(one), os.lstat(two)), path, new)
    p.do("link to another file system", os.link, "/proc/self/status", "status")
    p.do("link of a directory with a slash", os.link, "dir/", "other")
    p.do("link followed", os.link, p.fresh("link"), p.unused(), follow_symlinks=True)
    create("data")
    os.link("data", "data2")
    fd = p.open("write to one", "data", os.O_WRONLY)
    os.write(fd, b"hello")
    p.close(fd)
    p.facts("size seen through the other", "data2")
    os.chmod("data2", 0o755)
    p.facts("mode seen through the first", "data")


def case_too_many_links(p: Place) -> None:
    """EMLINK needs 65,000 links, which are made by hundreds of thousands of calls: a few show the count goes right."""
    create("file")
    for number in range(200):
        os.link("file", f"link{number}")
    p.facts("201 links", "file")
    for number in range(0, 200, 2):
        os.unlink(f"link{number}")
    p.facts("101 links", "link1")


# Renames


def case_rename_kinds(p: Place) -> None:
    targets = ("none", *KINDS, "full")
    for flags, old_kind, new_kind in product((0, NOREPLACE, EXCHANGE), (*KINDS, "full"), targets):
        label = f"{flags}: {old_kind} to {new_kind}"
        for name in ("from", "to"):
            os.mkdir(directory := p.unused())
            if name == "from":
                from_dir = directory
            else:
                to_dir = directory
        old = _node(p, old_kind, from_dir)
        new = _node(p, new_kind, to_dir)
        held = [os.open(path, os.O_PATH | os.O_NOFOLLOW) for path in (old, new) if os.path.lexists(path)]
        with p.stamps(label, *held, from_dir, to_dir):
            p.do(label, rename, old, new, flags)
        for fd in held:
            os.close(fd)
        p.facts(f"{label}: old", old)
        p.facts(f"{label}: new", new)


def _node(p: Place, kind: str, below: str) -> str:
    if kind == "none":
        return p.unused(below)
    if kind == "full":
        path = p.fresh("dir", below=below)
        create(f"{path}/something")
        return path
    return p.fresh(kind, below=below)


def case_rename_errors(p: Place) -> None:
    os.makedirs("a/b/c")
    create("a/file")
    create("file")
    os.link("file", "same")
    os.symlink("a", "link")
    for old, new in (
        ("a", "a/b"),
        ("a", "a/b/c/d"),
        ("a", "a/x"),
        ("a/b", "a"),
        ("a/b/c", "a"),
        ("a", "a"),
        ("a/.", "x"),
        ("a/b/..", "x"),
        ("a", "."),
        ("a", "a/.."),
        (".", "x"),
        ("none", "x"),
        ("none", "a"),
        ("file", "none/x"),
        ("file/x", "x"),
        ("a", "file/x"),
        ("file", "same"),
        ("file", "x/"),
        ("file/", "x"),
        ("a/", "y/"),
        ("y", "a"),
        ("link/", "y"),
        ("a/b", "link/z"),
        ("link/z", "a/b"),
        ("file", NAME_256),
        ("file", NAME_255),
        (NAME_255, "file"),
        ("file", "/proc/x"),
        ("/proc/self/status", "x"),
    ):
        for flags in (0, NOREPLACE, EXCHANGE, NOREPLACE | EXCHANGE, 8):
            label = f"{flags}: {old[:20]} to {new[:20]} ({len(new)})"
            with p.stamps(label, "a", "a/b", "file", "."):
                p.do(label, rename, old, new, flags)
    p.note("tree", sorted(root for root, _, _ in os.walk(".")))


def case_rename_open_files(p: Place) -> None:
    for name in ("old", "new"):
        with open(name, "w") as file:
            file.write(name * 1000)
    old, new = p.open("old", "old", os.O_RDWR), p.open("new", "new", os.O_RDWR)
    os.pwrite(old, b"not yet synced", 5000)
    os.pwrite(new, b"lost to the name", 5000)
    p.do("rename over", os.rename, "old", "new")
    p.facts("old descriptor", old)
    p.facts("new descriptor", new)
    p.do("read old", os.pread, old, 20, 4995)
    p.do("read new", os.pread, new, 20, 4995)
    p.facts("name", "new")
    p.do("write to the replaced", os.pwrite, new, b"still", 0)
    p.do("read the replaced", os.pread, new, 5, 0)
    with open("new", "rb") as file:
        p.note("by name", file.read()[4990:])
    p.do("whiteout", rename, "new", "white", WHITEOUT)


def case_rename_directories(p: Place) -> None:
    os.makedirs("a/b")
    os.makedirs("c")
    create("a/b/file")
    fd = p.open("directory", "a/b", os.O_RDONLY)
    p.do("move", os.rename, "a/b", "c/b")
    p.note("through the descriptor", os.listdir(fd))
    os.chdir("c/b")
    p.do("parent", lambda: sorted(os.listdir("..")))
    os.chdir("../..")
    os.mkdir("e")
    p.do("move over an empty one", os.rename, "c/b", "e")
    p.do("file", os.path.exists, "e/file")
    os.mkdir("f")
    p.do("exchange", rename, "e", "f", EXCHANGE)
    p.note("exchanged", [os.listdir("e"), os.listdir("f")])
    create("g")
    p.do("exchange of a file and a directory", rename, "f", "g", EXCHANGE)
    p.note("exchanged kinds", [os.path.isdir("f"), os.path.isdir("g")])
    p.do("exchange with its own child", rename, "g", "g/file", EXCHANGE)


# open


def case_open_flags(p: Place) -> None:
    accesses = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR, "3": 3}
    extras = {
        "": 0,
        "creat": os.O_CREAT,
        "creat excl": os.O_CREAT | os.O_EXCL,
        "trunc": os.O_TRUNC,
        "append": os.O_APPEND,
        "creat trunc": os.O_CREAT | os.O_TRUNC,
        "directory": os.O_DIRECTORY,
        "creat directory": os.O_CREAT | os.O_DIRECTORY,
        "nofollow": os.O_NOFOLLOW,
        "creat nofollow": os.O_CREAT | os.O_NOFOLLOW,
        "path": os.O_PATH,
        "path nofollow": os.O_PATH | os.O_NOFOLLOW,
        "path directory": os.O_PATH | os.O_DIRECTORY,
        "noatime": os.O_NOATIME,
        "sync": os.O_SYNC,
        "dsync": os.O_DSYNC,
        "excl": os.O_EXCL,
        "sync trunc": os.O_SYNC | os.O_TRUNC,
    }
    kinds = ("none", "file", "dir", "link", "dangling", "socket", "fifo")
    for kind, (access, flags), (extra, more) in product(kinds, accesses.items(), extras.items()):
        path = p.unused() if kind == "none" else p.fresh(kind)
        if kind in ("file", "link"):
            os.truncate(path, 100)
        label = f"{kind}: {access} {extra}"
        with p.stamps(label, path, "."):
            fd = p.open(label, path, flags | more | os.O_NONBLOCK)
        if fd >= 0:
            p.facts(f"{label}: opened", fd)
            p.do(f"{label}: read", lambda fd: len(os.read(fd, 10)), fd)
            p.do(f"{label}: write", os.write, fd, b"abc")
            p.do(f"{label}: seek", os.lseek, fd, 0, os.SEEK_CUR)
            p.close(fd)
        p.facts(f"{label}: after", path)


def case_path_descriptors(p: Place) -> None:
    os.mkdir("dir")
    create("dir/file", 0o640)
    os.symlink("file", "dir/link")
    fd = p.open("file", "dir/file", os.O_PATH)
    directory = p.open("dir", "dir", os.O_PATH | os.O_DIRECTORY)
    link = p.open("link", "dir/link", os.O_PATH | os.O_NOFOLLOW)
    for call, work in {
        "read": lambda: os.read(fd, 1),
        "write": lambda: os.write(fd, b"1"),
        "fchmod": lambda: os.fchmod(fd, 0o600),
        "fchown": lambda: os.fchown(fd, 1, 1),
        "ftruncate": lambda: os.ftruncate(fd, 0),
        "fgetxattr": lambda: os.getxattr(fd, "user.a"),
        "listdir": lambda: os.listdir(directory),
        "fchdir": lambda: go_and_come_back(f"/proc/self/fd/{directory}"),
        "openat": lambda: open_and_close_at("file", directory),
        "readlink": lambda: os.readlink("", dir_fd=link),
        "statat": lambda: os.stat("file", dir_fd=directory).st_mode,
        "dup": lambda: os.close(os.dup(fd)),
        "chmod by /proc": lambda: os.chmod(f"/proc/self/fd/{fd}", 0o600),
        "fsync": lambda: os.fsync(fd),
    }.items():
        p.do(call, work)
    os.unlink("dir/file")
    p.facts("unlinked", fd)


def open_and_close_at(path: str, directory: int) -> None:
    os.close(os.open(path, os.O_RDONLY, dir_fd=directory))


def case_truncating_opens(p: Place) -> None:
    for size in (0, 10, 100_000):
        path = p.unused()
        posix_rig.fill(path, size)
        for flags, label in ((os.O_TRUNC | os.O_WRONLY, "w"), (os.O_TRUNC | os.O_RDWR | os.O_CREAT, "rw creat")):
            os.truncate(path, size)
            with p.stamps(f"{label} of {size}", path, "."):
                p.do(f"{label} of {size}", open_and_close, path, flags)
            p.facts(f"{label} of {size}: after", path)
    for size in (0, 10):
        path = p.unused()
        posix_rig.fill(path, size)
        with p.stamps(f"O_CREAT of one that exists, {size}", path, "."):
            p.do(f"O_CREAT of one that exists, {size}", open_and_close, path, os.O_CREAT | os.O_WRONLY)


def case_temporary_files(p: Place) -> None:
    fd = p.open("O_TMPFILE", ".", os.O_TMPFILE | os.O_RDWR, 0o640)
    p.note("supported", fd >= 0)
    p.facts("made", fd)
    p.do("write", os.write, fd, b"x" * 100_000)
    p.facts("written", fd)
    p.do(
        "link",
        lambda: check(LIBC.linkat(AT_FDCWD, f"/proc/self/fd/{fd}".encode(), AT_FDCWD, b"linked", AT_SYMLINK_FOLLOW)),
    )
    p.facts("linked", "linked")
    p.do("read by name", lambda: len(Path("linked").read_bytes()))
    fd = p.open("O_TMPFILE O_EXCL", ".", os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o640)
    p.do(
        "link of that",
        lambda: check(LIBC.linkat(AT_FDCWD, f"/proc/self/fd/{fd}".encode(), AT_FDCWD, b"linked2", AT_SYMLINK_FOLLOW)),
    )
    p.open("read-only", ".", os.O_TMPFILE | os.O_RDONLY)


# Reading directories


def case_listing(p: Place) -> None:
    os.mkdir("dir")
    for kind in KINDS:
        p.fresh(kind, below="dir")
    with os.scandir("dir") as entries:
        kinds = {
            e.name: (e.is_dir(follow_symlinks=False), e.is_symlink(), e.is_file(follow_symlinks=False)) for e in entries
        }
    p.note("kinds", sorted(kinds.items()))
    with os.scandir("dir") as entries:
        p.note("inodes", all(entry.inode() == os.lstat(entry.path).st_ino for entry in entries))
    with p.stamps("listing", "dir"):
        os.listdir("dir")
    for kind in KINDS:
        if kind != "dir":
            p.do(f"listing of {kind}", os.listdir, p.fresh(kind))


def case_listing_while_it_changes(p: Place) -> None:
    """What was there all the time is seen once; what comes or goes, at most once."""
    os.mkdir("dir")
    names = {f"entry{number:05}" for number in range(20_000 if posix_rig.LONG else 1000)}
    for name in names:
        create(f"dir/{name}")
    seen: list[str] = []
    removed: set[str] = set()
    with os.scandir("dir") as entries:
        for count, entry in enumerate(entries):
            seen.append(entry.name)
            if count % 10 == 0 and len(seen) < len(names) // 2:
                create(f"dir/new{count}")
                victim = min(names - removed)
                os.unlink(f"dir/{victim}")
                removed.add(victim)
    p.note("twice", sorted(name for name in set(seen) if seen.count(name) > 1) if len(seen) < 50_000 else "many")
    p.note("missed", sorted(names - removed - set(seen)))


def case_renames_while_it_lists(p: Place) -> None:
    """A program that renames each entry it reads comes to an end."""
    os.mkdir("dir")
    total = 10_000 if posix_rig.LONG else 600
    for number in range(total):
        create(f"dir/entry{number:05}")
    count = 0
    with os.scandir("dir") as entries:
        for entry in entries:
            count += 1
            if count > 4 * total:
                break
            os.rename(entry.path, f"dir/renamed{count:05}")
    p.note("it ended", count <= 4 * total)
    p.note("left", len(os.listdir("dir")))


def case_removing_while_it_lists(p: Place) -> None:
    for number in (0, 1, 10, 10_000 if posix_rig.LONG else 700):
        os.mkdir(f"dir{number}")
        for each in range(number):
            create(f"dir{number}/{each}")
        with os.scandir(f"dir{number}") as entries:
            for entry in entries:
                os.unlink(entry.path)
        p.do(f"rmdir after {number} unlinks", os.rmdir, f"dir{number}")


def case_positions_in_a_directory(p: Place) -> None:
    """Telldir and seekdir: a position read once leads to the same entries again, also after others came and went."""
    os.mkdir("dir")
    names = [f"{number:04}" for number in range(400)]
    for name in names:
        create(f"dir/{name}")
    stream = _Stream("dir")
    entries = stream.read_all()
    p.note("all", sorted(name for name, _ in entries if not name.startswith(".")) == names)
    p.note("dots", sorted(name for name, _ in entries if name.startswith(".")))
    for index in (0, 1, 2, 100, 399, len(entries) - 1):
        stream.seek(entries[index][1])
        p.note(f"after entry {index}", [name for name, _ in stream.read_all()] == [n for n, _ in entries[index + 1 :]])
    position = entries[200][1]
    behind = {name for name, _ in entries[201:]}
    os.unlink(f"dir/{entries[200][0]}")
    os.unlink(f"dir/{entries[100][0]}")
    os.unlink(f"dir/{entries[300][0]}")
    create("dir/new")
    stream.seek(position)
    again = {name for name, _ in stream.read_all()}
    p.note("after removals", behind - {entries[300][0]} == again - {"new", entries[300][0]})
    stream.rewind()
    again = {name for name, _ in stream.read_all()}
    p.note("after rewind", ("new" in again, again & {entries[index][0] for index in (100, 200, 300)}))
    stream.close()


class _Stream:
    """A directory stream of the C library."""

    def __init__(self, path: str) -> None:
        import ctypes

        class Dirent(ctypes.Structure):
            _fields_ = (
                ("ino", ctypes.c_uint64),
                ("offset", ctypes.c_int64),
                ("length", ctypes.c_ushort),
                ("kind", ctypes.c_ubyte),
                ("name", ctypes.c_char * 256),
            )

        LIBC.opendir.restype = ctypes.c_void_p
        LIBC.readdir.restype = ctypes.POINTER(Dirent)
        LIBC.telldir.restype = ctypes.c_long
        self._stream = ctypes.c_void_p(LIBC.opendir(path.encode()))
        self._long = ctypes.c_long

    def read_all(self) -> list[tuple[str, int]]:
        """Return (name, position behind it) of the entries that are left."""
        found = []
        while entry := LIBC.readdir(self._stream):
            found.append((os.fsdecode(entry.contents.name), LIBC.telldir(self._stream)))
        return found

    def seek(self, position: int) -> None:
        LIBC.seekdir(self._stream, self._long(position))

    def rewind(self) -> None:
        LIBC.rewinddir(self._stream)

    def close(self) -> None:
        LIBC.closedir(self._stream)


def case_many_levels(p: Place) -> None:
    """Deeper than a path can say."""
    for _ in range(300):
        os.mkdir("level" + "x" * 20)
        os.chdir("level" + "x" * 20)
    create("bottom")
    p.do("getcwd", lambda: len(os.getcwd()) > 4096)
    for _ in range(300):
        os.chdir("..")
    p.note("back", [name for name in os.listdir(".") if name.startswith("level")])


def case_across_file_systems(p: Place) -> None:
    create("file")
    for call, work in {
        "rename out": lambda: os.rename("file", "/dev/shm/bpfuse-posix-file"),
        "link out": lambda: os.link("file", "/dev/shm/bpfuse-posix-file"),
        "rename in": lambda: os.rename("/proc/self/comm", "comm"),
        "exchange": lambda: rename("file", "/proc/self/comm", EXCHANGE),
    }.items():
        with p.stamps(call, "file", "."):
            p.do(call, work)


def case_errno_order(p: Place) -> None:
    """Which error is told when there are two."""
    create("file")
    os.mkdir("dir")
    os.mkdir("closed", 0o700)
    os.mkdir("readonly", 0o755)
    who = user(USER)
    for call, make in MAKERS.items():
        p.do(f"{call} in a closed directory", make, "closed/x", who=who)
        p.do(f"{call} in a directory not ours", make, "readonly/x", who=who)
        p.do(f"{call} over what exists, not ours", make, "dir", who=who)
    p.do("rmdir of a file not ours", os.rmdir, "file", who=who)
    p.do("unlink of a directory not ours", os.unlink, "dir", who=who)
    p.do("unlink of nothing in a closed directory", os.unlink, "closed/none", who=who)
    p.do("open O_CREAT|O_EXCL of a directory", open_and_close, "dir", os.O_CREAT | os.O_EXCL | os.O_RDWR)
    p.do("open O_CREAT of a directory", open_and_close, "dir", os.O_CREAT | os.O_RDWR)
    p.do("open O_CREAT with a slash", open_and_close, "newdir/", os.O_CREAT | os.O_RDWR)
    p.do("mkdir . ", os.mkdir, ".")
    p.do("errno names", lambda: errno.errorcode[errno.ENOENT])


@pytest.mark.parametrize("case", posix_rig.cases_of(globals()), ids=lambda case: case.__name__.removeprefix("case_"))
def test_as_on_ext4(ground: posix_rig.Ground, case: Callable[[Place], None]) -> None:
    ground.compare(case)
