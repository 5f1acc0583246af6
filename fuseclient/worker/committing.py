"""The writer's way to the metaserver: what a commit of content changed is in the maps before the writer goes on.

A commit is a change like any other: its reply is put under a token taken before it was sent, because others may have
changed the file between the commit and the reply; then the writer is told that it does not know the file any more.
"""

from __future__ import annotations

from collections.abc import Callable

from fuseclient.data.caller import Caller, Reply
from fuseclient.worker.feeding import Feeder
from metaserver import wire


class Committing:
    """A caller that puts what commits changed."""

    def __init__(self, caller: Caller, feeder: Feeder) -> None:
        self._caller = caller
        self._feeder = feeder
        self._overtaken: set[int] = set()

    async def call(self, request: wire.Request, reply_type: type[Reply], /) -> Reply:
        """Call, and put what the reply says was changed."""
        with self._feeder.begin() as token:
            reply = await self._caller.call(request, reply_type)
            if isinstance(reply, wire.Changed):
                inos = [each.ino for each in reply.attributes]
                self._overtaken.update(ino for ino in inos if not self._feeder.unchanged(token, ino))
                self._feeder.changed(token, reply.attributes)
            return reply

    def committed(self, changed: wire.Changed, forget: Callable[[int], None]) -> None:
        """The writer has taken note of a commit: have it ``forget`` what others changed meanwhile."""
        for each in changed.attributes:
            if each.ino in self._overtaken:
                self._overtaken.discard(each.ino)
                forget(each.ino)
