"""``bpfuse metaserver``: serve volumes."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Literal

import typer


def register(app: typer.Typer) -> None:
    app.command("metaserver")(metaserver)


def metaserver(
    engine: Annotated[
        str,
        typer.Option(
            metavar="URL", help="where metadata is kept: lmdb:///directory, etcd://..., postgresql://..., mysql://..."
        ),
    ],
    listen: Annotated[
        list[str], typer.Option(metavar="ADDRESS", help="host:port, or unix:/path; may be given several times")
    ],
    lease: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=3600, help="how long clients may rely on what they hold")
    ] = 30.0,
    durability: Annotated[
        Literal["commit", "interval"],
        typer.Option(help="commits are durable before they are acknowledged, or within 100 ms and at each fsync"),
    ] = "commit",
    tls_cert: Annotated[str | None, typer.Option(metavar="FILE", help="TLS on TCP, with this certificate")] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="its key, mode 0600")] = None,
    tls_client_ca: Annotated[
        str | None, typer.Option(metavar="FILE", help="the CA of certificates that clients may be known by")
    ] = None,
    require_identity: Annotated[
        bool, typer.Option("--require-identity", help="who is on this machine has to show a token, too")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="allow plaintext TCP that other machines can reach")
    ] = False,
    squash: Annotated[
        Literal["auto", "none", "root", "all"],
        typer.Option(help="with --insecure: whose rights clients on other machines have; auto: anybody's but root's"),
    ] = "auto",
    advertise: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="host:port where clients are told to come (default: where it listens)"),
    ] = None,
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], typer.Option(help="what is logged")] = "INFO",
) -> None:
    """Serve the volumes of one engine, in the foreground, until SIGTERM or SIGINT.

    Any number may run on one engine: one of them serves at a time, and the others stand by.
    """
    arguments = ["--engine", engine, "--lease-s", str(lease), "--log-level", log_level]
    arguments += ["--durability", durability, "--squash", squash]
    for each in listen:
        arguments += ["--listen", _address(each)]
    for option, path in (("--tls-cert", tls_cert), ("--tls-key", tls_key), ("--tls-client-ca", tls_client_ca)):
        if path is not None:
            arguments += [option, path]
    if require_identity:
        arguments.append("--require-identity")
    if insecure:
        arguments.append("--insecure")
    if advertise is not None:
        arguments += ["--advertise", _address(advertise)]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "metaserver", *arguments])


def _address(text: str) -> str:
    return text if text.startswith(("unix:", "tcp:")) else f"tcp:{text}"
