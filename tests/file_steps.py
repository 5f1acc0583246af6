"""System calls on files as data: made at random from a seed, run below a directory, printed as a script.

What a step answers can be compared between file systems: times of "now" are one value, and what POSIX leaves open
(sizes and link counts of directories, inode numbers, blocks) is left out.

``python tests/file_steps.py DIRECTORY < script`` runs a script, as a failed test prints it, and says what each step
answered.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import mmap
import os
import random
import stat
import sys
import time
from ast import literal_eval
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

#: The user, beside root, as whom steps are run.
USER: Final = 1234
NOREPLACE: Final = 1
EXCHANGE: Final = 2
#: For ``set_times``: the two values of utimensat(2) that are no times.
OMIT: Final = "omit"
NOW: Final = "now"
#: Files that can stay open at a time.
SLOTS: Final = 4

#: Times before this one were set by somebody: 2020 in ns.
_SET_BEFORE_NS: Final = 1_577_836_800 * 10**9
_PATTERN: Final = bytes(range(251)) * 1200
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD: Final = -100
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_UTIME: Final = {NOW: 0x3FFFFFFF, OMIT: 0x3FFFFFFE}


class Step(NamedTuple):
    """One call: a method of :class:`Player`, what it is given, and as whom."""

    call: str
    arguments: tuple[Any, ...]
    user: int = 0


class Facts(NamedTuple):
    """What can be compared of a stat. Sizes and links of directories are 0, and times of pipes, which only some set."""

    mode: int
    links: int
    size: int
    uid: int
    gid: int
    device: int
    mtime: int | str


class Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def facts_of(status: os.stat_result) -> Facts:
    directory = stat.S_ISDIR(status.st_mode)
    return Facts(
        status.st_mode,
        0 if directory else status.st_nlink,
        0 if directory else status.st_size,
        status.st_uid,
        status.st_gid,
        status.st_rdev,
        0 if stat.S_ISFIFO(status.st_mode) else _time(status.st_mtime_ns),
    )


def _time(time_ns: int) -> int | str:
    return time_ns if time_ns < _SET_BEFORE_NS else NOW


def _digest(data: bytes) -> tuple[int, str]:
    """Return what stands for data in a report: its length and the start of its hash."""
    return len(data), hashlib.sha256(data).hexdigest()[:16]


def _bytes(size: int, tag: int) -> bytes:
    return _PATTERN[tag : tag + size]


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def acting_as(user: int) -> Iterator[None]:
    """Have the body's system calls made by a user, and the group of that number."""
    if user == 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(user)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


class Player:
    """Runs steps below one directory, with files that stay open between them, by their slots."""

    def __init__(self, root: Path) -> None:
        self._root = os.fsencode(root)
        self._open: dict[int, int] = {}

    def play(self, step: Step) -> Any:
        """Return what a step answers, or the name of its errno."""
        try:
            with acting_as(step.user):
                return getattr(self, step.call)(*step.arguments)
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def close_all(self) -> list[Any]:
        """Look at every open file once more and close it; return what was answered."""
        answers = []
        for slot in sorted(self._open):
            for call, arguments in (("fstat", (slot,)), ("read_at", (slot, 0, 1 << 20)), ("close", (slot,))):
                answers.append((call, slot, self.play(Step(call, arguments))))
        return answers

    def _path(self, path: bytes) -> bytes:
        return os.path.join(self._root, path)

    def _fd(self, slot: int) -> int:
        fd = self._open.get(slot)
        if fd is None:
            raise OSError(errno.EBADF, "nothing is open in this slot")
        return fd

    def paths(self, wanted: Callable[[int], bool] = lambda mode: True) -> list[bytes]:
        """Return the paths of what there is below the directory, of kinds that are wanted by their mode."""
        found: list[bytes] = []
        waiting = [b""]
        while waiting:
            above = waiting.pop()
            for name in sorted(os.listdir(self._path(above))):
                path = os.path.join(above, name)
                mode = os.lstat(self._path(path)).st_mode
                if wanted(mode):
                    found.append(path)
                if stat.S_ISDIR(mode):
                    waiting.append(path)
        return found

    def slots(self) -> list[int]:
        """Return the slots in which a file is open."""
        return sorted(self._open)

    # Open files

    def open(self, slot: int, path: bytes, flags: int, mode: int) -> None:
        fd = os.open(self._path(path), flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)
        if slot in self._open:
            self.close(slot)
        self._open[slot] = fd

    def close(self, slot: int) -> None:
        fd = self._fd(slot)
        del self._open[slot]
        os.close(fd)

    def write(self, slot: int, size: int, tag: int) -> int:
        return os.write(self._fd(slot), _bytes(size, tag))

    def write_at(self, slot: int, offset: int, size: int, tag: int) -> int:
        return os.pwrite(self._fd(slot), _bytes(size, tag), offset)

    def read(self, slot: int, size: int) -> tuple[int, str]:
        return _digest(os.read(self._fd(slot), size))

    def read_at(self, slot: int, offset: int, size: int) -> tuple[int, str]:
        return _digest(os.pread(self._fd(slot), size, offset))

    def seek(self, slot: int, offset: int, whence: int) -> int:
        """Move the position in a file; positions in directories are each file system's own."""
        fd = self._fd(slot)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EISDIR, "not a file")
        return os.lseek(fd, offset, whence)

    def map_write(self, slot: int, size: int, tag: int) -> None:
        """Write to the beginning of a file through a shared mapping of all of it."""
        fd = self._fd(slot)
        if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_size < max(size, 1):
            raise OSError(errno.EINVAL, "there is nothing to map")
        with mmap.mmap(fd, 0) as mapped:
            mapped[:size] = _bytes(size, tag)
            mapped.flush()

    def copy(self, source: int, target: int, size: int, offset: int, target_offset: int) -> int:
        kinds = [os.fstat(self._fd(slot)).st_mode for slot in (source, target)]
        if not all(map(stat.S_ISREG, kinds)):
            raise OSError(errno.EINVAL, "not two files")
        return os.copy_file_range(self._fd(source), self._fd(target), size, offset, target_offset)

    def ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self._fd(slot), size)

    def fstat(self, slot: int) -> Facts:
        return facts_of(os.fstat(self._fd(slot)))

    def fsync(self, slot: int) -> None:
        os.fsync(self._fd(slot))

    def fdatasync(self, slot: int) -> None:
        os.fdatasync(self._fd(slot))

    def fchmod(self, slot: int, mode: int) -> None:
        os.fchmod(self._fd(slot), mode)

    def fchown(self, slot: int, uid: int, gid: int) -> None:
        os.fchown(self._fd(slot), uid, gid)

    def flist(self, slot: int) -> list[tuple[str, int]]:
        with os.scandir(self._fd(slot)) as entries:
            return sorted((entry.name, stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)) for entry in entries)

    def fsetxattr(self, slot: int, name: str, size: int, tag: int, flags: int) -> None:
        os.setxattr(self._fd(slot), name, _bytes(size, tag), flags)

    def fgetxattr(self, slot: int, name: str) -> tuple[int, str]:
        return _digest(os.getxattr(self._fd(slot), name))

    # Names

    def mkdir(self, path: bytes, mode: int) -> None:
        os.mkdir(self._path(path), mode)

    def rmdir(self, path: bytes) -> None:
        os.rmdir(self._path(path))

    def unlink(self, path: bytes) -> None:
        os.unlink(self._path(path))

    def rename(self, old: bytes, new: bytes, flags: int) -> None:
        _check(_LIBC.renameat2(_AT_FDCWD, self._path(old), _AT_FDCWD, self._path(new), flags))

    def link(self, old: bytes, new: bytes) -> None:
        os.link(self._path(old), self._path(new), follow_symlinks=False)

    def symlink(self, target: bytes, path: bytes) -> None:
        os.symlink(target, self._path(path))

    def readlink(self, path: bytes) -> bytes:
        return os.readlink(self._path(path))

    def mknod(self, path: bytes, mode: int, device: int) -> None:
        os.mknod(self._path(path), mode, device)

    def listdir(self, path: bytes) -> list[tuple[bytes, int]]:
        with os.scandir(self._path(path)) as entries:
            return sorted((entry.name, _kind(entry)) for entry in entries)

    # Whole files

    def write_file(self, path: bytes, size: int, tag: int) -> int:
        fd = os.open(self._path(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o644)
        try:
            return os.write(fd, _bytes(size, tag))
        finally:
            os.close(fd)

    def read_file(self, path: bytes) -> tuple[int, str]:
        fd = os.open(self._path(path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            return _digest(os.read(fd, 1 << 20))
        finally:
            os.close(fd)

    def truncate(self, path: bytes, size: int) -> None:
        os.truncate(self._path(path), size)

    # Attributes

    def stat(self, path: bytes, follow: bool) -> Facts:
        return facts_of(os.stat(self._path(path), follow_symlinks=follow))

    def access(self, path: bytes, mode: int) -> bool:
        return os.access(self._path(path), mode, effective_ids=True)

    def chmod(self, path: bytes, mode: int) -> None:
        os.chmod(self._path(path), mode)

    def chown(self, path: bytes, uid: int, gid: int, follow: bool) -> None:
        os.chown(self._path(path), uid, gid, follow_symlinks=follow)

    def set_times(self, path: bytes, atime: int | str, mtime: int | str, follow: bool) -> tuple[int | str | None, ...]:
        """Set times in ns, or NOW or OMIT; answers them, but for an access time that was not set."""
        times = (Timespec * 2)(_timespec(atime), _timespec(mtime))
        flags = 0 if follow else _AT_SYMLINK_NOFOLLOW
        _check(_LIBC.utimensat(_AT_FDCWD, self._path(path), ctypes.byref(times), flags))
        status = os.stat(self._path(path), follow_symlinks=follow)
        return None if atime == OMIT else _time(status.st_atime_ns), _time(status.st_mtime_ns)

    def setxattr(self, path: bytes, name: str, size: int, tag: int, flags: int, follow: bool) -> None:
        os.setxattr(self._path(path), name, _bytes(size, tag), flags, follow_symlinks=follow)

    def getxattr(self, path: bytes, name: str, follow: bool) -> tuple[int, str]:
        return _digest(os.getxattr(self._path(path), name, follow_symlinks=follow))

    def listxattr(self, path: bytes, follow: bool) -> list[str]:
        return sorted(os.listxattr(self._path(path), follow_symlinks=follow))

    def removexattr(self, path: bytes, name: str, follow: bool) -> None:
        os.removexattr(self._path(path), name, follow_symlinks=follow)

    def statvfs(self, path: bytes) -> tuple[int, bool]:
        figures = os.statvfs(self._path(path))
        free = figures.f_bavail <= figures.f_bfree <= figures.f_blocks and figures.f_ffree <= figures.f_files
        return figures.f_namemax, free and figures.f_bsize > 0 and figures.f_blocks > 0


def _kind(entry: os.DirEntry[bytes]) -> int:
    """Return an entry's type as the listing gives it, without a stat of a directory or a file."""
    if entry.is_symlink():
        return stat.S_IFLNK
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    return stat.S_IFREG if entry.is_file(follow_symlinks=False) else 0


def _timespec(when: int | str) -> Timespec:
    if isinstance(when, str):
        return Timespec(0, _UTIME[when])
    return Timespec(*divmod(when, 10**9))


def tree(root: Path) -> dict[bytes, tuple[Any, ...]]:
    """Return all there is below a directory, by path: facts, content or target, and xattrs."""
    found: dict[bytes, tuple[Any, ...]] = {}
    waiting = [b"."]
    while waiting:
        path = waiting.pop()
        below = _describe(os.fsencode(root), path, found)
        waiting += [os.path.join(path, name) for name in below]
    return found


def _describe(root: bytes, path: bytes, found: dict[bytes, tuple[Any, ...]]) -> list[bytes]:
    """Note one path; return the names in it if it is a directory."""
    whole = os.path.join(root, path)
    facts = facts_of(os.lstat(whole))
    names = os.listxattr(whole, follow_symlinks=False)
    xattrs = {name: _digest(os.getxattr(whole, name, follow_symlinks=False)) for name in sorted(names)}
    below: list[bytes] = []
    content: Any = None
    if stat.S_ISDIR(facts.mode):
        content = below = sorted(os.listdir(whole))
    elif stat.S_ISLNK(facts.mode):
        content = os.readlink(whole)
    elif stat.S_ISREG(facts.mode):
        content = _digest(Path(os.fsdecode(whole)).read_bytes())
    found[path] = facts, content, xattrs
    return below


class Generator:
    """Makes steps at random, most of them of what a player's directory has just then; names are few.

    The same seed makes the same steps, if they are played in between.
    """

    _NAMES: Final = (b"a", b"b", b"c", b"d", b"e", b"f", b"\xff\xfe\x80", b"two words\n", b"n" * 254)
    _BELOW: Final = (b"a", b"b", b"c", b"\xc3\xa4")
    _TARGETS: Final = (b"a", b"b", b"c", b"a/b", b"b/a/c", b"../a", b"none", b"d/", b"t" * 4095, b"./e")
    _XATTRS: Final = ("user.one", "user.one", "user." + "x" * 100, "trusted.t")
    _MODES: Final = (0o644, 0o600, 0o755, 0o777, 0o4755, 0o2755, 0o2711, 0o1777, 0o000, 0o440)
    _TIMES: Final = (0, 1, 10**9 - 1, 10**18, 981_173_106_123_456_789, -1, -(10**18) + 5, NOW, OMIT)
    _FLAGS: Final = (os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_NOFOLLOW, os.O_SYNC, os.O_DSYNC, os.O_DIRECTORY)
    _OWNERS: Final = (0, USER, 4321, -1)

    def __init__(self, seed: int, player: Player) -> None:
        self._random = random.Random(seed)
        self._player = player
        kinds = self._kinds()
        self._makers = [maker for maker, _ in kinds]
        self._weights = [weight for _, weight in kinds]

    def steps(self, count: int) -> Iterator[Step]:
        return (self._step() for _ in range(count))

    def _step(self) -> Step:
        (maker,) = self._random.choices(self._makers, self._weights)
        call, *arguments = maker()
        user = USER if self._chance(0.2) else 0
        return Step(call, tuple(arguments), user)

    def _kinds(self) -> list[tuple[Callable[[], tuple[Any, ...]], int]]:
        path, file, new, slot = self._path, self._file, self._new_path, self._slot
        size, offset, tag = self._size, self._offset, self._tag
        pick, mode, times = self._random.choice, self._mode, self._time
        return [
            (lambda: ("open", self._new_slot(), pick((file, new))(), self._open_flags(), mode()), 18),
            (lambda: ("close", slot()), 3),
            (lambda: ("write", slot(), size(), tag()), 5),
            (lambda: ("write_at", slot(), offset(), size(), tag()), 6),
            (lambda: ("read", slot(), size()), 3),
            (lambda: ("read_at", slot(), offset(), 2 * size()), 5),
            (lambda: ("seek", slot(), offset(), pick((os.SEEK_SET, os.SEEK_CUR, os.SEEK_END))), 2),
            (lambda: ("map_write", slot(), size(), tag()), 2),
            (lambda: ("copy", slot(), slot(), size(), offset(), offset()), 1),
            (lambda: ("ftruncate", slot(), offset()), 3),
            (lambda: ("fstat", slot()), 5),
            (lambda: (pick(("fsync", "fdatasync")), slot()), 2),
            (lambda: ("fchmod", slot(), mode()), 1),
            (lambda: ("fchown", slot(), pick(self._OWNERS), pick(self._OWNERS)), 1),
            (lambda: ("flist", slot()), 1),
            (lambda: ("fsetxattr", slot(), pick(self._XATTRS), self._random.randrange(300), tag(), 0), 1),
            (lambda: ("fgetxattr", slot(), pick(self._XATTRS)), 1),
            (lambda: ("mkdir", new(), mode()), 9),
            (lambda: ("rmdir", path()), 4),
            (lambda: ("unlink", file()), 7),
            (lambda: ("rename", path(), new(), pick((0, 0, 0, 0, NOREPLACE, EXCHANGE, EXCHANGE, 3, 8))), 12),
            (lambda: ("link", file(), new()), 5),
            (lambda: ("symlink", pick(self._TARGETS), new()), 4),
            (lambda: ("readlink", path()), 3),
            (lambda: ("mknod", new(), pick((stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG, 0)) | mode(), 0), 2),
            (lambda: ("listdir", path()), 5),
            (lambda: ("write_file", pick((file, new))(), size(), tag()), 9),
            (lambda: ("read_file", file()), 9),
            (lambda: ("truncate", file(), offset()), 3),
            (lambda: ("stat", path(), self._chance(0.5)), 9),
            (lambda: ("access", path(), self._random.randrange(8)), 3),
            (lambda: ("chmod", path(), mode()), 3),
            (lambda: ("chown", path(), pick(self._OWNERS), pick(self._OWNERS), self._chance(0.5)), 3),
            (lambda: ("set_times", path(), times(), times(), self._chance(0.5)), 4),
            (
                lambda: (
                    *("setxattr", path(), pick(self._XATTRS), self._random.randrange(300), tag()),
                    *(pick((0, 0, os.XATTR_CREATE, os.XATTR_REPLACE)), self._chance(0.8)),
                ),
                5,
            ),
            (lambda: ("getxattr", path(), pick(self._XATTRS), self._chance(0.8)), 3),
            (lambda: ("listxattr", path(), self._chance(0.8)), 2),
            (lambda: ("removexattr", path(), pick(self._XATTRS), self._chance(0.8)), 2),
            (lambda: ("statvfs", path()), 1),
        ]

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _path(self) -> bytes:
        """Return a path that exists, most of the time."""
        existing = self._player.paths()
        if existing and self._chance(0.85):
            return self._random.choice(existing)
        return self._any_path()

    def _file(self) -> bytes:
        """Return the path of a file that exists, half the time."""
        existing = self._player.paths(stat.S_ISREG)
        return self._random.choice(existing) if existing and self._chance(0.5) else self._path()

    def _new_path(self) -> bytes:
        """Return a path for something to be made, in a directory that exists, most of the time."""
        if self._chance(0.2):
            return self._path()
        above = self._random.choice([b"", *self._player.paths(stat.S_ISDIR)])
        if above.count(b"/") >= 3:
            return self._any_path()
        return os.path.join(above, self._random.choice(self._BELOW if above else self._NAMES))

    def _any_path(self) -> bytes:
        parts = [self._random.choice(self._NAMES)]
        while len(parts) < 3 and self._chance(0.4):
            parts.append(self._random.choice(self._BELOW))
        if self._chance(0.1):
            parts.append(self._random.choice((b".", b"..", b"x" * 256)))
        return b"/".join(parts) + (b"/" if self._chance(0.1) else b"")

    def _slot(self) -> int:
        return self._random.choice(self._player.slots() or [0]) if self._chance(0.95) else 0

    def _new_slot(self) -> int:
        return self._random.randrange(SLOTS)

    def _size(self) -> int:
        return self._random.randrange(self._random.choice((2, 100, 5000, 5000, 9000, 150_000)))

    def _offset(self) -> int:
        return self._random.randrange(self._random.choice((1, 100, 5000, 9000, 70_000, 400_000)))

    def _tag(self) -> int:
        return self._random.randrange(251)

    def _mode(self) -> int:
        return self._random.choice(self._MODES)

    def _time(self) -> int | str:
        when: int | str = self._random.choice(self._TIMES)
        return when

    def _open_flags(self) -> int:
        flags = self._random.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR))
        flags |= os.O_CREAT if self._chance(0.5) else 0
        for each in self._FLAGS:
            flags |= each if self._chance(0.08) else 0
        return flags


class Difference(NamedTuple):
    """What two directories answered differently first, or what differs at the end."""

    what: str


#: Gives steps, one after the other, to be played; the player is that of the plain directory.
Chooser = Callable[[Player], Iterable[Step]]


def at_random(seed: int, count: int) -> Chooser:
    """Return what chooses steps by a seed."""
    return lambda player: Generator(seed, player).steps(count)


def compare(choose: Chooser, expected: Path, tried: Path) -> tuple[list[Step], Difference | None]:
    """Run steps below two directories that are empty, side by side; return those that were run, and what differs."""
    played: list[Step] = []
    right, other = Player(expected), Player(tried)
    try:
        for step in choose(right):
            played.append(step)
            answers = right.play(step), other.play(step)
            if answers[0] != answers[1]:
                return played, Difference(f"{_call(step)} answered {answers[1]!r}, not {answers[0]!r}")
        answers = right.close_all(), other.close_all()
        if answers[0] != answers[1]:
            return played, Difference(f"the files left open answered {answers[1]}, not {answers[0]}")
    finally:
        right.close_all()
        other.close_all()
    return played, compare_trees(tree(expected), tree(tried))


def compare_trees(expected: dict[bytes, tuple[Any, ...]], found: dict[bytes, tuple[Any, ...]]) -> Difference | None:
    """Compare what :func:`tree` returned."""
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            return Difference(f"at the end, {path!r} is {found.get(path)}, not {expected.get(path)}")
    return None


def shrink(steps: list[Step], fails: Callable[[list[Step]], bool], seconds: float) -> list[Step]:
    """Leave out what can be left out of steps that fail, for so long."""
    until = time.monotonic() + seconds
    size = len(steps) // 2
    while size:
        start = 0
        while start < len(steps) and time.monotonic() < until:
            shorter = steps[:start] + steps[start + size :]
            if fails(shorter):
                steps = shorter
            else:
                start += size
        size //= 2
    return steps


def script_of(steps: Sequence[Step]) -> str:
    """Return a script that repeats these steps: see the module's docstring."""
    return "\n".join(["[", *(f"    {tuple(step)!r}," for step in steps), "]"])


def _call(step: Step) -> str:
    who = f" by user {step.user}" if step.user else ""
    return f"{step.call}{step.arguments!r}{who}"


def main() -> None:
    """Run a script of steps from standard input below a directory."""
    player = Player(Path(sys.argv[1]))
    os.umask(0o022)
    for each in literal_eval(sys.stdin.read()):
        step = Step(*each)
        print(f"{_call(step)} -> {player.play(step)!r}")
    print(*player.close_all(), sep="\n")


if __name__ == "__main__":
    main()
