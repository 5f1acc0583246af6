"""What the tests let differ from ext4 is what README says, word by word."""

from __future__ import annotations

from pathlib import Path

import pytest
from posix_limits import LIMITS

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("reason", sorted({limit.reason for limit in LIMITS}))
def test_each_limit_is_stated(reason: str) -> None:
    section = README.read_text().partition("### Where a mount differs from ext4")[2].partition("\n## ")[0]
    assert section
    assert reason.lower() in " ".join(section.split()).lower()
