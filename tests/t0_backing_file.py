"""A backing file: kept equal by patches, and what somebody else changes in it found out."""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseclient.data import backing_file
from fuseclient.data.backing_file import BackingFile

SIZE = 10_000
CONTENT = random.Random(5).randbytes(SIZE)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BackingFile:
    monkeypatch.setattr(backing_file, "BLOCK", 1000)
    (tmp_path / "file").write_bytes(CONTENT)
    made = BackingFile(tmp_path / "file")
    made.measure()
    return made


def differing(file: BackingFile, *, changed_here: bool) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    number = 0
    while block := file.differing(number, changed_here=changed_here):
        found[block[0]] = block[1]
        number = block[0] + 1
    return found


def test_what_is_written_here_is_nobody_else_s(file: BackingFile) -> None:
    file.patch(990, b"x" * 20)
    assert file.read(985, 30) == CONTENT[985:990] + b"x" * 20 + CONTENT[1010:1015]
    file.resize(12_345)
    assert file.read(9_999, 3) == CONTENT[-1:] + bytes(2)
    assert not file.changed_by_others()
    assert differing(file, changed_here=False) == {}
    file.resize(500)
    assert file.read(0, SIZE) == CONTENT[:500]
    assert differing(file, changed_here=False) == {}


def test_what_somebody_maps_and_writes_is_found(file: BackingFile) -> None:
    with file.path.open("r+b") as other, mmap.mmap(other.fileno(), 0) as mapping:
        mapping[3_500:3_510] = b"y" * 10
        mapping.flush()
        assert file.changed_by_others()
        file.patch(0, b"mine")
        assert file.changed_by_others()
        file.settle()
        assert not file.changed_by_others()
        expected = bytearray(CONTENT)
        expected[3_500:3_510], expected[:4] = b"y" * 10, b"mine"
        assert differing(file, changed_here=True) == {0: expected[:1000], 3: expected[3000:4000]}
        assert differing(file, changed_here=True) == {}
        mapping[9_999:] = b"z"
        mapping.flush()
        assert file.changed_by_others()
        assert list(differing(file, changed_here=True)) == [9]


def test_replacing_writes_only_what_differs(file: BackingFile) -> None:
    before = os.stat(file.path).st_mtime_ns
    file.replace(100, CONTENT[100:200])
    assert os.stat(file.path).st_mtime_ns == before
    file.replace(100, b"n" * 100)
    assert file.read(99, 102) == CONTENT[99:100] + b"n" * 100 + CONTENT[200:201]


def test_whoever_has_it_open_or_mapped_to_write_is_seen(file: BackingFile) -> None:
    assert not file.is_written()
    descriptor = os.open(file.path, os.O_RDWR)
    assert file.is_written()
    mapping = mmap.mmap(descriptor, 0)
    os.close(descriptor)
    assert file.is_written()
    mapping.close()
    assert not file.is_written()
    with file.path.open("rb"):
        assert not file.is_written()


def test_a_file_that_is_gone_is_an_error(file: BackingFile) -> None:
    file.path.unlink()
    for work in (file.measure, file.changed_by_others, file.settle, file.is_written, lambda: file.patch(0, b"x")):
        with pytest.raises(FileNotFoundError):
            work()


_changes = st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(1, 30)), max_size=12)


@given(_changes)
def test_everything_others_do_not_know_is_carried_over(changes: list[tuple[bool, int, int]]) -> None:
    """Whoever applies the differing blocks to what was written here by himself has the whole content."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backing_file, "BLOCK", 8)
        path = Path(f"/dev/shm/bpfuse-backing-{os.getpid()}")
        path.write_bytes(bytes(64))
        try:
            file, known = BackingFile(path), bytearray(64)
            file.measure()
            for here, offset, length in changes:
                data = random.Random(offset * 31 + length).randbytes(length)
                if here:
                    file.patch(offset, data)
                    known.extend(bytes(max(0, offset + length - len(known))))
                    known[offset : offset + length] = data
                else:
                    with path.open("r+b") as other:
                        other.seek(min(offset, len(known) - 1))
                        other.write(data[: len(known) - other.tell()])
            for number, block in differing(file, changed_here=True).items():
                known[number * 8 : number * 8 + len(block)] = block
            assert known == path.read_bytes()
        finally:
            path.unlink()
