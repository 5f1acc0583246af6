"""The store of immutable objects, one for each slice, named by the slice's id.

When :meth:`ObjectStore.put` has returned, the object survives a power failure and is whole, or there is none; what
:meth:`ObjectStore.read` returns is what was put, or it raises. The bytes of an object are object_format.py's, where
they lie local_store.py's and s3_store.py's. This module has what is the same for both: the format, limits of time and
of accesses at once, and that nothing is ever overwritten. An object that is there already is the work of a put whose
answer was lost if it is the same, and otherwise a second volume's in the same place.

Headers are kept, so that a range costs one access; the first access to an object reads its header together with what
is wanted when that lies near.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Protocol, TypeVar

from fuseclient.data.local_store import LocalBackend
from fuseclient.data.object_format import MAX_HEADER, MAX_OBJECT, Buffer, Codec, Header, encode, parse_header
from fuseclient.data.object_names import OWNER, Listed, object_name
from fuseclient.data.store_errors import (
    NoSpace,
    ObjectDamaged,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreTimeout,
)
from fuseclient.data.store_url import StoreUrl, parse_store_url

__all__ = [
    "MAX_OBJECT",
    "Listed",
    "NoSpace",
    "ObjectDamaged",
    "ObjectExists",
    "ObjectMissing",
    "ObjectStore",
    "StoreError",
    "StoreTimeout",
    "StoreUrl",
    "object_name",
    "open_store",
    "parse_store_url",
]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Headers kept, of at most 1 KiB each.
_HEADERS: Final = 16384
#: How far from an object's beginning a range may end to be read together with the header, in bytes.
_NEAR: Final = 256 * 1024


class Backend(Protocol):
    """Where the bytes of objects lie."""

    def where(self, slice_id: int) -> str: ...
    async def create(self, slice_id: int, parts: Callable[[], Sequence[Buffer]]) -> None: ...
    async def read(self, slice_id: int, start: int, length: int) -> memoryview: ...
    async def delete(self, slice_ids: Iterable[int]) -> None: ...
    def list(self) -> AsyncIterator[Sequence[Listed]]: ...
    async def owner(self) -> bytes: ...
    async def set_owner(self, text: bytes) -> None: ...
    def close(self) -> None: ...


class ObjectStore:
    """Objects in one place. Errors name the object."""

    def __init__(self, url: StoreUrl) -> None:
        self._codec = Codec[url.compression.upper()]
        self._timeout_s = url.timeout_s
        self._backend = _backend(url)
        self._puts = asyncio.Semaphore(url.concurrency)
        self._reads = asyncio.Semaphore(url.concurrency)
        self._headers: OrderedDict[int, Header] = OrderedDict()

    async def put(self, slice_id: int, data: Buffer) -> None:
        """Store an object; it is durable on return. ``data`` must not change meanwhile.

        Raises :exc:`StoreError`, :exc:`NoSpace` among them.
        """
        async with self._puts:
            try:
                await self._access(self._backend.create(slice_id, lambda: encode(slice_id, data, self._codec)))
            except ObjectExists:
                await self._check_same(slice_id, data)
            except StoreError as error:
                raise type(error)(f"object {slice_id} cannot be stored: {error}") from error

    async def _check_same(self, slice_id: int, data: Buffer) -> None:
        begin = memoryview(encode(slice_id, data, self._codec)[0])
        try:
            same = await self.header(slice_id) == parse_header(slice_id, begin)
        except ObjectDamaged:
            same = False
        if not same:
            where = self._backend.where(slice_id)
            raise ObjectExists(f"object {slice_id} is there already with other content: do two volumes share {where}?")

    async def read(self, slice_id: int, start: int, length: int) -> memoryview:
        """Return ``length`` bytes of an object's content from byte ``start`` on.

        Raises :exc:`ObjectMissing`, :exc:`ObjectDamaged` (an object shorter than that, too) or :exc:`StoreError`.
        """
        async with self._reads:
            try:
                return await self._read(slice_id, start, length)
            except ObjectDamaged as error:
                raise self._damaged(slice_id, error) from None
            except ObjectMissing:
                raise ObjectMissing(f"object {slice_id} is missing: {self._backend.where(slice_id)}") from None
            except StoreError as error:
                raise type(error)(f"object {slice_id} cannot be read: {error}") from error

    async def _read(self, slice_id: int, start: int, length: int) -> memoryview:
        header, begin = self._headers.get(slice_id), memoryview(b"")
        if header is None:
            near = start + length <= _NEAR
            begin = await self._fetch(slice_id, 0, MAX_HEADER + (_NEAR if near else 0))
            header = self._keep(slice_id, begin)
        if start + length > header.length:
            raise ObjectDamaged(f"it ends at byte {header.length}, before {start + length}")
        at, size = header.place(start, length)
        if at + size <= len(begin):
            stored = begin[at : at + size]
        else:
            stored = await self._fetch(slice_id, at, size)
        if header.codec:  # unpacking takes long enough to be felt by everybody else
            return await asyncio.to_thread(header.content, stored, start, length)
        return header.content(stored, start, length)

    async def header(self, slice_id: int) -> Header:
        """Return an object's checked header. Raises as :meth:`read` does, without the object's name."""
        return self._headers.get(slice_id) or self._keep(slice_id, await self._fetch(slice_id, 0, MAX_HEADER))

    def _keep(self, slice_id: int, begin: memoryview) -> Header:
        header = self._headers[slice_id] = parse_header(slice_id, begin)
        if len(self._headers) > _HEADERS:
            self._headers.popitem(last=False)
        return header

    async def verify(self, slice_id: int) -> int:
        """Read and check a whole object; return the length of its content. Raises as :meth:`read` does."""
        return (await self.whole(slice_id))[0].length

    async def whole(self, slice_id: int) -> tuple[Header, memoryview]:
        """Return an object's header and all of its stored bytes, read and checked. Raises as :meth:`read` does."""
        self._headers.pop(slice_id, None)
        async with self._reads:
            try:
                whole = await self._fetch(slice_id, 0, MAX_HEADER + 2 * MAX_OBJECT)
                header = parse_header(slice_id, whole)
                if header.stored != len(whole):
                    raise ObjectDamaged(f"it is of {len(whole)} bytes instead of {header.stored}")
                await asyncio.to_thread(header.content, whole[header.size :], 0, header.length)
            except ObjectDamaged as error:
                raise self._damaged(slice_id, error) from None
            except StoreError as error:
                raise type(error)(f"object {slice_id}: {error}") from error
        return header, whole

    async def delete(self, slice_ids: Iterable[int]) -> None:
        """Delete objects; those that are not there are passed over. Raises :exc:`StoreError`."""
        ids = list(slice_ids)
        for each in ids:
            self._headers.pop(each, None)
        if ids:
            await self._access(self._backend.delete(ids))

    async def check(self) -> None:
        """Raise :exc:`StoreError` unless the store can be reached and looked into."""

        async def look() -> None:
            async for _ in self._backend.list():
                return

        await self._access(look())

    def list(self) -> AsyncIterator[Sequence[Listed]]:
        """Yield all objects, and those whose upload was broken off, some at a time. Raises :exc:`StoreError`."""
        return self._backend.list()

    async def owner(self) -> bytes | None:
        """Return the identity of the volume that the store was made for; ``None``: it does not say.

        Raises :exc:`StoreError`.
        """
        try:
            return bytes.fromhex((await self._access(self._backend.owner())).decode())
        except ObjectMissing:
            return None
        except ValueError:
            raise StoreError(f"what says whose it is cannot be read ({OWNER})") from None

    async def set_owner(self, identity: bytes) -> None:
        """Note which volume the store is for. Raises :exc:`StoreError`."""
        await self._access(self._backend.set_owner(identity.hex().encode()))

    def where(self, slice_id: int) -> str:
        """Return an object's place, for messages."""
        return self._backend.where(slice_id)

    def close(self) -> None:
        """Give the store's threads back."""
        self._backend.close()

    async def _fetch(self, slice_id: int, start: int, length: int) -> memoryview:
        return await self._access(self._backend.read(slice_id, start, length))

    async def _access(self, access: Awaitable[_T]) -> _T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await access
        except TimeoutError:
            raise StoreTimeout(f"the store did not answer within {self._timeout_s:g} s") from None

    def _damaged(self, slice_id: int, error: ObjectDamaged) -> ObjectDamaged:
        self._headers.pop(slice_id, None)
        text = f"object {slice_id} is damaged: {error} ({self._backend.where(slice_id)})"
        _log.error("%s", text)
        return ObjectDamaged(text)


def open_store(url: str) -> ObjectStore:
    """Return the store at a URL; raise :exc:`StoreError` with one line for the user."""
    return ObjectStore(parse_store_url(url))


def _backend(url: StoreUrl) -> Backend:
    try:
        if url.is_local:
            return LocalBackend(Path(url.path), url.concurrency)
        from fuseclient.data.s3_store import S3Backend

        return S3Backend(url)
    except (OSError, ValueError) as error:
        raise StoreError(f"the store {url} cannot be opened: {error}") from error
