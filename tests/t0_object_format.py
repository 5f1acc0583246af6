"""The bytes of an object: round trips, and damage anywhere found out; the store's URL."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseclient.data.object_format import BLOCK, MAX_HEADER, MAX_OBJECT, Codec, encode, parse_header
from fuseclient.data.objects import (
    ObjectDamaged,
    ObjectExists,
    ObjectStore,
    StoreError,
    StoreUrl,
    object_name,
    open_store,
    parse_store_url,
)
from fuseclient.data.store_url import COMPRESSIONS

CODECS = list(Codec)


def whole(slice_id: int, data: bytes, codec: Codec) -> bytes:
    return b"".join(encode(slice_id, data, codec))


def decoded(slice_id: int, stored: bytes) -> bytes:
    view = memoryview(stored)
    header = parse_header(slice_id, view[:MAX_HEADER])
    if header.stored != len(stored):
        raise ObjectDamaged("its length")
    at, size = header.place(0, header.length)
    return bytes(header.content(view[at : at + size], 0, header.length))


def sample(length: int) -> bytes:
    """Return bytes of which the first half shrinks and the second does not."""
    return (b"compress me " * length)[: length // 2] + os.urandom(length - length // 2)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 77, MAX_OBJECT])
def test_what_is_encoded_is_decoded(codec: Codec, length: int) -> None:
    data = sample(length)
    assert decoded(9, whole(9, data, codec)) == data


@given(st.sampled_from(CODECS), st.integers(0, 3 * BLOCK), st.data())
def test_ranges_read_the_blocks_they_need_only(codec: Codec, length: int, draw: st.DataObject) -> None:
    data = sample(length)
    stored = memoryview(whole(1, data, codec))
    start = draw.draw(st.integers(0, length))
    count = draw.draw(st.integers(0, length - start))
    header = parse_header(1, stored[:MAX_HEADER])
    at, size = header.place(start, count)
    assert size <= (count // BLOCK + 2) * BLOCK
    assert header.content(stored[at : at + size], start, count) == data[start : start + count]


@pytest.mark.parametrize("codec", CODECS)
def test_what_does_not_shrink_is_stored_as_it_is(codec: Codec) -> None:
    assert len(whole(1, os.urandom(3 * BLOCK), codec)) == len(whole(1, bytes(3 * BLOCK), Codec.NONE))
    if codec:
        assert len(whole(1, bytes(3 * BLOCK), codec)) < BLOCK // 10


@pytest.mark.parametrize("codec", CODECS)
def test_damage_of_every_single_byte_is_found(codec: Codec) -> None:
    stored = bytearray(whole(5, sample(1000) + bytes(200), codec))
    for position in range(len(stored)):
        for flip in (0x01, 0x80, 0xFF):
            stored[position] ^= flip
            with pytest.raises(ObjectDamaged):
                decoded(5, bytes(stored))
            stored[position] ^= flip
    assert decoded(5, bytes(stored))


@pytest.mark.parametrize("codec", CODECS)
def test_every_truncation_and_extension_is_found(codec: Codec) -> None:
    stored = whole(5, sample(700), codec)
    for length in range(len(stored)):
        with pytest.raises(ObjectDamaged):
            decoded(5, stored[:length])
    with pytest.raises(ObjectDamaged):
        decoded(5, stored + b"\0")


def test_blocks_that_changed_places_are_found() -> None:
    stored = whole(5, b"a" * BLOCK + b"b" * BLOCK, Codec.NONE)
    head = len(stored) - 2 * BLOCK
    with pytest.raises(ObjectDamaged, match="block 0"):
        decoded(5, stored[:head] + stored[head + BLOCK :] + stored[head : head + BLOCK])


@given(st.binary(max_size=200))
def test_what_is_no_object_is_damaged_and_nothing_worse(data: bytes) -> None:
    with pytest.raises(ObjectDamaged):
        decoded(1, data)


# In a store


@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_stores_of_any_compression_read_each_others_objects(tmp_path: Path, compression: str) -> None:
    data = sample(3 * BLOCK + 5)
    writer, reader = open_store(f"file://{tmp_path}?compression={compression}"), open_store(f"file://{tmp_path}")
    await writer.put(3, data)
    assert await reader.read(3, BLOCK - 2, 5) == data[BLOCK - 2 : BLOCK + 3]
    assert await reader.verify(3) == len(data)
    writer.close()
    reader.close()


async def test_a_damaged_object_is_named_and_never_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(f"file://{tmp_path}")
    await store.put(3, sample(3 * BLOCK))
    path = tmp_path / object_name(3)
    stored = bytearray(path.read_bytes())
    stored[-1] ^= 1
    path.write_bytes(stored)
    assert len(await store.read(3, 0, BLOCK)) == BLOCK, "the other blocks are whole"
    for access in (store.read(3, 2 * BLOCK, 10), store.verify(3)):
        with pytest.raises(ObjectDamaged, match=r"object 3 is damaged: the checksum of block 2 is wrong"):
            await access
    assert str(path) in caplog.text
    os.truncate(path, 10)
    with pytest.raises(ObjectDamaged, match="object 3"):
        await fresh(tmp_path).read(3, 0, 1)
    path.rename(tmp_path / object_name(4))
    await store.put(3, b"x" * 100)
    path.rename(tmp_path / object_name(4))
    with pytest.raises(ObjectDamaged, match="object 4 is damaged: it is object 3"):
        await fresh(tmp_path).read(4, 0, 1)


def fresh(path: Path) -> ObjectStore:
    return open_store(f"file://{path}")


def names_below(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob("*") if path.is_file()]


async def test_an_object_is_never_overwritten(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    await store.put(3, b"content")
    await store.put(3, b"content")
    with pytest.raises(ObjectExists, match="do two volumes share"):
        await fresh(tmp_path).put(3, b"another")
    assert bytes(await store.read(3, 0, 7)) == b"content"
    assert names_below(tmp_path) == ["000000000003"]


async def test_a_store_is_listed_with_what_was_broken_off(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    ids = [1, 2, 1023, 1024, 5_000_000, 2**41]
    for each in ids:
        await store.put(each, b"x")
    (tmp_path / (object_name(7) + ".new")).write_bytes(b"half")
    (tmp_path / "00000/000/notes.txt").write_bytes(b"of somebody")
    (tmp_path / "00000/001/000000000001").write_bytes(b"in the wrong directory")
    pages = [page async for page in store.list()]
    found = [each for page in pages for each in page]
    assert [each.slice_id for each in found if not each.unfinished] == ids
    assert [(each.slice_id, each.bytes) for each in found if each.unfinished] == [(7, 4)]
    await store.delete([7, 1])
    assert not (tmp_path / (object_name(7) + ".new")).exists()
    assert not (tmp_path / object_name(1)).exists()


async def test_a_directory_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    """It may be a file system that is not mounted: nothing must go into the directory below."""
    store = open_store(f"file://{tmp_path}/blocks")
    await store.put(1, b"x")
    (tmp_path / "blocks").rename(tmp_path / "elsewhere")
    for each in (2, 5000):
        with pytest.raises(StoreError, match="gone"):
            await store.put(each, b"x")
    assert not (tmp_path / "blocks").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "blocks")
    await store.put(2, b"x")


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "file:///a%20b/c%3Fd",
        "file:///a?compression=zstd&timeout=5.0",
        "s3://bucket/",
        "s3://bucket/a/b?endpoint=http://127.0.0.1:8333&region=here&compression=lz4&concurrency=3",
    ],
)
def test_urls_are_understood_as_they_are_written(url: str) -> None:
    assert str(parse_store_url(url)) == url
    assert parse_store_url(str(parse_store_url(url))) == parse_store_url(url)


@given(st.text(min_size=1).map(lambda text: "/" + text), st.sampled_from(COMPRESSIONS))
def test_any_path_goes_through_a_url(path: str, compression: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        return
    store = StoreUrl(path=path, compression=compression)
    assert parse_store_url(str(store)) == store


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:secret@bucket/x",
        "s3://bucket:80/x",
        "file:///x?compression=gzip",
        "file:///x?endpoint=http://h",
        "file:///x?timeout=soon",
        "file:///x?concurrency=0",
        "file:///x?nonsense",
        "s3://b/x?endpoint=h:80",
        "s3://b/x?endpoint=http://u:p@h",
    ],
)
def test_other_urls_are_refused_without_their_secrets(url: str) -> None:
    with pytest.raises(StoreError) as refused:
        parse_store_url(url)
    assert "secret" not in str(refused.value)
