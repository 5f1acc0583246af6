"""The authority in etcd: a key that belongs to a lease, and goes with it; so do the keys of who stands for it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any, Final

from aetcd.rpc import rpc_pb2, rpc_pb2_grpc

from metaserver.engine.authority import ANNOUNCED_S, LAPSE_S
from metaserver.engine.etcd import EtcdStore
from metaserver.engine.remote_authority import Lock
from metaserver.errors import EngineBusy

_KEY: Final = b"\2"
#: What the keys begin with whose rest is the address of a metaserver, and what follows them all.
_ANNOUNCED: Final = b"\3"
_AFTER: Final = b"\4"
_TTL_S: Final = math.ceil(LAPSE_S)


class EtcdLock(Lock):
    """The lock of the rows below a prefix."""

    def __init__(self, store: EtcdStore) -> None:
        self._store = store
        self._key = store.prefix + _KEY
        self._lease = 0
        #: The lease of what was announced.
        self._announced = 0

    async def take(self, address: str) -> None:
        if (holder := await self.holder()) is not None:
            raise EngineBusy(f"the metaserver at {holder or 'an unknown place'} has the authority over this engine")
        lease = await self._grant(_TTL_S)
        compare = rpc_pb2.Compare(
            target=rpc_pb2.Compare.CREATE, result=rpc_pb2.Compare.EQUAL, key=self._key, create_revision=0
        )
        put = rpc_pb2.PutRequest(key=self._key, value=address.encode(), lease=lease)
        request = rpc_pb2.TxnRequest(compare=[compare], success=[rpc_pb2.RequestOp(request_put=put)])
        reply = await self._store.call(rpc_pb2_grpc.KVStub, "Txn", request)
        self._lease = lease
        if not reply.succeeded:
            await self.release()
            raise EngineBusy("another metaserver has just taken the authority over this engine")

    async def renew(self) -> None:
        if not await self._keep(self._lease):
            raise EngineBusy("its lease has run out")

    async def announce(self, address: str) -> list[str]:
        first = self._store.prefix + _ANNOUNCED
        if address and not (self._announced and await self._keep(self._announced)):
            lease = await self._grant(math.ceil(ANNOUNCED_S))
            put = rpc_pb2.PutRequest(key=first + address.encode(), lease=lease)
            await self._store.call(rpc_pb2_grpc.KVStub, "Put", put)
            self._announced = lease
        request = rpc_pb2.RangeRequest(key=first, range_end=self._store.prefix + _AFTER, keys_only=True)
        reply = await self._store.call(rpc_pb2_grpc.KVStub, "Range", request)
        return [each.key[len(first) :].decode(errors="replace") for each in reply.kvs]

    async def holder(self) -> str | None:
        reply = await self._store.call(rpc_pb2_grpc.KVStub, "Range", rpc_pb2.RangeRequest(key=self._key))
        return reply.kvs[0].value.decode(errors="replace") if reply.kvs else None

    async def release(self) -> None:
        leases, self._lease, self._announced = (self._lease, self._announced), 0, 0
        for lease in filter(None, leases):
            async with asyncio.timeout(LAPSE_S):
                await self._store.call(rpc_pb2_grpc.LeaseStub, "LeaseRevoke", rpc_pb2.LeaseRevokeRequest(ID=lease))

    async def _grant(self, ttl_s: int) -> int:
        reply = await self._store.call(rpc_pb2_grpc.LeaseStub, "LeaseGrant", rpc_pb2.LeaseGrantRequest(TTL=ttl_s))
        return int(reply.ID)

    async def _keep(self, lease: int) -> bool:
        """Have a lease begin anew; say whether it was still there."""

        async def ask() -> AsyncIterator[Any]:
            yield rpc_pb2.LeaseKeepAliveRequest(ID=lease)

        reply = await self._store.call(rpc_pb2_grpc.LeaseStub, "LeaseKeepAlive", ask())
        return bool(reply.TTL > 0)

    async def close(self) -> None:
        await self._store.close()
