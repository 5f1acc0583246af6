"""Files that one mount has open while another reads, changes, unlinks or writes them, on two mounts of one metaserver.

The lease is long: nothing here is right because something ran out.
"""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
import rig
import several_mounts

pytestmark = pytest.mark.usefixtures("needs_mounts")

LONG_LEASE_S: Final = 30.0
#: More than what lies in the metadata.
LARGE: Final = 200_000
#: Opens that may be ESTALE where a file is replaced all the time: a lookup amid a change can find what is gone, twice.
FEW: Final = 2


@pytest.fixture(scope="module", params=["bpf", "off"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """Two mounts of one volume; they live as long as the tests of one way to answer."""
    if request.param == "bpf":
        rig.require_uring()
    sandbox = rig.Sandbox()
    try:
        with several_mounts.cluster(sandbox, LONG_LEASE_S) as cluster:
            one, two = cluster.pair(request.param)
            yield one.path, two.path
        sandbox.assert_nothing_runs()
    finally:
        sandbox.close()


def cached(path: Path) -> bytes:
    """Read a file often enough that every cache has it."""
    for _ in range(3):
        path.stat()
        content = path.read_bytes()
    return content


def used(path: Path) -> tuple[int, int]:
    """Return how many inodes and blocks a volume has."""
    found = os.statvfs(path)
    return found.f_files - found.f_ffree, found.f_blocks - found.f_bfree


# Writers and readers


@pytest.mark.parametrize("size", [100, LARGE])
def test_each_fsync_is_seen_by_who_has_the_file_open(pair: tuple[Path, Path], size: int) -> None:
    one, two = (path / f"fsync-{size}" for path in pair)
    one.write_bytes(b"0" * size)
    assert cached(two) == b"0" * size
    with one.open("r+b", buffering=0) as writer, two.open("rb", buffering=0) as reader:
        for number in range(1, 6):
            content = b"%d" % number * size
            os.pwrite(writer.fileno(), content, 0)
            os.fsync(writer.fileno())
            assert os.pread(reader.fileno(), size + 1, 0) == content
            assert two.read_bytes() == content
        os.ftruncate(writer.fileno(), 10)
        assert os.fstat(reader.fileno()).st_size == 10
        assert two.read_bytes() == content[:10]
    assert cached(two) == content[:10]


def test_a_new_file_grows_before_the_eyes_of_others(pair: tuple[Path, Path]) -> None:
    one, two = (path / "grows" for path in pair)
    with one.open("xb", buffering=0) as writer:
        assert two.stat().st_size == 0
        with two.open("rb", buffering=0) as reader:
            for number in range(1, 6):
                writer.write(b"line\n")
                os.fsync(writer.fileno())
                assert two.stat().st_size == 5 * number
                assert reader.read() == b"line\n"
    assert cached(two) == b"line\n" * 5


def test_both_write_one_file(pair: tuple[Path, Path]) -> None:
    """Each its own half, with fsync; both see all of it."""
    one, two = (path / "halves" for path in pair)
    one.write_bytes(bytes(2 * LARGE))
    with one.open("r+b", buffering=0) as first, two.open("r+b", buffering=0) as second:
        for number in range(1, 4):
            for half, each in enumerate((first, second)):
                os.pwrite(each.fileno(), b"%d" % number * LARGE, half * LARGE)
                os.fsync(each.fileno())
            for each in (first, second):
                assert os.pread(each.fileno(), 2 * LARGE, 0) == b"%d" % number * 2 * LARGE


@pytest.mark.parametrize("length", [30, 3000, LARGE])
def test_both_append_and_nothing_is_lost(pair: tuple[Path, Path], length: int) -> None:
    """At the same time, with an fsync after each line, through handles that stay open, and some that do not."""
    paths = [path / f"appended-{length}" for path in pair]
    count = 30 if length < LARGE else 6

    def append(which: int) -> None:
        with paths[which].open("ab", buffering=0) as kept:
            for number in range(count):
                line = f"{which} {number} ".encode().ljust(length - 1, b".") + b"\n"
                if number % 3 == 2:
                    with paths[which].open("ab", buffering=0) as opened:
                        opened.write(line)
                    continue
                kept.write(line)
                os.fsync(kept.fileno())

    paths[0].touch()
    threads = [threading.Thread(target=append, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for path in paths:
        lines = path.read_bytes().splitlines(keepends=True)
        assert {len(line) for line in lines} == {length}
        for which in range(2):
            mine = [line.split()[1] for line in lines if line.startswith(b"%d " % which)]
            assert mine == [b"%d" % number for number in range(count)]


def test_an_append_goes_to_the_end_that_another_has_moved(pair: tuple[Path, Path]) -> None:
    one, two = (path / "ends" for path in pair)
    with one.open("ab", buffering=0) as first, two.open("a+b", buffering=0) as second:
        for number in range(5):
            first.write(b"first %d\n" % number)
            os.fsync(first.fileno())
            second.write(b"second %d\n" % number)
            os.fsync(second.fileno())
            assert os.pread(second.fileno(), 1000, 0) == one.read_bytes()
        os.truncate(one, 8)
        second.write(b"last\n")
        assert os.fstat(second.fileno()).st_size == 13
        with mmap.mmap(second.fileno(), 13, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
            assert mapped[:] == b"first 0\nlast\n"
    assert one.read_bytes() == b"first 0\nlast\n"


def test_chmod_of_a_file_that_was_just_made_is_seen(pair: tuple[Path, Path]) -> None:
    one, two = (path / "made" for path in pair)
    with one.open("xb", buffering=0) as writer:
        os.fchmod(writer.fileno(), 0o600)
        assert two.stat().st_mode & 0o777 == 0o600
        os.fchmod(writer.fileno(), 0o640)
        assert two.stat().st_mode & 0o777 == 0o640
        writer.write(b"data")
        os.utime(writer.fileno(), ns=(1, 2))
        assert (two.stat().st_mtime_ns, two.stat().st_mode & 0o777) == (2, 0o640)
        os.chmod(two, 0o604)
        assert os.fstat(writer.fileno()).st_mode & 0o777 == 0o604
    for path in (one, two):
        assert (path.stat().st_mtime_ns, path.stat().st_mode & 0o777) == (2, 0o604)
        assert path.read_bytes() == b"data"


def test_tar_x_while_another_lists(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """All is listed as it is; and in the end both see what was packed."""
    source = tmp_path / "source"
    for number in range(120):
        file = source / f"d{number // 30}" / f"f{number}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"%d" % number * 500)
        os.chmod(file, 0o600 + number % 8)
        os.utime(file, ns=(number, 10**9 * number))
    subprocess.run(["tar", "cf", tmp_path / "packed.tar", "-C", tmp_path, "source"], check=True)
    unpacking = subprocess.Popen(["tar", "xpf", tmp_path / "packed.tar", "-C", pair[0]])
    while unpacking.poll() is None:
        subprocess.run(["ls", "-lR", pair[1]], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert unpacking.returncode == 0

    def seen(top: Path) -> dict[str, tuple[int, int, bytes]]:
        files = [path for path in (top / "source").rglob("*") if path.is_file()]
        return {
            str(path.relative_to(top)): (path.stat().st_mode, path.stat().st_mtime_ns, path.read_bytes())
            for path in files
        }

    assert seen(pair[0]) == seen(pair[1]) == seen(tmp_path)


def test_who_mounts_sees_what_the_only_one_has_not_flushed(sandbox: rig.Sandbox, accel: str) -> None:
    """Changes of a new file's attributes wait for its flush while there is one mount, and are made for the second."""
    with several_mounts.cluster(sandbox, LONG_LEASE_S) as cluster:
        one = cluster.mount("a", accel).path / "file"
        with one.open("xb", buffering=0) as writer:
            os.fchmod(writer.fileno(), 0o604)
            writer.write(b"data")
            os.utime(writer.fileno(), ns=(1, 2))
            two = cluster.mount("b", accel).path / "file"
            assert (two.stat().st_mode & 0o777, two.stat().st_mtime_ns) == (0o604, 2)
            os.fchmod(writer.fileno(), 0o640)
            assert two.stat().st_mode & 0o777 == 0o640
        assert (two.read_bytes(), two.stat().st_mtime_ns) == (b"data", 2)
    sandbox.assert_nothing_runs()


# Unlinking


@pytest.mark.parametrize("how", ["unlink", "rename"])
@pytest.mark.parametrize("look", [False, True])
def test_an_unlinked_file_lives_on_where_it_is_open(pair: tuple[Path, Path], how: str, look: bool) -> None:
    one, two = (path / f"gone-{how}-{look}" for path in pair)
    before = used(pair[0])
    one.write_bytes(b"a" * LARGE)
    if look:  # what it caches is dropped by a break, and what it has open must still be known
        cached(one)
        os.chmod(two, 0o600)
    with one.open("r+b", buffering=0) as opened:
        if look:
            os.chmod(two, 0o640)
        if how == "unlink":
            two.unlink()
        else:
            other = two.with_name("other")
            other.write_bytes(b"new")
            other.rename(two)
        fd = opened.fileno()
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, LARGE + 1, 0) == b"a" * LARGE
        os.pwrite(fd, b"b" * 1000, LARGE)
        os.fsync(fd)
        assert os.fstat(fd).st_size == LARGE + 1000
        assert os.pread(fd, 2000, LARGE - 1000) == b"a" * 1000 + b"b" * 1000
        os.ftruncate(fd, 10)
        assert os.pread(fd, 100, 0) == b"a" * 10
        with mmap.mmap(fd, 10, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == b"a" * 10
        if how == "unlink":
            with pytest.raises(FileNotFoundError):
                one.open("rb")
        else:
            assert one.read_bytes() == b"new"
            two.unlink()
    rig.wait_for(lambda: used(pair[0])[0] == before[0], "its space is given back")


def repeat(times: int, call: Callable[[], object]) -> None:
    for _ in range(times):
        call()


def is_stale(path: Path, flags: int) -> bool:
    """Open a file; whether that was answered ESTALE."""
    try:
        os.close(os.open(path, flags))
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return True
    return False


def replace(path: Path) -> None:
    fresh = path.with_name("fresh")
    fresh.write_bytes(b"x" * 100)
    fresh.rename(path)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_CREAT])
def test_a_file_that_is_replaced_all_the_time_is_there(pair: tuple[Path, Path], flags: int) -> None:
    one, two = (path / f"replaced-{flags}" for path in pair)
    replace(two)
    with ThreadPoolExecutor() as pool:
        replacing = pool.submit(repeat, 150, lambda: replace(two))
        stale = 0
        while not replacing.done():
            stale += is_stale(one, flags)
        replacing.result()
    assert stale <= FEW


def test_a_file_that_is_made_and_removed_all_the_time_can_be_made(pair: tuple[Path, Path]) -> None:
    """As programs make locks."""
    one, two = (path / "lock" for path in pair)
    with ThreadPoolExecutor() as pool:
        removing = pool.submit(repeat, 4000, lambda: two.unlink(missing_ok=True))
        making = pool.submit(lambda: sum(is_stale(two, os.O_CREAT | os.O_RDWR) for _ in range(100)))
        stale = sum(is_stale(one, os.O_CREAT | os.O_RDWR) for _ in range(100))
        assert stale + making.result() <= FEW
        removing.result()


def test_a_reader_goes_on_reading_what_was_unlinked(pair: tuple[Path, Path]) -> None:
    """Opened by BPF where there is any."""
    one, two = (path / "read" for path in pair)
    one.write_bytes(b"a" * 3000)
    cached(one)
    with one.open("rb", buffering=0) as first, one.open("rb", buffering=0) as second:
        two.unlink()
        for each in (first, second):
            assert os.pread(each.fileno(), 4000, 0) == b"a" * 3000
            assert os.fstat(each.fileno()).st_nlink == 0
        first.close()
        assert os.pread(second.fileno(), 4000, 0) == b"a" * 3000
    with pytest.raises(FileNotFoundError):
        one.stat()


def test_opens_and_unlinks_at_once(pair: tuple[Path, Path]) -> None:
    """An open gets the whole file, or says that it is not there, or not any more."""
    one, two = (path / "at-once" for path in pair)
    ended = threading.Event()
    seen: list[str] = []

    def read() -> None:
        while not ended.is_set():
            try:
                with one.open("rb", buffering=0) as opened:
                    content = opened.read()
                    if content not in (b"x" * 5000, b""):
                        seen.append(f"{len(content)} bytes")
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    seen.append(f"{error!r}")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(60):
            fresh = two.with_name(f"fresh-{number}")
            fresh.write_bytes(b"x" * 5000)
            fresh.rename(two)
            if number % 3 == 0:
                two.unlink()
    finally:
        ended.set()
        reader.join()
    assert not seen
