"""BPF maps by bpf(2) itself, for tests that do what no worker would. Keys are 8 bytes; failures raise OSError."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any

from fuseclient._native import ffi

_SYS_BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
_CREATE, _LOOKUP, _UPDATE, _FREEZE = 0, 1, 2, 22
_HASH = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _call(command: int, attributes: bytes) -> int:
    result = int(_libc.syscall(_SYS_BPF, command, ctypes.create_string_buffer(attributes, 128), len(attributes)))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _element(command: int, fd: int, key: int, value: Any) -> None:
    raw_key = ffi.new("__u64 *", key)
    pointers = [int(ffi.cast("uintptr_t", pointer)) for pointer in (raw_key, value)]
    _call(command, struct.pack("<IIQQQ", fd, 0, *pointers, 0))


def lookup(fd: int, key: int, value: Any) -> None:
    """Read the value of a key into a cffi struct."""
    _element(_LOOKUP, fd, key, value)


def update(fd: int, key: int, value: Any) -> None:
    """Write the value of a key from a cffi struct."""
    _element(_UPDATE, fd, key, value)


def freeze(fd: int) -> None:
    """Have the map refuse every change from user space from now on."""
    _call(_FREEZE, struct.pack("<I", fd))


def create_hash(key_bytes: int, value_bytes: int, capacity: int) -> int:
    """Return the descriptor of a new hash map, one that refuses entries when it is full."""
    return _call(_CREATE, struct.pack("<5I", _HASH, key_bytes, value_bytes, capacity, 0))
