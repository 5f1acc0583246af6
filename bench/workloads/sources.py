"""What the workload of trees works on, made by the harness: a C project and a wheel, the same each time."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import subprocess
import zipfile
from pathlib import Path
from typing import Final

_WHEEL: Final = "benchtree-1.0-py3-none-any.whl"
_SOURCES: Final = 12
#: So that a commit is the same each time, whoever makes it.
_GIT: Final = {
    "GIT_AUTHOR_NAME": "bench",
    "GIT_AUTHOR_EMAIL": "bench@localhost",
    "GIT_COMMITTER_NAME": "bench",
    "GIT_COMMITTER_EMAIL": "bench@localhost",
    "GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z",
    "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
}


def git(*words: str | Path, directory: Path) -> str:
    """Run git without anybody's configuration; return what it prints."""
    environment = {**os.environ, **_GIT}
    command = ["git", *map(str, words)]
    return subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True, text=True).stdout


def make_project(directory: Path, files: int) -> None:
    """Make a repository of ``files`` texts and a C program that prints the sum of what its parts return."""
    rng = random.Random(11)
    directory.mkdir()
    for number in range(files):
        folder = directory / f"texts/d{number // 40}"
        folder.mkdir(parents=True, exist_ok=True)
        words = [rng.choice(("alpha", "beta", "gamma", "delta", "epsilon")) for _ in range(rng.randrange(50, 2500))]
        (folder / f"t{number}.txt").write_text("\n".join(words) + "\n")
    _make_program(directory)
    git("init", "-q", "-b", "main", directory=directory)
    git("add", ".", directory=directory)
    git("commit", "-q", "-m", "all", directory=directory)


def _make_program(directory: Path) -> None:
    (directory / "parts.h").write_text("".join(f"int part_{n}(int);\n" for n in range(_SOURCES)))
    for n in range(_SOURCES):
        lines = ['#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include "parts.h"\n']
        lines += [f"static int step_{n}_{k}(int x) {{ return x * {k + 3} % 1009 + {k}; }}\n" for k in range(60)]
        body = "".join(f"\tx = step_{n}_{k}(x);\n" for k in range(60))
        (directory / f"part_{n}.c").write_text("".join(lines) + f"int part_{n}(int x)\n{{\n{body}\treturn x;\n}}\n")
    calls = " + ".join(f"part_{n}({n})" for n in range(_SOURCES))
    (directory / "main.c").write_text(
        f'#include <stdio.h>\n#include "parts.h"\nint main(void)\n{{\n\tprintf("%d\\n", {calls});\n\treturn 0;\n}}\n'
    )
    objects = " ".join(["main.o", *(f"part_{n}.o" for n in range(_SOURCES))])
    (directory / "Makefile").write_text(
        f"program: {objects}\n\tgcc -o $@ $^\n%.o: %.c parts.h\n\tgcc -O1 -c -o $@ $<\n"
    )


def program_output() -> str:
    """Return what the program prints if it is built rightly."""
    total = 0
    for n in range(_SOURCES):
        x = n
        for k in range(60):
            x = x * (k + 3) % 1009 + k
        total += x
    return f"{total}\n"


def make_wheel(directory: Path, files: int) -> Path:
    """Make a wheel of a package with ``files`` modules."""
    rng, path, record = random.Random(13), directory / _WHEEL, []
    info = "benchtree-1.0.dist-info"
    texts = {
        "benchtree/__init__.py": "",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: benchtree\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: bench\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    for number in range(files):
        functions = [f"def f{n}(x):\n    return x + {rng.randrange(1000)}\n" for n in range(rng.randrange(5, 60))]
        texts[f"benchtree/m{number}.py"] = "\n\n".join(functions)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in texts.items():
            wheel.writestr(name, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record.append(f"{name},sha256={digest},{len(text)}")
        wheel.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/RECORD,,"]) + "\n")
    return path


def check_wheel(wheel: Path, target: Path) -> int:
    """Compare what was installed with the wheel; return how many modules there are. Raises :exc:`RuntimeError`."""
    modules = 0
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                modules += 1
                if (target / name).read_bytes() != archive.read(name):
                    raise RuntimeError(f"{name} was not installed as it is")
    return modules
