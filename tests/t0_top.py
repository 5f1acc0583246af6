"""The view of ``bpfuse top``: differences of readings, added up over directories, as rates."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest
from rich.console import Console

from fuseclient.observe.figures import Answers
from fuseclient.observe.top import Reading, read, render, view

EARLIER = Reading(10.0, {"LOOKUP": Answers(5, 5)}, {16: Answers(1, 0)}, {1: Answers(1, 1)})
LATER = Reading(
    12.0,
    {"LOOKUP": Answers(45, 5), "READ": Answers(0, 2)},
    {16: Answers(11, 0), 17: Answers(20, 4), 18: Answers(2, 0)},
    {1: Answers(1, 1), os.getpid(): Answers(6, 0), 0: Answers(2, 0)},
)
DIRECTORIES = {16: b"/a", 17: b"/a", 18: None}


def test_rates_are_of_the_time_between() -> None:
    shown = view(LATER, EARLIER, DIRECTORIES.get)
    assert msgspec.to_builtins(shown.requests) == [
        {"what": "LOOKUP", "kernel": 20.0, "worker": 0.0},
        {"what": "READ", "kernel": 0.0, "worker": 1.0},
    ]
    assert msgspec.to_builtins(shown.directories[0]) == {"what": "/a", "kernel": 15.0, "worker": 2.0}
    assert shown.directories[1].kernel == 1.0
    assert [each.what.split()[0] for each in shown.processes] == [str(os.getpid()), "the"]


def test_what_was_counted_is_read() -> None:
    answers: dict[str, dict[str, Any]] = {
        "busiest": {"inodes": [[17, 10, 7]], "processes": [[1, 3, 0]]},
        "stats": {"accel": "bpf", "profile": "general", "worker": {}, "requests": {"READ": {"kernel": 1, "daemon": 2}}},
    }
    reading = read(answers.__getitem__)
    assert reading.inodes == {17: Answers(7, 3)}
    assert reading.processes == {1: Answers(0, 3)}
    assert reading.requests["READ"] == Answers(1, 2)


@pytest.mark.parametrize("later", [LATER, EARLIER])
def test_it_is_shown(later: Reading) -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render(view(later, EARLIER, DIRECTORIES.get), "/mnt"))
    assert "/mnt: " in capture.get()
    assert ("LOOKUP" in capture.get()) == (later is LATER)
