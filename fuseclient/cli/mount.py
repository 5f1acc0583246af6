"""``bpfuse mount``: mount a volume."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Literal

import typer

from fuseclient import mounting
from fuseclient.cli.connecting import connecting
from fuseclient.cli.values import format_size, parse_size
from fuseclient.config import MountOptions
from fuseclient.volumes import parse_volume

_LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
_DEFAULTS = MountOptions(url="", mountpoint="")


def register(app: typer.Typer) -> None:
    app.command("mount")(connecting(mount))


def mount(
    url: Annotated[str, typer.Argument(help="file:///directory, or bpfuse://host:port/volume")],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="the mount point")],
    accel: Annotated[
        Literal["auto", "bpf", "off"],
        typer.Option(help="answer requests in the kernel: where possible, or fail, or not"),
    ] = "auto",
    profile: Annotated[Literal["general", "dataset"], typer.Option(help="dataset: mounted read-only")] = "general",
    read_only: Annotated[bool, typer.Option("--read-only", help="refuse every change")] = False,
    trusted: Annotated[
        bool, typer.Option("--trusted", help="obey the volume's setuid programs and device nodes")
    ] = False,
    kernel_cache_size: Annotated[str, typer.Option(metavar="SIZE", help="kernel memory for BPF maps")] = format_size(
        _DEFAULTS.kernel_cache_bytes
    ),
    kernel_ttl: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="how long the kernel's own caches may answer at most")
    ] = None,
    cache_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="where file content is kept; default: /var/cache/bpfuse")
    ] = None,
    cache_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="the most that is kept, 0: nothing; default: 10G, and of a volume on this machine only whole files",
        ),
    ] = None,
    queue_depth: Annotated[
        int | None, typer.Option(min=1, max=1024, help="requests of each CPU that can wait for the daemon at once")
    ] = None,
    lease: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=3600, help="the lease that an embedded metaserver gives")
    ] = _DEFAULTS.lease_s,
    locks: Annotated[
        Literal["shared", "local"],
        typer.Option(help="file locks: shared with other mounts of the volume, or known to this mount only"),
    ] = "shared",
    durability: Annotated[
        Literal["commit", "interval"],
        typer.Option(help="of an embedded volume's commits: durable at once, or within 100 ms and at each fsync"),
    ] = "commit",
    foreground: Annotated[bool, typer.Option("--foreground", help="stay, with the log on standard error")] = False,
    log_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="default: /var/log/bpfuse/, named by a hash of the mount point")
    ] = None,
    log_level: Annotated[_LogLevel, typer.Option(help="what is logged")] = "INFO",
) -> None:
    """Mount a volume. Returns when the mount works, unless it is to stay in the foreground."""
    options = MountOptions(
        url=url,
        mountpoint=directory,
        accel=accel,
        profile=profile,
        read_only=read_only or profile == "dataset",
        trusted=trusted,
        kernel_cache_bytes=parse_size(kernel_cache_size),
        kernel_ttl_s=kernel_ttl,
        cache_directory=None if cache_dir is None else os.path.abspath(cache_dir),
        cache_bytes=None if cache_size is None else parse_size(cache_size),
        queue_depth=queue_depth,
        lease_s=lease,
        locks=locks,
        durability=durability,
        log_file=None if foreground else os.path.abspath(log_file or mounting.default_log_file(directory)),
        log_level=log_level,
    )
    mounted = mounting.mount(options)
    _tell(mounted)
    if foreground:
        raise typer.Exit(mounting.wait_foreground(mounted))


def _tell(mounted: mounting.Mounted) -> None:
    for notice in mounted.notices:
        print(f"bpfuse: note: {notice}", file=sys.stderr)
    answered = "BPF programs in the kernel" if mounted.accel == "bpf" else "the daemon (not accelerated)"
    print(
        f"{parse_volume(mounted.options.url).url} is mounted at {mounted.options.mountpoint}; answered by {answered}",
        flush=True,
    )
