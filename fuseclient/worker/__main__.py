"""``python -m fuseclient.worker CONFIG_FD``: started by the channel, never by hand.

pyfuse3 imports trio, which takes a third of the worker's start and is of no use in pyfuse3's asyncio mode. So an empty
module stands in for it during that import.
"""

from __future__ import annotations

import sys
from types import ModuleType


def _import_pyfuse3() -> None:
    """Import pyfuse3, before anything else does."""
    sys.modules["trio"] = ModuleType("trio")
    try:
        import pyfuse3.asyncio  # noqa: F401 - only so that it is there
    finally:
        del sys.modules["trio"]


if __name__ == "__main__":
    _import_pyfuse3()
    from fuseclient.leaving import leave
    from fuseclient.worker.process import main

    leave(main(sys.argv))
