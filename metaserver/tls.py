"""TLS on the metaserver's side: the certificates it shows and asks for, and the time until they are agreed on.

TLS 1.3 and nothing older. A session cannot be resumed: what a client showed is verified for each of its connections.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Any, Final, NamedTuple, cast

from metaserver import wire

_log = logging.getLogger(__name__)

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


class Unlocking(asyncio.Protocol):
    """A connection until TLS is agreed on, for ``timeout_s`` at most; then that of ``make`` takes over.

    ``on_end`` is called, once, when it is over with it. The peer may hang, or talk anything.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        make: Callable[[], asyncio.Protocol],
        timeout_s: float,
        on_end: Callable[[Unlocking], object],
    ) -> None:
        self._context = context
        self._make = make
        self._timeout_s = timeout_s
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        #: What came after the handshake and before the other protocol was there.
        self._early = bytearray()
        self._is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.pause_reading()
        self._task = asyncio.get_running_loop().create_task(self._unlock(self._transport))

    def data_received(self, data: bytes) -> None:
        self._early += data

    def connection_lost(self, error: Exception | None) -> None:
        self._is_lost = True

    def cut(self, reason: str) -> None:
        """End it now."""
        _log.warning("a client is cut off: %s", reason)
        if self._task is not None:
            self._task.cancel()

    async def _unlock(self, transport: asyncio.Transport) -> None:
        peer = transport.get_extra_info("peername")
        try:
            secured = await asyncio.get_running_loop().start_tls(
                transport, self, self._context, server_side=True, ssl_handshake_timeout=self._timeout_s
            )
        except (OSError, asyncio.CancelledError) as error:
            if isinstance(error, OSError):
                _log.info("%s: no TLS: %s", peer, error)
            transport.abort()
            return
        finally:
            self._on_end(self)
        assert secured is not None
        self._hand_over(secured)

    def _hand_over(self, secured: asyncio.Transport) -> None:
        protocol = self._make()
        secured.set_protocol(protocol)
        protocol.connection_made(secured)
        if self._early:
            protocol.data_received(bytes(self._early))
        if self._is_lost:
            protocol.connection_lost(None)
