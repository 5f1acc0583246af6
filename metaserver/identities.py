"""The identities of a deployment, in the engine that all its metaservers share: made, shown, revoked, recognised."""

from __future__ import annotations

import hmac
from typing import Final, NamedTuple

import msgspec

from metaserver import keys, wire
from metaserver.engine.base import Snapshot, Transaction
from metaserver.errors import Refused
from metaserver.wire import ErrorCode, Identity

#: Whoever is on the metaserver's own machine, and may use its unix socket, or its loopback port.
LOCAL: Final = Identity("local", admin=True, squash=wire.Squash.NONE)
#: Whoever comes over plaintext that ``--insecure`` allows.
ANYBODY: Final = Identity("anybody")
#: Names that no identity in the engine has.
_RESERVED: Final = frozenset((LOCAL.name, ANYBODY.name))

_NO_DIGEST: Final = bytes(wire.DIGEST_BYTES)


class Known(msgspec.Struct, array_like=True, frozen=True):
    """What the engine keeps of an identity."""

    identity: Identity
    digest: bytes
    #: Random: another one that was made later under the same name is another identity.
    serial: bytes


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Known)


class Shown(NamedTuple):
    """What a client has shown of itself: a token, or the name in a certificate that was verified."""

    token: str | None
    certificate: str | None


def find(snapshot: Snapshot, name: str) -> Known | None:
    """Return an identity."""
    value = snapshot.get(keys.identity(name))
    return None if value is None else _DECODER.decode(value)


def create(txn: Transaction, request: wire.CreateIdentity, serial: bytes) -> None:
    """Make an identity; EXISTS, INVALID, TOO_LARGE."""
    identity = request.identity
    if identity.name in _RESERVED:
        raise Refused(ErrorCode.EXISTS, f"{identity.name!r} is a name of the metaserver's own")
    if len(request.digest) != (0 if identity.by_certificate else wire.DIGEST_BYTES):
        raise Refused(ErrorCode.INVALID, "an identity has a certificate or a token")
    if not identity.subtree.startswith(b"/") or b"\0" in identity.subtree:
        raise Refused(ErrorCode.INVALID, "a subtree is an absolute path")
    if find(txn, identity.name) is not None:
        raise Refused(ErrorCode.EXISTS, f"there is an identity {identity.name!r} already")
    if len(txn.range(*keys.identities(), limit=wire.MAX_IDENTITIES)) >= wire.MAX_IDENTITIES:
        raise Refused(ErrorCode.TOO_LARGE, f"there are {wire.MAX_IDENTITIES} identities")
    txn.put(keys.identity(identity.name), _ENCODER.encode(Known(identity, request.digest, serial)))


def revoke(txn: Transaction, name: str) -> Known:
    """Delete an identity and return it; NOT_FOUND."""
    known = find(txn, name)
    if known is None:
        raise Refused(ErrorCode.NOT_FOUND, f"there is no identity {name!r}")
    txn.delete(keys.identity(name))
    return known


def listed(snapshot: Snapshot, after: str) -> list[Identity]:
    """Return the identities after a name, as many as one message holds."""
    rows = snapshot.range(*keys.identities(after), limit=wire.IDENTITIES_PAGE)
    return [_DECODER.decode(value).identity for _, value in rows]


def recognise(snapshot: Snapshot, shown: Shown, now_s: float) -> Known:
    """Return who has shown this; NOT_AUTHENTICATED, which does not tell what was wrong with it."""
    if shown.token is not None:
        known = _by_token(snapshot, shown.token)
    else:
        known = _by_certificate(snapshot, shown.certificate)
    if known is None or is_over(known.identity, now_s):
        raise Refused(ErrorCode.NOT_AUTHENTICATED, "the metaserver does not know this identity, or not any more")
    return known


def _by_token(snapshot: Snapshot, token: str) -> Known | None:
    try:
        name, secret = wire.split_token(token)
    except ValueError:
        return None
    known = find(snapshot, name)
    expected = known.digest if known is not None and known.digest else _NO_DIGEST
    return known if hmac.compare_digest(expected, wire.digest(secret)) else None


def _by_certificate(snapshot: Snapshot, name: str | None) -> Known | None:
    known = find(snapshot, name) if name else None
    return known if known is not None and known.identity.by_certificate else None


def is_over(identity: Identity, now_s: float) -> bool:
    """Whether an identity has expired."""
    return bool(identity.expires_s) and now_s >= identity.expires_s
