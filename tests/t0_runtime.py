"""The registry of mounts, processes by identity, the kernel's list of mounts, and the control socket's client."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import rig
from hypothesis import given
from hypothesis import strategies as st

from fuseclient import control, mounts, processes, runtime, unmounting
from fuseclient.errors import UserError
from fuseclient.processes import Process

ENDLESS = "import signal; print('ready', flush=True); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + ENDLESS


@contextlib.contextmanager
def program(code: str, *, descriptors: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python program that prints a line when it is ready; it is killed at the end."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, pass_fds=descriptors) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def record_of(pid: int, mountpoint: str = "/m") -> runtime.MountRecord:
    return runtime.MountRecord(
        mountpoint=mountpoint,
        url="file:///v",
        pid=pid,
        accel="off",
        profile="general",
        started=1.5,
        device_minor=42,
        processes=[processes.identify("channel", pid)],
    )


# The registry


def test_a_key_is_stable_and_of_any_bytes() -> None:
    assert runtime.mount_key("/mnt") == hashlib.sha256(b"/mnt").hexdigest()[:16]
    assert len(runtime.mount_key("/\udcff")) == 16
    assert runtime.mount_key("/a") != runtime.mount_key("/b")


def test_a_record_survives_and_is_private(runtime_root: Path) -> None:
    claim = runtime.claim("/m")
    record = record_of(os.getpid())
    claim.directory.write(record)
    assert claim.directory.read() == record
    assert runtime_root.stat().st_mode & 0o7777 == 0o700
    assert claim.directory.path.stat().st_mode & 0o7777 == 0o700
    assert claim.directory.record_path.stat().st_mode & 0o7777 == 0o600
    assert runtime.live_records() == [record]
    claim.abandon()
    assert runtime.live_records() == []
    assert claim.directory.read() is None


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b'{"mountpoint": 1}', b"\xff\xfe"])
def test_a_record_that_cannot_be_understood_is_none(runtime_root: Path, content: bytes) -> None:
    claim = runtime.claim("/m")
    claim.directory.record_path.write_bytes(content)
    assert claim.directory.read() is None
    assert runtime.live_records() == []
    claim.abandon()


def test_a_claimed_mount_point_is_refused(runtime_root: Path) -> None:
    claim = runtime.claim("/m")
    with pytest.raises(UserError, match="in use by another bpfuse mount"):
        runtime.claim("/m")
    runtime.claim("/other").abandon()
    claim.close()
    runtime.claim("/m").abandon()


def test_a_claim_lives_in_who_inherited_it_and_dies_with_it(runtime_root: Path) -> None:
    claim = runtime.claim("/m")
    with program(ENDLESS, descriptors=(claim.descriptor,)) as heir:
        claim.close()
        with pytest.raises(UserError):
            runtime.claim("/m")
        heir.kill()
        heir.wait()
        runtime.claim("/m").abandon()


def test_a_claim_is_never_on_a_removed_directory(runtime_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's end, between the opening and the locking of the directory, is noticed."""
    lock = runtime._lock
    removed: list[bool] = []

    def remove_first(descriptor: int) -> bool:
        if not removed:
            removed.append(True)
            runtime.directory_of("/m").remove()
        return lock(descriptor)

    monkeypatch.setattr(runtime, "_lock", remove_first)
    claim = runtime.claim("/m")
    assert removed
    assert os.path.samestat(os.fstat(claim.descriptor), claim.directory.path.stat())
    claim.abandon()


def test_a_runtime_directory_that_is_too_deep_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BPFUSE_RUNTIME_DIR", str(tmp_path / ("d" * 90)))
    with pytest.raises(UserError, match="too long"):
        runtime.claim("/m")


def test_a_runtime_directory_that_cannot_be_made_is_refused(
    monkeypatch: pytest.MonkeyPatch, sandbox: rig.Sandbox
) -> None:
    (sandbox.path / "file").touch()
    monkeypatch.setenv("BPFUSE_RUNTIME_DIR", str(sandbox.path / "file" / "run"))
    with pytest.raises(UserError, match="cannot be made"):
        runtime.claim("/m")


def test_a_path_on_no_mount_of_ours_is_refused(runtime_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not on a bpfuse mount"):
        runtime.mount_of(str(tmp_path))


# Processes


def test_a_process_is_known_by_its_start(runtime_root: Path) -> None:
    me = processes.identify("channel", os.getpid())
    assert processes.is_alive(me)
    assert not processes.is_alive(Process(role="channel", pid=me.pid, start_ticks=me.start_ticks - 1))


def test_waiting_for_processes_to_end() -> None:
    with program(ENDLESS) as first, program(ENDLESS) as second:
        both = [processes.identify("worker", each.pid) for each in (first, second)]
        first.kill()
        assert processes.wait_ended(both, 0.0) in (both, both[1:])
        assert processes.wait_ended(both[:1], rig.WAIT_S) == []
        assert not processes.is_alive(both[0])  # not even before its parent has waited for it
        assert processes.wait_ended(both, 0.0) == both[1:]


def test_a_pid_of_another_start_is_not_waited_for_and_not_killed() -> None:
    with program(ENDLESS) as process:
        genuine = processes.identify("worker", process.pid)
        other = Process(role="worker", pid=process.pid, start_ticks=genuine.start_ticks + 1)
        assert processes.wait_ended([other], rig.WAIT_S) == []
        processes.stop([other], rig.WAIT_S)
        assert processes.is_alive(genuine)


@pytest.mark.parametrize(("code", "end"), [(ENDLESS, signal.SIGTERM), (STUBBORN, signal.SIGKILL)])
def test_stopping_is_gentle_first(code: str, end: signal.Signals) -> None:
    with program(code) as process:
        processes.stop([processes.identify("worker", process.pid)], 0.2 if end is signal.SIGKILL else rig.WAIT_S)
        assert process.wait() == -end


def test_nobody_has_this_pid() -> None:
    with program(ENDLESS) as process:
        pass
    with pytest.raises(ProcessLookupError):
        processes.identify("worker", process.pid)


# The kernel's list of mounts


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext4 /dev/root rw,errors=continue",
            mounts.KernelMount("/mnt2", "ext4", "/dev/root", 0),
        ),
        (
            r"99 1 0:57 / /with\040space\011tab\134backslash rw - fuse.bpfuse file:///a\040b rw",
            mounts.KernelMount("/with space\ttab\\backslash", "fuse.bpfuse", "file:///a b", 57),
        ),
        ("1 1 0:1 / / rw shared:1 master:2 - rootfs  rw", mounts.KernelMount("/", "rootfs", "", 1)),
    ],
)
def test_a_line_of_the_mount_list(line: str, expected: mounts.KernelMount) -> None:
    assert mounts._parse_line(line) == expected


def test_proc_is_mounted() -> None:
    found = mounts.find_mount("/proc")
    assert found is not None
    assert found.filesystem == "proc"
    assert mounts.find_mount("/proc/self") is None


def test_a_mount_point_is_resolved_through_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    assert mounts.resolve(f"{tmp_path}/b/../b") == str(tmp_path / "a")
    assert mounts.resolve(f"{tmp_path}/none/") == str(tmp_path / "none")
    assert mounts.resolve("/../proc/") == "/proc"


def test_unmounting_what_is_not_mounted_raises(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=str(tmp_path)):
        mounts.unmount(str(tmp_path))


def test_unmounting_what_somebody_looks_at_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def unmount(mountpoint: str, *, lazy: bool = False) -> None:
        tries.append((mountpoint, lazy))
        if len(tries) < 3:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(mounts, "unmount", unmount)
    unmounting._unmount_patiently("/m", lazy=False)
    assert tries == [("/m", False)] * 3


# The control socket


@contextlib.contextmanager
def control_server(directory: Path, *pieces: bytes) -> Iterator[Path]:
    """Answer one question with these pieces, then close."""
    path = directory / "control.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                for piece in pieces:
                    connection.sendall(piece)

        thread = threading.Thread(target=serve)
        thread.start()
        yield path
        thread.join()


def test_an_answer_in_pieces(sandbox: rig.Sandbox) -> None:
    with control_server(sandbox.path, b'{"a', b'": [1,', b" 2]}\n") as path:
        assert control.ask(path, "stats") == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b'{"error": "no such command"}\n', "no such command"),
        (b"", "in the middle"),
        (b'{"a": 1}', "in the middle"),
        (b"nonsense\n", "cannot be understood"),
        (b"[1]\n", "cannot be understood"),
    ],
)
def test_an_answer_that_is_none(sandbox: rig.Sandbox, answer: bytes, words: str) -> None:
    with control_server(sandbox.path, answer) as path, pytest.raises(control.ControlError, match=words):
        control.ask(path, "stats")


def test_nobody_answers(sandbox: rig.Sandbox) -> None:
    with pytest.raises(control.ControlError):
        control.ask(sandbox.path / "none.sock", "stats")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(sandbox.path / "control.sock"))
        silent.listen()
        with pytest.raises(control.ControlError, match="does not answer"):
            control.ask(sandbox.path / "control.sock", "stats", timeout_s=0.05)


@given(st.binary(max_size=64))
def test_any_answer_is_a_dictionary_or_refused(line: bytes) -> None:
    with contextlib.suppress(control.ControlError):
        assert isinstance(control._decode(line), dict)
