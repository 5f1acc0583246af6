"""Histograms of latencies: what is read from the tracer's tables, and where the headers that it needs are found."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fuseclient.errors import UserError
from fuseclient.observe import kernel_headers
from fuseclient.observe.latency import Kind, as_json, latencies, quantile_ns, render

LOOKUP, READ = Kind("LOOKUP", True), Kind("READ", False)


@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_in_the_bucket_of_the_true_one(times: list[int], fraction: float) -> None:
    histogram: dict[int, int] = {}
    for each in times:
        histogram[each.bit_length() - 1] = histogram.get(each.bit_length() - 1, 0) + 1
    rank = max(0, -int(-fraction * len(times) // 1) - 1)
    power = sorted(times)[rank].bit_length() - 1
    assert 1 << power <= quantile_ns(histogram, fraction) <= 1 << (power + 1)


def test_what_took_the_most_time_comes_first() -> None:
    sums = {LOOKUP: (3, 9_000, 5_000), READ: (1, 70_000, 70_000)}
    measured = latencies([(LOOKUP, 10, 1), (READ, 16, 1), (LOOKUP, 11, 1), (LOOKUP, 12, 1)], sums)
    assert [(each.opcode, each.answered_by, each.count) for each in measured] == [
        ("READ", "worker", 1),
        ("LOOKUP", "kernel", 3),
    ]
    assert measured[1].mean_us == 3.0
    assert measured[1].histogram == {10: 1, 11: 1, 12: 1}
    assert measured[1].p50_us <= measured[1].p90_us <= measured[1].p99_us <= measured[1].longest_us == 5.0
    assert as_json(measured, 2.0)["latencies"][1]["histogram"] == {"10": 1, "11": 1, "12": 1}


def test_it_is_shown() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(latencies([(READ, 12, 4), (READ, 14, 1)], {READ: (5, 40_000, 20_000)}), "/mnt"))
    text = console.export_text()
    assert "READ answered by the worker" in text
    assert [
        line.split()[2] for line in text.splitlines() if line.strip().startswith(("4.1 us", "8.2 us", "16.4 us"))
    ] == [
        "4",
        "0",
        "1",
    ]
    console.print(render([], "/mnt"))
    assert "no requests" in console.export_text()


def tree(modules: Path, release: str, *, common: bool) -> Path:
    build = modules / release / "build"
    (build / "include").mkdir(parents=True)
    if common:
        (modules / release / "source").mkdir()
    return build


def test_headers_of_the_running_kernel_are_left_to_bcc(tmp_path: Path) -> None:
    tree(tmp_path, "6.1.0-2", common=True)
    tree(tmp_path, "6.18", common=False)
    assert kernel_headers.find(tmp_path, "6.18") == (None, [])


def test_headers_of_another_kernel_serve(tmp_path: Path) -> None:
    assert (
        kernel_headers.find(tree(tmp_path, "5.1", common=False).parent.parent, "6.18").source == tmp_path / "5.1/build"
    )
    build = tree(tmp_path, "6.1", common=True)
    found = kernel_headers.find(tmp_path, "6.18")
    assert found.source == tmp_path / "6.1" / "source"
    assert f"-I{build / 'include'}" in found.flags


def test_no_headers_are_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get install linux-headers"):
        kernel_headers.find(tmp_path, "6.18")
