"""Making, revoking and listing the identities that a metaserver knows."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Final

import msgspec

from fuseclient import servers
from fuseclient.credentials import Credentials
from fuseclient.errors import UserError, reason
from fuseclient.worker import rpc
from metaserver import wire

#: As the file of a token: standard output.
STDOUT: Final = "-"


def parse_address(text: str) -> str:
    """Return the address that "unix:/path", "host:port" or "bpfuse://host:port" means; raise :exc:`UserError`."""
    place, mark, query = text.partition("?")
    place = place.removeprefix("bpfuse://").rstrip("/")
    address = place if place.startswith(("unix:", "tcp:")) else f"tcp:{place}"
    try:
        wire.parse_address(address)
        Credentials.parse(query)
    except ValueError:
        raise UserError(f"not a metaserver's address: {text!r}; it is host:port or unix:/path") from None
    return address + mark + query


def create(address: str, identity: wire.Identity, token_file: str | None) -> None:
    """Make an identity, and the file with its token, if it is not known by a certificate; raise :exc:`UserError`.

    The metaserver is not told the token, but a digest of it.
    """
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(identity), type=wire.Identity)
    except msgspec.ValidationError as error:
        raise UserError(f"this cannot be an identity: {error}") from None
    if identity.by_certificate:
        _change(address, wire.CreateIdentity(identity, b""))
        return
    assert token_file is not None
    token = wire.make_token(identity.name)
    with _private_file(token_file, token):
        _change(address, wire.CreateIdentity(identity, wire.digest(wire.split_token(token)[1])))


def revoke(address: str, name: str) -> None:
    """Delete an identity: what it has open is cut off; raise :exc:`UserError`."""
    _change(address, wire.RevokeIdentity(name))


def listed(address: str) -> list[wire.Identity]:
    """Return all identities, by name; raise :exc:`UserError`."""

    async def body(connection: rpc.Connection) -> list[wire.Identity]:
        found: list[wire.Identity] = []
        while more := (await connection.call(wire.ListIdentities(_last(found)), wire.Identities)).identities:
            found += more
        return found

    try:
        return servers.talk(address, body)
    except rpc.Refused as refused:
        raise _refused(address, refused) from None


def _last(found: list[wire.Identity]) -> str:
    return found[-1].name if found else ""


def _change(address: str, request: wire.CreateIdentity | wire.RevokeIdentity) -> None:
    try:
        servers.talk(address, lambda connection: connection.call(request, wire.Done))
    except rpc.Refused as refused:
        raise _refused(address, refused) from None


def _refused(address: str, refused: rpc.Refused) -> UserError:
    return UserError(f"{address.partition('?')[0]} refused: {refused}")


@contextlib.contextmanager
def _private_file(path: str, token: str) -> Iterator[None]:
    """Write a token to a new file of the user's own; it is removed again if the body fails."""
    if path == STDOUT:
        yield
        sys.stdout.write(f"{token}\n")
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise UserError(f"{path} cannot be made: {reason(error)}") from None
    try:
        with open(descriptor, "w") as file:
            file.write(f"{token}\n")
            file.flush()
            os.fsync(descriptor)
        yield
    except BaseException:
        os.unlink(path)
        raise
