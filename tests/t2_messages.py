"""What passes between clients and the metaserver: nothing beyond request and reply where nobody else holds anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from served import serving

from bench.protocol import Clients
from metaserver import wire


@pytest.mark.parametrize("engine", ["memory://", "lmdb"])
async def test_a_change_in_a_directory_that_nobody_else_holds_costs_no_extra_message(
    tmp_path: Path, engine: str
) -> None:
    async with serving(tmp_path, engine) as metaserver:
        clients = await Clients.connect(metaserver.address, 1)
        assert await clients.messages_of_changes(20) == 0
        await clients.close()


async def test_one_that_somebody_holds_costs_a_break_and_its_acknowledgement(tmp_path: Path) -> None:
    async with serving(tmp_path) as metaserver:
        holder, writer = await metaserver.client(), await metaserver.client()
        told: list[wire.Break] = []

        def drop(broken: wire.Break) -> None:
            told.append(broken)
            holder.connection.acknowledge(broken.number)

        holder.connection.on_break(drop)
        made = await writer.make(b"file")
        for mode in (0o600, 0o640):
            await holder.attributes(made.ino)
            await writer.change(wire.SetAttributes(made.ino, mode=mode))
        await writer.change(wire.SetAttributes(made.ino, mode=0o644))
        assert [each.inodes for each in told] == [[made.ino]] * 2


async def test_a_break_reaches_all_holders_before_the_change_is_made(tmp_path: Path) -> None:
    async with serving(tmp_path) as metaserver:
        clients = await Clients.connect(metaserver.address, 20)
        for holders in (0, 20):
            assert await clients.timed_change(holders) > 0
        await clients.close()
