"""The end of a process that has used obstore.

Its threads (Rust's tokio) are never joined. One that still wants the interpreter while that is shut down, to drop the
future of an answer that has just been awaited, is ended by CPython (before 3.14) with pthread_exit(3), which Rust
cannot unwind: it calls abort(3). So about one in a hundred processes that were through with everything, and had said
so, ended by SIGABRT. Such a process leaves without shutting the interpreter down.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End the process with an exit code."""
    if "obstore" not in sys.modules:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # whoever read it has gone
            code = code or 1
    os._exit(code)
