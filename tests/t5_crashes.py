"""Metaservers, and the object store, are killed under load in random order: what was acknowledged is there, and no
answer is stale.

Two mounts, one of them accelerated where that is possible, are written to and read through without a pause. What each
completed call has made is in a manifest outside the volume: at the end fsck must find nothing, and a fresh mount must
show all of the manifest. A read that begins after a write's call has returned on the other mount must show it.

``BPFUSE_CRASHES=N`` has N faults happen instead of a few (make crashes); ``BPFUSE_SEED`` repeats an order.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
import rig
import weed
from several_metaservers import Group
from several_mounts import SLACK_S

from fuseclient import features

pytestmark = pytest.mark.usefixtures("needs_mounts")

LEASE_S: Final = 5.0
_COUNT: Final = int(os.environ.get("BPFUSE_CRASHES", "0"))
#: Files that a writer goes round; every so many writes it makes a large file, and a directory that it renames.
_FILES: Final = 20
_EVERY: Final = 10
_LARGE: Final = 200_000
#: Seconds that a store may take to start, and an access to it until it is tried again.
_GOES_ON_S: Final = 60.0
#: The lines in a mount's log when a close says so.
_TOLD: Final = ("may have lost changes that it had acknowledged", r"NOT_FOUND: there is no inode \d+")


class Manifest:
    """What completed calls have made: the number that each file has at least, and the directories that there are.

    It is a file outside the volume, too, for who looks into a failure.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._file = path.open("a")
        self.numbers: dict[str, int] = {}
        self.directories: set[str] = set()

    def wrote(self, name: str, number: int) -> None:
        with self._lock:
            self.numbers[name] = number
            print(name, number, file=self._file, flush=True)

    def made(self, name: str) -> None:
        with self._lock:
            self.directories.add(name)
            print(name, file=self._file, flush=True)

    def least(self, rng: random.Random) -> tuple[str, int]:
        """Return one of the files, and the number that it has at least."""
        with self._lock:
            return rng.choice(list(self.numbers.items()))


def content(name: str, number: int) -> bytes:
    """Return what a file of this number holds: its number first, then bytes that tell it from every other."""
    size = _LARGE if number % _EVERY == 0 else 100
    return f"{number} {name} ".encode() + random.Random(f"{name} {number}").randbytes(size)


def number_of(name: str, found: bytes) -> int:
    """Return the number that a file has; fail if it holds anything but the content of that number."""
    number = int(found.partition(b" ")[0])
    assert found == content(name, number), f"{name} is mixed up"
    return number


class Load:
    """Programs on the mounts. ``pauses`` has the longest time that a call of each kind took, in seconds."""

    def __init__(self, manifest: Manifest, paths: list[Path], seed: int) -> None:
        self._manifest = manifest
        self._ended = threading.Event()
        self._failures: list[BaseException] = []
        self.counts: Counter[str] = Counter()
        self.pauses: Counter[str] = Counter()
        self._threads: list[threading.Thread] = []
        for index, path in enumerate(paths):
            others = paths[index - 1]
            self._start(self._write, path, f"w{index}")
            self._start(self._read, others, random.Random(f"{seed} {index}"))

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        def run() -> None:
            try:
                while not self._ended.is_set():
                    work(*arguments)
            except BaseException as error:
                self._failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _timed(self, kind: str, call: Callable[[], bytes | None]) -> bytes | None:
        began = time.monotonic()
        try:
            result = call()
        except OSError as error:
            # A close may say that the new file, which LMDB had put off for a moment, is lost with a metaserver.
            if kind != "write" or error.errno not in (errno.EIO, errno.ESTALE):
                raise
            self.counts["told"] += 1
            return None
        self.pauses[kind] = max(self.pauses[kind], time.monotonic() - began)  # type: ignore[assignment]
        self.counts[kind] += 1
        return result

    def _write(self, root: Path, writer: str) -> None:
        number = self.counts[writer] = self.counts[writer] + 1
        name = f"{writer}-{number % _FILES}"
        if self._timed("write", lambda: _replace(root / name, content(name, number))) is None:
            return
        self._manifest.wrote(name, number)
        if number % _EVERY == 0:
            made, kept = f"{writer}-made{number}", f"{writer}-directory{number}"
            self._timed("mkdir", lambda: (root / made).mkdir())
            self._timed("rename", lambda: _rename(root / made, root / kept))
            self._manifest.made(kept)

    def _read(self, root: Path, rng: random.Random) -> None:
        if not self._manifest.numbers:
            return
        name, least = self._manifest.least(rng)
        found = self._timed("read", (root / name).read_bytes)
        assert found is not None
        number = number_of(name, found)
        assert number >= least, f"{name} shows {number}, though {least} was there"

    def went_on(self) -> None:
        """Wait until each mount has written and been read again."""
        before = Counter(self.counts)
        rig.wait_for(
            lambda: (
                self._failures or all(self.counts[kind] > before[kind] + 3 for kind in ("w0", "w1", "read", "write"))
            ),
            "the load goes on",
            _GOES_ON_S,
        )
        assert not self._failures, self._failures

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(rig.WAIT_S)
            assert not thread.is_alive()
        assert not self._failures, self._failures


def _replace(path: Path, data: bytes) -> bytes:
    """Make a file's content this, so that a reader sees the former or this one, and return it."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(data)
    new.rename(path)
    return data


def _rename(path: Path, new: Path) -> None:
    path.rename(new)


class Faults:
    """What is done to the metaservers and the store, if it is a server, and how often."""

    def __init__(self, group: Group, store: weed.Weed | None) -> None:
        self._group = group
        self._store = store
        self.counts: Counter[str] = Counter()

    def do(self, kind: str) -> None:
        """Do one, and return when as many metaservers run as before, and one serves."""
        self.counts[kind] += 1
        getattr(self, kind)()

    def kill_the_authority(self) -> None:
        server = self._group.authority()
        server.kill()
        rig.wait_for(lambda: self._group.status()["authority"] not in (None, server.address), "another one serves")
        server.start()

    def kill_a_standby(self) -> None:
        server = self._group.standby()
        server.kill()
        server.start()

    def end_the_authority(self) -> None:
        server = self._group.authority()
        server.close()
        server.start()

    def hang_the_authority(self) -> None:
        server = self._group.authority()
        self._group.hang(server)
        rig.wait_for(lambda: self._group.status()["authority"] not in (None, server.address), "another one serves")
        server.kill()
        server.start()

    def kill_the_store(self) -> None:
        assert self._store is not None
        self._store.kill()
        self._store.start()


@pytest.fixture
def store() -> Iterator[weed.Weed | None]:
    """An S3 server, if more than a few faults are to happen; else the store is a directory."""
    if not _COUNT or weed.find() is None:
        yield None
        return
    with weed.running() as server:
        yield server


@pytest.fixture
def group(store: weed.Weed | None, sandbox: rig.Sandbox) -> Iterator[Group]:
    made = Group(sandbox, 2, LEASE_S)
    blocks = f"file://{sandbox.path}/blocks" if store is None else store.url("crashes")
    try:
        made.start()
        sandbox.run("format", made.url, "--store", blocks).expect_success()
        yield made
    finally:
        made.close()


def _order(store: weed.Weed | None) -> tuple[list[str], int]:
    """Return the faults, in order, and the seed."""
    seed = int(os.environ.get("BPFUSE_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    kinds = ["kill_the_authority", "kill_a_standby", "end_the_authority"]
    more = ["hang_the_authority"] + ["kill_the_store"] * (store is not None)
    rng = random.Random(seed)
    return rng.choices(kinds + more, k=_COUNT) if _COUNT else rng.sample(kinds, len(kinds)), seed


def test_what_was_acknowledged_outlives_every_process(
    store: weed.Weed | None, sandbox: rig.Sandbox, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, seed = _order(store)
    monkeypatch.setattr(rig, "WATCHDOG_S", rig.WATCHDOG_S * max(1, len(order) / 4))
    print(f"seed {seed}: {order}")
    manifest = Manifest(sandbox.path / "manifest")
    accelerated = "off" if features.missing_for_bpf(rig.probed()) else "bpf"
    mounts = [rig.Mount(sandbox, group.url, sandbox.directory(name), accel, (), list(_TOLD)) for name, accel in
              (("a", accelerated), ("b", "off"))]  # fmt: skip
    first = group.status()["epoch"]
    with contextlib.ExitStack() as stack:
        for each in mounts:
            stack.enter_context(rig.watched(each))
        load, faults = Load(manifest, [each.path for each in mounts], seed), Faults(group, store)
        for kind in order:
            load.went_on()
            faults.do(kind)
        load.went_on()
        load.end()
        epoch = group.status()["epoch"]
    changed = sum(faults.counts[kind] for kind in faults.counts if kind.endswith("the_authority"))
    assert epoch - first == changed > 0, "the authority went round"
    assert load.counts["told"] <= 2 * changed, "each writer has one file open"
    assert load.counts["read"] > 0
    assert load.counts["rename"] > 0
    assert len(manifest.numbers) > _FILES, "both have written"
    worst = dict(load.pauses)
    print(f"{dict(load.counts)}; longest calls {worst}")
    if not faults.counts.keys() & {"hang_the_authority", "kill_the_store"}:
        assert all(pause < LEASE_S + SLACK_S for pause in worst.values()), worst

    group.close()
    sandbox.run("fsck", group.url, "--engine", f"lmdb://{sandbox.path}/engine", "--verify").expect_success()
    group.start()
    with rig.watched(rig.Mount(sandbox, group.url, sandbox.directory("c"), "off", (), [])) as fresh:
        shown = {name: number_of(name, (fresh.path / name).read_bytes()) for name in manifest.numbers}
        lost = {name: number for name, number in manifest.numbers.items() if shown[name] < number}
        assert not lost
        assert manifest.directories <= set(os.listdir(fresh.path))
