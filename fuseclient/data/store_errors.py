"""What can be wrong with an object store: the one family of errors that everything above it knows."""

from __future__ import annotations


class StoreError(Exception):
    """The object store failed, or holds less than it should."""


class ObjectMissing(StoreError):
    """There is no object of that id."""


class ObjectDamaged(StoreError):
    """An object's bytes are not those that were stored."""


class ObjectExists(StoreError):
    """There is an object of that id already."""


class NoSpace(StoreError):
    """The store is full."""


class StoreTimeout(StoreError):
    """The store did not answer in time."""
