"""The real command and real mounts: every mistake is one line and leaves nothing behind; every end is a clean one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import rig
from conftest import MountFactory

from fuseclient import mounts, processes, runtime

#: What the kernel says of a connection that is no more: by when and how it ended.
CUT_OFF = r"not connected|connection abort|canceled"

pytestmark = pytest.mark.usefixtures("needs_mounts")


@pytest.fixture
def point(sandbox: rig.Sandbox) -> Path:
    """An empty directory to mount on."""
    return sandbox.directory("mnt")


def write(path: Path, data: bytes) -> None:
    """Write a file so that it is acknowledged to be durable."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def in_private_namespace(sandbox: rig.Sandbox, script: str) -> rig.Outcome:
    """Run a shell script in a mount namespace of its own in which the fuse module has no parameters."""
    hide = "mount -t tmpfs none /sys/module/fuse/parameters && "
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", hide + script]
    env = {**sandbox.environment, "BPFUSE": " ".join(rig.COMMAND)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    return rig.Outcome(done.returncode, done.stdout, done.stderr)


# Mistakes


def test_a_mount_point_that_is_missing(sandbox: rig.Sandbox) -> None:
    url = sandbox.format()
    sandbox.run("mount", url, sandbox.path / "none").expect_error("none", "does not exist")
    sandbox.assert_nothing_runs()


def test_a_mount_point_that_is_a_file(sandbox: rig.Sandbox) -> None:
    url = sandbox.format()
    (sandbox.path / "file").touch()
    sandbox.run("mount", url, sandbox.path / "file").expect_error("not a directory")
    sandbox.run("mount", url, sandbox.path / "file" / "below").expect_error("not a directory")


def test_a_mount_point_that_is_mounted(sandbox: rig.Sandbox, mount: MountFactory) -> None:
    first = mount()
    other = sandbox.format("other")
    sandbox.run("mount", other, first.path).expect_error(str(first.path), "mounted already")
    (sandbox.path / "link").symlink_to(first.path)
    sandbox.run("mount", other, sandbox.path / "link").expect_error("mounted already")
    write(first.path / "still", b"works")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", ["nonsense", "file:///"]),
        ("file://relative", ["absolute"]),
        ("file://{}/none", ["not a volume", "bpfuse format"]),
        ("file://{}/mnt", ["not a volume"]),
        ("file://{}/file", ["not a volume"]),
        ("bpfuse://127.0.0.1:1/v", ["127.0.0.1:1"]),
        ("bpfuse://127.0.0.1/v", ["bpfuse://host:port/volume"]),
    ],
)
def test_a_url_that_is_no_volume(sandbox: rig.Sandbox, point: Path, url: str, words: list[str]) -> None:
    (sandbox.path / "file").touch()
    sandbox.run("mount", url.format(sandbox.path), point).expect_error(*words)
    sandbox.assert_nothing_runs()


def test_a_volume_that_its_metaserver_does_not_have(sandbox: rig.Sandbox, point: Path) -> None:
    server = sandbox.start("metaserver", "--engine", f"lmdb://{sandbox.path}/engine", "--listen", "127.0.0.1:0")
    assert server.stderr is not None
    first = server.stderr.readline()
    address = re.search(r"tcp:(127\.0\.0\.1:\d+)", first)
    assert address is not None, first
    sandbox.run("mount", f"bpfuse://{address[1]}/missing", point).expect_error("no volume 'missing'", "bpfuse format")
    url = f"bpfuse://{address[1]}/v"
    sandbox.run("format", url, "--store", f"file://{sandbox.path}/blocks").expect_success()
    sandbox.run("format", url, "--store", f"file://{sandbox.path}/blocks").expect_error("'v' already")
    server.terminate()
    assert server.wait(rig.WAIT_S) == 0


def test_a_volume_that_is_mounted_elsewhere(sandbox: rig.Sandbox, mount: MountFactory) -> None:
    first = mount()
    second = sandbox.directory("second")
    sandbox.run("mount", first.url, second).expect_error("mounted already", str(first.path))
    assert sandbox.registered() == [runtime.mount_key(str(first.path))]


def test_a_volume_that_is_in_use_where_the_registry_cannot_tell(sandbox: rig.Sandbox, mount: MountFactory) -> None:
    first = mount()
    second = sandbox.directory("second")
    elsewhere = {"BPFUSE_RUNTIME_DIR": str(sandbox.path / "run2")}
    log = sandbox.path / "second.log"
    refused = sandbox.run("mount", first.url, second, "--log-file", log, env=elsewhere)
    refused.expect_error(f"{first.url.removeprefix('file://')}")
    assert not list((sandbox.path / "run2").glob("*/"))
    assert mounts.find_mount(str(second)) is None


def test_a_mount_point_above_the_volume(sandbox: rig.Sandbox) -> None:
    above = sandbox.directory("above")
    url = sandbox.format("above/volume")
    sandbox.run("mount", url, above).expect_error("below the mount point")


def test_not_root(sandbox: rig.Sandbox, point: Path) -> None:
    url = sandbox.format()
    code = (
        "import contextlib, os, sys; from fuseclient import cli, mounting, native\n"
        "sys.argv = ['bpfuse', 'mount', '--help']\n"
        "with contextlib.suppress(SystemExit): cli.main()\n"  # imports what that user may not be able to read
        "os.setgid(65534); os.setuid(65534)\n"
        f"sys.argv = ['bpfuse', 'mount', {url!r}, {str(point)!r}]\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [rig.COMMAND[0], "-c", code], env=sandbox.environment, capture_output=True, text=True, check=False
    )
    rig.Outcome(done.returncode, done.stdout, done.stderr).expect_error("user 65534", "root")
    sandbox.assert_nothing_runs()


def test_a_missing_feature_with_accel_bpf(sandbox: rig.Sandbox, point: Path) -> None:
    url = sandbox.format()
    refused = in_private_namespace(sandbox, f"exec $BPFUSE mount {url} {point} --accel bpf")
    refused.expect_error("FUSE-over-io_uring", "enable_uring", "bpfuse doctor")
    sandbox.assert_nothing_runs()


def test_a_missing_feature_with_accel_auto_mounts_and_says_so(sandbox: rig.Sandbox, point: Path) -> None:
    url = sandbox.format()
    log = sandbox.path / "mnt.log"
    done = in_private_namespace(
        sandbox,
        f"$BPFUSE mount {url} {point} --log-file {log} && echo hello > {point}/f && $BPFUSE stats {point} --json"
        f" && $BPFUSE umount {point}",
    ).expect_success()
    assert "FUSE-over-io_uring" in done.err
    assert "not accelerated" in done.err
    assert json.loads(done.out.splitlines()[-1])["accel"] == "off"


@pytest.mark.parametrize("size", ["1K", "100T"])
def test_a_kernel_cache_of_no_sense(sandbox: rig.Sandbox, point: Path, size: str) -> None:
    url = sandbox.format()
    sandbox.run("mount", url, point, "--kernel-cache-size", size).expect_error("kernel cache")


def test_a_log_file_that_cannot_be_opened(sandbox: rig.Sandbox, point: Path) -> None:
    url = sandbox.format()
    sandbox.run("mount", url, point, "--log-file", "/proc/none/log").expect_error("/proc/none/log")
    sandbox.assert_nothing_runs()


def test_a_channel_that_dies_at_once_is_one_line(sandbox: rig.Sandbox, point: Path) -> None:
    """An embedded metaserver that cannot open its engine: what it says reaches the user."""
    url = sandbox.format()
    (sandbox.path / "volume" / "meta" / "data.mdb").write_bytes(b"not a database" * 1000)
    log = sandbox.path / "mnt.log"
    sandbox.run("mount", url, point, "--accel", "off", "--log-file", log).expect_error()
    sandbox.assert_nothing_runs()


def test_unmounting_what_is_not_ours(sandbox: rig.Sandbox, point: Path) -> None:
    sandbox.run("umount", point).expect_error("nothing is mounted")
    sandbox.run("umount", sandbox.path / "none").expect_error("nothing is mounted")
    sandbox.run("umount", "/proc").expect_error("another kind", "proc")


def test_figures_of_what_is_not_ours(sandbox: rig.Sandbox, point: Path) -> None:
    sandbox.run("stats", point).expect_error("not on a bpfuse mount")
    sandbox.run("stats", "/proc").expect_error("not on a bpfuse mount")


# A mount and its end


def test_a_mount_says_what_it_is(sandbox: rig.Sandbox, point: Path, accel: str) -> None:
    url = sandbox.format()
    before = rig.uring_switch()
    log = sandbox.path / "mnt.log"
    said = sandbox.run("mount", url, point, "--accel", accel, "--log-file", log).expect_success().out
    assert said.splitlines() == [said.rstrip("\n")]
    assert url in said
    assert ("BPF programs" in said) == (accel == "bpf")
    found = mounts.find_mount(str(point))
    assert found is not None
    assert found.source == url
    assert rig.uring_switch() == before
    sandbox.run("umount", point).expect_success()


def test_what_a_mount_leaves_is_private(sandbox: rig.Sandbox, mount: MountFactory) -> None:
    mounted = mount()
    directory = sandbox.runtime / runtime.mount_key(str(mounted.path))
    assert directory.stat().st_mode & 0o7777 == 0o700
    for name in ("mount.json", "control.sock", "metaserver.sock"):
        assert (directory / name).stat().st_mode & 0o077 == 0, name
    assert mounted.log.stat().st_mode & 0o7777 == 0o600
    assert {process.role for process in mounted.record.processes} == {"channel", "worker", "metaserver"}


def test_the_log_goes_to_var_log_by_default(sandbox: rig.Sandbox, point: Path) -> None:
    log = Path("/var/log/bpfuse") / f"{runtime.mount_key(str(point))}.log"
    try:
        sandbox.run("mount", sandbox.format(), point, "--accel", "off").expect_success()
        assert log.stat().st_mode & 0o7777 == 0o600
        sandbox.run("umount", point).expect_success()
    finally:
        log.unlink(missing_ok=True)


def test_data_outlives_the_mount(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    write(mounted.path / "f", b"kept")
    mounted.remount()
    assert (mounted.path / "f").read_bytes() == b"kept"
    assert os.listdir(mounted.path) == ["f"]


def test_the_kernel_answers(mount: MountFactory) -> None:
    mounted = mount("bpf")
    for number in range(50):
        write(mounted.path / f"f{number}", b"x" * number)
    mounted.remount()
    for number in range(50):
        assert (mounted.path / f"f{number}").read_bytes() == b"x" * number
    reading = mounted.stats()
    assert reading["accel"] == "bpf"
    for opcode in ("LOOKUP", "OPEN", "READ"):
        figures = reading["requests"][opcode]
        assert figures["kernel"] > figures["daemon"], opcode


def test_without_acceleration_the_kernel_answers_nothing(mount: MountFactory) -> None:
    mounted = mount("off")
    write(mounted.path / "f", b"x")
    assert (mounted.path / "f").read_bytes() == b"x"
    reading = mounted.stats()
    assert reading["accel"] == "off"
    assert all(figures["kernel"] == 0 for figures in reading["requests"].values())


def test_a_read_only_mount_refuses_changes(mount: MountFactory) -> None:
    mounted = mount()
    write(mounted.path / "f", b"x")
    mounted.remount("--read-only")
    with pytest.raises(OSError, match="Read-only") as refused:
        (mounted.path / "g").touch()
    assert refused.value.errno == errno.EROFS
    assert (mounted.path / "f").read_bytes() == b"x"


def test_figures_as_json_and_as_a_table(sandbox: rig.Sandbox, mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    (mounted.path / "d").mkdir()
    reading = mounted.stats()
    assert {"accel", "profile", "epoch", "lease_remaining_s", "worker", "requests", "maps"} <= reading.keys()
    assert reading["worker"]["pid"] == mounted.process("worker").pid
    assert reading["worker"]["rss_bytes"] > 0
    assert reading["requests"]["MKDIR"] == {"kernel": 0, "daemon": 1}
    table = sandbox.run("stats", mounted.path / "d").expect_success().out
    assert "MKDIR" in table
    assert mounted.url in table


def test_figures_again_and_again(sandbox: rig.Sandbox, mount: MountFactory) -> None:
    mounted = mount()
    watching = sandbox.start("stats", mounted.path, "--watch", "--json", "--interval", "0.1")
    assert watching.stdout is not None
    for _ in range(3):
        assert json.loads(watching.stdout.readline())["accel"] == "off"
    watching.send_signal(signal.SIGINT)
    assert watching.wait(rig.WAIT_S) == 130


def end_by_umount8(mounted: rig.Mount) -> None:
    subprocess.run(["umount", mounted.path], check=True)


def end_by_sigterm(mounted: rig.Mount) -> None:
    os.kill(mounted.record.pid, signal.SIGTERM)


def end_by_sigint(mounted: rig.Mount) -> None:
    os.kill(mounted.record.pid, signal.SIGINT)


@pytest.mark.parametrize("end", [end_by_umount8, end_by_sigterm, end_by_sigint])
def test_every_end_ends_every_process(mount: MountFactory, accel: str, end: Callable[[rig.Mount], None]) -> None:
    mounted = mount(accel)
    write(mounted.path / "f", b"kept")
    record, objects = mounted.record, mounted.bpf_objects()
    end(mounted)
    assert processes.wait_ended(record.processes, rig.WAIT_S) == []
    rig.assert_gone(record, objects)
    assert mounted.sandbox.registered() == []


def test_a_mount_in_use_is_not_unmounted(sandbox: rig.Sandbox, mount: MountFactory) -> None:
    mounted = mount()
    with (mounted.path / "f").open("wb") as file:
        sandbox.run("umount", mounted.path).expect_error("in use", "--force")
        file.write(b"still works")
    assert (mounted.path / "f").read_bytes() == b"still works"
    mounted.unmount()


def test_a_mount_in_use_is_forced(mount: MountFactory, accel: str) -> None:
    mounted = mount(accel)
    write(mounted.path / "f", b"kept")
    descriptor = os.open(mounted.path / "f", os.O_RDONLY)
    mounted.unmount("--force")
    assert mounts.find_mount(str(mounted.path)) is None
    with pytest.raises(OSError, match=CUT_OFF):
        os.fsync(descriptor)
    with contextlib.suppress(OSError):  # what close asks of a mount depends on who answered the open
        os.close(descriptor)
    mounted.mount()
    assert (mounted.path / "f").read_bytes() == b"kept"


def test_a_killed_channel_is_cleared_and_its_data_is_there(
    sandbox: rig.Sandbox, mount: MountFactory, accel: str
) -> None:
    mounted = mount(accel)
    write(mounted.path / "f", b"acknowledged")
    record, objects = mounted.record, mounted.bpf_objects()
    os.kill(record.pid, signal.SIGKILL)
    assert processes.wait_ended([mounted.process("channel")], rig.WAIT_S) == []
    with pytest.raises(OSError, match=CUT_OFF):
        mounted.path.stat()
    sandbox.run("mount", mounted.url, mounted.path).expect_error("dead mount point", "bpfuse umount")
    sandbox.run("stats", mounted.path).expect_error("dead mount point")
    sandbox.run("umount", mounted.path).expect_success()
    rig.assert_gone(record, objects)
    sandbox.assert_nothing_runs()
    mounted.mount()
    assert (mounted.path / "f").read_bytes() == b"acknowledged"


def test_a_dead_mount_point_without_a_record_is_cleared(sandbox: rig.Sandbox, mount: MountFactory) -> None:
    mounted = mount()
    record = mounted.record
    os.kill(record.pid, signal.SIGKILL)
    assert processes.wait_ended(record.processes, rig.WAIT_S) == []
    (sandbox.runtime / runtime.mount_key(str(mounted.path)) / "mount.json").unlink()
    sandbox.run("umount", mounted.path).expect_success()
    sandbox.assert_nothing_runs()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_mount_in_the_foreground_ends_with_its_command(
    sandbox: rig.Sandbox, point: Path, number: signal.Signals, code: int
) -> None:
    url = sandbox.format()
    command = sandbox.start("mount", url, point, "--accel", "off", "--foreground")
    assert command.stdout is not None
    assert url in command.stdout.readline()
    write(point / "f", b"x")
    command.send_signal(number)
    assert command.wait(rig.WAIT_S) == code
    sandbox.assert_nothing_runs()


def test_a_mount_in_the_foreground_ends_with_umount(sandbox: rig.Sandbox, point: Path) -> None:
    command = sandbox.start("mount", sandbox.format(), point, "--accel", "off", "--foreground")
    assert command.stdout is not None
    assert command.stdout.readline()
    sandbox.run("umount", point).expect_success()
    assert command.wait(rig.WAIT_S) == 0


def test_an_interrupted_start_leaves_nothing(sandbox: rig.Sandbox, point: Path) -> None:
    url = sandbox.format()
    log = sandbox.path / "mnt.log"
    command = sandbox.start("mount", url, point, "--accel", "off", "--log-file", log)
    rig.wait_for(sandbox.registered, "the mount is being made")
    command.send_signal(signal.SIGINT)
    if command.wait(rig.WAIT_S) == 0:  # it was ready first
        sandbox.run("umount", point).expect_success()
    else:
        assert command.returncode == 130
    sandbox.assert_nothing_runs()


def test_of_two_mounts_on_one_point_at_once_one_wins(sandbox: rig.Sandbox, point: Path) -> None:
    urls = [sandbox.format("a"), sandbox.format("b")]
    arguments = (point, "--accel", "off", "--log-file", sandbox.path / "mnt.log")
    commands = [sandbox.start("mount", url, *arguments) for url in urls]
    codes = sorted(command.wait(2 * rig.WAIT_S) for command in commands)
    assert codes == [0, 1]
    assert len(sandbox.mounted()) == 1
    sandbox.run("umount", point).expect_success()
