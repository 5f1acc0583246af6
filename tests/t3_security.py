"""Mounts that show a certificate or a token: the set-up of docs/security.md as it stands there, and what it refuses."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
import rig

_DOCUMENT: Final = rig.REPOSITORY / "docs" / "security.md"
_SECRET: Final = re.compile(r"[A-Za-z0-9_-]{43}")


def _commands() -> list[str]:
    """Return the commands of the set-up, as they are in the document, with lines that go on put together."""
    text = _DOCUMENT.read_text().partition("## Set up")[2].partition("## How clients come in")[0]
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    return "\n".join(lines).replace("\\\n", " ").splitlines()


class Site:
    """The document's machine below a directory: /etc/bpfuse, /srv, /mnt and the port are elsewhere."""

    def __init__(self, sandbox: rig.Sandbox) -> None:
        self.sandbox = sandbox
        self.port = ""
        self.server: subprocess.Popen[str] | None = None
        for name in ("etc", "srv", "mnt", "mnt/home", "mnt/read"):
            sandbox.directory(name)

    def place(self, command: str) -> str:
        """Return a command of the document as it is for this site."""
        moved = command.replace("/etc/bpfuse", f"{self.sandbox.path}/etc/bpfuse")
        moved = re.sub(r"(?<![a-z])/(srv|mnt)/", rf"{self.sandbox.path}/\1/", moved)
        moved = moved.replace("/run/bpfuse-meta.sock", f"{self.sandbox.path}/meta.sock")
        return moved.replace("0.0.0.0:7000", "0.0.0.0:0").replace("127.0.0.1:7000", f"127.0.0.1:{self.port}")

    def follow(self) -> None:
        """Do all that the document says, but for the revocation at its end."""
        shell: list[str] = []
        for command in _commands():
            if not command.startswith("bpfuse "):
                shell.append(command)
                continue
            if shell:
                script = self.place("\n".join(("set -eu", *shell)))
                subprocess.run(["/bin/sh", "-c", script], check=True, capture_output=True, timeout=rig.WAIT_S)
                shell = []
            self.bpfuse(*shlex.split(self.place(command))[1:])

    def bpfuse(self, *arguments: str) -> None:
        if arguments[0] == "metaserver":
            self._serve(*arguments)
        elif arguments[:2] == ("token", "revoke"):
            return
        elif arguments[0] == "mount":
            self.sandbox.run(*arguments, "--log-file", f"{self.sandbox.path}/mount.log").expect_success()
        else:
            self.sandbox.run(*arguments).expect_success()

    def _serve(self, *arguments: str) -> None:
        self.server = self.sandbox.start(*arguments, "--lease", "2")
        assert self.server.stderr is not None
        said = ""
        while (found := re.search(r"listening on tcp:0\.0\.0\.0:(\d+), unix:\S+ \(TLS\)", said)) is None:
            line = self.server.stderr.readline()
            assert line, said
            said += line
        self.port = found[1]

    def token(self, *arguments: str | Path) -> rig.Outcome:
        return self.sandbox.run("token", arguments[0], f"unix:{self.sandbox.path}/meta.sock", *arguments[1:])

    def mount(self, name: str, *options: str) -> Path:
        """Mount as an identity that is made with these options; return the mount point."""
        point, token = self.sandbox.directory(f"mnt/{name}"), self.sandbox.path / f"{name}.token"
        self.token("create", name, "--volume", "home", *options, "--output", token).expect_success()
        query = f"ca={self.sandbox.path}/etc/bpfuse/ca.pem&token={token}"
        url = f"bpfuse://127.0.0.1:{self.port}/home?{query}"
        self.sandbox.run("mount", url, point, "--log-file", f"{self.sandbox.path}/mount.log").expect_success()
        return point

    def close(self) -> None:
        ends = [self.sandbox.start("umount", "--force", point) for point in self.sandbox.mounted()]
        for end in ends:
            assert end.wait(rig.WAIT_S) == 0
        assert self.server is not None
        self.server.terminate()
        _, self.said = self.server.communicate(timeout=rig.WAIT_S)
        assert self.server.returncode == 0, self.said


@pytest.fixture(scope="module")
def site(needs_mounts: None) -> Iterator[Site]:
    sandbox = rig.Sandbox()
    made = Site(sandbox)
    try:
        made.follow()
        yield made
        made.close()
        sandbox.assert_nothing_runs()
        _assert_no_secrets(made)
    finally:
        sandbox.close()


def _assert_no_secrets(site: Site) -> None:
    """What was logged has no token in it."""
    tokens = [path.read_text().strip() for path in site.sandbox.path.rglob("*.token")]
    logs = site.said + (site.sandbox.path / "mount.log").read_text()
    assert len(tokens) > 2
    for token in tokens:
        assert _SECRET.fullmatch(token.partition(":")[2])
        assert token.partition(":")[2] not in logs


def test_the_documents_mounts_work(site: Site) -> None:
    home, read = site.sandbox.path / "mnt/home", site.sandbox.path / "mnt/read"
    (home / "file").write_text("content")
    (home / "large").write_bytes(b"x" * 300_000)
    assert (read / "file").read_text() == "content"
    assert (read / "large").stat().st_size == 300_000
    for change in (lambda: (read / "new").touch(), lambda: (read / "file").unlink(), (read / "file").write_bytes):
        _refused(change, errno.EROFS)
    listed = site.token("list").expect_success().out
    assert re.search(r"builder +certificate +home .*read-only", listed)


def _refused(change: Callable[..., object], *numbers: int) -> None:
    with pytest.raises(OSError, match="Errno") as refused:
        change(*([b"x"] if getattr(change, "__name__", "") == "write_bytes" else []))
    assert refused.value.errno in numbers


def test_no_token_is_seen_in_a_process(site: Site) -> None:
    secrets = [path.read_bytes().strip().partition(b":")[2] for path in site.sandbox.path.rglob("*.token")]
    for process in site.sandbox.running():
        seen = Path(f"/proc/{process}/cmdline").read_bytes() + Path(f"/proc/{process}/environ").read_bytes()
        assert not any(secret in seen for secret in secrets)


def test_a_subtree_is_all_there_is(site: Site) -> None:
    home = site.sandbox.path / "mnt/home"
    (home / "tenant/within").mkdir(parents=True)
    (home / "secret").write_text("secret")
    point = site.mount("tenant", "--subtree", "/tenant", "--squash", "none")
    assert os.listdir(point) == ["within"]
    (point / "within/made").write_text("made")
    assert (home / "tenant/within/made").read_text() == "made"
    os.symlink("../../secret", point / "within/link")
    assert os.readlink(home / "tenant/within/link") == "../../secret"
    assert os.stat(point / "within" / "..").st_ino == os.stat(point).st_ino
    (home / "secret").rename(home / "tenant/moved")
    assert (point / "moved").read_text() == "secret"
    (home / "tenant/moved").rename(home / "secret")
    assert not (point / "moved").exists()


def test_roots_rights_are_taken_away(site: Site) -> None:
    home = site.sandbox.path / "mnt/home"
    (home / "open").mkdir()
    (home / "open").chmod(0o1777)
    (home / "private").mkdir(mode=0o700)
    (home / "passwords").write_text("secret")
    (home / "passwords").chmod(0o600)
    point = site.mount("squashed", "--squash", "root", "--uid", "1234", "--gid", "1235")
    (point / "open/made").write_text("made")
    status = (home / "open/made").stat()
    assert (status.st_uid, status.st_gid) == (1234, 1235)
    _refused(lambda: (point / "passwords").read_text(), errno.EACCES)
    _refused(lambda: os.listdir(point / "private"), errno.EACCES)
    _refused(lambda: (point / "new").touch(), errno.EACCES)
    _refused(lambda: (point / "passwords").chmod(0o666), errno.EPERM)
    _refused(lambda: os.chown(point / "open/made", 0, 0), errno.EPERM)
    assert (home / "passwords").read_text() == "secret"

    # And revoked, while it is mounted:
    site.token("revoke", "squashed").expect_success()
    site.token("revoke", "squashed").expect_error("no identity 'squashed'")
    _refused(lambda: (point / "open/after").write_text("after"), errno.EIO, errno.ESTALE)
    assert os.listdir(home / "open") == ["made"]


def test_who_shows_nothing_that_counts_mounts_nothing(site: Site) -> None:
    url = f"bpfuse://127.0.0.1:{site.port}/home?ca={site.sandbox.path}/etc/bpfuse/ca.pem"
    other = site.sandbox.directory("mnt/other")
    token = f"token={site.sandbox.path}/forged.token"
    site.token("create", "forged", "--volume", "home", "--expires", "1s", "--output", token.partition("=")[2])
    site.sandbox.run("mount", f"{url}&{token}", other).expect_error("NOT_AUTHENTICATED")
    site.sandbox.run("mount", url, other).expect_error("NOT_AUTHENTICATED")
    plain = f"bpfuse://127.0.0.1:{site.port}/home"
    site.sandbox.run("mount", plain, other).expect_error("no metaserver to talk to")
    site.sandbox.run("mount", plain, other, "--insecure", "--token-file", "x").expect_error("insecure is plaintext")
