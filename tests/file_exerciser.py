"""Random work on one file through several descriptors, compared with what it must hold; and random work on one tree by
several processes at once, of which every answer must be one that it can be.

Both repeat themselves by their seed.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import stat
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from posix_rig import LIBC, check

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
_PAGE: Final = 4096


class Wrong(AssertionError):
    """A file does not hold what was written to it."""


class OneFile:
    """Does random things to a file of up to ``most`` bytes and keeps what it must hold in memory."""

    def __init__(self, path: Path, seed: int, most: int) -> None:
        self._path = path
        self._random = random.Random(seed)
        self._most = most
        self.model = bytearray()
        self.log: list[str] = []
        self._fds = [os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(3)]
        self._stamp = 0
        self._allocates = True

    def run(self, steps: int) -> None:
        """Do so many things. :exc:`Wrong` says what was found and what led to it."""
        kinds: list[tuple[Callable[[], None], int]] = [
            (self._write, 10),
            (self._append, 2),
            (self._splice, 2),
            (self._send, 2),
            (self._read, 10),
            (self._map_read, 4),
            (self._map_write, 5),
            (self._truncate, 4),
            (self._punch, 3),
            (self._zero, 2),
            (self._allocate, 2),
            (self._copy, 3),
            (self._seek, 2),
            (self._reopen, 2),
            (self._sync, 2),
            (self._forget, 2),
        ]
        makers, weights = [kind for kind, _ in kinds], [weight for _, weight in kinds]
        try:
            for work in self._random.choices(makers, weights, k=steps):
                work()
                self._check_size()
            self._compare(0, len(self.model), self._path.read_bytes(), "the whole file")
        finally:
            for fd in self._fds:
                os.close(fd)

    def _fail(self, what: str) -> None:
        raise Wrong("\n".join([what, "the last that was done:", *self.log[-60:]]))

    def _compare(self, offset: int, length: int, found: bytes, what: str) -> None:
        expected = self.model[offset : offset + length]
        if found == expected:
            return
        if len(found) != len(expected):
            self._fail(f"{what}: {len(found)} bytes at {offset}, not {len(expected)}")
        first = next(index for index, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        self._fail(f"{what}: byte {offset + first} is {found[first]}, not {expected[first]}")

    def _check_size(self) -> None:
        size = os.fstat(self._fd()).st_size
        if size != len(self.model):
            self._fail(f"its size is {size}, not {len(self.model)}")

    def _fd(self) -> int:
        return self._random.choice(self._fds)

    def _bytes(self, length: int) -> bytes:
        self._stamp += 1
        block = bytes((self._stamp * 37 + index) % 251 + 1 for index in range(251))
        return (block * (length // 251 + 1))[:length]

    def _length(self) -> int:
        """Return a length: often small, often around pages and whole objects, sometimes large."""
        kind = self._random.randrange(4)
        if kind == 0:
            return self._random.randrange(1, 200)
        if kind == 1:
            return self._random.randrange(1, 4) * _PAGE + self._random.randrange(-3, 4)
        return self._random.randrange(1, self._most // (2 if kind == 2 else 16))

    def _offset(self, end: int) -> int:
        if self._random.random() < 0.3:
            edges = (0, _PAGE, 65_536, 4 * 2**20, len(self.model))
            return max(0, min(end, self._random.choice(edges) + self._random.randrange(-9, 10)))
        return self._random.randrange(end + 1)

    def _range(self, end: int) -> tuple[int, int]:
        offset = self._offset(end)
        return offset, max(0, min(self._length(), end - offset))

    def _put(self, offset: int, data: bytes) -> None:
        if len(self.model) < offset:
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + len(data)] = data

    # What is done

    def _write(self) -> None:
        offset, length = self._range(self._most)
        data = self._bytes(length)
        fd = self._fd()
        self.log.append(f"pwrite({fd}, {length} bytes, {offset})")
        if os.pwrite(fd, data, offset) != length:
            self._fail("a short write")
        if length:
            self._put(offset, data)

    def _append(self) -> None:
        length = min(self._length(), self._most - len(self.model))
        data = self._bytes(max(length, 0))
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self.log.append(f"append({len(data)} bytes at {len(self.model)})")
        os.write(fd, data)
        os.close(fd)
        self.model += data

    def _splice(self) -> None:
        """Write pages of a pipe."""
        offset = self._offset(self._most)
        data = self._bytes(min(self._length(), 60_000, self._most - offset))
        self.log.append(f"splice({len(data)} bytes, {offset})")
        out, into = os.pipe()
        try:
            os.write(into, data)
            done = 0
            while done < len(data):
                done += os.splice(out, self._fd(), len(data) - done, offset_dst=offset + done)
        finally:
            os.close(out)
            os.close(into)
        if data:
            self._put(offset, data)

    def _send(self) -> None:
        """Read by sendfile(2) into a file elsewhere."""
        offset, length = self._range(self._most)
        self.log.append(f"sendfile({length}, {offset})")
        with tempfile.TemporaryFile() as file:
            while length and (count := os.sendfile(file.fileno(), self._fd(), offset, length)):
                offset, length = offset + count, length - count
            size = file.tell()
            self._compare(offset - size, size, os.pread(file.fileno(), size, 0), "sendfile")
        if length and offset < len(self.model):
            self._fail(f"sendfile ended at {offset}")

    def _read(self) -> None:
        offset, length = self._range(self._most)
        fd = self._fd()
        self.log.append(f"pread({fd}, {length}, {offset})")
        self._compare(offset, length, os.pread(fd, length, offset), "read")

    def _map_read(self) -> None:
        offset, length = self._range(len(self.model))
        if length:
            self.log.append(f"mapped read({length}, {offset})")
            with self._mapping(offset, length) as mapped:
                within = offset % _PAGE
                self._compare(offset, length, mapped[within : within + length], "mapped read")

    def _map_write(self) -> None:
        offset, length = self._range(len(self.model))
        if length:
            self.log.append(f"mapped write({length}, {offset})")
            data = self._bytes(length)
            with self._mapping(offset, length) as mapped:
                mapped[offset % _PAGE : offset % _PAGE + length] = data
                if self._random.random() < 0.5:
                    mapped.flush()
            self._put(offset, data)

    def _mapping(self, offset: int, length: int) -> mmap.mmap:
        return mmap.mmap(self._fd(), offset % _PAGE + length, offset=offset // _PAGE * _PAGE)

    def _truncate(self) -> None:
        size = self._offset(self._most)
        self.log.append(f"truncate({size})")
        if self._random.random() < 0.5:
            os.ftruncate(self._fd(), size)
        else:
            os.truncate(self._path, size)
        if size < len(self.model):
            del self.model[size:]
        else:
            self.model.extend(bytes(size - len(self.model)))

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """Say whether it was done: not if the file system has no such call."""
        if not self._allocates or not length:
            return False
        self.log.append(f"fallocate({mode}, {offset}, {length})")
        try:
            check(LIBC.fallocate(self._fd(), mode, ctypes.c_long(offset), ctypes.c_long(length)))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._allocates = False
        return self._allocates

    def _punch(self) -> None:
        offset, length = self._range(self._most)
        if self._fallocate(PUNCH_HOLE | KEEP_SIZE, offset, length):
            end = min(offset + length, len(self.model))
            self.model[offset:end] = bytes(max(0, end - offset))

    def _zero(self) -> None:
        offset, length = self._range(self._most)
        keep = self._random.choice((0, KEEP_SIZE))
        if self._fallocate(ZERO_RANGE | keep, offset, length):
            end = min(offset + length, len(self.model)) if keep else offset + length
            if end > offset:
                self._put(offset, bytes(end - offset))

    def _allocate(self) -> None:
        offset, length = self._range(self._most)
        keep = self._random.choice((0, KEEP_SIZE))
        if self._fallocate(keep, offset, length) and not keep and offset + length > len(self.model):
            self.model.extend(bytes(offset + length - len(self.model)))

    def _copy(self) -> None:
        offset, length = self._range(len(self.model))
        target = self._offset(self._most)
        length = min(length, self._most - target)
        if length <= 0 or abs(target - offset) < length:
            return
        self.log.append(f"copy_file_range({length} bytes, {offset} to {target})")
        data, done = bytes(self.model[offset : offset + length]), 0
        while done < length:
            count = os.copy_file_range(self._fd(), self._fd(), length - done, offset + done, target + done)
            if count == 0:
                self._fail("a copy ended early")
            done += count
        self._put(target, data)

    def _seek(self) -> None:
        """What is no hole is only zeros in no case: data that was written is in what SEEK_DATA finds."""
        if not self.model:
            return
        offset = self._random.randrange(len(self.model))
        self.log.append(f"seek({offset})")
        fd = self._fd()
        hole = os.lseek(fd, offset, os.SEEK_HOLE)
        try:
            data = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = len(self.model)
        if not offset <= hole <= len(self.model) or not offset <= data <= len(self.model):
            self._fail(f"from {offset}, a hole at {hole} and data at {data}")
        if any(self.model[offset:data]):
            self._fail(f"from {offset} there is data before {data}")

    def _reopen(self) -> None:
        index = self._random.randrange(len(self._fds))
        os.close(self._fds[index])
        flags = self._random.choice((0, 0, 0, os.O_SYNC, os.O_DSYNC, os.O_DIRECT))
        self._fds[index] = os.open(self._path, os.O_RDWR | flags)
        self.log.append(f"reopened {index} with {flags:o}")

    def _sync(self) -> None:
        self.log.append("fsync")
        self._random.choice((os.fsync, os.fdatasync))(self._fd())

    def _forget(self) -> None:
        """Have the kernel drop what it keeps of the file."""
        self.log.append("fadvise")
        os.posix_fadvise(self._fd(), 0, 0, os.POSIX_FADV_DONTNEED)


#: What a call on a tree may be refused with while others change it.
EXPECTED: Final = frozenset(
    {
        errno.ENOENT,
        errno.EEXIST,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENOTEMPTY,
        errno.EINVAL,
        errno.ELOOP,
        errno.ENODATA,
        errno.EPERM,
        errno.ENXIO,
    }
)


class OneTree:
    """Does random things below a directory that others work in, too."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root = root
        self._random = random.Random(seed)
        #: What was refused, by call and errno.
        self.refused: Counter[tuple[str, str]] = Counter()

    def run(self, steps: int) -> None:
        """Do so many things; an errno that has no place here raises."""
        calls = [name for name in dir(self) if name.startswith("do_")]
        for _ in range(steps):
            name = self._random.choice(calls)
            try:
                getattr(self, name)(self._path(), self._path())
            except OSError as error:
                if error.errno not in EXPECTED:
                    raise
                self.refused[name, errno.errorcode[error.errno]] += 1

    def _path(self) -> str:
        """Return a path of up to four names: few, so that the processes meet."""
        names = [
            f"{self._random.choice('dfl')}{self._random.randrange(6)}" for _ in range(self._random.randrange(1, 5))
        ]
        return os.path.join(self._root, *["d" + name[1:] for name in names[:-1]], names[-1])

    def _size(self) -> int:
        return self._random.choice((0, 10, 3000, 65_537, 200_000))

    def do_create(self, path: str, _: str) -> None:
        self._write(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def do_create_new(self, path: str, _: str) -> None:
        self._write(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL)

    def do_write(self, path: str, _: str) -> None:
        self._write(path, os.O_WRONLY)

    def do_append(self, path: str, _: str) -> None:
        self._write(path, os.O_WRONLY | os.O_APPEND)

    def _write(self, path: str, flags: int) -> None:
        fd = os.open(path, flags | os.O_NONBLOCK, 0o644)
        try:
            os.write(fd, bytes(self._size()))
            if self._random.random() < 0.1:
                os.fsync(fd)
        finally:
            os.close(fd)

    def do_read(self, path: str, _: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            while data := os.read(fd, 100_000):
                if any(data):
                    raise AssertionError(f"{path} holds what nobody wrote")
        finally:
            os.close(fd)

    def do_nameless(self, path: str, _: str) -> None:
        fd = os.open(os.path.dirname(path), os.O_TMPFILE | os.O_RDWR, 0o644)
        try:
            os.write(fd, bytes(self._size()))
            check(LIBC.linkat(-100, f"/proc/self/fd/{fd}".encode(), -100, path.encode(), 0x400))
        finally:
            os.close(fd)

    def do_hold(self, path: str, other: str) -> None:
        """Write to what has been unlinked, perhaps by others, or replaced."""
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        try:
            os.replace(other, path)
            os.write(fd, bytes(self._size()))
            os.fchmod(fd, 0o700)
            if any(os.pread(fd, 10_000, 0)):
                raise AssertionError(f"{path}, unlinked, holds what nobody wrote")
        finally:
            os.close(fd)

    def do_chown(self, path: str, _: str) -> None:
        os.chown(path, 1000, 1000, follow_symlinks=False)

    def do_rename_new(self, path: str, other: str) -> None:
        check(LIBC.renameat2(-100, path.encode(), -100, other.encode(), 1))

    def do_mkdir(self, path: str, _: str) -> None:
        os.mkdir(path)

    def do_make_above(self, path: str, _: str) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)

    def do_rmdir(self, path: str, _: str) -> None:
        os.rmdir(path)

    def do_unlink(self, path: str, _: str) -> None:
        os.unlink(path)

    def do_rename(self, path: str, other: str) -> None:
        os.rename(path, other)

    def do_exchange(self, path: str, other: str) -> None:
        check(LIBC.renameat2(-100, path.encode(), -100, other.encode(), 2))

    def do_link(self, path: str, other: str) -> None:
        os.link(path, other, follow_symlinks=False)

    def do_symlink(self, path: str, other: str) -> None:
        os.symlink(os.path.relpath(other, os.path.dirname(path)), path)

    def do_mkfifo(self, path: str, _: str) -> None:
        os.mkfifo(path)

    def do_truncate(self, path: str, _: str) -> None:
        os.truncate(path, self._size())

    def do_chmod(self, path: str, _: str) -> None:
        os.chmod(path, 0o755)

    def do_utime(self, path: str, _: str) -> None:
        os.utime(path, (1, 2))

    def do_setxattr(self, path: str, _: str) -> None:
        os.setxattr(path, "user.some", b"value")

    def do_removexattr(self, path: str, _: str) -> None:
        os.removexattr(path, "user.some")

    def do_stat(self, path: str, _: str) -> None:
        os.lstat(path)

    def do_list(self, path: str, _: str) -> None:
        for entry in os.scandir(os.path.dirname(path)):
            entry.stat(follow_symlinks=False)


def check_tree(root: Path) -> dict[str, tuple[int, int, int]]:
    """Return (mode, links, size) by path of a tree that nobody changes; each must fit to what is found."""
    found: dict[str, tuple[int, int, int]] = {}
    names: Counter[int] = Counter()
    statuses: dict[int, os.stat_result] = {}
    for above, directories, files in os.walk(root):
        status = os.lstat(above)
        below = sum(not os.path.islink(os.path.join(above, name)) for name in directories)
        assert status.st_nlink == 2 + below, f"{above} has {status.st_nlink} links and {below} directories in it"
        for name in (*directories, *files):
            path = os.path.join(above, name)
            status = os.lstat(path)
            found[os.path.relpath(path, root)] = (status.st_mode, _links(status), status.st_size)
            names[status.st_ino] += 1
            statuses[status.st_ino] = status
    for ino, status in statuses.items():
        if not stat.S_ISDIR(status.st_mode):
            assert status.st_nlink == names[ino], f"inode {ino} has {status.st_nlink} links and {names[ino]} names"
    return found


def _links(status: os.stat_result) -> int:
    return 0 if stat.S_ISDIR(status.st_mode) else status.st_nlink
