"""The URL of an engine, taken apart and checked. Passwords are not in it: they come from a file or the environment."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, unquote

from metaserver import wire
from metaserver.errors import EngineUnusable

#: Holds the password of the user that a URL names, unless its option ``password_file`` names a file.
PASSWORD_VARIABLE: Final = "BPFUSE_ENGINE_PASSWORD"
FORMS: Final = (
    "lmdb:///directory, memory://, etcd://host,host/prefix, postgresql://user@host/database and"
    " mysql://user@host/database"
)

_URL: Final = re.compile(r"(?P<scheme>[a-z]+)://(?P<where>[^/?#]*)(?P<path>/[^?#]*)?(?:\?(?P<query>[^#]*))?")
_HOST: Final = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
#: Bytes of a certificate, at most.
_MOST_FILE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Location:
    """An engine's URL, without the secrets.

    ``hosts`` are (host, port), where a port of 0 is the default one; ``path`` is empty or begins with a slash.
    """

    url: str
    scheme: str
    user: str | None
    hosts: tuple[tuple[str, int], ...]
    path: str
    options: Mapping[str, str]

    def password(self) -> str | None:
        """Return the user's password, if there is one; raise :exc:`EngineUnusable` for a file that others can read."""
        content = self.private_file("password_file")
        if content is None:
            return os.environ.get(PASSWORD_VARIABLE)
        try:
            return content.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise EngineUnusable(f"{self.options['password_file']}: a password is text in UTF-8") from None

    def number(self, option: str, missing: int, least: int, most: int) -> int:
        """Return the value of an option that is a number; raise :exc:`EngineUnusable`."""
        text = self.options.get(option)
        if text is None:
            return missing
        if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
            raise EngineUnusable(f"{self.url}: {option} is a number from {least} to {most}")
        return int(text)

    def file(self, option: str) -> bytes | None:
        """Return the content of the file that an option names; raise :exc:`EngineUnusable`."""
        path = self.options.get(option)
        return None if path is None else _read_file(path)

    def private_file(self, option: str) -> bytes | None:
        """Return the content of the file that an option names, its owner's alone; raise :exc:`EngineUnusable`."""
        path = self.options.get(option)
        try:
            return None if path is None else wire.read_private(path)
        except wire.NotPrivate as error:
            raise EngineUnusable(str(error)) from None

    def tls(self) -> ssl.SSLContext | None:
        """Return what a server's certificate is checked by, and our own; ``None``: no authority is named.

        Raises :exc:`EngineUnusable`, as for a key that others can read.
        """
        ca, certificate = self.options.get("ca"), self.options.get("cert")
        self.private_key()
        if ca is None:
            return None
        try:
            context = ssl.create_default_context(cafile=ca)
            if certificate is not None:
                context.load_cert_chain(certificate, self.options.get("key"), _no_password)
        except OSError as error:  # SSLError is one
            raise EngineUnusable(f"{self.url}: its certificates cannot be used: {error.strerror or error}") from None
        return context

    def private_key(self) -> bytes | None:
        """Return the key of our own certificate, if there is one; raise :exc:`EngineUnusable`."""
        given = {"ca", "cert", "key"} & self.options.keys()
        if ("key" in given and "cert" not in given) or ("cert" in given and given != {"ca", "cert", "key"}):
            raise EngineUnusable(f"{self.url}: a certificate needs its key, and ca: whose the server's is")
        return self.private_file("key")

    def allow(self, *options: str) -> None:
        """Raise :exc:`EngineUnusable` if there are other options than these."""
        for name in self.options:
            if name not in options:
                known = ", ".join(options) or "none"
                raise EngineUnusable(f"{self.url}: there is no option {name!r}; options are: {known}")


def _no_password() -> str:
    raise EngineUnusable("the key is encrypted; nobody is here to give its password")


def parse(url: str) -> Location:
    """Take a URL apart; raise :exc:`EngineUnusable`, which never shows a password."""
    scheme, _, rest = url.partition("://")
    userinfo = rest.split("/", 1)[0].rpartition("@")[0]
    if ":" in userinfo:
        raise EngineUnusable(
            f"{scheme}://...: a URL must not have a password in it, others can see it: put it into a file and add"
            f" ?password_file=PATH, or into the environment as {PASSWORD_VARIABLE}"
        )
    match = _URL.fullmatch(url)
    if match is None:
        raise EngineUnusable(f"{url!r} is not the URL of a storage engine; known are {FORMS}")
    user, _, where = match["where"].rpartition("@")
    pairs = parse_qsl(match["query"] or "", keep_blank_values=True)
    options = dict(pairs)
    if len(options) < len(pairs) or "password" in options:
        raise EngineUnusable(
            f"{scheme}://...: an option is given twice, or is a password: that goes into a file, with"
            f" ?password_file=PATH, or into the environment as {PASSWORD_VARIABLE}"
        )
    hosts = tuple(_host(url, each) for each in where.split(",")) if where else ()
    return Location(url, scheme, unquote(user) or None, hosts, unquote(match["path"] or ""), options)


def _host(url: str, text: str) -> tuple[str, int]:
    match = _HOST.fullmatch(text)
    if match is None or int(match["port"] or 0) > 65535:
        raise EngineUnusable(f"{url}: {text!r} is not a host, or host:port")
    return match["host"], int(match["port"] or 0)


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_FILE + 1)
    except OSError as error:
        raise EngineUnusable(f"{path}: {error.strerror}") from None
    if len(content) > _MOST_FILE:
        raise EngineUnusable(f"{path} is larger than {_MOST_FILE} bytes")
    return content
