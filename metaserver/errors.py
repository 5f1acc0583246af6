"""Errors of the metaserver below the wire: what a verb refuses, and what a storage engine cannot do."""

from __future__ import annotations

from metaserver.wire import ErrorCode


class Refused(Exception):
    """A request that cannot be granted; the transaction it came from is aborted and the client told ``code``."""

    def __init__(self, code: ErrorCode, message: str = "") -> None:
        super().__init__(message or code.name.lower().replace("_", " "))
        self.code = code

    @property
    def message(self) -> str:
        """One line for the client's log."""
        return str(self)


class EngineError(Exception):
    """Base of everything a storage engine raises."""


class EngineBusy(EngineError):
    """Another process has the engine's files open."""


class EngineUnusable(EngineError):
    """The engine cannot be opened: wrong URL, missing directory, damaged or foreign files."""


class EngineUnavailable(EngineError):
    """The servers that keep the engine's data have not answered for too long; nothing was committed."""


class EngineClosed(EngineError):
    """The engine was closed before or while the call ran."""


class EngineFull(EngineError):
    """No space is left where the engine stores its data; nothing of the transaction was committed."""


class LimitExceeded(EngineError):
    """A key, a value or a whole transaction is larger than every engine must take; nothing was committed."""


class Conflict(EngineError):
    """Another transaction changed what this one had read; nothing was committed. Retried by ``Engine.write``."""


class Unknown(EngineError):
    """The engine failed while it committed: the transaction may or may not be durable."""


class Fenced(EngineError):
    """Another server has taken over the engine; nothing was committed, and nothing of this one will be."""
