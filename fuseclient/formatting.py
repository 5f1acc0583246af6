"""Making a volume: an embedded one in a directory, or one on a metaserver that runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fuseclient import servers
from fuseclient.data.objects import ObjectStore, StoreError, open_store, parse_store_url
from fuseclient.errors import UserError, reason
from fuseclient.volumes import Embedded, Remote, parse_store, parse_volume
from metaserver import wire

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a volume is made with."""

    #: Bytes up to which a file lies in the metadata engine.
    inline_limit: int = wire.MAX_INLINE
    #: Of the objects in the store: none, lz4 or zstd.
    compression: str | None = None
    #: Take a store that is not empty, and give up what is in it.
    reuse_store: bool = False
    #: How many events are kept at most, and for how many seconds.
    kept_events: int = wire.KEPT_EVENTS
    kept_s: int = wire.KEPT_S


def format_volume(url: str, store: str | None, settings: Settings) -> str:
    """Make the volume and return its URL.

    Raises :exc:`UserError`; nothing is left behind then.
    """
    if not 0 <= settings.inline_limit <= wire.MAX_INLINE:
        raise UserError(f"the inline limit is from 0 to {wire.MAX_INLINE} bytes, not {settings.inline_limit}")
    volume = parse_volume(url)
    store_url = parse_store(store, settings.compression) if store is not None else None
    if isinstance(volume, Embedded):
        _format_embedded(volume, store_url, settings)
    else:
        _format_remote(volume, store_url, settings)
    return volume.url


def _format_remote(volume: Remote, store: str | None, settings: Settings) -> None:
    if store is None:
        raise UserError(f"{volume.url} needs a store for its data: add --store file:///directory")
    servers.must_be_new(volume)
    _make(volume.address, volume.name, store, settings)


def _format_embedded(volume: Embedded, store: str | None, settings: Settings) -> None:
    if volume.is_formatted():
        raise UserError(f"{volume.directory} holds a volume already")
    with _new_directory(volume.directory):
        for directory in (volume.metadata, volume.blocks):
            directory.mkdir(mode=0o700)
        store = store or parse_store(f"file://{volume.blocks}", settings.compression)
        with servers.embedded_server(volume) as address:
            _make(address, volume.name, store, settings)


def _make(address: str, name: str, store: str, settings: Settings) -> None:
    """Make a volume whose store is found fit, and have the store say whose it is."""
    first = _first_slice(store, settings)
    kept = settings.kept_events, settings.kept_s
    identity = servers.create_volume(address, wire.CreateVolume(name, store, settings.inline_limit, *kept, first))
    _with_store(store, lambda opened: opened.set_owner(identity))


def _first_slice(url: str, settings: Settings) -> int:
    """Return the slice id that a new volume can begin with in a store; raise :exc:`UserError` if it is in use."""
    parsed = parse_store_url(url)
    if parsed.is_local and not Path(parsed.path).exists():
        return 1

    async def look(store: ObjectStore) -> int:
        owned, last = await store.owner() is not None, 0
        await store.check()
        async for page in store.list():
            last = max([last, *(each.slice_id for each in page)])
            if last and not settings.reuse_store:
                break
        if (owned or last) and not settings.reuse_store:
            raise UserError(
                f"the store {url} has objects, or is another volume's: give an empty directory, or another prefix;"
                " to give up what is in it: --reuse-store"
            )
        return last + 1

    return _with_store(url, look)


def _with_store(url: str, work: Callable[[ObjectStore], Coroutine[None, None, _T]]) -> _T:
    """Do something with a store; raise :exc:`UserError` where that fails."""

    async def body() -> _T:
        store = open_store(url)
        try:
            return await work(store)
        finally:
            store.close()

    try:
        return asyncio.run(body())
    except StoreError as error:
        raise UserError(f"the store {url} cannot be used: {error}") from None


@contextlib.contextmanager
def _new_directory(directory: Path) -> Iterator[None]:
    """Have an empty directory of mode 0700. If the body fails, it is as it was before, or gone."""
    made = _take_directory(directory)
    mode = directory.stat().st_mode & 0o7777
    try:
        directory.chmod(0o700)
        yield
    except BaseException:
        _clear(directory)
        if made:
            directory.rmdir()
        else:
            directory.chmod(mode)
        raise


def _take_directory(directory: Path) -> bool:
    """Return whether the directory was made by this; raise :exc:`UserError` if it cannot become a volume."""
    try:
        directory.mkdir(mode=0o700)
        return True
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(f"{directory} cannot be made: {reason(error)}") from None
    try:
        content = os.listdir(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot become a volume: {reason(error)}") from None
    if content:
        raise UserError(f"{directory} is not empty and not a volume; give an empty or a new directory")
    return False


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path)
