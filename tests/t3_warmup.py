"""``bpfuse warmup`` on a real mount: what it put is answered in the kernel, and what does not fit is said."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Final

import figures
import pytest
import rig
import several_mounts
from conftest import MountFactory

from bench import large_directory
from fuseclient import runtime

pytestmark = pytest.mark.usefixtures("needs_mounts")

DIRECTORIES: Final = 3
FILES: Final = 12
SMALL: Final = b"small" * 300
LARGE_BYTES: Final = 3 << 20


@pytest.fixture
def tree(mount: MountFactory, needs_uring: None) -> rig.Mount:
    """A mount whose caches are cold, of a volume with some directories of small files and a symlink each."""
    mounted = mount("bpf", "--kernel-ttl", "0", "--cache-size", "16M")
    for number in range(DIRECTORIES):
        directory = mounted.path / "tree" / f"{number}" / "deeper"
        directory.mkdir(parents=True)
        for each in range(FILES):
            (directory / f"{each}").write_bytes(SMALL)
        (directory / "link").symlink_to("0")
    mounted.remount()
    return mounted


#: "tree" is not an entry of itself.
ENTRIES: Final = DIRECTORIES * (2 + FILES + 1)
ALL_DIRECTORIES: Final = 1 + 2 * DIRECTORIES


def warm(mounted: rig.Mount, *options: str, path: str = "tree") -> dict[str, Any]:
    outcome = mounted.sandbox.run("warmup", mounted.path / path, "--json", *options).expect_success()
    progress: dict[str, Any] = json.loads(outcome.out)
    return progress


def asked(mounted: rig.Mount) -> dict[str, int]:
    """Return how many requests the worker has answered, by opcode."""
    return {opcode: answers["daemon"] for opcode, answers in figures.stats(mounted)["requests"].items()}


def walk(top: Path) -> int:
    """Look at everything below a directory; return how many entries there are."""
    count = 0
    for parent, directories, files in os.walk(top):
        for name in (*directories, *files):
            os.lstat(os.path.join(parent, name))
            count += 1
    return count


def test_metadata_is_answered_in_the_kernel_then(tree: rig.Mount) -> None:
    progress = warm(tree)
    assert progress["state"] == "done"
    assert progress["complete"]
    assert (progress["entries"], progress["directories"]) == (ENTRIES, ALL_DIRECTORIES)
    assert progress["content"]["files"] == DIRECTORIES  # the symlinks' targets
    before = asked(tree)
    assert walk(tree.path / "tree") == ENTRIES
    after = asked(tree)
    assert {opcode: count for opcode, count in after.items() if count != before.get(opcode, 0)} == {}
    assert figures.answers(tree, "LOOKUP").kernel >= ENTRIES


def test_what_is_there_is_passed_over_until_it_changes(tree: rig.Mount) -> None:
    warm(tree)
    again = warm(tree)
    assert (again["entries"], again["directories"]) == (0, 0)
    assert (again["entries_passed_over"], again["directories_passed_over"]) == (ENTRIES, ALL_DIRECTORIES)
    # Names made here are put at once; content has not been fetched yet.
    (tree.path / "tree" / "new").mkdir()
    with_data = warm(tree, "--data")
    assert with_data["content"]["files"] == DIRECTORIES * (FILES + 1)
    assert with_data["content"]["bytes"] == DIRECTORIES * (FILES * len(SMALL) + 1)
    third = warm(tree, "--data")
    assert third["directories"] == 0
    assert third["directories_passed_over"] == ALL_DIRECTORIES + 1
    outcome = tree.sandbox.run("warmup", tree.path / "tree" / "0").expect_success()
    assert f"passed over, as they are there: {FILES + 2} entries of 2 directories" in outcome.out


def test_content_comes_with_data(tree: rig.Mount) -> None:
    warm(tree, "--data")
    reads = asked(tree).get("READ", 0)
    for number in range(DIRECTORIES):
        for each in range(FILES):
            assert (tree.path / "tree" / str(number) / "deeper" / str(each)).read_bytes() == SMALL
    assert asked(tree).get("READ", 0) == reads


def test_larger_files_go_into_the_disk_cache_as_far_as_it_has_room(tree: rig.Mount) -> None:
    """Objects are kept there, since the mount has a --cache-size; 16 MiB have room for five files."""
    contents = [os.urandom(LARGE_BYTES) for _ in range(6)]
    directory = tree.path / "large"
    directory.mkdir()
    for number, content in enumerate(contents):
        (directory / f"{number}").write_bytes(content)
    (directory / "hole").touch()
    os.truncate(directory / "hole", 1 << 20)
    tree.remount()
    progress = warm(tree, "--data", path="large")
    assert progress["files"] == {"files": 7, "bytes": 6 * LARGE_BYTES + (1 << 20)}
    there = progress["files_brought"]["files"] + progress["files_passed_over"]["files"]
    assert there >= 5
    assert progress["files_left_out"]["files"] == 7 - there > 0
    assert not progress["complete"]
    assert figures.stats(tree)["caches"]["disk"]["evictions"] == 0
    again = warm(tree, "--data", path="large")
    assert again["files_brought"]["files"] == 0
    assert again["files_passed_over"]["files"] == there
    text = tree.sandbox.run("warmup", "--data", directory).expect_success().out
    assert "NOT there: larger files" in text
    assert "the disk cache has room for 16.0 MiB" in text
    assert (directory / "0").read_bytes() == contents[0]


def test_files_of_a_store_that_is_near_are_kept_whole(mount: MountFactory, needs_uring: None) -> None:
    mounted = mount("bpf")
    for name, size in (("large", LARGE_BYTES), ("middling", 200_000)):
        (mounted.path / name).write_bytes(os.urandom(size))
    mounted.remount()
    progress = warm(mounted, "--data", path=".")
    assert progress["files_brought"] == {"files": 1, "bytes": LARGE_BYTES}
    assert progress["files_in_store"] == {"files": 1, "bytes": 200_000}
    assert progress["complete"]
    assert figures.stats(mounted)["caches"]["whole_files"]["files"] == 1
    assert warm(mounted, "--data", path=".")["files_passed_over"]["files"] == 1
    assert len((mounted.path / "large").read_bytes()) == LARGE_BYTES


def test_what_does_not_fit_into_the_kernel_cache_is_left_out(
    mount: MountFactory, sandbox: rig.Sandbox, needs_uring: None
) -> None:
    """1 MiB have room for 120 pages and some 1700 entries."""
    url = sandbox.format("wide")
    asyncio.run(large_directory.make(sandbox.path / "wide" / "meta", "volume", 2500))
    mounted = mount("bpf", "--kernel-cache-size", "1M", url=url)
    for number in range(10):
        (mounted.path / f"content{number}").write_bytes(os.urandom(60_000))
    mounted.remount()
    progress = warm(mounted, "--data", path=".")
    assert not progress["complete"]
    assert (progress["directories"], progress["directories_left_out"]) == (1, 1)
    assert progress["entries"] + 1 == progress["room_entries"] > 1500  # one is the mark that the directory is whole
    assert progress["content"]["files"] + progress["content_left_out"]["files"] == 10
    assert 4 <= progress["content"]["files"] <= 8
    maps = figures.stats(mounted)["maps"]
    assert progress["entries"] <= maps["names"]["entries"]
    text = sandbox.run("warmup", mounted.path, "--data").expect_success().out
    assert "NOT there: 1 directories, with all below them: the kernel cache has room for" in text
    assert "NOT there: content of" in text
    assert walk(mounted.path) == 2511


def test_an_interrupted_one_ends_and_goes_on(tree: rig.Mount) -> None:
    os.stat(tree.path / "tree")
    with several_mounts.stopped(tree.process("metaserver").pid):
        command = tree.sandbox.start("warmup", tree.path / "tree")
        rig.wait_for(lambda: _is_asking(command.pid), "the command asks how far it is")
        refused = tree.sandbox.run("warmup", tree.path)
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=rig.WAIT_S)
        assert command.returncode == 130, out + err
        assert "stopped; the same command goes on from here" in out
    refused.expect_error("is being warmed already")
    assert warm(tree)["entries"] == ENTRIES


def _is_asking(pid: int) -> bool:
    """Say whether the command is in its pause between two questions."""
    names = {(task / "wchan").read_text() for task in Path(f"/proc/{pid}/task").iterdir()}
    return any("nanosleep" in name for name in names)


def test_a_worker_that_dies_meanwhile(tree: rig.Mount) -> None:
    tree.allowed.append("the worker .* ended with -9")
    os.stat(tree.path / "tree")
    with several_mounts.stopped(tree.process("metaserver").pid):
        command = tree.sandbox.start("warmup", tree.path / "tree")
        rig.wait_for(lambda: _is_asking(command.pid), "the command asks how far it is")
        os.kill(tree.process("worker").pid, signal.SIGKILL)
        _, err = command.communicate(timeout=rig.WAIT_S)
    assert command.returncode == 1
    assert err.startswith("bpfuse: the mount")
    assert len(err.splitlines()) == 1


def test_without_acceleration_there_is_no_place_for_metadata(mount: MountFactory) -> None:
    mounted = mount("off")
    outcome = mounted.sandbox.run("warmup", mounted.path)
    outcome.expect_error("no kernel cache to be warmed (--accel off)", "--accel auto")


def test_mistakes_are_one_line(mount: MountFactory, sandbox: rig.Sandbox) -> None:
    mounted = mount("off", allowed=("the worker .* ended",))
    (mounted.path / "file").touch()
    run = sandbox.run
    run("warmup", sandbox.path).expect_error("is not on a bpfuse mount")
    run("warmup", mounted.path / "file").expect_error("is not a directory")
    run("warmup", mounted.path / "none").expect_error("none: no such file or directory")
    run("warmup").expect_error("path", code=2)
    several_mounts.kill(mounted, "channel", "worker", "metaserver")
    run("warmup", mounted.path).expect_error("is a dead mount point", "bpfuse umount")
    subprocess.run(["umount", "-l", str(mounted.path)], check=True)
    with mounted.sandbox_environment():
        runtime.directory_of(str(mounted.path)).remove()
