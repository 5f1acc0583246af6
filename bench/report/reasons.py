"""Why rows miss a target: what ``make bench-profile``, strace and counts of requests have shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_CHANGES: Final = (
    "Names and files that come and go: bpfuse answers a change when it is on disk, by a synchronous write of its "
    "metadata engine's log, which changes that wait together share. While 40 directories were made and removed, "
    "JuiceFS on Redis synced twice, JuiceFS on SQLite and SeaweedFS not at all (strace). The column of "
    '"bpfuse interval", which syncs every 100 ms, compares with like durability. What is left there are a change\'s '
    "hand-overs between kernel, channel, worker and metaserver: beside waiting, committing and sending no function of "
    "the two has more than a twentieth of the samples (py-spy):"
)


@dataclass(frozen=True)
class Reason:
    """For rows and bases that these regular expressions match."""

    workload: str
    row: str
    base: str
    text: str


_FIRST_LISTING: Final = (
    "The listing is the first that a new metaserver is asked for: it reads the volume, the root, the directory, its "
    "names and their attributes from the engine, one after the other, of which a metaserver that serves has most at "
    "hand. Timed call by call, with 500 files on etcd: 3 ms for the root, 3 for the directory and 12 for the listing; "
    "JuiceFS, whose engine is warm, 0, 2 and 14:"
)

REASONS: Final = (
    Reason("small", "(create|delete).*", ".*", _CHANGES),
    Reason("metadata", "(create|remove|mkdir|rmdir).*", ".*", _CHANGES),
    Reason("trees", "tar extract|rsync|git clone|pip install|C build|compileall|rm -r", ".*", _CHANGES),
    Reason("engines", "directory", "juicefs .*", _FIRST_LISTING),
    Reason(
        "pytorch",
        "second epoch, .*",
        "ext4",
        "For every image the kernel asks for OPEN, IOCTL (Python's open asks whether it is a terminal) and "
        "RELEASE, once each, all answered by BPF programs, while pages and attributes stay in the kernel "
        "(counted by bpfuse stats); ext4 asks nobody, and the profile dataset neither opens nor releases:",
    ),
)


def reason(workload: str, row: str, base: str) -> str | None:
    """Return why a row is slower than a base; None: nobody has found out."""
    for each in REASONS:
        if re.fullmatch(each.workload, workload) and re.fullmatch(each.row, row) and re.fullmatch(each.base, base):
            return each.text
    return None
