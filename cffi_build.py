"""Builds fuseclient._native: the native channel and the worker's side of the BPF maps, for Python.

Every declaration that Python sees is taken from the headers themselves, so nothing is written twice: a header fed to
cffi holds declarations only, and its preprocessor lines are left out.

    python cffi_build.py        builds fuseclient/_native.*.so in place
"""

from __future__ import annotations

import re
from pathlib import Path

import cffi

ROOT = Path(__file__).resolve().parent
NATIVE = ROOT / "fuseclient" / "channel" / "native"

#: In the order of their dependence; those that do not exist are left out.
HEADERS = [ROOT / "bpf" / "abi.h", *(NATIVE / f"{name}.h" for name in ("loader", "figures", "cache_fill", "channel"))]

#: The kernel's types as its headers define them on every 64-bit machine.
TYPES = """
typedef signed char __s8;
typedef unsigned char __u8;
typedef short __s16;
typedef unsigned short __u16;
typedef int __s32;
typedef unsigned int __u32;
typedef long long __s64;
typedef unsigned long long __u64;
"""

#: The code that cffi generates does not use all of its parameters, and casts functions to others.
PREAMBLE = """
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wcast-function-type"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
"""


def declarations(header: Path) -> str:
    """Return a header without its preprocessor lines."""
    return re.sub(r"^[ \t]*#(?:.*\\\n)*.*$", "", header.read_text(), flags=re.MULTILINE)


def make_builder() -> cffi.FFI:
    """Return cffi's builder of the module."""
    headers = [header for header in HEADERS if header.exists()]
    builder = cffi.FFI()
    builder.cdef(TYPES + "".join(declarations(header) for header in headers))
    builder.set_source(
        "fuseclient._native",
        PREAMBLE + "".join(f'#include "{header.name}"\n' for header in headers),
        sources=sorted(str(source) for source in NATIVE.glob("*.c")),
        depends=sorted(str(header) for folder in (ROOT / "bpf", NATIVE) for header in folder.glob("*.h")),
        include_dirs=[str(ROOT / "bpf"), str(NATIVE)],
        libraries=["bpf", "uring", "pthread"],
        extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"],
    )
    return builder


def build() -> Path:
    """Compile under build/, put the module beside the package's sources, and return its path."""
    # Not in ROOT: setuptools would read pyproject.toml there, whose form older ones do not know.
    made = Path(make_builder().compile(tmpdir=str(ROOT / "build" / "native"), verbose=False))
    module = ROOT / "fuseclient" / made.name
    made.replace(module)
    return module


if __name__ == "__main__":
    build()
