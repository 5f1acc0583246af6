"""The etcd engine: a store on any number of endpoints of one cluster (see remote.py for what makes it an engine).

A row's key is the prefix, a zero byte and the key; the tip is the key ``prefix + 01``, and its version etcd's revision
of the last change of that. A commit is one Txn that compares that revision; a fetch one read-only Txn, which is
linearizable and all of one revision. What does not fit in one goes on at that revision.

etcd keeps the past until it is compacted, and stops taking writes when its file is as large as its quota. So whoever
commits has it forget, now and then, all that is older than a few minutes.

aetcd has the messages of etcd's protocol; its own client has one endpoint and does not come back after a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio
from aetcd.rpc import rpc_pb2, rpc_pb2_grpc

from metaserver.engine.base import Row, Space
from metaserver.engine.store import Compacted, Found, Lost, Moved, Past, Query, Store, Tip, Writes
from metaserver.errors import EngineError, EngineFull, EngineUnusable, LimitExceeded

_log = logging.getLogger(__name__)

PORT: Final = 2379
#: Bytes of a prefix.
MOST_PREFIX: Final = 100
#: What etcd takes in one request unless it is told otherwise: operations, and bytes (with room for the rest of it).
MOST_OPERATIONS: Final = 128
MOST_BYTES: Final = 1_400_000
#: etcd's default quota, in bytes; a client is not told of another one.
QUOTA: Final = 2 * 1024**3
#: Seconds that one request may take: at first, and when others took long.
_TIMEOUT_S: Final = 1.0
_LONGEST_S: Final = 10.0
#: How many times longer than the last answer, or than all endpoints were waited for, the next one may take.
_SLOWER: Final = 4.0
#: Rows of one page of a range: half of what may be received, if all are as large as can be.
_PAGE: Final = 512
#: Seconds for which the past is kept at least.
_KEPT_S: Final = 600.0
#: How often, and after which pause in seconds, a revision is asked for again when no answer came.
_PAST_TRIES: Final = 20
_PAST_PAUSE_S: Final = 0.5
_ROWS: Final = b"\0"
_TIP: Final = b"\1"
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 4 * 1024 * 1024),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.enable_http_proxy", 0),
)
_LOST: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
)
_TOKEN_REFUSED: Final = ("invalid auth token", "revision in header is old", "revision of auth store is old")
_USER_REFUSED: Final = ("authentication failed", "authentication is not enabled", "user name is empty")
#: What gRPC says of a connection that TLS did not come to be on, and what that means.
_TLS_REFUSED: Final = {
    "TSI_PROTOCOL_FAILURE": "TLS is not agreed on: its certificate may be none that ca= vouches for",
    "TSI_DATA_CORRUPTED": "it refuses this TLS connection: it may ask for a client's certificate (cert=, key=)",
}


class _TokenRefused(Exception):
    """A token that was given for a password is of no use any more."""


@dataclass(frozen=True, slots=True)
class Settings:
    """A cluster and a place in it. ``endpoints`` are ``host:port``; the certificates are PEM."""

    endpoints: tuple[str, ...]
    prefix: bytes
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    quota: int = QUOTA

    @property
    def has_tls(self) -> bool:
        return self.ca is not None


class EtcdStore(Store):
    """The rows below a prefix."""

    most_writes = MOST_OPERATIONS - 1
    most_bytes = MOST_BYTES

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._rows = settings.prefix + _ROWS
        self._tip = settings.prefix + _TIP
        self._at = 0
        #: How long an answer is waited for: some members may hang, or have no leader, while others know the next one.
        #: So it is longer only after as many in a row did not answer in time as there are endpoints: all may be slow.
        self._timeout_s = _TIMEOUT_S
        self._silences = 0
        #: Made when they are first used: a channel belongs to the loop that runs then.
        self._channels: list[grpc.aio.Channel | None] = [None] * len(settings.endpoints)
        self._token: str | None = None
        #: When to compact next, on the loop's clock, and up to which revision.
        self._compact: tuple[float, int] | None = None
        self._compacting: asyncio.Task[None] | None = None

    @property
    def prefix(self) -> bytes:
        """What the keys begin with."""
        return self._settings.prefix

    # The store

    async def fetch(self, keys: Sequence[bytes], queries: Sequence[Query]) -> Found:
        return await self._fetch(keys, queries, 0)

    async def commit(self, version: int, marks: bytes, writes: Writes) -> int:
        compare = rpc_pb2.Compare(
            target=rpc_pb2.Compare.MOD, result=rpc_pb2.Compare.EQUAL, key=self._tip, mod_revision=version
        )
        success = [_put(self._tip, marks)]
        success += [_delete(self._rows + k) if v is None else _put(self._rows + k, v) for k, v in writes.items()]
        failure = [_range(rpc_pb2.RangeRequest(key=self._tip))]
        request = rpc_pb2.TxnRequest(compare=[compare], success=success, failure=failure)
        reply = await self._kv("Txn", request)
        if not reply.succeeded:
            raise Moved(_tip(reply.responses[0].response_range.kvs))
        revision = int(reply.header.revision)
        self._see_to_compaction(revision)
        return revision

    @contextlib.asynccontextmanager
    async def past(self) -> AsyncIterator[Past]:
        reply = await self._kv("Range", rpc_pb2.RangeRequest(key=self._tip))
        yield _EtcdPast(self, int(reply.header.revision))

    async def space(self) -> Space:
        status = await self.call(rpc_pb2_grpc.MaintenanceStub, "Status", rpc_pb2.StatusRequest())
        quota = self._settings.quota
        return Space(quota, max(0, quota - int(status.dbSizeInUse or status.dbSize)))

    async def close(self) -> None:
        if self._compacting is not None:
            self._compacting.cancel()
            await asyncio.wait({self._compacting})
        for channel in self._channels:
            if channel is not None:
                await channel.close()

    # Reading

    async def _fetch(self, keys: Sequence[bytes], queries: Sequence[Query], revision: int) -> Found:
        """Read at a revision; 0: now."""
        most = MOST_OPERATIONS - 1 - len(queries)
        requests = [rpc_pb2.RangeRequest(key=self._tip, revision=revision)]
        requests += [self._request(query, revision) for query in queries]
        requests += [rpc_pb2.RangeRequest(key=self._rows + key, revision=revision) for key in keys[:most]]
        revision, replies = await self._ranges(requests)
        found = Found(_tip(replies[0].kvs))
        for query, reply in zip(queries, replies[1:], strict=False):
            found.ranges[query] = await self._rest(query, reply, revision)
        found.values.update(_values(keys[:most], replies[1 + len(queries) :]))
        parts = [keys[at : at + MOST_OPERATIONS] for at in range(most, len(keys), MOST_OPERATIONS)]
        asked = [[rpc_pb2.RangeRequest(key=self._rows + key, revision=revision) for key in part] for part in parts]
        for part, (_, more) in zip(parts, await asyncio.gather(*map(self._ranges, asked)), strict=True):
            found.values.update(_values(part, more))
        return found

    async def _ranges(self, requests: list[Any]) -> tuple[int, list[Any]]:
        """Ask for ranges at once; return their revision and the replies."""
        reply = await self._kv("Txn", rpc_pb2.TxnRequest(success=[_range(request) for request in requests]))
        return int(reply.header.revision), [each.response_range for each in reply.responses]

    def _request(self, query: Query, revision: int, after: bytes | None = None, left: int | None = None) -> Any:
        """Return the request for a page of a range: its beginning, or what comes after a key."""
        start, end = self._rows + query.start, self._rows + query.end
        if after is not None:
            start, end = (start, after) if query.reverse else (after + b"\0", end)
        order = rpc_pb2.RangeRequest.DESCEND if query.reverse else rpc_pb2.RangeRequest.NONE
        limit = query.limit if left is None else left
        return rpc_pb2.RangeRequest(
            key=start,
            range_end=end,
            revision=revision,
            limit=_PAGE if limit is None else min(_PAGE, limit),
            sort_order=order,
            sort_target=rpc_pb2.RangeRequest.KEY,
        )

    async def _rest(self, query: Query, reply: Any, revision: int) -> list[Row]:
        """Return the rows of a page and of those that follow it."""
        skip = len(self._rows)
        rows: list[Row] = [(each.key[skip:], each.value) for each in reply.kvs]
        while reply.more and (query.limit is None or len(rows) < query.limit):
            left = None if query.limit is None else query.limit - len(rows)
            reply = await self._kv("Range", self._request(query, revision, self._rows + rows[-1][0], left or _PAGE))
            rows += [(each.key[skip:], each.value) for each in reply.kvs]
        return rows

    # Requests

    async def _kv(self, method: str, request: Any) -> Any:
        return await self.call(rpc_pb2_grpc.KVStub, method, request)

    async def call(self, stub: Callable[[grpc.aio.Channel], Any], method: str, request: Any) -> Any:
        """Ask the endpoint that answered last; if it does not, the next one is asked the next time.

        Of a stream the first reply is taken.
        """
        try:
            return await self._call(stub, method, request)
        except _TokenRefused:  # it was forgotten by a restart, or has become too old; nothing was done
            self._token = None
        try:
            return await self._call(stub, method, request)
        except _TokenRefused as refused:
            raise Lost(str(refused)) from None

    async def _call(self, stub: Callable[[grpc.aio.Channel], Any], method: str, request: Any) -> Any:
        at, began = self._at, asyncio.get_running_loop().time()
        try:
            metadata = await self._authenticated(at)
            call = getattr(stub(self._channel(at)), method)(request, timeout=self._timeout_s, metadata=metadata)
            try:
                reply = await (call.read() if isinstance(call, grpc.aio.StreamStreamCall) else call)
            finally:
                call.cancel()
            if reply is grpc.aio.EOF:
                raise Lost(f"{self._settings.endpoints[at]}: no answer")
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._silences += 1
                if self._silences % len(self._settings.endpoints) == 0:
                    self._timeout_s = min(_LONGEST_S, _SLOWER * self._timeout_s)
            raise self._meaning(error, at) from None
        except grpc.aio.UsageError as error:  # the channel is closed
            raise EngineError(f"etcd: {error}") from None
        self._silences = 0
        took_s = asyncio.get_running_loop().time() - began
        self._timeout_s = min(_LONGEST_S, max(_TIMEOUT_S, _SLOWER * took_s))
        return reply

    async def _authenticated(self, at: int) -> tuple[tuple[str, str], ...]:
        if self._settings.user is None:
            return ()
        if self._token is None:
            request = rpc_pb2.AuthenticateRequest(name=self._settings.user, password=self._settings.password or "")
            reply = await rpc_pb2_grpc.AuthStub(self._channel(at)).Authenticate(request, timeout=self._timeout_s)
            self._token = str(reply.token)
        return (("token", self._token),)

    def _channel(self, at: int) -> grpc.aio.Channel:
        channel = self._channels[at]
        if channel is None:
            channel = self._channels[at] = self._connect(self._settings.endpoints[at])
        return channel

    def _connect(self, endpoint: str) -> grpc.aio.Channel:
        settings = self._settings
        if not settings.has_tls:
            return grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
        credentials = grpc.ssl_channel_credentials(settings.ca, settings.key, settings.certificate)
        return grpc.aio.secure_channel(endpoint, credentials, options=_OPTIONS)

    def _meaning(self, error: grpc.aio.AioRpcError, at: int) -> Exception:
        """Return what etcd's refusal means."""
        code, text = error.code(), error.details() or ""
        if "compacted" in text:
            return Compacted(text)
        if "space exceeded" in text:
            return EngineFull(f"etcd: {text}")
        if "too many operations" in text or "too large" in text:
            return LimitExceeded(f"etcd: {text}")
        if any(each in text for each in _TOKEN_REFUSED):
            return _TokenRefused(text)
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED) or any(
            each in text for each in _USER_REFUSED
        ):
            return EngineUnusable(f"etcd refuses this user: {text}")
        if (why := next((why for sign, why in _TLS_REFUSED.items() if sign in text), None)) is not None:
            return EngineUnusable(f"{self._settings.endpoints[at]}: {why}")
        if code in _LOST or "future revision" in text or "too many requests" in text:
            if self._at == at:
                self._at = (at + 1) % len(self._settings.endpoints)
            return Lost(f"{self._settings.endpoints[at]}: {text or code.name.lower()}")
        return EngineError(f"etcd: {code.name}: {text}")

    # Compaction

    def _see_to_compaction(self, revision: int) -> None:
        now = asyncio.get_running_loop().time()
        if self._compact is None:
            self._compact = now + _KEPT_S, revision
        elif now >= self._compact[0]:
            self._compacting = asyncio.create_task(self._forget(self._compact[1]), name="compaction")
            self._compact = now + _KEPT_S, revision

    async def _forget(self, revision: int) -> None:
        try:
            await self._kv("Compact", rpc_pb2.CompactionRequest(revision=revision))
        except Compacted:
            pass  # somebody else did
        except (Lost, EngineError) as error:
            _log.warning("etcd was not compacted: %s", error)


class _EtcdPast(Past):
    """A revision."""

    def __init__(self, store: EtcdStore, revision: int) -> None:
        self._store = store
        self._revision = revision

    async def fetch(self, keys: Sequence[bytes], queries: Sequence[Query]) -> Found:
        for _ in range(_PAST_TRIES - 1):
            with contextlib.suppress(Lost):
                return await self._store._fetch(keys, queries, self._revision)
            await asyncio.sleep(_PAST_PAUSE_S)
        return await self._store._fetch(keys, queries, self._revision)


def _put(key: bytes, value: bytes) -> Any:
    return rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=key, value=value))


def _delete(key: bytes) -> Any:
    return rpc_pb2.RequestOp(request_delete_range=rpc_pb2.DeleteRangeRequest(key=key))


def _range(request: Any) -> Any:
    return rpc_pb2.RequestOp(request_range=request)


def _tip(found: Sequence[Any]) -> Tip:
    return Tip(int(found[0].mod_revision), found[0].value) if found else Tip(0, b"")


def _values(keys: Sequence[bytes], replies: Sequence[Any]) -> dict[bytes, bytes | None]:
    return {key: reply.kvs[0].value if reply.kvs else None for key, reply in zip(keys, replies, strict=True)}
