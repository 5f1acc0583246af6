"""``python -m fuseclient.channel CONFIG_FD --ready-fd N``: one mount, from its options to its end.

``CONFIG_FD`` holds MountOptions as JSON. One JSON line goes to the ready descriptor: ``{"ready": true, "accel": ...,
"notice": ...}`` when the mount works, or ``{"error": text}``; then the exit code is 1 and nothing is left mounted.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from typing import Any

import msgspec

from fuseclient import diagnostics
from fuseclient.channel.children import StartError
from fuseclient.channel.process import Mount
from fuseclient.channel.transport import TransportError
from fuseclient.config import MountOptions
from fuseclient.errors import UserError
from fuseclient.native import NativeError

_log = logging.getLogger("fuseclient.channel")


def main() -> int:
    """Run the mount; return the exit code."""
    parser = argparse.ArgumentParser(prog="bpfuse-channel")
    parser.add_argument("config_fd", type=int)
    parser.add_argument("--ready-fd", type=int, required=True)
    arguments = parser.parse_args()
    with open(arguments.config_fd, "rb") as file:
        options = msgspec.json.decode(file.read(), type=MountOptions)
    os.set_inheritable(arguments.ready_fd, False)
    diagnostics.start("channel", options.log_level)
    return asyncio.run(_serve(options, arguments.ready_fd))


async def _serve(options: MountOptions, ready_fd: int) -> int:
    mount = Mount(options)
    mount.stop_at_signals()
    try:
        await mount.start()
    except (StartError, TransportError, NativeError, UserError) as error:
        _say(ready_fd, {"error": str(error)})
        return 1
    except Exception as error:
        _log.exception("the mount could not be started")
        _say(ready_fd, {"error": f"a fault of bpfuse's own, see the log: {error!r}"})
        return 1
    _log.info("%s is mounted on %s, accel=%s", mount.volume.url, options.mountpoint, mount.accel)
    _say(ready_fd, {"ready": True, "accel": mount.accel, "notice": mount.notice})
    await mount.run()
    return 0


def _say(ready_fd: int, what: dict[str, Any]) -> None:
    """Tell whoever started the channel, if it still listens."""
    try:
        os.write(ready_fd, msgspec.json.encode(what) + b"\n")
    except BrokenPipeError:
        _log.warning("nobody waits for this mount to be ready")
    os.close(ready_fd)


if __name__ == "__main__":
    sys.exit(main())
