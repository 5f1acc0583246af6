"""The URL of an object store: where it is and how objects are put there. Pure; a volume keeps it as text.

``file:///directory`` and ``s3://bucket/prefix``, both with options behind a question mark: ``compression`` (none,
lz4 or zstd: of objects stored from now on), ``timeout`` (seconds that one access may take), ``concurrency`` (accesses
at once, of each kind); for S3 also ``endpoint`` (a URL; without it, AWS) and ``region``. Credentials are no part of
a URL, which anybody may see (s3_credentials.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from fuseclient.data.store_errors import StoreError

COMPRESSIONS: Final = ("none", "lz4", "zstd")
FORMS: Final = "file:///directory or s3://bucket/prefix?endpoint=URL"

_COMMON: Final = frozenset({"compression", "timeout", "concurrency"})
_S3_ONLY: Final = frozenset({"endpoint", "region"})


@dataclass(frozen=True, kw_only=True)
class StoreUrl:
    """A store's place and options. ``bucket`` is empty for a local directory, whose ``path`` is absolute."""

    path: str
    bucket: str = ""
    endpoint: str | None = None
    region: str | None = None
    compression: str = "none"
    timeout_s: float = 60.0
    concurrency: int = 8

    @property
    def is_local(self) -> bool:
        return not self.bucket

    def compressed(self, compression: str) -> StoreUrl:
        """Return the same store with another compression; raise :exc:`StoreError` if there is none of that name."""
        return replace(self, compression=_compression(str(self), compression))

    def __str__(self) -> str:
        place = f"file://{quote(self.path)}" if self.is_local else f"s3://{self.bucket}/{quote(self.path)}"
        options = [
            ("endpoint", self.endpoint),
            ("region", self.region),
            *((name, getattr(self, field)) for name, field in _OPTIONS if getattr(self, field) != _DEFAULT[field]),
        ]
        query = urlencode([(name, value) for name, value in options if value is not None], safe=":/")
        return f"{place}?{query}" if query else place


_OPTIONS: Final = (("compression", "compression"), ("timeout", "timeout_s"), ("concurrency", "concurrency"))
_DEFAULT: Final = {"compression": "none", "timeout_s": 60.0, "concurrency": 8}


def parse_store_url(url: str) -> StoreUrl:
    """Return what a URL says; raise :exc:`StoreError` with one line for the user."""
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        options = _options(url, parts.query, _COMMON)
        return StoreUrl(path=unquote(parts.path), **_values(url, options))
    if parts.scheme == "s3" and parts.netloc:
        if "@" in parts.netloc or ":" in parts.netloc:
            raise StoreError("credentials and ports do not belong into a store's URL: use AWS_ACCESS_KEY_ID and others")
        options = _options(url, parts.query, _COMMON | _S3_ONLY)
        values = _values(url, options)
        return StoreUrl(path=unquote(parts.path).strip("/"), bucket=parts.netloc, **values)
    raise StoreError(f"{url} is not a store this client knows; it must be {FORMS}")


def _options(url: str, query: str, known: frozenset[str]) -> dict[str, str]:
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise StoreError(f"{url}: its options are not name=value&name=value") from None
    for name in options:
        if name not in known:
            raise StoreError(f"{url}: there is no option {name!r}; known are {', '.join(sorted(known))}")
    return options


def _values(url: str, options: dict[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if "compression" in options:
        values["compression"] = _compression(url, options["compression"])
    if "timeout" in options:
        values["timeout_s"] = _number(url, options["timeout"], 0.1, 3600.0)
    if "concurrency" in options:
        values["concurrency"] = int(_number(url, options["concurrency"], 1, 256))
    if "endpoint" in options:
        values["endpoint"] = _endpoint(url, options["endpoint"])
    if "region" in options:
        values["region"] = options["region"]
    return values


def _compression(url: str, name: str) -> str:
    if name not in COMPRESSIONS:
        raise StoreError(f"{url}: there is no compression {name!r}; known are {', '.join(COMPRESSIONS)}")
    return name


def _endpoint(url: str, endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
        raise StoreError(f"{url}: the endpoint is to be http://host:port or https://host")
    return endpoint.rstrip("/")


def _number(url: str, text: str, least: float, most: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not least <= number <= most:
        raise StoreError(f"{url}: {text!r} is not a number from {least:g} to {most:g}")
    return number
