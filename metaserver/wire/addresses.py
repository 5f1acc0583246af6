"""Where a metaserver listens."""

from __future__ import annotations

from typing import NamedTuple


class UnixAddress(NamedTuple):
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


class TcpAddress(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


def parse_addresses(text: str) -> list[UnixAddress | TcpAddress]:
    """Return what several addresses say, with commas between them; raise :exc:`ValueError`."""
    return [parse_address(each) for each in text.split(",")]


def parse_address(text: str) -> UnixAddress | TcpAddress:
    """Return what "unix:/path" or "tcp:host:port" says (an IPv6 host in brackets); raise :exc:`ValueError`."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest.startswith("/") and "\0" not in rest:
        return UnixAddress(rest)
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and host and port.isascii() and port.isdigit() and int(port) < 65536:
        return TcpAddress(host.removeprefix("[").removesuffix("]"), int(port))
    raise ValueError(f"not an address: {text!r}; it is unix:/path or tcp:host:port")
