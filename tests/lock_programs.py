"""Processes that open and lock files as they are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import rig

#: The whole file, as the start and the length of a range.
WHOLE: Final = (0, 0)

#: A program with a descriptor that does what it is told: a line in, an errno or 0 out.
_PROGRAM: Final = """
import errno, fcntl, os, signal, struct, sys
files = {}
F = struct.Struct("hhqqi4x")
def region(kind, start, length):
    return F.pack({"sh": fcntl.F_RDLCK, "ex": fcntl.F_WRLCK, "un": fcntl.F_UNLCK}[kind], 0, int(start), int(length), 0)
def run(word, *a):
    if word == "open": files[a[0]] = os.open(a[1], {"r": os.O_RDONLY, "w": os.O_RDWR}[a[2]])
    elif word == "close": os.close(files.pop(a[0]))
    elif word == "dup": files[a[1]] = os.dup(files[a[0]])
    elif word == "write": os.pwrite(files[a[0]], " ".join(a[1:]).encode(), 0)
    elif word == "flock":
        how = {"sh": fcntl.LOCK_SH, "ex": fcntl.LOCK_EX, "un": fcntl.LOCK_UN}[a[1]]
        fcntl.flock(files[a[0]], how | (0 if "wait" in a else fcntl.LOCK_NB))
    elif word == "posix": fcntl.fcntl(files[a[0]], fcntl.F_SETLKW if "wait" in a else fcntl.F_SETLK, region(*a[1:4]))
    elif word == "ofd": fcntl.fcntl(files[a[0]], 38 if "wait" in a else 37, region(*a[1:4]))
    elif word == "alarm":
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(InterruptedError(errno.EINTR, "")))
        signal.setitimer(signal.ITIMER_REAL, float(a[0]))
    elif word == "fork":
        if os.fork() == 0: signal.pause()
print(0, flush=True)
for line in sys.stdin:
    try: run(*line.split()); print(0, flush=True)
    except OSError as error: print(error.errno, flush=True)
"""


class Program:
    """A process of its own that opens and locks files."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert self.answer() == 0
        rig.wait_for(lambda: self._system_call() != "running", "it waits for words")
        self._idle = self._system_call()

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def do(self, *words: object) -> int:
        """Do something and return 0 or its errno."""
        self.tell(*words)
        return self.answer()

    def sleeps(self) -> bool:
        """Whether it waits in a system call other than the one in which it waits for words."""
        return self._system_call() not in ("running", self._idle)

    def _system_call(self) -> str:
        return Path(f"/proc/{self.process.pid}/syscall").read_text().split()[0]

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Programs:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._started: list[Program] = []

    def start(self, how: str = "w") -> Program:
        """Return a program that has the file open as "f"."""
        program = Program()
        self._started.append(program)
        assert program.do("open", "f", self.path, how) == 0
        return program

    def two(self, how: str = "w") -> tuple[Program, Program]:
        return self.start(how), self.start(how)

    def end(self) -> None:
        for program in self._started:
            if program.process.poll() is None:
                program.end()
