"""Opening of a store that must be there, for those who list what is in it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from fuseclient.data.objects import Listed, ObjectStore, StoreError, StoreUrl, parse_store_url
from fuseclient.errors import UserError, reason


@contextlib.contextmanager
def opened(url: str) -> Iterator[ObjectStore]:
    """Have a store for the body. What it raises as :exc:`StoreError`, and a store that is gone, is a UserError."""
    try:
        parsed = parse_store_url(url)
        _must_exist(parsed)
        store = ObjectStore(parsed)
        try:
            yield store
        finally:
            store.close()
    except StoreError as error:
        raise UserError(f"the store {url}: {error}") from None


def _must_exist(url: StoreUrl) -> None:
    """Raise :exc:`UserError` if a local directory is not there: opening it would make it."""
    if not url.is_local:
        return
    try:
        is_there = Path(url.path).is_dir()
    except OSError as error:
        raise UserError(f"the store {url} cannot be looked into: {reason(error)}") from None
    if not is_there:
        raise UserError(f"the store {url} is gone: there is no such directory")


async def must_belong(store: ObjectStore, url: str, identity: bytes) -> None:
    """Raise :exc:`UserError` if a store says that it is another volume's. Raises :exc:`StoreError`."""
    owner = await store.owner()
    if owner not in (None, identity):
        raise UserError(f"the store {url} belongs to another volume: nothing in it is this one's")


async def ascending(store: ObjectStore) -> AsyncIterator[Listed]:
    """Yield a store's objects by rising id; raise :exc:`StoreError` if it lists them in another order."""
    last = -1
    async for page in store.list():
        for each in page:
            if each.slice_id < last:
                raise StoreError(f"it lists object {each.slice_id} after {last}")
            last = each.slice_id
            yield each
