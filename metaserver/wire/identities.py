"""Messages about identities: who may use which volumes, and how."""

from __future__ import annotations

import enum
from typing import Annotated, Final

from msgspec import Meta

from metaserver.wire.base import U32, U63, Message, VolumeName
from metaserver.wire.tokens import DIGEST_BYTES

#: The most identities that one message tells of, and that a metaserver has.
IDENTITIES_PAGE: Final = 64
MAX_IDENTITIES: Final = 4096
#: Who the kernel calls nobody.
NOBODY: Final = 65534

IdentityName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}\Z")]


class Squash(enum.IntEnum):
    """Whose rights an identity's users have."""

    #: ROOT for clients on other machines, NONE on the metaserver's own.
    AUTO = 0
    #: Those that the client says.
    NONE = 1
    #: The same, but none of root's.
    ROOT = 2
    #: Those of one user, whoever they are.
    ALL = 3


class Identity(Message):
    """Who a client is. Nothing of its secret is in it."""

    name: IdentityName
    #: It may make volumes and identities.
    admin: bool = False
    #: ``None``: all.
    volumes: Annotated[list[VolumeName], Meta(max_length=64)] | None = None
    #: The directory that is the root for it: absolute, "/" for all of the volume.
    subtree: Annotated[bytes, Meta(min_length=1, max_length=4095)] = b"/"
    read_only: bool = False
    squash: Squash = Squash.AUTO
    #: Who root, or everybody, is instead.
    uid: U32 = NOBODY
    gid: U32 = NOBODY
    #: Seconds since 1970 after which it is refused; 0: never.
    expires_s: U63 = 0
    #: Known by a certificate of this name, and not by a token.
    by_certificate: bool = False


class CreateIdentity(Message, tag=55):
    """Make an identity; EXISTS. ``digest``: of the secret of its token (see tokens.py), nothing if it has none."""

    identity: Identity
    digest: Annotated[bytes, Meta(max_length=DIGEST_BYTES)]


class RevokeIdentity(Message, tag=56):
    """Delete an identity; NOT_FOUND. All that it has open is cut off before the reply."""

    name: IdentityName


class ListIdentities(Message, tag=57):
    """Tell of the identities whose name sorts after ``after``, at most IDENTITIES_PAGE; none: there are no more."""

    after: Annotated[str, Meta(max_length=64)] = ""


class Identities(Message, tag=95):
    identities: list[Identity]
