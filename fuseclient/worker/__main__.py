"""``python -m fuseclient.worker CONFIG_FD``: started by the channel, never by hand."""

from __future__ import annotations

import sys

from fuseclient.leaving import leave
from fuseclient.worker.process import main

if __name__ == "__main__":
    leave(main(sys.argv))
