"""Objects in an S3 bucket, by obstore.

A request that fails is repeated by obstore, with growing pauses, for as long as ObjectStore lets it. An object is made
only if there is none of its name. Messages are shortened to their first line, and never hold a secret.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, Final

import obstore
import obstore.exceptions
import obstore.store

from fuseclient.data import s3_credentials
from fuseclient.data.object_format import Buffer
from fuseclient.data.object_names import OWNER, Listed, listed, object_name
from fuseclient.data.store_errors import NoSpace, ObjectExists, ObjectMissing, StoreError
from fuseclient.data.store_url import StoreUrl

_CONNECT_S: Final = 5.0
#: No limit of its own: an access is tried again until its time is over.
_RETRIES: Final = 10_000
_LISTED_AT_ONCE: Final = 1000
_MESSAGE: Final = 300


class S3Backend:
    """A bucket, or what lies below a prefix of it."""

    def __init__(self, url: StoreUrl) -> None:
        self._prefix = f"s3://{url.bucket}/{url.path}".rstrip("/")
        # One attempt may take a third of the time that is given for all.
        attempt = timedelta(seconds=url.timeout_s / 3)
        credentials = s3_credentials.from_file()
        self._secrets = s3_credentials.secrets(credentials)
        config: Any = {**credentials, **({"endpoint": url.endpoint} if url.endpoint else {})}
        self._store = obstore.store.S3Store(
            url.bucket,
            prefix=url.path or None,
            config=config,
            region=url.region or os.environ.get("AWS_REGION") or "us-east-1",
            client_options={
                "timeout": attempt,
                "connect_timeout": min(attempt, timedelta(seconds=_CONNECT_S)),
                "allow_http": bool(url.endpoint and url.endpoint.startswith("http://")),
                "pool_max_idle_per_host": str(url.concurrency),
            },
            retry_config={
                "max_retries": _RETRIES,
                "retry_timeout": timedelta(seconds=url.timeout_s),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=2),
                    "base": 2,
                },
            },
        )

    def where(self, slice_id: int) -> str:
        """Return an object's place, for messages."""
        return f"{self._prefix}/{object_name(slice_id)}"

    async def create(self, slice_id: int, parts: Callable[[], Sequence[Buffer]]) -> None:
        """Store an object. Raises ObjectExists, NoSpace, StoreError."""
        data = b"".join(parts())
        try:
            await obstore.put_async(self._store, object_name(slice_id), data, mode="create", use_multipart=False)
        except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError) as error:
            raise ObjectExists("it exists") from error
        except (obstore.exceptions.BaseError, OSError) as error:
            raise _error(error, self._secrets) from None

    async def read(self, slice_id: int, start: int, length: int) -> memoryview:
        """Return bytes of an object, fewer at its end. Raises ObjectMissing, StoreError."""
        try:
            return memoryview(
                await obstore.get_range_async(self._store, object_name(slice_id), start=start, length=length)
            )
        except FileNotFoundError as error:
            raise ObjectMissing("it is missing") from error
        except (obstore.exceptions.BaseError, OSError) as error:
            raise _error(error, self._secrets) from None

    async def owner(self) -> bytes:
        """Return what :meth:`set_owner` was given last. Raises ObjectMissing, StoreError."""
        try:
            return bytes(await (await obstore.get_async(self._store, OWNER)).bytes_async())
        except FileNotFoundError as error:
            raise ObjectMissing("it is missing") from error
        except (obstore.exceptions.BaseError, OSError) as error:
            raise _error(error, self._secrets) from None

    async def set_owner(self, text: bytes) -> None:
        """Keep a short text beside the objects. Raises NoSpace, StoreError."""
        try:
            await obstore.put_async(self._store, OWNER, text, use_multipart=False)
        except (obstore.exceptions.BaseError, OSError) as error:
            raise _error(error, self._secrets) from None

    async def delete(self, slice_ids: Iterable[int]) -> None:
        """Delete objects; those that are not there are passed over. Raises StoreError."""
        names = [object_name(each) for each in slice_ids]
        try:
            if names:
                await obstore.delete_async(self._store, names)
        except FileNotFoundError:
            return
        except (obstore.exceptions.BaseError, OSError) as error:
            raise _error(error, self._secrets) from None

    async def list(self) -> AsyncIterator[Sequence[Listed]]:
        """Yield all objects, some at a time. Raises StoreError."""
        try:
            async for page in obstore.list(self._store, chunk_size=_LISTED_AT_ONCE):
                found = (listed(each["path"], each["size"], each["last_modified"].timestamp()) for each in page)
                yield [each for each in found if each is not None]
        except (obstore.exceptions.BaseError, OSError) as error:
            raise _error(error, self._secrets) from None

    def close(self) -> None:
        """There is nothing to be ended."""


def _error(error: Exception, secrets: Iterable[str]) -> StoreError:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    for secret in secrets:
        text = text.replace(secret, "***")
    full = "507" in text or "no space" in text.lower() or "QuotaExceeded" in text
    return NoSpace(text[:_MESSAGE]) if full else StoreError(text[:_MESSAGE])
