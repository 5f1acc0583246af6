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

_FIRST_LOOK: Final = (
    "The first listings after a mount: the worker asks the metaserver for the directory and puts its names and "
    "attributes into the maps, so that they are never asked for again. That takes the worker 5 us an entry and the "
    "metaserver 2.5, in Python (py-spy), of which a directory of 100 files hides nothing; JuiceFS in Go has less to do:"
)

_COPIES: Final = (
    "Each byte of a file read for the first time is copied five to six times between the metaserver, the worker, the "
    "maps and the page cache, and with four processes on two cores the reader and the daemons share the processors: "
    "28 us a file of 16 KiB in the metaserver, 23 in the worker, 19 in the channel (py-spy, psutil):"
)

_WARM_BYTES: Final = (
    "The bytes come from the page cache on every system, and copying them is most of the time (ext4, asking nobody, "
    "takes nearly as long); the requests that bpfuse saves are as many as for smaller files:"
)

_NO_REQUEST: Final = (
    "The kernel answers from its own caches on either side, without a request; the medians lie within each other's "
    "spread:"
)

_OWN_MEMORY: Final = (
    "Each byte goes through fresh memory three times: the store's pages, the worker's buffer and the mount's own page "
    "cache, with 33,000 page faults for 128 MiB (/proc/PID/stat), of which each costs this virtual machine about a "
    "microsecond; of 0.33 s of the read 0.23 are CPU time of the worker:"
)

REASONS: Final = (
    Reason("small", "(find|ls -lR|stat), cold", ".*", _FIRST_LOOK),
    Reason("small", "read .*, cold.*", ".*", _COPIES),
    Reason("small", "read 64 KiB .*, warm.*", ".*", _WARM_BYTES),
    Reason("pytorch", "checkpoint read, cold.*", ".*", _OWN_MEMORY),
    Reason("metadata", "stat .*", "seaweedfs", _NO_REQUEST),
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
