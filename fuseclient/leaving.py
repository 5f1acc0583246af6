"""How a process ends that may have used obstore.

obstore's threads hand their results over under the interpreter's lock, and are still in that for a moment when whoever
waited for the result goes on. A thread that finds the interpreter being taken apart aborts the process (SIGABRT,
Python 3.11), after all its work was done. So the interpreter is not taken apart.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a program and end the process with its exit code, or that of the SystemExit that it raises."""
    try:
        code = main() or 0
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise
        code = ended.code or 0
    if "obstore" not in sys.modules:
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
