"""What the metaserver acknowledged and may not have on disk yet: making it durable, and what is lost if it cannot be.

A lazy metaserver acknowledges before it is durable. If it ends before, or the session does, what it had acknowledged
may be lost: each writer of a file of which that can be is told, once; if there is none, the next sync is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from fuseclient.data.caller import Caller
from fuseclient.data.objects import StoreError
from fuseclient.data.open_file import OpenFile
from metaserver import wire

_LOST: Final = StoreError("the metaserver may have lost changes that it had acknowledged")


class Durability:
    """``is_lazy`` says whether the metaserver is; ``changes`` counts what it acknowledged.

    ``took_over``: another worker was here before, which alone knew what was lost, and what it held back itself.
    """

    def __init__(
        self, caller: Caller, is_lazy: Callable[[], bool], changes: Callable[[], int], *, took_over: bool = False
    ) -> None:
        self._caller = caller
        self.is_lazy = is_lazy
        self._changes = changes
        self._took_over = took_over
        #: A lazy metaserver may have lost changes of which no open file knows.
        self._lost = False
        #: How many changes are known to be durable.
        self._durable_changes = 0

    def acknowledged(self, file: OpenFile, *, lazy: bool) -> None:
        """A change of a file was acknowledged; ``lazy``: it was asked for so."""
        file.unsynced = lazy or self.is_lazy()

    async def sync_file(self, file: OpenFile) -> None:
        """Return when all that was acknowledged of a file is durable; raises as a call does."""
        file.unsynced = False
        file.syncing += 1
        try:
            await self._sync()
        except BaseException:
            file.unsynced = True
            raise
        finally:
            file.syncing -= 1

    async def sync_all(self) -> None:
        """Return when all that was acknowledged is durable; raises StoreError, once, if something may be lost."""
        await self._sync()
        lost, self._lost = self._lost or (self._took_over and self.is_lazy()), False
        self._took_over = False
        if lost:
            raise _LOST

    async def _sync(self) -> None:
        changes = self._changes()
        await self._caller.call(wire.Sync(), wire.Done)
        self._durable_changes = changes

    def acknowledged_lost(self, files: Iterable[OpenFile]) -> None:
        """What was acknowledged lazily may be lost, of these files or of any other."""
        self._lost |= self.is_lazy() and self._changes() != self._durable_changes
        self._durable_changes = self._changes()
        for file in files:
            if file.unsynced or file.syncing:
                file.lose(_LOST)

    def lost(self) -> None:
        """Something is lost of a file that nobody has open."""
        self._lost = True
