"""A store compared with the slices that its volume knows of: both come by rising id, and are merged.

What is wrong with objects is kept as ids, eight bytes each, so that memory stays small however large the store is.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final

from fuseclient.data.object_format import plain_size
from fuseclient.data.objects import Listed, ObjectDamaged, ObjectMissing, ObjectStore
from fuseclient.maintenance.job import Amount
from fuseclient.maintenance.stores import ascending

#: Objects that are looked into at once.
_AT_ONCE: Final = 64
#: Objects between two reports of progress.
_TOLD: Final = 256
#: Beside an unused slice, instead of the bytes that are needed of it.
_UNUSED: Final = -1

Needed = tuple[int, int]


def _ids() -> array[int]:
    return array("Q")


@dataclass
class Comparison:
    """What came out. All lists are of ids and ascend."""

    #: All objects of the store.
    objects: Amount = field(default_factory=Amount)
    #: Those of unused slices, which are deleted sooner or later.
    unused: Amount = field(default_factory=Amount)
    leaked: Amount = field(default_factory=Amount)
    missing: array[int] = field(default_factory=_ids)
    damaged: array[int] = field(default_factory=_ids)
    #: In the store, and of no slice that is known.
    leaked_ids: array[int] = field(default_factory=_ids)
    leaked_sizes: array[int] = field(default_factory=_ids)
    #: Uploads that were broken off.
    unfinished_ids: array[int] = field(default_factory=_ids)
    #: The highest id in the store.
    last: int = 0


class Comparer:
    """Compares a store with ``needed``: slices with the bytes that are needed of their objects, by rising id.

    ``verify`` reads every object that is needed and checks all of its bytes. ``tick`` is told of progress.
    """

    def __init__(
        self, store: ObjectStore, needed: AsyncIterator[Needed], tick: Callable[[int], None], *, verify: bool
    ) -> None:
        self.result = Comparison()
        self._store = store
        self._needed = needed
        self._tick = tick
        self._verify = verify
        self._next: Needed | None = None
        #: (slice, bytes needed, bytes stored)
        self._suspects: list[tuple[int, int, int]] = []
        #: The last object that is needed.
        self._last_needed = 0

    async def run(self) -> Comparison:
        """Compare all; raises :exc:`~fuseclient.data.objects.StoreError`."""
        await self._advance()
        async for each in ascending(self._store):
            if self.result.objects.count % _TOLD == 0:
                self._tick(self.result.objects.count)
            await self._pass_before(each.slice_id)
            await self._look_at(each)
        await self._pass_before(None)
        await self._look_into()
        return self.result

    async def _advance(self) -> None:
        self._next = await anext(self._needed, None)

    async def _pass_before(self, slice_id: int | None) -> None:
        """The slices before this one have no object."""
        while self._next is not None and (slice_id is None or self._next[0] < slice_id):
            if self._next[1] > 0:
                self.result.missing.append(self._next[0])
            await self._advance()

    async def _look_at(self, each: Listed) -> None:
        result = self.result
        known = self._next is not None and self._next[0] == each.slice_id
        needed = self._next[1] if known and self._next is not None else _UNUSED
        if each.unfinished:
            if needed == _UNUSED and each.slice_id != self._last_needed:
                result.unfinished_ids.append(each.slice_id)
            return
        result.objects.add(each.bytes)
        result.last = each.slice_id
        if not known:
            result.leaked.add(each.bytes)
            result.leaked_ids.append(each.slice_id)
            result.leaked_sizes.append(each.bytes)
        elif needed == _UNUSED:
            result.unused.add(each.bytes)
            await self._advance()
        else:
            await self._advance()
            self._last_needed = each.slice_id
            await self._suspect(each, needed)

    async def _suspect(self, each: Listed, needed: int) -> None:
        """Look into an object, with others, unless its size is that of an uncompressed one that is needed whole."""
        if needed and (self._verify or each.bytes != plain_size(needed)):
            self._suspects.append((each.slice_id, needed, each.bytes))
            if len(self._suspects) >= _AT_ONCE:
                await self._look_into()

    async def _look_into(self) -> None:
        suspects, self._suspects = self._suspects, []
        sound = await asyncio.gather(*(self._is_sound(*suspect) for suspect in suspects))
        for (slice_id, *_), is_sound in zip(suspects, sound, strict=True):
            if not is_sound:
                self.result.damaged.append(slice_id)

    async def _is_sound(self, slice_id: int, needed: int, size: int) -> bool:
        try:
            if self._verify:
                return await self._store.verify(slice_id) >= needed
            header = await self._store.header(slice_id)
            return header.stored == size and header.length >= needed
        except (ObjectDamaged, ObjectMissing):
            return False
