"""Fixtures of all levels, and what tests run in. Real mounts skip, and say why, where they are not possible."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Final, Protocol

import databases as database_servers
import pytest
import rig
from certificates import Authority, Pair
from hypothesis import settings
from namespaces import Files, new_engine
from xdist.scheduler import LoadScopeScheduling

from metaserver.tls import Files as TlsFiles
from metaserver.tls import Tls

settings.register_profile("bpfuse", deadline=None)  # a machine under load is no failure
settings.load_profile("bpfuse")

#: What tests may know of the environment that they are started in; nothing else comes to them.
_KEPT: Final = re.compile("PATH|TMPDIR|PYTHONHASHSEED|BPFUSE_(LONG|SEED|CRASHES)|PYTEST.*")
_REPORT = pytest.StashKey[pytest.TestReport]()


def pytest_configure() -> None:
    """Have tests find the same on every machine, whatever make, shell, locale, home and umask they are started in."""
    for name in [name for name in os.environ if not _KEPT.fullmatch(name)]:
        del os.environ[name]
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    os.environ.update(HOME=tempfile.gettempdir(), LC_ALL="C.UTF-8", TZ="UTC")
    time.tzset()
    os.umask(0o022)
    # A shell has what it runs in the background ignore it, and all that is started below would.
    signal.signal(signal.SIGINT, signal.default_int_handler)


class _ByModuleAndMode(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
    """Gives a process the tests of a module, or those of one mode of it: they share a mount."""

    def _split_scope(self, nodeid: str) -> str:
        mode = re.search(r"\[(bpf|off)\b", nodeid)
        return nodeid.partition("::")[0] + (mode[0] if mode else "")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling | None:
    """Share the tests out."""
    config.option.loadscopereorder = False
    return _ByModuleAndMode(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have processes that share the tests begin with what takes longest, so that they end together."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.name[:2], reverse=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the outcome of the test itself, for fixtures that tell more when it has failed."""
    report = yield
    if report.when == "call":
        item.stash[_REPORT] = report
    return report


class MountFactory(Protocol):
    """Makes mounts that end with the test."""

    def __call__(
        self, accel: str = ..., *options: str, url: str | None = None, name: str = ..., allowed: tuple[str, ...] = ...
    ) -> rig.Mount:
        """Mount a volume (a fresh one unless ``url`` is given) with --accel ``accel`` and further options.

        ``name`` is the mount point's. ``allowed``: patterns of serious log lines that the test provokes.
        """


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Workers that run in a test's own process keep files elsewhere than those of the machine's mounts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPFUSE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def databases() -> Iterator[database_servers.Databases]:
    """Servers of storage engines, each started when it is first asked for."""
    yield from database_servers.running()


@pytest.fixture
def sandbox() -> Iterator[rig.Sandbox]:
    """A directory and a runtime directory of the test's own; at the end nothing may be left of what ran in it."""
    box = rig.Sandbox()
    try:
        yield box
        box.assert_nothing_runs()
    finally:
        box.close()


@pytest.fixture
def runtime_root(sandbox: rig.Sandbox, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime directory of this test, for this process too; it does not exist yet."""
    monkeypatch.setenv("BPFUSE_RUNTIME_DIR", str(sandbox.runtime))
    return sandbox.runtime


@pytest.fixture(params=["remote", "lmdb"])
async def fs(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Files]:
    """A volume in both kinds of engines; what is stored is checked after the test."""
    engine = new_engine(request.param, tmp_path / "engine")
    files = await Files.create(engine)
    yield files
    await files.check()
    await engine.close()


@pytest.fixture(scope="session")
def needs_mounts() -> None:
    """Skip where nothing can be mounted."""
    rig.require_mounts()


@pytest.fixture(scope="session")
def needs_uring() -> None:
    """Skip, with the reason that ``bpfuse doctor`` gives, where requests cannot be answered in the kernel."""
    rig.require_uring()


@pytest.fixture(params=["bpf", "off"])
def accel(request: pytest.FixtureRequest) -> str:
    """Both ways to answer requests: a test that takes this runs accelerated, and as its own twin without."""
    if request.param == "bpf":
        rig.require_uring()
    return str(request.param)


@pytest.fixture
def mount(sandbox: rig.Sandbox, request: pytest.FixtureRequest) -> Iterator[MountFactory]:
    """Real mounts, made by the real command, each under a watchdog."""
    rig.require_mounts()
    mounted: list[rig.Mount] = []
    with contextlib.ExitStack() as stack:

        def make(
            accel: str = "off",
            *options: str,
            url: str | None = None,
            name: str = "mnt",
            allowed: tuple[str, ...] = (),
        ) -> rig.Mount:
            if accel == "bpf":
                rig.require_uring()
            url = url or sandbox.format(f"{name}-volume")
            made = rig.Mount(sandbox, url, sandbox.directory(name), accel, options, list(allowed))
            mounted.append(made)
            return stack.enter_context(rig.watched(made))

        yield make
        report = request.node.stash.get(_REPORT, None)
        if report is not None and report.failed:
            for each in mounted:
                print(f"--- log of {each.path}\n{each.read_log()}")


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def server_pair(authority: Authority) -> Pair:
    return authority.sign("server")


@pytest.fixture
def tls(authority: Authority, server_pair: Pair) -> Tls:
    return Tls(TlsFiles(*server_pair, authority.path))
