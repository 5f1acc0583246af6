"""The command line without a mount: URLs, sizes, one line a mistake, exit codes, the doctor's answer, the tables."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import rig
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fuseclient import cli, features
from fuseclient.cli.values import format_size, parse_size
from fuseclient.errors import UserError
from fuseclient.observe import figures
from fuseclient.volumes import Embedded, Remote, parse_store, parse_volume


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process and return its exit code."""
    monkeypatch.setattr("sys.argv", ["bpfuse", *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def raiser(error: BaseException) -> object:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


# Volumes


def test_an_embedded_url_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    volume = parse_volume(f"file://{tmp_path}/link/../link/v")
    assert volume == Embedded(tmp_path / "real" / "v")
    assert volume.url == f"file://{tmp_path}/real/v"


def test_the_path_of_a_url_is_literal_and_travels_encoded() -> None:
    volume = parse_volume("file:///a b%20#?c")
    assert isinstance(volume, Embedded)
    assert str(volume.directory) == "/a b%20#?c"
    assert volume.engine_url == "lmdb:///a%20b%2520%23%3Fc/meta"
    assert volume.store_url == "file:///a%20b%2520%23%3Fc/blocks"
    assert parse_store("file:///a b") == "file:///a%20b"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("bpfuse://127.0.0.1:7000/v", "tcp:127.0.0.1:7000"),
        ("bpfuse://host.example:1/a-b.c_d", "tcp:host.example:1"),
        ("bpfuse://[::1]:65535/0", "tcp:[::1]:65535"),
    ],
)
def test_a_remote_url(url: str, address: str) -> None:
    volume = parse_volume(url)
    assert isinstance(volume, Remote)
    assert volume.address == address
    assert volume.url == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/tmp/x",
        "file:",
        "file://",
        "file:///",
        "file:////",
        "file://relative/path",
        "file:///a\nb",
        "file:///a\0b",
        "FILE:///a",
        "http://host/v",
        "bpfuse://",
        "bpfuse://host/v",
        "bpfuse://host:0/v",
        "bpfuse://host:65536/v",
        "bpfuse://host:x/v",
        "bpfuse://host:7000",
        "bpfuse://host:7000/",
        "bpfuse://host:7000/UPPER",
        "bpfuse://host:7000/a/b",
        "bpfuse://host:7000/" + "a" * 64,
        "bpfuse://user@host:7000/v",
    ],
)
def test_what_is_no_volume_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_volume(url)
    assert "\n" not in refused.value.message


@given(st.one_of(st.text(), st.text().map("file:///".__add__), st.text().map("bpfuse://".__add__)))
def test_any_text_is_a_volume_or_a_user_error(url: str) -> None:
    with contextlib.suppress(UserError):
        volume = parse_volume(url)
        assert parse_volume(volume.url) == volume


@pytest.mark.parametrize(
    "url",
    [
        "",
        "gs://bucket",
        "s3://",
        "s3://key:secret@bucket/x",
        "file:///x?compression=rar",
        "s3://b?endpoint=ftp://x",
        "file://x",
        "file:///",
    ],
)
def test_what_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(UserError):
        parse_store(url)


# Sizes


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("4096", 4096), ("64K", 65536), ("64kib", 65536), ("256MB", 256 << 20), ("2g", 2 << 30)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5M", "1 M", "1X", "0x10", "\u0661"])
def test_what_is_no_size_is_a_usage_error(text: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_size(text)
    assert refused.value.exit_code == 2


@given(st.integers(0, 2**45))
def test_a_size_survives_being_shown(count: int) -> None:
    assert parse_size(format_size(count)) == count


# Exit codes and what is said


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["mount"],
        ["mount", "file:///v"],
        ["mount", "file:///v", "/m", "--accel", "maybe"],
        ["mount", "file:///v", "/m", "--kernel-cache-size", "lots"],
        ["mount", "file:///v", "/m", "--lease", "0"],
        ["mount", "file:///v", "/m", "--queue-depth", "0"],
        ["mount", "file:///v", "/m", "--kernel-ttl", "-1"],
        ["format"],
        ["format", "file:///v", "--inline-limit", "x"],
        ["umount", "--nonsense", "/m"],
        ["stats", "/m", "--interval", "0"],
        ["metaserver", "--listen", "127.0.0.1:0"],
    ],
)
def test_arguments_that_cannot_be_parsed_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    code = run_main(monkeypatch, *arguments)
    captured = capsys.readouterr()
    rig.Outcome(code, captured.out, captured.err).expect_error(code=2)
    assert not captured.out


def test_a_user_error_is_one_line_with_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fuseclient.unmounting.unmount", raiser(UserError("two\nlines", exit_code=3)))
    assert run_main(monkeypatch, "umount", "/m") == 3
    assert capsys.readouterr().err == "bpfuse: two lines\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt()])
def test_an_interrupt_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    monkeypatch.setattr("fuseclient.unmounting.unmount", raiser(error))
    assert run_main(monkeypatch, "umount", "/m") == 130
    assert not capsys.readouterr().err


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuseclient.unmounting.unmount", raiser(ZeroDivisionError()))
    monkeypatch.setattr("sys.argv", ["bpfuse", "umount", "/m"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_the_real_command(sandbox: rig.Sandbox) -> None:
    assert sandbox.run("version").expect_success().out.startswith("bpfuse 0.")
    assert "umount" in sandbox.run("--help").expect_success().out
    sandbox.run("mount", "--help").expect_success()


# Formatting volumes


def test_format_makes_a_private_volume(sandbox: rig.Sandbox) -> None:
    url = sandbox.format("v")
    volume = parse_volume(url)
    assert isinstance(volume, Embedded)
    assert volume.is_formatted()
    for directory in (volume.directory, volume.metadata, volume.blocks):
        assert directory.stat().st_mode & 0o7777 == 0o700


def test_format_takes_an_empty_directory(sandbox: rig.Sandbox) -> None:
    sandbox.directory("v").chmod(0o755)
    sandbox.format("v")
    assert (sandbox.path / "v").stat().st_mode & 0o7777 == 0o700


def test_format_refuses_a_volume_that_is_there(sandbox: rig.Sandbox) -> None:
    url = sandbox.format("v")
    before = sorted(path.name for path in (sandbox.path / "v").rglob("*"))
    sandbox.run("format", url).expect_error("holds a volume already")
    assert sorted(path.name for path in (sandbox.path / "v").rglob("*")) == before


def test_format_refuses_what_is_not_its_own(sandbox: rig.Sandbox) -> None:
    (sandbox.directory("v") / "precious").write_text("kept")
    sandbox.run("format", f"file://{sandbox.path}/v").expect_error("not empty")
    assert [path.name for path in (sandbox.path / "v").iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("url", "options", "words"),
    [
        ("file://{}/none/v", [], ["cannot be made", "no such file"]),
        ("file://{}/file", [], ["not a directory"]),
        ("file://{}/v", ["--inline-limit", "65K"], ["inline limit"]),
        ("file://{}/v", ["--store", "gs://bucket"], ["store"]),
        ("file://{}/v", ["--store", "s3://bucket?endpoint=http://127.0.0.1:1&timeout=0.3"], ["cannot be used"]),
        ("bpfuse://127.0.0.1:1/v", [], ["--store"]),
        ("bpfuse://127.0.0.1:1/v", ["--store", "file:///x"], ["127.0.0.1:1"]),
        ("nonsense", [], ["nonsense"]),
    ],
)
def test_format_refuses_and_leaves_nothing(
    sandbox: rig.Sandbox, url: str, options: list[str], words: list[str]
) -> None:
    (sandbox.path / "file").write_text("kept")
    sandbox.run("format", url.format(sandbox.path), *options).expect_error(*words)
    assert [path.name for path in sandbox.path.iterdir()] == ["file"]


def test_format_that_fails_half_way_leaves_nothing(sandbox: rig.Sandbox) -> None:
    """The metaserver gets no time to start."""
    code = (
        "import sys; from fuseclient import cli, servers\n"
        "servers._READY_TIMEOUT_S = 0.0\n"
        f"sys.argv = ['bpfuse', 'format', 'file://{sandbox.path}/v']\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=sandbox.environment, capture_output=True, text=True, check=False
    )
    rig.Outcome(done.returncode, done.stdout, done.stderr).expect_error("did not start")
    assert not (sandbox.path / "v").exists()


# Doctor


def test_doctor_lists_every_feature(sandbox: rig.Sandbox) -> None:
    outcome = sandbox.run("doctor", "--json")
    report = json.loads(outcome.out)
    assert outcome.code == (0 if report["acceleration"] else 1)
    assert report["acceleration"] == all(feature["found"] for feature in report["features"])
    for feature in report["features"]:
        assert feature["detail"]
        assert feature["purpose"]
        assert feature["remedy"]


def test_doctor_shows_remedies(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    missing = features.Feature(name="thing", found=False, detail="not seen", purpose="tests", remedy="get a thing")
    monkeypatch.setattr("fuseclient.features.probe", lambda: [missing])
    assert run_main(monkeypatch, "doctor") == 1
    out = capsys.readouterr().out
    assert "thing: get a thing" in out
    assert "--accel off" in out


def btf(types: bytes, names: bytes) -> bytes:
    """Return kernel type information of these types and names."""
    return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names)) + types + names


@pytest.mark.parametrize("arguments", [3, 7])
def test_the_tracepoints_arguments_are_counted(arguments: int) -> None:
    names = b"\0int\0btf_trace_io_uring_complete\0"
    integer = struct.pack("<IIII", 1, 1 << 24, 4, 32)
    prototype = struct.pack("<III", 0, 13 << 24 | arguments + 1, 0) + bytes(8 * (arguments + 1))
    pointer = struct.pack("<III", 0, 2 << 24, 2)
    typedef = struct.pack("<III", 5, 8 << 24, 3)
    assert features.tracepoint_arguments(btf(integer + prototype + pointer + typedef, names)) == arguments


@pytest.mark.parametrize("data", [b"", bytes(24), btf(b"", b"\0"), b"\x9f\xeb" + bytes(10)])
def test_a_kernel_without_the_tracepoint(data: bytes) -> None:
    assert features.tracepoint_arguments(data) is None


# Figures


STATS = {
    "accel": "bpf",
    "profile": "general",
    "epoch": 2,
    "lease_remaining_s": 12.5,
    "worker": {"pid": 7, "rss_bytes": 1 << 20, "restarts": 1},
    "requests": {"LOOKUP": {"kernel": 990, "daemon": 10}, "READ": {"kernel": 0, "daemon": 0}},
    "outcomes": {"LOOKUP": {"answered": 990, "miss_name": 7, "miss_epoch": 3}, "STATFS": {"answered": 4}},
    "levels": {"kernel": 990, "memory": 2, "disk_cache": 0, "metaserver": 6, "store": 2, "uncounted": 0},
    "maps": {"inodes": {"entries": 5, "capacity": 10, "bytes": 4096}},
    "a figure of a later version": 1,
}


def test_figures_are_shown() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(figures.render(figures.parse_stats(STATS), "a mount"))
    shown = capture.get()
    for text in (
        "a mount",
        "LOOKUP",
        "99.0%",
        "50.0%",
        "12.5 s left",
        "pid 7",
        "epoch 2",
        "name 7, epoch 3",
        "75.0%",
        "20.0%",
    ):
        assert text in shown
    assert "READ" not in shown
    assert "STATFS" not in shown


def test_an_unaccelerated_mount_without_figures_is_shown() -> None:
    bare = {"accel": "off", "profile": "general", "worker": {}, "requests": {}}
    console = Console(width=120)
    with console.capture() as capture:
        console.print(figures.render(figures.parse_stats(bare), "a mount"))
    assert "not accelerated" in capture.get()


def test_figures_of_a_wrong_form_are_refused() -> None:
    with pytest.raises(UserError):
        figures.parse_stats({"accel": "bpf"})


def test_the_difference_of_two_readings() -> None:
    earlier = figures.parse_stats(STATS)
    more = {"LOOKUP": {"kernel": 1000, "daemon": 10}, "OPEN": {"kernel": 1, "daemon": 2}}
    later = figures.parse_stats({**STATS, "requests": more})
    assert figures.since(later.requests, earlier.requests) == {
        "LOOKUP": figures.Answers(10, 0),
        "OPEN": figures.Answers(1, 2),
    }
    assert figures.total(figures.since(later.requests, earlier.requests)) == figures.Answers(11, 2)


# The start


def _commands(words: list[str]) -> list[str]:
    app = cli.app_for(words)
    return [*(str(each.name) for each in app.registered_commands), *(str(each.name) for each in app.registered_groups)]


def test_only_the_command_that_is_called_is_loaded() -> None:
    everything = _commands([])
    assert set(everything) == set(cli.MODULES)
    assert _commands(["no-such-command"]) == everything
    for name in everything:
        assert name in (some := _commands([name, "--help"]))
        assert len(some) <= 2, f"{name} brings {some}"


def test_a_worker_starts_without_trio() -> None:
    command = [sys.executable, "-P", "-X", "importtime", "-m", "fuseclient.worker", "-1"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr
    imported = {line.rpartition("|")[2].strip() for line in told.splitlines() if line.startswith("import time:")}
    assert {"pyfuse3", "fuseclient.worker.process"} <= imported
    assert not {each for each in imported if each.partition(".")[0] == "trio"}


# The end


@pytest.mark.parametrize(("imports", "shut_down"), [("atexit", "shut down\n"), ("atexit, obstore", "")])
def test_who_used_obstore_leaves_without_shutting_down(imports: str, shut_down: str) -> None:
    """Its threads may want the interpreter once more, and abort when that is shut down."""
    program = (
        f"import {imports}\n"
        "from unittest import mock\n"
        "from fuseclient import cli\n"
        "atexit.register(print, 'shut down')\n"
        "with mock.patch('sys.argv', ['bpfuse', 'version']):\n"
        "    cli.run()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    version, newline, after = ended.stdout.partition("\n")
    assert version
    assert newline
    assert after == shut_down


def test_the_commands_leave_so() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="bpfuse")
    assert command.load() is cli.run
