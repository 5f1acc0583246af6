"""Programs that people use, run on a mount and on a plain ext4 directory: what they make has to be the same."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Final

import file_steps
import lmdb
import posix_rig
import pytest
from posix_rig import LONG, pattern

pytestmark = [pytest.mark.usefixtures("needs_mounts"), pytest.mark.timeout(600)]

_ENVIRONMENT: Final = {
    **os.environ,
    "LC_ALL": "C",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.com",
    "GIT_AUTHOR_DATE": "2024-01-02T03:04:05Z",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.com",
    "GIT_COMMITTER_DATE": "2024-01-02T03:04:05Z",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}
_TIMEOUT_S: Final = 120.0
#: Files of the repository: several in each directory, and loose objects in each of git's 256.
_FILES: Final = 2000 if LONG else 500


@pytest.fixture(scope="module", params=["bpf", "off"])
def ground(request: pytest.FixtureRequest) -> Iterator[posix_rig.Ground]:
    with posix_rig.ground(request.param) as made:
        yield made


def needs(*programs: str) -> None:
    """Skip the test where a program is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """Run a program to its end and return what it says; it must end with this code."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert done.returncode == code, f"{' '.join(map(str, command))} ended with {done.returncode}:\n{out}{err}"
    return out


_expected: Final[dict[str, Any]] = {}


def same(ground: posix_rig.Ground, name: str, work: Callable[[Path], Any]) -> None:
    """Do the work in a new directory on each, on the plain one once; both must come to the same."""
    plain, mounted = (place.root for place in ground.places(name))
    if name not in _expected:
        _expected[name] = work(plain)
    assert work(mounted) == _expected[name]


def tree(root: Path, *, times: bool = False) -> dict[bytes, tuple[Any, ...]]:
    """Return all there is below a directory; modification times only if asked for."""
    found = file_steps.tree(root)
    return found if times else {path: (each[0]._replace(mtime=0), *each[1:]) for path, each in found.items()}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Version control


def test_git(ground: posix_rig.Ground) -> None:
    needs("git")
    same(ground, "git", use_git)


def use_git(root: Path) -> list[str]:
    """Make a repository of many files, change it, clone it, tidy it; return what git says of each."""
    repository = root / "repository"
    said = [run("git", "init", "-q", "-b", "main", "repository", cwd=root)]
    for number in range(_FILES):
        path = repository / f"dir{number % 40}" / f"below{number % 3}" / f"file{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pattern(37 * (number % 90) + 1, number))
    (repository / "large").write_bytes(pattern(3_000_000))
    (repository / "link").symlink_to("dir1")
    os.chmod(repository / "dir1" / "below1" / "file1.txt", 0o755)

    def git(*arguments: str, code: int = 0) -> None:
        said.append(run("git", *arguments, cwd=repository, code=code))

    git("add", "-A")
    git("commit", "-q", "-m", "first")
    git("diff-files", "--quiet")  # by times and sizes only: what git has just looked at has not changed since
    git("rev-parse", "HEAD", "HEAD^{tree}")
    git("checkout", "-q", "-b", "other")
    for number in range(0, _FILES, 40):
        (repository / f"dir{number % 40}" / f"below{number % 3}" / f"file{number}.txt").write_text(f"new {number}")
    git("mv", "dir2", "moved")
    git("rm", "-q", "-r", "dir3")
    git("commit", "-q", "-a", "-m", "second")
    git("rev-parse", "HEAD")
    git("checkout", "-q", "main")
    git("diff-files", "--quiet")
    git("status", "--porcelain")
    git("merge", "-q", "-m", "merge", "other")
    git("rev-parse", "HEAD^{tree}")
    git("stash", code=0)
    said.append(run("git", "clone", "-q", "repository", "clone", cwd=root))
    said.append(run("git", "diff-files", "--quiet", cwd=root / "clone"))
    said.append(run("git", "fsck", "--full", "--strict", cwd=root / "clone"))
    git("gc", "-q", "--prune=now")
    git("fsck", "--full")
    git("status", "--porcelain")
    said.append(run("git", "ls-tree", "-r", "HEAD", cwd=root / "clone"))
    said.append(str(sorted(tree(root / "clone" / "dir5").items())))
    return said


# Archives and copies


def make_a_tree(root: Path) -> None:
    """Make files of every kind, with all that an archive keeps of them."""
    root.mkdir()
    for number in range(120):
        path = root / f"dir{number % 7}" / f"file{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pattern(number * 997, number))
        os.chmod(path, (0o644, 0o600, 0o755, 0o4755, 0o2711, 0o444)[number % 6])
        os.chown(path, number % 3 * 1000, number % 2 * 2000)
        if number % 6 in (3, 4):
            os.chmod(path, 0o4755)
        if number % 5 == 0:
            os.setxattr(path, "user.number", b"%d" % number)
            os.setxattr(path, "trusted.binary", bytes(range(200)))
    os.link(root / "dir1" / "file1", root / "dir2" / "hard link")
    os.link(root / "dir1" / "file1", root / "another hard link")
    for name, target in (("symlink", "dir1/file1"), ("dangling", "nowhere"), ("long", "x/" * 1500)):
        os.symlink(target, root / name)
        os.chown(root / name, 1000, 1000, follow_symlinks=False)
    os.mkfifo(root / "pipe", 0o640)
    os.mknod(root / "null", 0o20666, os.makedev(1, 3))
    with open(root / "sparse", "wb") as sparse:
        sparse.truncate(20 * 2**20)
        sparse.seek(9 * 2**20)
        sparse.write(b"island")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe any bytes \n")).write_bytes(b"x")
    (root / "empty").mkdir(mode=0o711)
    (root / "sticky").mkdir()
    os.chmod(root / "sticky", 0o3777)
    for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        os.utime(path, ns=(10**18 + number, 981_173_106_123_456_789 + 10**9 * number), follow_symlinks=False)


def test_tar(ground: posix_rig.Ground) -> None:
    needs("tar")
    plain, mounted = (place.root for place in ground.places("tar"))
    make_a_tree(plain / "tree")
    options = ("--xattrs", "--xattrs-include=*", "--format=posix", "--numeric-owner", "--sort=name", "--sparse")
    keep = ("--pax-option=delete=atime,delete=ctime,exthdr.name=%d/x",)
    run("tar", "-c", *options, *keep, "-f", mounted / "from-plain.tar", "tree", cwd=plain)
    run("tar", "-x", "-p", "--same-owner", "--xattrs", "--xattrs-include=*", "-f", "from-plain.tar", cwd=mounted)
    assert tree(mounted / "tree", times=True) == tree(plain / "tree", times=True)
    run("tar", "-d", *options[:2], "-f", "from-plain.tar", cwd=mounted)
    run("tar", "-c", *options, *keep, "-f", plain / "from-mount.tar", "tree", cwd=mounted)
    (plain / "back").mkdir()
    run("tar", "-x", "-p", "--same-owner", *options[:2], "-f", "../from-mount.tar", cwd=plain / "back")
    assert tree(plain / "back" / "tree", times=True) == tree(plain / "tree", times=True)


def test_rsync(ground: posix_rig.Ground) -> None:
    needs("rsync")
    plain, mounted = (place.root for place in ground.places("rsync"))
    make_a_tree(plain / "tree")
    options = ("-aHAX", "--numeric-ids", "--itemize-changes")
    run("rsync", *options, f"{plain}/tree/", f"{mounted}/copy/", cwd=plain)
    assert tree(mounted / "copy", times=True) == tree(plain / "tree", times=True)
    assert run("rsync", *options, "--dry-run", f"{plain}/tree/", f"{mounted}/copy/", cwd=plain) == ""
    assert (
        run("rsync", *options, "--dry-run", "--checksum", "--delete", f"{mounted}/copy/", f"{plain}/tree/", cwd=plain)
        == ""
    )
    run("rsync", *options, f"{mounted}/copy/", f"{mounted}/second/", cwd=plain)
    (mounted / "copy" / "dir1" / "file1").write_bytes(b"changed")
    shutil.rmtree(mounted / "copy" / "dir3")
    run("rsync", *options, "--delete", "--inplace", f"{mounted}/copy/", f"{mounted}/second/", cwd=plain)
    assert tree(mounted / "second", times=True) == tree(mounted / "copy", times=True)
    run("rsync", *options, "--sparse", f"{mounted}/second/", f"{plain}/back/", cwd=plain)
    assert tree(plain / "back", times=True) == tree(mounted / "copy", times=True)


def test_copies(ground: posix_rig.Ground) -> None:
    """cp, mv, find, sed, sort, diff: what the programs of every day say and leave."""

    def work(root: Path) -> list[Any]:
        make_a_tree(root / "tree")
        said: list[Any] = [run("cp", "-a", "tree", "copy", cwd=root)]
        said.append(run("diff", "-r", "--no-dereference", "-x", "pipe", "-x", "null", "tree", "copy", cwd=root))
        said.append(tree(root / "copy", times=True))
        said.append(run("mv", "copy/dir1", "copy/dir2", ".", cwd=root))
        said.append(run("sed", "-i", "s/a/b/", "dir1/file1", cwd=root))
        said.append(sorted(run("find", ".", "-newer", "tree/null", "-links", "+1", "-type", "f", cwd=root).split()))
        said.append(run("sort", "-o", "dir2/file2", "dir2/file2", cwd=root))
        said.append(run("install", "-m", "751", "-o", "5", "dir1/file8", "installed", cwd=root))
        said.append(run("dd", "if=tree/file", "of=dd", "bs=1000", "conv=fsync", "status=none", cwd=root, code=1))
        said.append(run("dd", "if=tree/dir1/file99", "of=dd", "bs=1000", "conv=sparse,fsync", "status=none", cwd=root))
        said.append(run("chmod", "-R", "u+rwX,go-rwx", "tree", cwd=root))
        said.append(run("chown", "-R", "7:8", "tree", cwd=root))
        said.append(run("rm", "-r", "copy", cwd=root))
        said.append(tree(root))
        return said

    same(ground, "copies", work)


# Building


def test_building_a_program(ground: posix_rig.Ground) -> None:
    needs("make", "gcc")

    def work(root: Path) -> list[Any]:
        (root / "common.h").write_text("#define NUMBER 42\nint add(int, int);\n")
        (root / "main.c").write_text(
            '#include <stdio.h>\n#include "common.h"\nint main(void) { printf("%d\\n", add(NUMBER, 1)); return 0; }\n'
        )
        (root / "add.c").write_text('#include "common.h"\nint add(int a, int b) { return a + b; }\n')
        (root / "other.c").write_text("int other(void) { return 1; }\n")
        (root / "Makefile").write_text(
            "program: main.o add.o libother.a\n\tgcc -o $@ main.o add.o -L. -lother\n"
            "libother.a: other.o\n\tar rcs $@ $^\n"
            "main.o add.o: common.h\n%.o: %.c\n\tgcc -g -c -o $@ $<\nclean:\n\trm -f *.o program libother.a\n"
        )
        said: list[Any] = [run("make", "-j2", cwd=root), run(root / "program", cwd=root)]
        said.append(run("make", "-q", cwd=root))
        (root / "common.h").write_text("#define NUMBER 43\nint add(int, int);\n")
        said.append(sorted(run("make", cwd=root).splitlines()))
        said.append(run(root / "program", cwd=root))
        said.append(run("make", "clean", cwd=root))
        said.append(sorted(os.listdir(root)))
        return [each if not isinstance(each, str) else sorted(each.splitlines()) for each in said]

    same(ground, "make", work)


def test_installing_a_package(ground: posix_rig.Ground) -> None:
    """A virtual environment with a wheel in it, and the same wheel in a directory of its own."""

    def work(root: Path) -> list[Any]:
        wheel = make_wheel(root)
        run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=root)
        python = root / "venv" / "bin" / "python"
        pip = (sys.executable, "-m", "pip")
        run(*pip, "--python", python, "install", "-q", "--no-index", "--no-compile", wheel, cwd=root)
        said: list[Any] = [run(python, "-c", "import sample.part7; print(sample.part7.VALUE)", cwd=root)]
        run(python, "-m", "compileall", "-q", root / "venv" / "lib", cwd=root)
        said.append(run(root / "venv" / "bin" / "sample", cwd=root))
        run(*pip, "install", "-q", "--no-index", "--target", "target", wheel, cwd=root)
        said.append(sorted(str(path.relative_to(root / "target")) for path in (root / "target").rglob("*")))
        said.append(sorted(path.name for path in (root / "venv" / "bin").iterdir()))
        return said

    same(ground, "pip", work)


def make_wheel(root: Path) -> Path:
    """Make a wheel of 100 modules and a script."""
    path = root / "sample-1.0-py3-none-any.whl"
    info = "sample-1.0.dist-info"
    contents = {f"sample/part{number}.py": f"VALUE = {number}\n" * (number + 1) for number in range(100)}
    contents["sample/__init__.py"] = "def main():\n    print('sample runs')\n"
    contents[f"{info}/METADATA"] = "Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n"
    contents[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    contents[f"{info}/entry_points.txt"] = "[console_scripts]\nsample = sample:main\n"
    contents[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*contents, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in contents.items():
            wheel.writestr(name, content)
    return path


# Databases

#: Transactions after which the writer is killed.
_ACKNOWLEDGED: Final = 25


def _tell(pipe: int, step: int) -> None:
    os.write(pipe, step.to_bytes(4))


def killed_after(work: Callable[[Callable[[int], None]], None], count: int) -> int:
    """Run ``work`` in a process, kill it after it has told of ``count`` steps; return the last it told of."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        try:
            work(lambda step: _tell(write_end, step))
        finally:
            os._exit(1)
    os.close(write_end)
    last = -1
    with os.fdopen(read_end, "rb") as told:
        while (step := told.read(4)) and int.from_bytes(step) < count:
            last = int.from_bytes(step)
        os.kill(pid, signal.SIGKILL)
        while step := told.read(4):
            last = int.from_bytes(step)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    return last


@pytest.mark.parametrize("journal", ["wal", "delete", "truncate"])
def test_sqlite_after_the_writer_was_killed(ground: posix_rig.Ground, journal: str) -> None:
    _, mounted = (place.root for place in ground.places(f"sqlite-{journal}"))
    path = mounted / "database"

    def write(tell: Callable[[int], None]) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute(f"PRAGMA journal_mode={journal}")
            database.execute("PRAGMA synchronous=FULL")
            database.execute("CREATE TABLE IF NOT EXISTS rows (step INTEGER, part INTEGER, data BLOB)")
            (first,) = database.execute("SELECT coalesce(max(step) + 1, 0) FROM rows").fetchone()
            for step in range(10_000):
                database.execute("BEGIN")
                for part in range(20):
                    database.execute("INSERT INTO rows VALUES (?, ?, ?)", (first + step, part, pattern(500, part)))
                database.execute("UPDATE rows SET data = ? WHERE step = ?", (pattern(700, step), first + step // 2))
                database.execute("COMMIT")
                tell(step)

    total = 0
    for _ in range(5 if LONG else 2):
        total += killed_after(write, _ACKNOWLEDGED) + 1
        with closing(sqlite3.connect(path)) as database, database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            counts = database.execute("SELECT step, count(*) FROM rows GROUP BY step ORDER BY step").fetchall()
        assert [count for _, count in counts] == [20] * len(counts), "a transaction is there in part"
        assert len(counts) >= total, "an acknowledged transaction is lost"
        total = len(counts)


def test_sqlite_in_several_processes(ground: posix_rig.Ground) -> None:
    _, mounted = (place.root for place in ground.places("sqlite-many"))
    path = mounted / "database"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("PRAGMA journal_mode=wal")
        database.execute("CREATE TABLE counter (value INTEGER)")
        database.execute("INSERT INTO counter VALUES (0)")

    def count() -> None:
        with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as database:
            for _ in range(25):
                database.execute("UPDATE counter SET value = value + 1")

    together([count] * 4)
    with closing(sqlite3.connect(path)) as database, database:
        assert database.execute("SELECT value FROM counter").fetchone() == (100,)
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def together(works: list[Callable[[], None]]) -> None:
    """Run each in a process of its own; all must end well."""
    pids = []
    for work in works:
        pid = os.fork()
        if pid == 0:
            try:
                work()
                os._exit(0)
            except BaseException as error:
                print(f"a process failed: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * len(works)


@pytest.mark.parametrize("mapped", [True, False], ids=["written by mapping", "written by calls"])
def test_lmdb_after_the_writer_was_killed(ground: posix_rig.Ground, mapped: bool) -> None:
    _, mounted = (place.root for place in ground.places(f"lmdb-{mapped}"))

    def environment() -> lmdb.Environment:
        return lmdb.open(str(mounted), map_size=32 * 2**20, writemap=mapped)

    def write(tell: Callable[[int], None]) -> None:
        with environment() as opened:
            for step in range(10_000):
                with opened.begin(write=True) as txn:
                    for part in range(30):
                        txn.put(b"%06d-%02d" % (step, part), pattern(300, step + part))
                    if step > 10:
                        txn.delete(b"%06d-%02d" % (step - 10, 0))
                tell(step)

    last = killed_after(write, _ACKNOWLEDGED)
    with environment() as opened, opened.begin() as txn:
        found = {bytes(key): bytes(value) for key, value in txn.cursor()}
    steps = max(int(key[:6]) for key in found)
    assert steps >= last, "an acknowledged transaction is lost"
    expected = {
        b"%06d-%02d" % (step, part): pattern(300, step + part)
        for step in range(steps + 1)
        for part in range(30)
        if part or step > steps - 10 or step == 0
    }
    assert found == expected


# Load

_FIO_JOBS: Final = {
    "sequential": ("--rw=write", "--bs=128k", "--size=16m", "--ioengine=psync"),
    "random": ("--rw=randwrite", "--bs=4k-20k", "--bs_unaligned", "--size=4m", "--ioengine=psync"),
    "mixed": ("--rw=randrw", "--bs=8k", "--size=4m", "--ioengine=psync", "--fsync=50"),
    "direct": ("--rw=randwrite", "--bs=16k", "--size=8m", "--ioengine=psync", "--direct=1"),
    "mapped": ("--rw=randwrite", "--bs=4k", "--size=4m", "--ioengine=mmap"),
    "asynchronous": ("--rw=randwrite", "--bs=16k", "--size=8m", "--ioengine=libaio", "--iodepth=8", "--direct=1"),
    "several": ("--rw=randwrite", "--bs=4k", "--size=1m", "--ioengine=psync", "--numjobs=3"),
}


@pytest.mark.parametrize("job", _FIO_JOBS)
def test_fio(ground: posix_rig.Ground, job: str) -> None:
    needs("fio")
    _, mounted = (place.root for place in ground.places(f"fio-{job}"))
    run(
        *("fio", f"--name={job}", f"--directory={mounted}", *_FIO_JOBS[job]),
        *("--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--randseed=7", "--group_reporting"),
        cwd=mounted,
    )


def test_many_processes_in_one_directory(ground: posix_rig.Ground) -> None:
    """Their own files come and go; one counter is changed under a lock file, one file replaced by rename."""
    _, mounted = (place.root for place in ground.places("crowd"))
    (mounted / "counter").write_text("0")
    (mounted / "current").write_bytes(pattern(50_000, 0))

    def work(number: int) -> None:
        for turn in range(60):
            path = mounted / f"file-{number}-{turn}"
            path.write_bytes(pattern(turn * 100, number))
            os.rename(path, mounted / f"kept-{number}-{turn}")
            if turn % 2:
                os.unlink(mounted / f"kept-{number}-{turn}")
        for turn in range(15):
            _counted(mounted)
            new = mounted / f"new-{number}"
            new.write_bytes(pattern(50_000, number * 100 + turn))
            os.rename(new, mounted / "current")
            content = (mounted / "current").read_bytes()
            assert any(content == pattern(50_000, seed) for seed in _seeds()), "a replaced file is seen in part"
        with open(mounted / "locked", "a+b") as locked:
            for _ in range(15):
                fcntl.flock(locked, fcntl.LOCK_EX)
                locked.write(b"x" * 100)
                locked.flush()
                fcntl.flock(locked, fcntl.LOCK_UN)

    together([partial(work, number) for number in range(5)])
    kept = {f"kept-{number}-{turn}" for number in range(5) for turn in range(0, 60, 2)}
    assert set(os.listdir(mounted)) == kept | {"counter", "current", "locked"}
    assert (mounted / "counter").read_text() == "75"
    assert (mounted / "locked").stat().st_size == 5 * 15 * 100


def _counted(directory: Path) -> None:
    """Count one up, under a lock file."""
    deadline = time.monotonic() + 60
    while True:
        try:
            os.close(os.open(directory / "lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            assert time.monotonic() < deadline, "the lock file is never free"
    value = int((directory / "counter").read_text())
    (directory / "counter").write_text(str(value + 1))
    os.unlink(directory / "lock")


def _seeds() -> list[int]:
    return [0, *(number * 100 + turn for number in range(5) for turn in range(15))]
