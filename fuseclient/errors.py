"""The one exception for what a user can mend: it is shown as one line, never as a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user's, or a machine that cannot do what was asked. ``message`` is one line without a full stop.

    ``exit_code`` is what the command ends with.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = " ".join(message.split())
        self.exit_code = exit_code


def reason(error: OSError) -> str:
    """Return why a system call failed, for the end of a user's line."""
    return (error.strerror or str(error)).lower()
