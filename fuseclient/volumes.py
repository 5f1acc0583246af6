"""Where a volume is: its URL as the user writes it, checked, as a typed value.

The query of the second form tells where the credentials are (see credentials.py).

``file:///dir`` is an embedded volume: its metadata and blocks lie in one directory, and whoever uses it starts a
metaserver of its own on it. ``bpfuse://host:port/name`` is a volume of a running metaserver. The path of a file URL
is taken literally, as a shell would: nothing in it is percent-decoded. The URLs of engines and stores, which travel
between programs, are percent-encoded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from fuseclient.credentials import NO_CREDENTIALS, Credentials
from fuseclient.data.store_errors import StoreError
from fuseclient.data.store_url import FORMS as STORE_FORMS
from fuseclient.data.store_url import parse_store_url
from fuseclient.errors import UserError, reason

#: What the one volume of an embedded metaserver is called.
EMBEDDED_NAME: Final = "volume"

#: What the engine of an embedded volume keeps its data in.
_ENGINE_FILE: Final = "data.mdb"
_FORMS: Final = "file:///directory or bpfuse://host:port/volume"
_VOLUME_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_PLACE: Final = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True)
class Embedded:
    """A volume in a directory of this machine."""

    #: Absolute; symbolic links are resolved.
    directory: Path

    name = EMBEDDED_NAME

    @property
    def url(self) -> str:
        return f"file://{self.directory}"

    @property
    def metadata(self) -> Path:
        """Where the metaserver's engine lives."""
        return self.directory / "meta"

    @property
    def blocks(self) -> Path:
        """Where data objects lie, unless the volume was made with another store."""
        return self.directory / "blocks"

    @property
    def engine_url(self) -> str:
        return f"lmdb://{quote(str(self.metadata))}"

    @property
    def store_url(self) -> str:
        return f"file://{quote(str(self.blocks))}"

    def is_formatted(self) -> bool:
        """Say whether there is a volume; raise :exc:`UserError` if the directory cannot be looked into."""
        try:
            return (self.metadata / _ENGINE_FILE).is_file()
        except OSError as error:
            raise UserError(f"{self.metadata} cannot be read: {reason(error)}") from None


@dataclass(frozen=True)
class Remote:
    """A volume of metaservers that run by themselves: one of them, at a time, has the authority."""

    #: Host and port of each.
    hosts: tuple[tuple[str, int], ...]
    name: str
    credentials: Credentials = NO_CREDENTIALS

    @property
    def url(self) -> str:
        """The volume, as it is shown; see :attr:`full_url`."""
        return f"bpfuse://{self.places}/{self.name}"

    @property
    def full_url(self) -> str:
        """What :func:`parse_volume` makes this of, with where the credentials are."""
        return f"{self.url}{self.credentials.suffix}"

    @property
    def places(self) -> str:
        """The metaservers, as in the URL."""
        return ",".join(f"{host}:{port}" for host, port in self.hosts)

    @property
    def address(self) -> str:
        """The metaservers, in the form that a connection is made to."""
        return ",".join(f"tcp:{host}:{port}" for host, port in self.hosts) + self.credentials.suffix


Volume = Embedded | Remote


def parse_volume(url: str) -> Volume:
    """Return the volume that ``url`` names, whether or not it exists; raise :exc:`UserError`."""
    if url.startswith("file://"):
        return Embedded(Path(os.path.realpath(_absolute_path(url))))
    if url.startswith("bpfuse://"):
        return _parse_remote(url)
    raise UserError(f"not the URL of a volume: {url!r}; it is {_FORMS}")


def parse_store(url: str, compression: str | None = None) -> str:
    """Return the encoded URL of the store that the user wrote; raise :exc:`UserError`.

    ``compression`` is an option of the URL, too. The path of a file URL is taken literally up to a question mark.
    """
    try:
        if url.startswith("s3://"):
            store = parse_store_url(url)
        elif url.startswith("file://"):
            place, _, query = url.partition("?")
            encoded = f"file://{quote(os.path.realpath(_absolute_path(place)))}"
            store = parse_store_url(f"{encoded}?{query}" if query else encoded)
        else:
            raise UserError(f"not the URL of a store: {url!r}; it is {STORE_FORMS}")
        return str(store.compressed(compression) if compression is not None else store)
    except StoreError as error:
        raise UserError(str(error)) from None


def _absolute_path(url: str) -> str:
    path = url.removeprefix("file://")
    if not path.startswith("/"):
        raise UserError(f"{url!r} has no absolute path; write file:///directory")
    if any(ord(character) < 32 or ord(character) == 127 for character in path):
        raise UserError(f"the path in {url!r} has a control character")
    if not path.strip("/"):
        raise UserError(f"{url!r} is the root directory")
    return path


def _parse_remote(url: str) -> Remote:
    url, _, query = url.partition("?")
    places, _, volume = url.removeprefix("bpfuse://").partition("/")
    hosts = tuple(_parse_place(url, place) for place in places.split(","))
    if not volume:
        raise UserError(f"not the URL of a volume: {url!r}; it is {_FORMS}")
    if not _VOLUME_NAME.fullmatch(volume):
        raise UserError(
            f"{volume!r} cannot be a volume's name: up to 63 of a-z, 0-9, '_', '.', '-', a letter or digit first"
        )
    try:
        return Remote(hosts, volume, Credentials.parse(query))
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None


def _parse_place(url: str, place: str) -> tuple[str, int]:
    match = _PLACE.fullmatch(place)
    if match is None:
        raise UserError(f"not the URL of a volume: {url!r}; it is {_FORMS}")
    port = int(match["port"])
    if not 0 < port < 65536:
        raise UserError(f"{url!r} has no valid port: it is from 1 to 65535")
    return match["host"], port
