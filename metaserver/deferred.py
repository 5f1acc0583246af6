"""Deletions put off: what is too much for one transaction goes into a queue as one small task.

The tasks of a volume are numbered; whoever adds one takes the number after the last. The only writer of long queues is
the clearing up of large deletions, so that is no point of contention.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from metaserver import keys
from metaserver.engine.base import Transaction
from metaserver.records import pack_numbers, unpack_numbers
from metaserver.volumes import Volume

#: Numbers in one task: 32 KiB.
_TASK_NUMBERS: Final = 4096


class Kind(enum.IntEnum):
    """What is to be done with a task's numbers."""

    #: They are slice ids: take a reference from each.
    RELEASE = 1
    #: They are inodes that a session (the task's argument) uses no more.
    REAP = 2
    #: It is the version of an event: forget all before it.
    FORGET = 3


class Task(NamedTuple):
    key: bytes
    kind: Kind
    argument: bytes
    numbers: list[int]


def put_off(txn: Transaction, volume: Volume, kind: Kind, argument: bytes, numbers: Sequence[int]) -> None:
    """Append tasks for these numbers; ``argument`` is at most 255 bytes."""
    last = txn.range(*keys.tasks(volume.id), limit=1, reverse=True)
    number = keys.task_number(last[0][0]) + 1 if last else 0
    for start in range(0, len(numbers), _TASK_NUMBERS):
        key = keys.task(volume.id, number + start // _TASK_NUMBERS)
        txn.put(key, _pack(kind, argument, numbers[start : start + _TASK_NUMBERS]))


def first_task(txn: Transaction, volume: Volume) -> Task | None:
    rows = txn.range(*keys.tasks(volume.id), limit=1)
    if not rows:
        return None
    key, value = rows[0]
    end = 2 + value[1]
    return Task(key, Kind(value[0]), value[2:end], unpack_numbers(value[end:]))


def keep_rest(txn: Transaction, task: Task, rest: Sequence[int]) -> None:
    """The task is done but for these numbers."""
    if rest:
        txn.put(task.key, _pack(task.kind, task.argument, rest))
    else:
        txn.delete(task.key)


def _pack(kind: Kind, argument: bytes, numbers: Iterable[int]) -> bytes:
    return bytes((kind, len(argument))) + argument + pack_numbers(numbers)
