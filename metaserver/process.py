"""A metaserver as a process: its engine, its signals, and what it says to the process that started it."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import resource
import signal
import sys
from dataclasses import dataclass
from typing import Final

import uvloop

from metaserver.engine import candidate
from metaserver.errors import EngineBusy, EngineUnusable
from metaserver.front import Front
from metaserver.gate import Access
from metaserver.listener import ListenError
from metaserver.server import Server
from metaserver.tls import BadCertificate, Files, Tls
from metaserver.wire import Squash

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1
#: Of mallopt(3): free memory that is not given back, and from where on a block is mapped by itself, in bytes.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 32 * 1024 * 1024
_MAPPED_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Options:
    """What a metaserver is started with. ``ready_fd`` is told the first address, ``lease_s`` is in seconds.

    The paths are of PEM files; ``squash`` is a :class:`Squash`, by name.
    """

    engine: str
    listen: list[str]
    lease_s: float
    durability: str
    ready_fd: int | None
    log_level: str
    insecure: bool
    die_with_parent: bool
    grace: bool = True
    janitor: bool = True
    #: Refuse to start, rather than stand by, while another metaserver has the engine.
    alone: bool = False
    advertise: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    require_identity: bool = False
    squash: str = "auto"

    def access(self) -> Access:
        """Return how clients may come; raise :exc:`BadCertificate`."""
        tls = None
        if self.tls_cert is not None and self.tls_key is not None:
            tls = Tls(Files(self.tls_cert, self.tls_key, self.tls_client_ca))
        elif self.tls_cert or self.tls_key or self.tls_client_ca:
            raise BadCertificate("TLS takes both --tls-cert and --tls-key")
        return Access(tls, self.insecure and tls is None, self.require_identity, Squash[self.squash.upper()])


def run(options: Options) -> int:
    """Serve until SIGTERM or SIGINT and return the exit code: 2, with one line on stderr, for a user's mistake."""
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if options.die_with_parent:
        _die_with_parent()
    _allow_many_files()
    _keep_memory()
    try:
        uvloop.run(_serve(options))
    except (ListenError, EngineBusy, EngineUnusable, BadCertificate) as error:
        print(f"metaserver: {error}", file=sys.stderr)
        _say(options.ready_fd, f"{'busy' if isinstance(error, EngineBusy) else 'error'} {error}")
        return 2
    return 0


async def _serve(options: Options) -> None:
    stop = asyncio.Event()
    access = options.access()
    if access.tls is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, access.tls.reload)
    if access.insecure:
        _log.warning("--insecure: whoever can reach this metaserver can use it, and whoever is on the way can see it")
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    front = Front(
        lambda address: candidate(options.engine, address, options.durability),
        lambda engine: Server(
            engine, lease_s=options.lease_s, grace=options.grace, janitor=options.janitor, access=access
        ),
        access=access,
    )
    address = await front.start(*options.listen, advertise=options.advertise, alone=options.alone)
    try:
        _log.info("listening on %s%s", ", ".join(front.addresses), " (TLS)" if access.tls is not None else "")
        _say(options.ready_fd, f"ready {address}")
        await stop.wait()
        _log.info("ending")
    finally:
        await front.close()


def _say(ready_fd: int | None, line: str) -> None:
    """Tell whoever started this process "ready ADDRESS", "busy TEXT" or "error TEXT"."""
    if ready_fd is None:
        return
    try:
        os.write(ready_fd, f"{line}\n".encode())
    except BrokenPipeError:
        _log.warning("nobody reads the ready descriptor")
    os.close(ready_fd)


def _die_with_parent() -> None:
    """Have the kernel send SIGTERM when the thread that started this process ends, or end now if it already has."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _allow_many_files() -> None:
    """Raise the soft limit of open files: a connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _keep_memory() -> None:
    """Keep what one fetch's content took for the next one: memory given back is cleared by the kernel at each return,
    which takes longer than all else that is done with it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
