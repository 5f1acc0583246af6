"""How a volume is served: its metaservers, who of them has the authority, and the sessions of its clients."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from fuseclient import runtime
from fuseclient.credentials import NO_CREDENTIALS, Credentials
from fuseclient.errors import UserError
from fuseclient.volumes import Embedded, Volume, parse_volume
from fuseclient.worker import rpc
from fuseclient.worker.finding import may_follow
from metaserver import wire

#: Seconds that each metaserver has to answer.
_ANSWER_S: Final = 3.0
#: The least part of a session's id, in hexadecimal digits, that names it.
_LEAST_DIGITS: Final = 4


def read(url: str) -> dict[str, Any]:
    """Ask all metaservers of a volume how they are; raise :exc:`UserError` for what is no volume of theirs."""
    volume = parse_volume(url)
    return asyncio.run(_read(volume, _addresses(volume)))


def _suffix(volume: Volume) -> str:
    """Return what goes to each address: where the credentials are."""
    return "" if isinstance(volume, Embedded) else volume.credentials.suffix


def evict(url: str, who: str) -> str:
    """End a session, given by its id, the beginning of it, or its host and mount point; return its whole id.

    Raises :exc:`UserError` if there is no such session, or more than one.
    """
    volume = parse_volume(url)
    status = asyncio.run(_read(volume, _addresses(volume)))
    if status["authority"] is None:
        raise UserError(f"no metaserver of {url} has the authority")
    session = _session_of(status["sessions"], who, url)
    asyncio.run(_evict(status["authority"] + _suffix(volume), wire.EvictSession(volume.name, bytes.fromhex(session))))
    return session


def _addresses(volume: Volume) -> list[str]:
    """Return where the metaservers of a volume listen; one that is embedded has one if it is mounted."""
    if not isinstance(volume, Embedded):
        return volume.address.partition("?")[0].split(",")
    for record in runtime.live_records():
        if record.url == volume.url:
            return [f"unix:{runtime.directory_of(record.mountpoint).metaserver_socket}"]
    raise UserError(f"{volume.url} is not mounted, so it has no metaserver")


async def _read(volume: Volume, addresses: list[str]) -> dict[str, Any]:
    suffix = _suffix(volume)
    answers = await asyncio.gather(*(_ask(each + suffix, volume.name) for each in addresses))
    found = dict(zip(addresses, answers, strict=True))
    credentials = NO_CREDENTIALS if isinstance(volume, Embedded) else volume.credentials
    while told := sorted(_named(found, credentials) - found.keys()):
        found.update(zip(told, await asyncio.gather(*(_ask(each + suffix, volume.name) for each in told)), strict=True))
    serving = {each: status for each, status in found.items() if isinstance(status, wire.Status) and status.epoch}
    authority = max(serving, key=lambda each: serving[each].epoch, default=None)
    status = serving[authority] if authority is not None else wire.Status("", 0)
    return {
        "url": volume.url,
        "volume": volume.name,
        "authority": authority,
        "epoch": status.epoch,
        "lease_s": status.lease_ms / 1000,
        "grace_s": status.grace_ms / 1000,
        "missing": status.missing,
        "metaservers": [_metaserver(each, answer, authority) for each, answer in found.items()],
        "sessions": [_session(each) for each in status.sessions],
        "evicted": [
            {"session": each.session.hex(), **_client(each.client), "why": each.why, "ago_s": each.ago_ms / 1000}
            for each in status.evicted
        ],
    }


def _named(found: Mapping[str, wire.Status | Exception], credentials: Credentials) -> set[str]:
    """Return the metaservers that those who answered have named."""
    return {
        place
        for teller, status in found.items()
        if isinstance(status, wire.Status)
        for place in (status.elsewhere, *status.metaservers)
        if may_follow(teller, place, credentials)
    }


async def _ask(address: str, volume: str) -> wire.Status | rpc.Disconnected | rpc.Refused:
    try:
        connection = await rpc.connect(address, timeout_s=_ANSWER_S)
    except (rpc.Disconnected, rpc.Refused) as error:
        return error
    try:
        async with asyncio.timeout(_ANSWER_S):
            return await connection.call(wire.GetStatus(volume), wire.Status)
    except TimeoutError:
        return rpc.Disconnected(f"{address} does not answer within {_ANSWER_S:g} s")
    except rpc.Disconnected as error:
        return error
    except rpc.Refused as refused:
        if refused.code is wire.ErrorCode.NO_SUCH_VOLUME:
            raise UserError(f"the metaserver at {address} has no volume {volume!r}") from None
        return refused
    finally:
        connection.abort()


async def _evict(address: str, request: wire.EvictSession) -> None:
    try:
        connection = await rpc.connect(address, timeout_s=_ANSWER_S)
        try:
            await connection.call(request, wire.Done)
        finally:
            connection.abort()
    except (rpc.Disconnected, rpc.Refused) as error:
        raise UserError(f"the session was not evicted: {error}") from None


def _metaserver(
    address: str, answer: wire.Status | rpc.Disconnected | rpc.Refused, authority: str | None
) -> dict[str, Any]:
    """Say how one is: offline without an answer; unstable if it knows of no authority, or believes itself to be it."""
    if not isinstance(answer, wire.Status):
        nothing = {"role": None, "epoch": None, "software": None}
        return {"address": address, "state": "offline", **nothing, "why": str(answer)}
    role = "authority" if address == authority else "standby"
    steady = address == authority or (not answer.epoch and authority is not None)
    return {
        "address": address,
        "state": "online" if steady else "unstable",
        "role": role,
        "epoch": answer.epoch or None,
        "software": answer.software,
        "why": None if steady else "it knows of no authority" if not answer.epoch else "another one has taken over",
    }


def _client(text: str) -> dict[str, str]:
    host, _, mountpoint = text.partition(":")
    return {"host": host, "mountpoint": mountpoint}


def _session(session: wire.SessionStatus) -> dict[str, Any]:
    return {
        "session": session.session.hex(),
        **_client(session.client),
        "software": session.software,
        "state": str(session.state),
        "renewed_s": session.renewed_ms / 1000,
        "left_s": session.left_ms / 1000,
        "leases": {"directories": session.directories, "inodes": session.inodes},
        "writing": session.writing,
        "pending_breaks": session.breaks,
    }


def _session_of(sessions: list[dict[str, Any]], who: str, url: str) -> str:
    found = [
        str(each["session"])
        for each in sessions
        if who == f"{each['host']}:{each['mountpoint']}"
        or (len(who) >= _LEAST_DIGITS and each["session"].startswith(who.lower()))
    ]
    if len(found) != 1:
        what = "more than one session is" if found else "no session is"
        raise UserError(f"{what} {who!r} on {url}; bpfuse status lists them")
    return found[0]


def render(status: dict[str, Any]) -> RenderableType:
    """Return a status as text for people."""
    summary = Table.grid(padding=(0, 2))
    summary.add_row("authority", status["authority"] or "none")
    if status["authority"]:
        summary.add_row("epoch", str(status["epoch"]))
        summary.add_row("lease", f"{status['lease_s']:g} s")
    if status["grace_s"]:
        summary.add_row("changes wait", f"for {status['missing']} sessions, {status['grace_s']:.1f} s at most")
    parts = [summary, _metaservers(status["metaservers"]), _sessions(status["sessions"])]
    return Group(*parts, *([_evicted(status["evicted"])] if status["evicted"] else []))


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _metaservers(metaservers: list[dict[str, Any]]) -> Table:
    table = _table("metaserver", "state", "role", "software", "")
    for each in metaservers:
        table.add_row(each["address"], each["state"], each["role"] or "", each["software"] or "", each["why"] or "")
    return table


def _sessions(sessions: list[dict[str, Any]]) -> Table:
    table = _table("session", "mount", "state", "renewed", "directories", "inodes", "writing", "breaks", "software")
    for each in sessions:
        table.add_row(
            each["session"][:12],
            f"{each['host']}:{each['mountpoint']}",
            each["state"],
            f"{each['renewed_s']:.1f} s ago",
            f"{each['leases']['directories']:,}",
            f"{each['leases']['inodes']:,}",
            str(each["writing"]),
            str(each["pending_breaks"]),
            each["software"],
        )
    return table


def _evicted(evicted: list[dict[str, Any]]) -> Table:
    table = _table("evicted", "mount", "when", "why")
    for each in evicted:
        mount = f"{each['host']}:{each['mountpoint']}"
        table.add_row(each["session"][:12], mount, f"{each['ago_s']:.0f} s ago", each["why"])
    return table
