"""Values of options that need more than a type: sizes, and text for the terminal."""

from __future__ import annotations

import re
from typing import Final

from rich.console import Console

from fuseclient.errors import UserError

_UNITS: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_LARGE_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB")
_SIZE: Final = re.compile(r"([0-9]{1,15})([KMGT]?)(?:I?B)?", re.IGNORECASE)
#: Columns of a table where the output is no terminal.
_PIPE_COLUMNS: Final = 110


def parse_size(text: str) -> int:
    """Return the bytes that a size as 4096, 64K or 256M means (units of 1024); raise :exc:`UserError`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"not a size: {text!r}; write it as 4096, 64K, 256M or 2G", exit_code=2)
    return int(match[1]) << _UNITS[match[2].upper()]


def format_size(count: int) -> str:
    """Return bytes as :func:`parse_size` takes them, in the largest unit that they are a multiple of."""
    for unit, shift in reversed(_UNITS.items()):
        if count >= 1 << shift and count % (1 << shift) == 0:
            return f"{count >> shift}{unit}"
    return str(count)


def format_bytes(count: int) -> str:
    """Return bytes for people: exactly below 1 KiB, else with one decimal."""
    if count < 1024:
        return f"{count} bytes"
    power = min((count.bit_length() - 1) // 10, len(_LARGE_UNITS))
    return f"{count / (1 << 10 * power):,.1f} {_LARGE_UNITS[power - 1]}"


def console() -> Console:
    """Return a console on standard output; a pipe gets plain text of a fixed width."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=_PIPE_COLUMNS)
