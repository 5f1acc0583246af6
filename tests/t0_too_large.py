"""Directories larger than the kernel cache: found by windows that follow one another, told once."""

from __future__ import annotations

import pytest

from fuseclient.worker.too_large import TooLarge


def test_windows_that_follow_one_another_add_up(caplog: pytest.LogCaptureFixture) -> None:
    found = TooLarge(100)
    found.fetched(1, 0, 60, 60)
    found.fetched(1, 60, 100, 40)
    assert found.count == 0
    found.fetched(1, 100, 101, 1)
    assert found.count == 1
    assert [record.getMessage().split(" has ")[0] for record in caplog.records] == ["the directory with inode 1"]
    found.fetched(1, 0, 500, 500)
    assert (found.count, len(caplog.records)) == (1, 1)


def test_what_is_read_again_or_elsewhere_does_not_count() -> None:
    found = TooLarge(100)
    for _ in range(3):
        found.fetched(1, 0, 60, 60)
    found.fetched(1, 1000, 1060, 60)
    found.fetched(2, 60, 120, 60)
    found.fetched(2, 0, 60, 60)
    assert found.count == 0


def test_one_large_window_is_enough() -> None:
    found = TooLarge(100)
    for ino in range(2000):
        found.fetched(ino, 0, 101, 101 - ino % 2)
    assert found.count == 1000
