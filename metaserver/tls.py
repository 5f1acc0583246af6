"""TLS on the metaserver's side: the certificates it shows and asks for, and the time until they are agreed on.

TLS 1.3 and nothing older. A session cannot be resumed: what a client showed is verified for each of its connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar, cast

from metaserver import wire

_log = logging.getLogger(__name__)

_Protocol = TypeVar("_Protocol", bound=asyncio.Protocol)

_NAME: Final = "commonName"


class BadCertificate(Exception):
    """The certificate, its key or the CA cannot be used. The text is one line for the user."""


class Files(NamedTuple):
    """Paths of PEM files. Without ``client_ca`` clients are known by tokens only."""

    certificate: str
    key: str
    client_ca: str | None = None


class Tls:
    """What the metaserver shows, and whom it believes; read anew by :meth:`reload`."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self.context = _context(files)

    def reload(self) -> None:
        """Read the files again, for the connections that come from now on; what cannot be used changes nothing."""
        try:
            self.context = _context(self._files)
            _log.info("the certificates were read again")
        except BadCertificate as error:
            _log.error("the certificates were not read again: %s", error)


def _context(files: Files) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    try:
        wire.read_private(files.key)
        context.load_cert_chain(files.certificate, files.key, _no_password)
        if files.client_ca is not None:
            context.load_verify_locations(files.client_ca)
            context.verify_mode = ssl.CERT_OPTIONAL
    except wire.NotPrivate as error:
        raise BadCertificate(str(error)) from None
    except OSError as error:
        what = ", ".join(filter(None, files))
        raise BadCertificate(f"TLS cannot be had with {what}: {error.strerror or error}") from None
    return context


def _no_password() -> str:
    raise BadCertificate("the key is encrypted; nobody is here to give its password")


def certificate_name(transport: asyncio.BaseTransport) -> tuple[str, float] | None:
    """Return the name in the certificate that a client has shown, and when that ends (seconds since 1970)."""
    shown = cast(dict[str, Any] | None, transport.get_extra_info("peercert"))
    if not shown:
        return None
    names = [value for part in shown["subject"] for key, value in part if key == _NAME]
    return (names[-1], float(ssl.cert_time_to_seconds(shown["notAfter"]))) if names else None


class Unlocking:
    """A connection until TLS is agreed on, for ``timeout_s`` at most; the protocol that ``make`` returns has it then.

    The peer may hang, or talk anything. (Not start_tls of a connection that was accepted already: uvloop may have read
    the beginning of the handshake by then.)
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, timeout_s: float) -> None:
        self._sock = sock
        self._context = context
        self._timeout_s = timeout_s

    def cut(self, reason: str) -> None:
        """End it now."""
        _log.warning("a client is cut off: %s", reason)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    async def run(self, make: Callable[[], _Protocol]) -> _Protocol | None:
        """Return the protocol, which has the connection; ``None``: there is none any more."""
        try:
            _, protocol = await asyncio.get_running_loop().connect_accepted_socket(
                make, self._sock, ssl=self._context, ssl_handshake_timeout=self._timeout_s
            )
        except OSError as error:
            _log.info("no TLS with a client: %s", error)
            self._sock.close()
            return None
        return protocol
