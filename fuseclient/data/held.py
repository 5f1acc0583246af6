"""What the writer needs to know of files that the metaserver is not told of yet: see fuseclient/worker/creations.py."""

from __future__ import annotations

from typing import Protocol

from metaserver import wire


class HeldFiles(Protocol):
    """Files that were made here and are held back."""

    @property
    def may_wait(self) -> bool:
        """Whether one may be closed before it is committed."""
        ...

    def record(self, attributes: wire.Attributes, content: bytes, *, writing: bool) -> wire.NewFile:
        """Return what the metaserver is to be told of one."""
        ...

    async def commit(self, file: wire.NewFile, *, lazy: bool) -> wire.Attributes | None:
        """Have one made; return what it is then, or None if it was made before. Raises as a call does.

        NOT_FOUND: it cannot be made any more, and is held back no longer.
        """
        ...

    def closed(self, file: wire.NewFile) -> None:
        """One was closed; it is made soon."""
        ...

    def give_up(self, ino: int) -> None:
        """One will never be made."""
        ...

    async def commit_all(self) -> None:
        """Return when nothing is held back any more; raise what is in the way."""
        ...

    async def commit_closed(self) -> None:
        """Return when no closed one is held back any more; raise what is in the way."""
        ...


class NoneHeld:
    """Nothing is held back, ever."""

    may_wait = False

    def record(self, attributes: wire.Attributes, content: bytes, *, writing: bool) -> wire.NewFile:
        raise LookupError(attributes.ino)

    async def commit(self, file: wire.NewFile, *, lazy: bool) -> wire.Attributes | None:
        raise LookupError(file.ino)

    def closed(self, file: wire.NewFile) -> None:
        raise LookupError(file.ino)

    def give_up(self, ino: int) -> None:
        raise LookupError(ino)

    async def commit_all(self) -> None:
        pass

    async def commit_closed(self) -> None:
        pass
