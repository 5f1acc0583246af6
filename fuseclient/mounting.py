"""Mounting: everything a user can get wrong is checked first, then the channel is started and waited for.

The channel is ``python -m fuseclient.channel CONFIG_FD --ready-fd N``. ``CONFIG_FD`` holds
:class:`fuseclient.config.MountOptions` as JSON. When the mount works the channel writes one line to the ready
descriptor, :class:`Ready` as JSON, or ``{"error": text}`` when it gives up. It also inherits the lock on the runtime
directory (:mod:`fuseclient.runtime`), which it need not touch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Final

import msgspec

from fuseclient import features, mounts, runtime, servers
from fuseclient.config import MountOptions
from fuseclient.errors import UserError, reason
from fuseclient.volumes import Embedded, parse_volume

_LOG_DIRECTORY: Final = Path("/var/log/bpfuse")
_READY_TIMEOUT_S: Final = 90.0
_END_TIMEOUT_S: Final = 30.0
_ENDING: Final = (signal.SIGINT, signal.SIGTERM)
#: What can be asked for as kernel memory, in bytes.
_CACHE_MIN: Final = 1 << 20
_CACHE_MAX: Final = 64 << 30


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """What the channel says when the mount works."""

    ready: bool
    #: How requests are answered: "bpf" or "off".
    accel: str
    #: One line for the user, as why a mount with ``--accel auto`` is not accelerated.
    notice: str | None = None


class _Failed(msgspec.Struct, frozen=True):
    """What the channel says when it gives up."""

    error: str


@dataclass(frozen=True)
class Mounted:
    """A mount that works, and the channel that serves it."""

    options: MountOptions
    accel: str
    #: Lines that the user should read.
    notices: tuple[str, ...]
    channel: subprocess.Popen[bytes]


def mount(options: MountOptions) -> Mounted:
    """Check the options, start the channel and return when the mount works.

    The channel outlives this process. It logs to the options' file, or to this process's standard error. Raises
    :exc:`UserError`, with nothing left behind.
    """
    options, notices = check(options)
    claim = runtime.claim(options.mountpoint)
    try:
        channel, ready = _start(options, claim)
    except BaseException:
        claim.abandon()
        raise
    claim.close()
    if ready.notice:
        notices += (ready.notice,)
    return Mounted(options, ready.accel, notices, channel)


def check(options: MountOptions) -> tuple[MountOptions, tuple[str, ...]]:
    """Return the options, resolved, and notices for the user; raise :exc:`UserError` for what cannot be mounted."""
    found = features.probe(for_bpf=options.accel != "off")
    if missing := features.missing_for_mount(found):
        raise UserError(f"this cannot be mounted here: {features.describe(missing)}; {missing[0].remedy}")
    mountpoint = _check_mountpoint(options.mountpoint)
    url, may_only_read, notices = _check_volume(options.url, mountpoint)
    if options.durability != "commit" and not isinstance(parse_volume(url), Embedded):
        raise UserError("--durability is for embedded volumes; of others, it is an option of their metaserver")
    _check_cache_directory(options.cache_directory, mountpoint)
    accel, more = _check_acceleration(options.accel, found)
    if not _CACHE_MIN <= options.kernel_cache_bytes <= _CACHE_MAX:
        raise UserError(f"the kernel cache is from 1M to 64G, not {options.kernel_cache_bytes} bytes")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if accel != "off" and options.kernel_cache_bytes > memory // 2:
        raise UserError(
            f"a kernel cache of {options.kernel_cache_bytes >> 20}M is more than half of this machine's memory "
            f"({memory >> 20}M), and could not be swapped out"
        )
    read_only = options.read_only or may_only_read
    options = msgspec.structs.replace(options, mountpoint=mountpoint, url=url, accel=accel, read_only=read_only)
    return options, notices + more


def default_log_file(mountpoint: str) -> str:
    """Return where the log of a mount goes unless the user says otherwise."""
    return str(_LOG_DIRECTORY / f"{runtime.mount_key(mounts.resolve(mountpoint))}.log")


def wait_foreground(mounted: Mounted) -> int:
    """Wait until the mount ends; signals end it in order. Return the exit code: 130 after an interrupt."""
    received: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        mounted.channel.terminate()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    code = mounted.channel.wait()
    if signal.SIGINT in received:
        return 130
    return code if code >= 0 else 1


def _check_mountpoint(path: str) -> str:
    mountpoint = mounts.resolve(path)
    existing = mounts.find_mount(mountpoint)
    if existing is not None and existing.filesystem == mounts.FILESYSTEM_TYPE:
        record = runtime.directory_of(mountpoint).read()
        if record is not None and runtime.channel_alive(record):
            raise UserError(f"{mountpoint} has {record.url} mounted already")
        raise UserError(f"{mountpoint} is a dead mount point; clear it first: bpfuse umount {mountpoint}")
    try:
        if not Path(mountpoint).stat().st_mode & 0o170000 == 0o040000:
            raise UserError(f"the mount point {mountpoint} is not a directory")
    except FileNotFoundError:
        raise UserError(f"the mount point {mountpoint} does not exist") from None
    except OSError as error:
        raise UserError(f"the mount point {mountpoint} cannot be used: {reason(error)}") from None
    return mountpoint


def _check_volume(url: str, mountpoint: str) -> tuple[str, bool, tuple[str, ...]]:
    """Return the URL of a volume that can be mounted, whether it can be read only, and notices."""
    volume = parse_volume(url)
    if isinstance(volume, Embedded):
        _check_embedded(volume, mountpoint)
        return volume.url, False, ()
    notices: tuple[str, ...] = ()
    if volume.credentials.insecure:
        notices += (f"--insecure: whoever is on the way to {volume.places} can see and change all that is said",)
    may_only_read = servers.check_volume(volume).read_only
    if may_only_read:
        notices += ("mounted read-only: the metaserver lets this identity change nothing",)
    return volume.full_url, may_only_read, notices


def _check_embedded(volume: Embedded, mountpoint: str) -> None:
    if not volume.is_formatted():
        raise UserError(f"{volume.directory} is not a volume; make one with: bpfuse format {volume.url}")
    if volume.directory.is_relative_to(mountpoint):
        raise UserError(f"the volume {volume.directory} lies below the mount point {mountpoint}")
    for record in runtime.live_records():
        if record.url == volume.url:
            raise UserError(f"{volume.url} is mounted already, at {record.mountpoint}")


def _check_cache_directory(path: str | None, mountpoint: str) -> None:
    if path is None:
        return
    if Path(os.path.realpath(path)).is_relative_to(mountpoint):
        raise UserError(f"the cache directory {path} lies below the mount point {mountpoint}")
    try:
        Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the cache directory {path} cannot be made: {reason(error)}") from None


def _check_acceleration(accel: str, found: list[features.Feature]) -> tuple[str, tuple[str, ...]]:
    missing = features.missing_for_bpf(found)
    if accel == "off" or not missing:
        return accel, ()
    what = features.describe(missing)
    if accel == "bpf":
        raise UserError(f"no acceleration here; missing: {what}; `bpfuse doctor` tells how to mend it")
    return "off", (f"not accelerated; missing: {what}; `bpfuse doctor` tells how to mend it",)


def _start(options: MountOptions, claim: runtime.Claim) -> tuple[subprocess.Popen[bytes], Ready]:
    """Start the channel and wait for its word; if it gives up, or this is interrupted, it has ended on return."""
    reading, writing = os.pipe()
    channel: subprocess.Popen[bytes] | None = None
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reading)
        try:
            with _signals_held_back(), contextlib.ExitStack() as passed_on:
                passed_on.callback(os.close, writing)
                config = _config_descriptor(options)
                passed_on.callback(os.close, config)
                log = passed_on.enter_context(_open_log(options.log_file))
                channel = _launch(config, writing, claim.descriptor, log)
            return channel, _wait_ready(channel, reading, options)
        except BaseException:
            if channel is not None:
                _end(channel)
            raise


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Have SIGINT and SIGTERM come after the body: between a process's start and its being known they would lose it."""
    came: list[int] = []
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for caught in came:
            signal.raise_signal(caught)


def _config_descriptor(options: MountOptions) -> int:
    descriptor = os.memfd_create("bpfuse-options", os.MFD_CLOEXEC)
    os.write(descriptor, msgspec.json.encode(options))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _open_log(path: str | None) -> contextlib.AbstractContextManager[IO[bytes] | None]:
    if path is None:
        return contextlib.nullcontext()
    try:
        Path(path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        return open(os.open(path, flags, 0o600), "ab")
    except OSError as error:
        raise UserError(f"the log file {path} cannot be opened: {reason(error)}") from None


def _launch(config: int, ready: int, lock: int, log: IO[bytes] | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "fuseclient.channel", str(config), "--ready-fd", str(ready)]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd="/",
        umask=0o077,
        pass_fds=(config, ready, lock),
        start_new_session=True,
    )


def _wait_ready(channel: subprocess.Popen[bytes], ready: int, options: MountOptions) -> Ready:
    line = servers.read_line(ready, _READY_TIMEOUT_S)
    if line is None:
        raise UserError(_silent_failure(channel, options))
    try:
        answer = msgspec.json.decode(line, type=dict[str, object])
        if "error" in answer:
            raise UserError(msgspec.convert(answer, _Failed).error)
        return msgspec.convert(answer, Ready)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise UserError(f"the channel said what cannot be understood: {error}") from None


def _silent_failure(channel: subprocess.Popen[bytes], options: MountOptions) -> str:
    """Say in one line how a channel failed that said nothing itself."""
    try:
        what = f"the channel ended with status {channel.wait(1.0)} before the mount was ready"
    except subprocess.TimeoutExpired:
        what = f"the mount was not ready within {_READY_TIMEOUT_S:g} s"
    if options.log_file is None:
        return what
    last = servers.last_line(Path(options.log_file))
    return f"{what}; {options.log_file} ends: {last}" if last else what


def _end(channel: subprocess.Popen[bytes]) -> None:
    channel.terminate()
    try:
        channel.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        channel.kill()
        channel.wait()
