"""Making a volume: an embedded one in a directory, or one on a metaserver that runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fuseclient import servers
from fuseclient.data.objects import StoreError, open_store, parse_store_url
from fuseclient.errors import UserError, reason
from fuseclient.volumes import Embedded, Remote, parse_store, parse_volume
from metaserver import wire


def format_volume(url: str, store: str | None, inline_limit: int, compression: str | None = None) -> str:
    """Make the volume and return its URL. ``inline_limit``: bytes up to which a file lies in the metadata engine.

    ``compression``: none, lz4 or zstd, of the objects in the store.

    Raises :exc:`UserError`; nothing is left behind then.
    """
    if not 0 <= inline_limit <= wire.MAX_INLINE:
        raise UserError(f"the inline limit is from 0 to {wire.MAX_INLINE} bytes, not {inline_limit}")
    volume = parse_volume(url)
    store_url = parse_store(store, compression) if store is not None else None
    if store_url is not None and not parse_store_url(store_url).is_local:
        _check_store(store_url)
    if isinstance(volume, Embedded):
        _format_embedded(volume, store_url or parse_store(f"file://{volume.blocks}", compression), inline_limit)
    else:
        _format_remote(volume, store_url, inline_limit)
    return volume.url


def _format_remote(volume: Remote, store: str | None, inline_limit: int) -> None:
    if store is None:
        raise UserError(f"{volume.url} needs a store for its data: add --store file:///directory")
    servers.create_volume(volume.address, wire.CreateVolume(volume.name, store, inline_limit))


def _check_store(url: str) -> None:
    """Raise :exc:`UserError` unless the store answers."""

    async def look() -> None:
        store = open_store(url)
        try:
            await store.check()
        finally:
            store.close()

    try:
        asyncio.run(look())
    except StoreError as error:
        raise UserError(f"the store {url} cannot be used: {error}") from None


def _format_embedded(volume: Embedded, store: str, inline_limit: int) -> None:
    if volume.is_formatted():
        raise UserError(f"{volume.directory} holds a volume already")
    with _new_directory(volume.directory):
        for directory in (volume.metadata, volume.blocks):
            directory.mkdir(mode=0o700)
        with servers.embedded_server(volume) as address:
            servers.create_volume(address, wire.CreateVolume(volume.name, store, inline_limit))


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
