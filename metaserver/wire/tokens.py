"""Tokens: what a client shows of itself, and how both sides read it.

A token is ``NAME:SECRET``, the identity's name and 256 random bits. The metaserver keeps a digest of the secret only.
The text of a token is in no message of an exception.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Final

from metaserver.wire.private_files import NotPrivate, read_private

#: Bytes of a secret.
SECRET_BYTES: Final = 32
DIGEST_BYTES: Final = 32
MAX_TOKEN: Final = 128

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
_SECRET: Final = re.compile(r"[A-Za-z0-9_-]{43}")


def make_token(name: str) -> str:
    """Return a new token of an identity; raise :exc:`ValueError` for what cannot be one's name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be an identity's name: up to 64 of A-Z, a-z, 0-9 and _.@-")
    return f"{name}:{secrets.token_urlsafe(SECRET_BYTES)}"


def split_token(token: str) -> tuple[str, str]:
    """Return the name and the secret of a token; raise :exc:`ValueError`, which does not tell the text."""
    name, _, secret = token.partition(":")
    if not _NAME.fullmatch(name) or not _SECRET.fullmatch(secret):
        raise ValueError("this is not a token")
    return name, secret


def digest(secret: str) -> bytes:
    """Return what is kept of a secret. It has 256 bits of chance in it: no salt and no slow hash add anything."""
    return hashlib.sha256(secret.encode()).digest()


def read_token(path: str) -> str:
    """Return the token in a file; raise :exc:`NotPrivate`."""
    try:
        token = read_private(path).decode("ascii").strip()
        split_token(token)
    except ValueError:
        raise NotPrivate(f"there is no token in {path}") from None
    return token
