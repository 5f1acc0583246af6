"""What a client shows a metaserver, and what it believes of it: the query of a volume's URL, and of an address.

``bpfuse://host:port/volume?ca=FILE&cert=FILE&key=FILE&token=FILE``: paths of files only, never what is in them.

* On the loopback device, without ``ca``, ``cert`` or ``tls``: plaintext.
* Otherwise TLS 1.3, and the certificate has to be the host's, signed by ``ca`` or, without it, by one that the system
  believes.
* ``insecure``: plaintext to another machine. No token is sent then.

The files are read for each connection: what was renewed is used from the next one on.
"""

from __future__ import annotations

import contextlib
import ipaddress
import ssl
from dataclasses import dataclass, fields
from typing import Final
from urllib.parse import parse_qsl, quote

from metaserver import wire

_PATHS: Final = ("ca", "cert", "key", "token")
_FLAGS: Final = ("tls", "insecure")


class Unusable(Exception):
    """What the client was told to show, or to believe, cannot be used. The text is one line for the user."""


@dataclass(frozen=True)
class Credentials:
    """Absolute paths of PEM files and of a file with a token; and whether TLS is asked for, or done without."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    token: str | None = None
    tls: bool = False
    insecure: bool = False

    @classmethod
    def parse(cls, query: str) -> Credentials:
        """Return what the query of a URL says; raise :exc:`ValueError`."""
        given: dict[str, str | bool] = {}
        for name, value in parse_qsl(query, keep_blank_values=True, errors="strict"):
            if name in given or name not in (*_PATHS, *_FLAGS):
                raise ValueError(f"{name!r} is given twice, or is none of {', '.join((*_PATHS, *_FLAGS))}")
            if name in _FLAGS and value:
                raise ValueError(f"{name} has no value")
            if name in _PATHS and (not value.startswith("/") or "\0" in value):
                raise ValueError(f"{name} is the absolute path of a file")
            given[name] = True if name in _FLAGS else value
        return cls(**given).checked()  # type: ignore[arg-type] # the names are looked at above

    def checked(self) -> Credentials:
        """Return itself; raise :exc:`ValueError` for what contradicts itself."""
        if (self.cert is None) != (self.key is None):
            raise ValueError("a certificate and its key belong together")
        if self.insecure and (self.tls or self.ca or self.cert or self.token):
            raise ValueError("insecure is plaintext: nothing secret is shown, and nobody's certificate is looked at")
        return self

    def query(self) -> str:
        """Return what :meth:`parse` takes."""
        given = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return "&".join(name if value is True else f"{name}={quote(value)}" for name, value in given if value)

    @property
    def suffix(self) -> str:
        """The query with its question mark, if there is any."""
        query = self.query()
        return f"?{query}" if query else ""

    def needs_tls(self, host: str) -> bool:
        """Whether a connection to a host is to be one of TLS."""
        if self.insecure:
            return False
        return self.tls or bool(self.ca or self.cert) or not is_loopback(host)

    def context(self) -> ssl.SSLContext:
        """Return what TLS is to be spoken with; raise :exc:`Unusable`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
            else:
                context.load_default_certs()
            if self.cert is not None and self.key is not None:
                wire.read_private(self.key)
                context.load_cert_chain(self.cert, self.key, _no_password)
        except wire.NotPrivate as error:
            raise Unusable(str(error)) from None
        except OSError as error:
            what = ", ".join(filter(None, (self.ca, self.cert, self.key)))
            raise Unusable(f"TLS cannot be had with {what}: {error.strerror or error}") from None
        return context

    def read_token(self) -> str | None:
        """Return the token that is to be shown, if any; raise :exc:`Unusable`."""
        try:
            return None if self.token is None else wire.read_token(self.token)
        except wire.NotPrivate as error:
            raise Unusable(str(error)) from None


#: Nothing to show, and no CA of one's own.
NO_CREDENTIALS: Final = Credentials()


def _no_password() -> str:
    raise Unusable("the key is encrypted; nobody is here to give its password")


def is_loopback(host: str) -> bool:
    """Whether a host as the user wrote it is this machine, for certain: a name may be anybody's."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    return host == "localhost"
