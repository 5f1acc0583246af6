"""Why rows miss a target: what ``make bench-profile`` and counts of requests have shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Reason:
    """For rows and bases that these regular expressions match."""

    workload: str
    row: str
    base: str
    text: str


REASONS: Final[tuple[Reason, ...]] = ()


def reason(workload: str, row: str, base: str) -> str | None:
    """Return why a row is slower than a base; None: nobody has found out."""
    for each in REASONS:
        if re.fullmatch(each.workload, workload) and re.fullmatch(each.row, row) and re.fullmatch(each.base, base):
            return each.text
    return None
