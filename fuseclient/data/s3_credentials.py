"""The credentials of an S3 store: from the environment, or from a file that it names, which nobody else may read.

``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY`` and ``AWS_SESSION_TOKEN`` are obstore's own to read. In their absence
``AWS_SHARED_CREDENTIALS_FILE`` names a file as other programs for S3 use it, of which the section ``AWS_PROFILE``, or
``default``, is taken. There is no other way: URLs, volumes and command lines have none, because others see these.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from typing import Final

from fuseclient.data.store_errors import StoreError
from metaserver import wire

_FILE: Final = "AWS_SHARED_CREDENTIALS_FILE"
_NAMES: Final = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")


def from_file() -> dict[str, str]:
    """Return the credentials of the file that the environment names, under obstore's names; empty: it is not needed.

    Raises :exc:`StoreError`, with one line that has no secret, for a file that cannot be read, that others than its
    owner can read, or that has no credentials.
    """
    path = os.environ.get(_FILE)
    if not path or os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    profile = os.environ.get("AWS_PROFILE", "default")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(_read(path))
        section = parser[profile]
    except (configparser.Error, UnicodeDecodeError):  # its text may quote a line, and so a secret
        raise StoreError(f"{path}: not a file of credentials") from None
    except KeyError:
        raise StoreError(f"{path} has no section [{profile}]") from None
    found = {name: section[name] for name in _NAMES if section.get(name)}
    if missing := [name for name in _NAMES[:2] if name not in found]:
        raise StoreError(f"{path} has no {missing[0]} in section [{profile}]")
    return found


def _read(path: str) -> str:
    try:
        return wire.read_private(path).decode()
    except wire.NotPrivate as error:
        raise StoreError(str(error)) from None


def secrets(credentials: Mapping[str, str]) -> list[str]:
    """Return what must not be in any message: of these credentials, and of the environment."""
    held = [credentials.get(name) or os.environ.get(name.upper()) for name in _NAMES[1:]]
    return [each for each in held if each]
