"""What tests of the real command share: running it, real mounts under a watchdog, and the proof that nothing is left.

Every process that a test starts carries the test's own BPFUSE_RUNTIME_DIR in its environment: by that it is found.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from fuseclient import features, mounts, processes, runtime
from fuseclient.channel import acceleration

REPOSITORY: Final = Path(__file__).resolve().parent.parent
COMMAND: Final = (sys.executable, "-P", "-m", "fuseclient.cli")
#: A mount that lives longer in one test is taken to hang.
WATCHDOG_S: Final = 60.0
WAIT_S: Final = 20.0
_COMMAND_TIMEOUT_S: Final = 120.0
_URING_SWITCH: Final = Path("/sys/module/fuse/parameters/enable_uring")
_SERIOUS: Final = re.compile(r"\b(ERROR|CRITICAL)\b|^Traceback|Fatal Python error", re.MULTILINE)


@functools.cache
def probed() -> list[features.Feature]:
    """Return what this machine offers; it is tried once in a run."""
    return features.probe()


def require_mounts() -> None:
    """Skip the test where nothing can be mounted."""
    if missing := features.missing_for_mount(probed()):
        pytest.skip(f"nothing can be mounted here: {features.describe(missing)}")


def require_uring() -> None:
    """Skip the test where requests cannot be answered in the kernel; fail if that is the programs' own fault."""
    if missing := features.missing_for_bpf(probed()):
        if [each.name for each in missing] == ["BPF programs"] and "not permitted" not in missing[0].detail:
            pytest.fail(f"this kernel has all it takes, and refuses them: {missing[0].detail}")
        pytest.skip(f"requests cannot be answered in the kernel here: {features.describe(missing)}")


def uring_switch() -> str | None:
    """Return what the kernel's switch for FUSE-over-io_uring is while no mount is being made; None without one."""
    with acceleration.switch_locked():
        return _URING_SWITCH.read_text() if _URING_SWITCH.exists() else None


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """Return the condition's value as soon as it is true; fail after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s:g} s for this, in vain: {what}")
        time.sleep(0.01)
    return value


@dataclass
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str

    def expect_success(self) -> Outcome:
        assert self.code == 0, f"exit code {self.code}: {self.err or self.out}"
        return self

    def expect_error(self, *words: str, code: int = 1) -> Outcome:
        """Expect one line on standard error that begins with "bpfuse: " and has these words in it."""
        assert self.code == code, f"exit code {self.code}, not {code}: {self.out}{self.err}"
        lines = self.err.splitlines()
        assert len(lines) == 1, f"more or less than one line: {self.err!r}"
        assert lines[0].startswith("bpfuse: ")
        for word in words:
            assert word in lines[0], f"{word!r} is not in {lines[0]!r}"
        return self


class Sandbox:
    """A directory and a runtime directory of one test, with short paths, for sockets' sake."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="bpfuse-t-"))
        self.runtime = self.path / "run"
        self._extra_processes: list[subprocess.Popen[str]] = []

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"BPFUSE_RUNTIME_DIR": str(self.runtime), "BPFUSE_CACHE_DIR": str(self.path / "cache")}
        return {**os.environ, **own, "PYTHONPATH": path, "COLUMNS": "200"}

    def directory(self, name: str) -> Path:
        """Return a directory of this name, made if it is not there."""
        path = self.path / name
        path.mkdir(exist_ok=True)
        return path

    def run(self, *arguments: str | Path, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Outcome:
        """Run ``bpfuse`` with these arguments to its end."""
        command = [*prefix, *COMMAND, *map(str, arguments)]
        done = subprocess.run(
            command,
            env={**self.environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start ``bpfuse`` with these arguments; at the latest it ends with the test."""
        command = [*COMMAND, *map(str, arguments)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )
        self._extra_processes.append(process)
        return process

    def format(self, name: str = "volume", *options: str) -> str:
        """Make an embedded volume and return its URL."""
        url = f"file://{self.path / name}"
        self.run("format", url, *options).expect_success()
        return url

    def running(self) -> list[int]:
        """Return the processes that belong to this sandbox."""
        mark = f"BPFUSE_RUNTIME_DIR={self.runtime}\0".encode()
        return [pid for pid in _pids() if mark in _environment(pid)]

    def mounted(self) -> list[str]:
        """Return the mount points inside this sandbox."""
        return [mount.mountpoint for mount in mounts.list_mounts() if mount.mountpoint.startswith(f"{self.path}/")]

    def registered(self) -> list[str]:
        """Return the runtime directories of mounts."""
        return [path.name for path in self.runtime.iterdir() if path.is_dir()] if self.runtime.is_dir() else []

    def assert_nothing_runs(self) -> None:
        """Fail if a process, a mount or a runtime directory is left."""
        assert not self.mounted()
        assert not self.registered()
        left = [f"{pid}: {_command_line(pid)}" for pid in self.running()]
        assert not left, f"processes are left: {left}"

    def close(self) -> None:
        """End by force whatever is left, and remove the directory."""
        for process in self._extra_processes:
            process.kill()
            process.communicate()
        for mountpoint in reversed(self.mounted()):
            _tear_off(mountpoint)
        for pid in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.path, ignore_errors=True)


@dataclass
class Mount:
    """One real mount. ``allowed`` are patterns of serious log lines that the test provokes."""

    sandbox: Sandbox
    url: str
    path: Path
    accel: str
    options: tuple[str, ...]
    allowed: list[str] = field(default_factory=list)
    #: What the command is run by, to have the mount's processes in another network namespace.
    prefix: tuple[str, ...] = ()

    @property
    def log(self) -> Path:
        return self.sandbox.path / f"{self.path.name}.log"

    @property
    def record(self) -> runtime.MountRecord:
        with self.sandbox_environment():
            record = runtime.directory_of(str(self.path)).read()
        assert record is not None
        return record

    def process(self, role: str) -> processes.Process:
        """Return the mount's "channel", "worker" or "metaserver"."""
        return next(process for process in self.record.processes if process.role == role)

    def mount(self) -> None:
        """Mount by the real command."""
        arguments: tuple[str | Path, ...] = (
            self.url,
            self.path,
            "--accel",
            self.accel,
            "--log-file",
            self.log,
            *self.options,
        )
        outcome = self.sandbox.run("mount", *arguments, prefix=self.prefix)
        assert outcome.code == 0, f"{outcome.err}\n{self.read_log()}"

    def unmount(self, *options: str) -> None:
        """Unmount by the real command, and see that all of it is gone."""
        record, objects = self.record, self.bpf_objects()
        self.sandbox.run("umount", self.path, *options).expect_success()
        assert_gone(record, objects)

    def remount(self, *options: str) -> None:
        """Unmount and mount again: every cache is cold then."""
        self.unmount()
        self.options = options or self.options
        self.mount()

    def stats(self) -> dict[str, Any]:
        """Return what ``bpfuse stats --json`` says."""
        outcome = self.sandbox.run("stats", self.path, "--json").expect_success()
        reading = json.loads(outcome.out)
        assert isinstance(reading, dict)
        return reading

    def answered(self, opcode: str) -> tuple[int, int]:
        """Return how many requests of an opcode the kernel and the daemon have answered."""
        figures = self.stats()["requests"].get(opcode, {"kernel": 0, "daemon": 0})
        return figures["kernel"], figures["daemon"]

    def bpf_objects(self) -> set[tuple[str, int]]:
        """Return the BPF maps and programs that the channel holds, as (kind, id)."""
        return _bpf_objects(self.record.pid)

    def read_log(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else "(no log)"

    def sandbox_environment(self) -> contextlib.AbstractContextManager[None]:
        """Have this process use the sandbox's runtime directory."""
        return _environment_variable("BPFUSE_RUNTIME_DIR", str(self.sandbox.runtime))


@contextlib.contextmanager
def guarded(mount: Mount) -> Iterator[None]:
    """Put the body under a watchdog, which ends the mount if it hangs."""
    watchdog = threading.Timer(WATCHDOG_S, _bite, (mount,))
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


@contextlib.contextmanager
def watched(mount: Mount) -> Iterator[Mount]:
    """Have the mount for the body: mounted before, unmounted after, under a watchdog, and nothing left of it."""
    with guarded(mount):
        try:
            mount.mount()
            yield mount
            if mounts.find_mount(str(mount.path)) is not None:
                mount.unmount()
            assert_log_is_clean(mount)
        except BaseException:
            print(f"--- log of {mount.path}\n{mount.read_log()}", file=sys.stderr)
            raise


def assert_gone(record: runtime.MountRecord, objects: set[tuple[str, int]]) -> None:
    """Fail unless every process, the mount and the BPF objects of a mount are gone."""
    left = [f"{process.role} {process.pid}" for process in record.processes if processes.is_alive(process)]
    assert not left, f"processes are left: {left}"
    assert mounts.find_mount(record.mountpoint) is None
    # The kernel frees them a moment after the last descriptor is closed.
    wait_for(lambda: not objects & _all_bpf_objects(), f"the BPF objects {objects} are freed")


def assert_log_is_clean(mount: Mount) -> None:
    """Fail on a serious line of the log that the test did not expect."""
    lines = [line for line in mount.read_log().splitlines() if _SERIOUS.search(line)]
    stray = [line for line in lines if not any(re.search(pattern, line) for pattern in mount.allowed)]
    assert not stray, f"in the log of {mount.path}: {stray}"


def _bite(mount: Mount) -> None:
    """Show where a hanging mount's processes are, then abort its connection, so that the test's own calls return."""
    print(f"--- {mount.path} hangs; stacks go to its log", file=sys.stderr)
    for pid in mount.sandbox.running():
        if _catches(pid, signal.SIGUSR1):
            os.kill(pid, signal.SIGUSR1)
    found = mounts.find_mount(str(mount.path))
    if found is not None:
        time.sleep(1.0)  # the signal handlers print on threads that the abort would move on
        mounts.abort_connection(found.device_minor)


def _tear_off(mountpoint: str) -> None:
    found = mounts.find_mount(mountpoint)
    if found is not None and found.filesystem == mounts.FILESYSTEM_TYPE:
        mounts.abort_connection(found.device_minor)
    mounts.unmount(mountpoint, lazy=True)


def _catches(pid: int, number: signal.Signals) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and int(path.name) != os.getpid()]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes() + b"\0"
    except OSError:
        return b""


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "(it has just ended)"


def _bpf_objects(pid: int) -> set[tuple[str, int]]:
    found = set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            for kind, number in re.findall(r"^(map|prog)_id:\s*(\d+)$", path.read_text(), re.MULTILINE):
                found.add((kind, int(number)))
    return found


def _all_bpf_objects() -> set[tuple[str, int]]:
    if shutil.which("bpftool") is None:
        return set()
    found = set()
    for kind in ("map", "prog"):
        listed = subprocess.run(["bpftool", "-j", kind, "show"], capture_output=True, text=True, check=False)
        found |= {(kind, entry["id"]) for entry in json.loads(listed.stdout or "[]") if "id" in entry}
    return found


@contextlib.contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
