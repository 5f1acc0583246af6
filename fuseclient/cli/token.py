"""``bpfuse token``: who may use which volumes of a metaserver."""

from __future__ import annotations

import os
import re
import time
from typing import Annotated, Final, Literal

import msgspec
import typer
from rich.table import Table

from fuseclient import identities
from fuseclient.cli.connecting import connecting
from fuseclient.cli.values import console
from fuseclient.errors import UserError
from metaserver import wire

_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_PERIOD: Final = re.compile(r"([0-9]{1,9})([smhd])")

_Address = Annotated[str, typer.Argument(metavar="METASERVER", help="host:port, or unix:/path")]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="the identity's name")]

_app = typer.Typer(help="Who may use which volumes of a metaserver: identities, known by a token or a certificate.")


def register(app: typer.Typer) -> None:
    for command in (create, revoke, show):
        name = "list" if command is show else command.__name__
        _app.command(name)(connecting(command))
    app.add_typer(_app, name="token", no_args_is_help=True)


def create(
    metaserver: _Address,
    name: _Name,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="a new file for the token; -: stdout"),
    ] = None,
    certificate: Annotated[
        bool, typer.Option("--certificate", help="known by a certificate whose common name is NAME: there is no token")
    ] = False,
    volume: Annotated[list[str] | None, typer.Option(metavar="NAME", help="it may use; may be repeated")] = None,
    all_volumes: Annotated[bool, typer.Option("--all-volumes", help="it may use any volume")] = False,
    subtree: Annotated[str, typer.Option(metavar="PATH", help="the directory that is the root for it")] = "/",
    read_only: Annotated[bool, typer.Option("--read-only", help="it may change nothing")] = False,
    squash: Annotated[
        Literal["auto", "none", "root", "all"],
        typer.Option(help="take root's rights from its users, or give all those of one; auto: root off this machine"),
    ] = "auto",
    uid: Annotated[int, typer.Option(min=1, max=2**32 - 2, help="who root, or everybody, is then")] = wire.NOBODY,
    gid: Annotated[int, typer.Option(min=1, max=2**32 - 2, help="and the group")] = wire.NOBODY,
    admin: Annotated[bool, typer.Option("--admin", help="it may make volumes and identities")] = False,
    expires: Annotated[str | None, typer.Option(metavar="PERIOD", help="from now on: 90s, 10m, 12h or 30d")] = None,
) -> None:
    """Make an identity, and the token that it is known by."""
    if certificate == (output is not None):
        raise UserError("give --output FILE, where its token goes, or --certificate", 2)
    if not (volume or all_volumes or admin) or (volume and all_volumes):
        raise UserError("give the volumes that it may use: --volume NAME, or --all-volumes", 2)
    identity = wire.Identity(
        name,
        admin,
        None if all_volumes else volume or [],
        os.fsencode(subtree),
        read_only,
        wire.Squash[squash.upper()],
        uid,
        gid,
        0 if expires is None else int(time.time()) + _period_s(expires),
        certificate,
    )
    identities.create(identities.parse_address(metaserver), identity, output)


def revoke(metaserver: _Address, name: _Name) -> None:
    """Delete an identity. Whatever uses it is cut off at once."""
    identities.revoke(identities.parse_address(metaserver), name)


def show(
    metaserver: _Address, as_json: Annotated[bool, typer.Option("--json", help="a line of JSON for each")] = False
) -> None:
    """Show the identities. No secrets are shown: the metaserver does not have them."""
    found = identities.listed(identities.parse_address(metaserver))
    if as_json:
        for identity in found:
            print(msgspec.json.encode(_described(identity)).decode())
        return
    table = Table("name", "known by", "volumes", "below", "access", "squash", "expires", box=None)
    for identity in found:
        told = _described(identity)
        access = "admin" if identity.admin else "read-only" if identity.read_only else "read-write"
        volumes = "all" if identity.volumes is None else " ".join(identity.volumes)
        known_by, squash = str(told["known_by"]), str(told["squash"])
        table.add_row(identity.name, known_by, volumes, str(told["subtree"]), access, squash, _end(identity))
    console().print(table)


def _described(identity: wire.Identity) -> dict[str, object]:
    return {
        "name": identity.name,
        "known_by": "certificate" if identity.by_certificate else "token",
        "admin": identity.admin,
        "volumes": identity.volumes,
        "subtree": os.fsdecode(identity.subtree),
        "read_only": identity.read_only,
        "squash": identity.squash.name.lower(),
        "uid": identity.uid,
        "gid": identity.gid,
        "expires_s": identity.expires_s or None,
    }


def _end(identity: wire.Identity) -> str:
    if not identity.expires_s:
        return "never"
    text = time.strftime("%Y-%m-%d %H:%M", time.localtime(identity.expires_s))
    return f"{text} (over)" if identity.expires_s <= time.time() else text


def _period_s(text: str) -> int:
    match = _PERIOD.fullmatch(text)
    if match is None:
        raise UserError(f"not a period: {text!r}; write it as 90s, 10m, 12h or 30d", 2)
    return int(match[1]) * _UNITS_S[match[2]]
