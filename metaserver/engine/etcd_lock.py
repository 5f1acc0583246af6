"""The authority in etcd: a key that belongs to a lease, and goes with it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any, Final

from aetcd.rpc import rpc_pb2, rpc_pb2_grpc

from metaserver.engine.authority import LAPSE_S
from metaserver.engine.etcd import EtcdStore
from metaserver.engine.remote_authority import Lock
from metaserver.errors import EngineBusy

_KEY: Final = b"\2"
_TTL_S: Final = math.ceil(LAPSE_S)


class EtcdLock(Lock):
    """The lock of the rows below a prefix."""

    def __init__(self, store: EtcdStore) -> None:
        self._store = store
        self._key = store.prefix + _KEY
        self._lease = 0

    async def take(self, address: str) -> None:
        if (holder := await self.holder()) is not None:
            raise EngineBusy(f"the metaserver at {holder or 'an unknown place'} has the authority over this engine")
        granted = await self._store.call(rpc_pb2_grpc.LeaseStub, "LeaseGrant", rpc_pb2.LeaseGrantRequest(TTL=_TTL_S))
        compare = rpc_pb2.Compare(
            target=rpc_pb2.Compare.CREATE, result=rpc_pb2.Compare.EQUAL, key=self._key, create_revision=0
        )
        put = rpc_pb2.PutRequest(key=self._key, value=address.encode(), lease=granted.ID)
        request = rpc_pb2.TxnRequest(compare=[compare], success=[rpc_pb2.RequestOp(request_put=put)])
        reply = await self._store.call(rpc_pb2_grpc.KVStub, "Txn", request)
        self._lease = int(granted.ID)
        if not reply.succeeded:
            await self.release()
            raise EngineBusy("another metaserver has just taken the authority over this engine")

    async def renew(self) -> None:
        async def ask() -> AsyncIterator[Any]:
            yield rpc_pb2.LeaseKeepAliveRequest(ID=self._lease)

        reply = await self._store.call(rpc_pb2_grpc.LeaseStub, "LeaseKeepAlive", ask())
        if reply.TTL <= 0:
            raise EngineBusy("its lease has run out")

    async def holder(self) -> str | None:
        reply = await self._store.call(rpc_pb2_grpc.KVStub, "Range", rpc_pb2.RangeRequest(key=self._key))
        return reply.kvs[0].value.decode(errors="replace") if reply.kvs else None

    async def release(self) -> None:
        lease, self._lease = self._lease, 0
        if lease:
            async with asyncio.timeout(LAPSE_S):
                await self._store.call(rpc_pb2_grpc.LeaseStub, "LeaseRevoke", rpc_pb2.LeaseRevokeRequest(ID=lease))

    async def close(self) -> None:
        await self._store.close()
