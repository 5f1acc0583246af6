"""What the writer asks of the mount that it is part of, and tells it. By default it is alone with its files."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from fuseclient.data.held import HeldFiles, NoneHeld
from metaserver import wire


async def _nothing(ino: int) -> None:
    """Nobody was granted anything."""


@dataclass
class WriterHooks:
    """Set, once, by who puts the mount together."""

    held_files: HeldFiles = field(default_factory=NoneHeld)
    #: Whether no other client sees the volume, nor will before :meth:`Writer.commit_deferred` has returned.
    is_alone: Callable[[], bool] = lambda: False
    #: Called with the inode of a file of which data was given up: the kernel may have it in its pages.
    when_given_up: Callable[[int], None] = lambda ino: None
    #: Called with the attributes of a file that was shown, when they are about to be true no more.
    when_touched: Callable[[wire.Attributes], None] = lambda attributes: None
    #: Called with an inode, or 0 for all, to take back what was granted of it; what was done so has come on return.
    withdraw: Callable[[int], Awaitable[None]] = _nothing
    #: Called with the inode of each commit of slices, and those.
    when_laid: Callable[[int, list[wire.Slice]], None] = lambda ino, slices: None
