"""The control socket of a mount: one JSON line asked, one answered, over a unix socket that only its owner may use."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from fuseclient.errors import UserError

_log = logging.getLogger(__name__)

_LINE_MAX: Final = 4096
_IDLE_S: Final = 30.0

#: Answers a question, with its arguments; raises UserError.
Command = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class _Question(msgspec.Struct, frozen=True):
    command: str
    arguments: dict[str, Any] = {}


async def serve(path: Path, commands: Mapping[str, Command]) -> asyncio.Server:
    """Listen at ``path`` (mode 0600) and answer each question by the command of that name."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_IDLE_S):
                writer.write(msgspec.json.encode(await _reply(await reader.readline(), commands)) + b"\n")
                await writer.drain()
        except (TimeoutError, ConnectionError, ValueError):
            return
        finally:
            writer.close()

    before = os.umask(0o177)
    try:
        return await asyncio.start_unix_server(answer, path, limit=_LINE_MAX)
    finally:
        os.umask(before)


async def _reply(line: bytes, commands: Mapping[str, Command]) -> dict[str, Any]:
    try:
        question = msgspec.json.decode(line, type=_Question)
    except msgspec.DecodeError:
        return {"error": 'not a question: expected {"command": NAME}'}
    name = question.command
    if name not in commands:
        return {"error": f"no command {name!r}"}
    try:
        return await commands[name](question.arguments)
    except UserError as error:
        return {"error": error.message}
    except Exception:
        _log.exception("the command %s failed", name)
        return {"error": f"the command {name} failed; see the mount's log"}
