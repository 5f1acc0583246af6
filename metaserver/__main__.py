"""``python -m metaserver``: the command line of a metaserver.

``python -m metaserver [serve]`` serves volumes; ``fsck``, ``gc``, ``dump`` and ``load`` work on one of an
engine that nobody serves.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from metaserver import maintenance, process, wire
from metaserver.engine import DURABILITIES


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _address(text: str) -> str:
    try:
        wire.parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _lease(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 3600")
    return seconds


def _descriptor(text: str) -> int:
    try:
        number = int(text)
        os.fstat(number)
    except (ValueError, OSError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not an open file descriptor") from None
    return number


def main(arguments: list[str]) -> int:
    """Run a command and return its exit code; a mistake prints one line and exits with 2."""
    if arguments[:1] == ["fsck"]:
        return maintenance.fsck(_parse_fsck(arguments[1:]))
    if arguments[:1] == ["gc"]:
        return maintenance.collect(_parse_gc(arguments[1:]))
    if arguments[:1] == ["dump"]:
        return maintenance.write_dump(_parse_move("dump", "Write a volume to a file.", arguments[1:]))
    if arguments[:1] == ["load"]:
        return maintenance.load_dump(_parse_move("load", "Make a volume of a file.", arguments[1:]))
    return process.run(parse(arguments[arguments[:1] == ["serve"] :]))


def _parse_fsck(arguments: list[str]) -> maintenance.Options:
    parser = _Parser(prog="metaserver fsck", description="Check a volume that nobody serves.", allow_abbrev=False)
    _add_volume(parser)
    parser.add_argument("--repair", dest="change", action="store_true", help="repair what can be repaired")
    parser.add_argument("--store", action="store_true", help="tell of slices, and ask which objects are lost")
    return maintenance.Options(**vars(parser.parse_args(arguments)))


def _parse_gc(arguments: list[str]) -> maintenance.Options:
    parser = _Parser(prog="metaserver gc", description="Clear up a volume that nobody serves.", allow_abbrev=False)
    _add_volume(parser)
    parser.add_argument("--dry-run", dest="change", action="store_false", help="only count")
    return maintenance.Options(**vars(parser.parse_args(arguments)))


def _parse_move(command: str, description: str, arguments: list[str]) -> maintenance.Options:
    parser = _Parser(prog=f"metaserver {command}", description=description, allow_abbrev=False)
    _add_volume(parser)
    parser.add_argument("--file", required=True, metavar="PATH", help="the dump")
    return maintenance.Options(**vars(parser.parse_args(arguments)))


def _add_volume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", required=True, metavar="URL", help="lmdb:///directory or another engine's URL")
    parser.add_argument("--volume", required=True, metavar="NAME", help="the volume's name")


def parse(arguments: list[str]) -> process.Options:
    """Return the options of a server; a mistake prints one line and exits with 2."""
    parser = _Parser(prog="metaserver", description="Serve bpfuse volumes.", allow_abbrev=False)
    parser.add_argument("--engine", required=True, metavar="URL", help="lmdb:///directory or another engine's URL")
    parser.add_argument(
        "--listen",
        required=True,
        type=_address,
        action="append",
        metavar="ADDRESS",
        help="unix:/path or tcp:host:port; may be repeated",
    )
    parser.add_argument("--lease-s", type=_lease, default=30.0, metavar="SECONDS", help="lease length (default: 30)")
    parser.add_argument(
        "--durability",
        choices=DURABILITIES,
        default="commit",
        help="interval: changes are acknowledged first and durable within 100 ms or at an fsync (default: commit)",
    )
    parser.add_argument("--ready-fd", type=_descriptor, metavar="FD", help='gets "ready ADDRESS" and a newline')
    parser.add_argument("--log-level", choices=("DEBUG", "INFO", "WARNING", "ERROR"), default="INFO")
    parser.add_argument("--insecure", action="store_true", help="allow plaintext TCP that other machines can reach")
    parser.add_argument("--tls-cert", metavar="FILE", help="TLS on TCP, with this certificate (PEM)")
    parser.add_argument("--tls-key", metavar="FILE", help="its key (PEM), mode 0600")
    parser.add_argument("--tls-client-ca", metavar="FILE", help="whose certificates clients may be known by (PEM)")
    parser.add_argument(
        "--require-identity", action="store_true", help="who is on this machine has to show who he is, too"
    )
    parser.add_argument(
        "--squash",
        choices=[each.name.lower() for each in wire.Squash],
        default="auto",
        help="whose rights those have who come over plaintext from elsewhere (default: anybody's but root's)",
    )
    parser.add_argument("--die-with-parent", action="store_true", help="end when the starting process ends")
    parser.add_argument("--no-janitor", dest="janitor", action="store_false", help="clear up nothing by itself")
    parser.add_argument(
        "--no-grace",
        action="store_false",
        dest="grace",
        help="do not wait for sessions of an earlier run: nobody but the one client that comes now can have had any",
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="end, rather than stand by, if another metaserver has the engine",
    )
    parser.add_argument(
        "--advertise",
        type=_address,
        metavar="ADDRESS",
        help="where clients are told to come when this one has the authority (default: where it listens)",
    )
    return process.Options(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
