"""The same cases on a plain ext4 directory and on a mount: what the plain one answers is what is expected.

A case is a function of a :class:`Place`. It runs with the place's directory as its working directory, so its paths are
relative, and notes what the calls answer under labels. Both logs are compared line by line. What may differ is listed
in :mod:`posix_limits`, each with its reason; a limit that does not show any more is a failure too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import functools
import os
import pickle
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import rig
from posix_limits import LIMITS

#: Users beside root, who have the groups of their own numbers.
USER: Final = 65534
OTHER: Final = 65533
#: BPFUSE_LONG=1: more seeds, and larger trees.
LONG: Final = bool(os.environ.get("BPFUSE_LONG"))

LIBC: Final = ctypes.CDLL(None, use_errno=True)
AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_SYMLINK_FOLLOW: Final = 0x400
AT_EMPTY_PATH: Final = 0x1000
_CLOCK_REALTIME_COARSE: Final = 5
_CASE_S: Final = 60.0


class Group(NamedTuple):
    """Who makes calls: user, group, and further groups."""

    user: int
    group: int
    others: tuple[int, ...] = ()


def user(number: int, *others: int) -> Group:
    """Return a user with the group of the same number."""
    return Group(number, number, others)


@contextlib.contextmanager
def acting_as(who: Group | None) -> Iterator[None]:
    """Have the body's system calls made by a user; None: by root."""
    if who is None:
        yield
        return
    groups = os.getgroups()
    os.setgroups(who.others)
    os.setegid(who.group)
    os.seteuid(who.user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def check(result: int) -> int:
    """Return the result of a call through ctypes, or raise its errno."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def name_of(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))


def in_child(who: Group | None, work: Callable[[], Any]) -> Any:
    """Return what ``work`` returns in a forked process whose real user this is, or the name of its errno."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if who is not None:
                os.setgroups(who.others)
                os.setgid(who.group)
                os.setuid(who.user)
            answer: Any = work()
        except OSError as error:
            answer = name_of(error)
        except BaseException as error:
            answer = repr(error)
        with os.fdopen(write_end, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    return pickle.loads(said) if said else f"ended with status {status}"


class Place:
    """One directory in which a case runs, and what it noted there. ``mounted``: not the plain one."""

    def __init__(self, root: Path, mounted: bool) -> None:
        self.root = root
        self.mounted = mounted
        self.log: list[tuple[str, Any]] = []
        self._open: list[int] = []
        self._counter = 0

    def note(self, label: str, value: Any) -> None:
        """Note a value that is to be the same in both places."""
        self.log.append((label, value))

    def do(self, label: str, call: Callable[..., Any], *arguments: Any, who: Group | None = None, **named: Any) -> Any:
        """Call, and note the answer or the errno; return the answer, or None after an error."""
        try:
            with acting_as(who):
                value = call(*arguments, **named)
        except OSError as error:
            self.note(label, name_of(error))
            return None
        self.note(label, value)
        return value

    def open(self, label: str, path: str | bytes, flags: int, mode: int = 0o644, who: Group | None = None) -> int:
        """Open and note whether that worked; return the descriptor, which the end of the case closes, or -1."""
        try:
            with acting_as(who):
                fd = os.open(path, flags | os.O_CLOEXEC, mode)
        except OSError as error:
            self.note(label, name_of(error))
            return -1
        self.note(label, "opened")
        self._open.append(fd)
        return fd

    def close(self, fd: int) -> None:
        """Close what :meth:`open` returned."""
        if fd >= 0:
            self._open.remove(fd)
            os.close(fd)

    def close_all(self) -> None:
        for fd in list(self._open):
            with contextlib.suppress(OSError):
                self.close(fd)

    def fresh(self, kind: str, mode: int | None = None, owner: int = 0, below: str = "") -> str:
        """Make a node of one of ``KINDS`` and return its path."""
        self._counter += 1
        path = os.path.join(below, f"{kind}{self._counter}")
        make(kind, path)
        if owner:
            os.chown(path, owner, owner, follow_symlinks=False)
        if mode is not None:
            os.chmod(path, mode)
        return path

    def unused(self, below: str = "") -> str:
        """Return a path that nothing has."""
        self._counter += 1
        return os.path.join(below, f"new{self._counter}")

    def facts(self, label: str, path: str | bytes | int, follow: bool = False) -> None:
        """Note mode, owner, links and size; links and size of directories are each file system's own."""
        try:
            status = os.stat(path) if isinstance(path, int) else os.stat(path, follow_symlinks=follow)
        except OSError as error:
            self.note(label, name_of(error))
            return
        directory = stat.S_ISDIR(status.st_mode)
        size, links = (0, 0) if directory else (status.st_size, status.st_nlink)
        self.note(label, (oct(status.st_mode), status.st_uid, status.st_gid, links, size, status.st_rdev))

    @contextlib.contextmanager
    def stamps(self, label: str, *paths: str | bytes | int, access: bool = False) -> Iterator[None]:
        """Note which times of these inodes the body changes: "m" and "c", and with ``access`` "a"."""
        before = [_times(path) for path in paths]
        tick()
        yield
        for path, old in zip(paths, before, strict=True):
            new = _times(path)
            changed = [letter for letter in ("amc" if access else "mc") if old[letter] != new[letter]]
            went_back = "c" in changed and new["c"] < old["c"]
            self.note(f"{label}: times of {'a descriptor' if isinstance(path, int) else path!r}", changed)
            self.note(f"{label}: ctime goes back", went_back)

    def new_is_now(self, label: str, path: str) -> None:
        """Note whether a node's times are all of the last seconds, and equal to each other."""
        status = os.lstat(path)
        times = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
        self.note(label, [abs(time.time_ns() - each) < 60 * 10**9 for each in times])


def _times(path: str | bytes | int) -> dict[str, int]:
    try:
        status = os.stat(path) if isinstance(path, int) else os.lstat(path)
    except OSError:
        return {"a": 0, "m": 0, "c": 0}
    return {"a": status.st_atime_ns, "m": status.st_mtime_ns, "c": status.st_ctime_ns}


@functools.cache
def _is_multigrain(directory: str) -> bool:
    """Say whether times that were looked at differ from those of the next change, as of Linux 6.13 on ext4."""
    seen = set()
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        for mode in (0o600, 0o644, 0o600, 0o644):
            os.fchmod(file.fileno(), mode)
            seen.add(os.fstat(file.fileno()).st_ctime_ns)
    return len(seen) == 4


def tick() -> None:
    """Return when a change now gets another time than one before: after one timer interrupt at most."""
    if _is_multigrain(ext4_directory()):
        return
    before = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) == before:
        pass


#: Kinds of nodes.
KINDS: Final = ("file", "dir", "fifo", "block", "char", "socket", "link", "dangling")


def make(kind: str, path: str) -> None:
    """Make a node; a "link" leads to a file beside it, a "dangling" one to nothing."""
    if kind == "file":
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    elif kind == "dir":
        os.mkdir(path, 0o755)
    elif kind == "fifo":
        os.mkfifo(path, 0o644)
    elif kind in ("block", "char"):
        os.mknod(path, (stat.S_IFBLK if kind == "block" else stat.S_IFCHR) | 0o644, os.makedev(1, 2))
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path)
    elif kind == "link":
        Path(f"{path}.target").touch()
        os.symlink(f"{os.path.basename(path)}.target", path)
    else:
        os.symlink("nothing", path)


def remove(path: str) -> None:
    """Remove a node of any kind."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        os.rmdir(path)
    else:
        os.unlink(path)


class Ground:
    """A plain directory and a mount, on which cases run by turns."""

    def __init__(self, sandbox: rig.Sandbox, mounted: rig.Mount) -> None:
        self._sandbox = sandbox
        self.mount = mounted
        self.plain = sandbox.directory("plain")
        for path in (sandbox.path, self.plain, mounted.path):
            path.chmod(0o755)

    def places(self, name: str) -> tuple[Place, Place]:
        """Return a new directory in each."""
        made = []
        for number, root in enumerate((self.plain, self.mount.path)):
            path = root / name
            path.mkdir()
            path.chmod(0o755)
            made.append(Place(path, bool(number)))
        return made[0], made[1]

    def compare(self, case: Callable[[Place], None], places: tuple[Place, Place] | None = None) -> None:
        """Run a case in both; fail with all that differs and is no stated limit."""
        name = case.__name__.removeprefix("case_")
        plain, mounted = places or self.places(name)
        for place in (plain, mounted):
            self._run(case, place)
        limits = [limit for limit in LIMITS if limit.case == name]
        assert [label for label, _ in plain.log] == [label for label, _ in mounted.log], _first_label(plain, mounted)
        seen, failures = set(), []
        for (label, expected), (_, found) in zip(plain.log, mounted.log, strict=True):
            if expected == found:
                continue
            limit = next((each for each in limits if fnmatch.fnmatchcase(label, each.label)), None)
            seen.add(limit)
            if limit is None:
                failures.append(f"{name}: {label}: {_short(found)}, not {_short(expected)}")
        failures += [f"{name}: this limit is none any more: {each}" for each in limits if each not in seen]
        assert not failures, "\n".join(["", *failures])

    def _run(self, case: Callable[[Place], None], place: Place) -> None:
        watchdog = threading.Timer(_CASE_S, rig._bite, (self.mount,))
        watchdog.daemon = True
        watchdog.start()
        before, mask = os.getcwd(), os.umask(0o022)
        os.chdir(place.root)
        try:
            case(place)
        finally:
            place.close_all()
            os.umask(mask)
            os.chdir(before)
            watchdog.cancel()


def _first_label(plain: Place, mounted: Place) -> str:
    for (expected, value), (found, other) in zip(plain.log, mounted.log, strict=False):
        if expected != found:
            return f"the case took another way: {found!r} ({other!r}) instead of {expected!r} ({value!r})"
    return "one of the two logs ended early"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 400 else f"{text[:400]}..."


@functools.cache
def ext4_directory() -> str:
    """Return a directory on ext4, for the sandbox; skip where there is none."""
    for path in (tempfile.gettempdir(), "/var/tmp", str(rig.REPOSITORY / "build")):
        if os.path.isdir(path) and _filesystem(path) == "ext2/ext3":
            return path
    pytest.skip("no directory on ext4 to compare with: tried the temporary one, /var/tmp and build")


def _filesystem(path: str) -> str:
    return subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True).stdout.strip()


#: How the two ways to answer are mounted here: what is durable when makes no difference to what calls answer.
_OPTIONS: Final = {"bpf": (), "off": ("--durability", "interval")}


@contextlib.contextmanager
def ground(accel: str, *more: str) -> Iterator[Ground]:
    """Have a plain directory and a mount beside it, for many cases; nothing is left of them at the end."""
    options = (*_OPTIONS[accel], *more)
    rig.require_mounts()
    if accel == "bpf":
        rig.require_uring()
    with _temporary_directory(ext4_directory()):
        sandbox = rig.Sandbox()
    try:
        mount = rig.Mount(sandbox, sandbox.format(), sandbox.directory("mnt"), accel, options)
        mount.mount()
        try:
            yield Ground(sandbox, mount)
        except BaseException:
            print(f"--- log of {mount.path}\n{mount.read_log()[-8000:]}")
            raise
        mount.unmount()
        rig.assert_log_is_clean(mount)
        sandbox.assert_nothing_runs()
    finally:
        sandbox.close()


@contextlib.contextmanager
def _temporary_directory(path: str) -> Iterator[None]:
    before, tempfile.tempdir = tempfile.tempdir, path
    try:
        yield
    finally:
        tempfile.tempdir = before


def cases_of(module: dict[str, Any]) -> list[Callable[[Place], None]]:
    """Return a module's cases, in their order."""
    return [value for name, value in module.items() if name.startswith("case_")]


def fill(path: str | Path, size: int, seed: int = 1) -> bytes:
    """Write a file of bytes that repeat with no power of two, and return them."""
    data = pattern(size, seed)
    Path(path).write_bytes(data)
    return data


def pattern(size: int, seed: int = 1) -> bytes:
    block = bytes((index * 7 + seed * 31) % 251 for index in range(251))
    return (block * (size // 251 + 1))[:size]


def remove_tree(path: Path) -> None:
    shutil.rmtree(path)


def product(*tables: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return all combinations, as a list."""
    combined: list[tuple[Any, ...]] = [()]
    for table in tables:
        rows = list(table)
        combined = [(*row, value) for row in combined for value in rows]
    return combined
