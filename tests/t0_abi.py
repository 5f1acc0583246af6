"""Python, the native channel and the BPF programs see every shared struct and enum alike."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fuseclient import native
from fuseclient._native import ffi, lib
from fuseclient.observe.opcodes import OPCODES
from metaserver.wire import Attributes

ROOT = Path(__file__).parent.parent
ABI = (ROOT / "bpf" / "abi.h").read_text()


def shared(kind: str) -> list[str]:
    """Return the names of the structs ("struct") or enums that abi.h defines."""
    return [line.split()[1] for line in ABI.splitlines() if line.startswith(f"{kind} ") and line.endswith("{")]


class Btf:
    """The types of a BPF object, by bpftool."""

    def __init__(self, path: Path) -> None:
        bpftool = shutil.which("bpftool", path="/usr/sbin:/sbin:/usr/bin:/bin")
        if bpftool is None:
            pytest.skip("bpftool is not installed")
        text = subprocess.run([bpftool, "-j", "btf", "dump", "file", path], check=True, capture_output=True).stdout
        types = json.loads(text)["types"]
        self.structs = {each["name"]: each for each in types if each["kind"] == "STRUCT"}
        self.enums = {each["name"]: each for each in types if each["kind"] == "ENUM"}


@pytest.fixture(scope="module")
def built() -> Btf:
    if not native.OBJECT_PATH.exists():
        pytest.skip(f"{native.OBJECT_PATH} is not built")
    return Btf(native.OBJECT_PATH)


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Btf:
    """An object of all that abi.h defines, also what no program uses, compiled for BPF."""
    if shutil.which("clang") is None:
        pytest.skip("clang is not installed")
    folder = tmp_path_factory.mktemp("witness")
    source, made = folder / "witness.bpf.c", folder / "witness.bpf.o"
    lines = ["#include <linux/types.h>", f'#include "{ROOT}/bpf/abi.h"']
    lines += [f"struct {name} witness_{name};" for name in shared("struct")]
    lines += [f"enum {name} witness_{name};" for name in shared("enum")]
    source.write_text("\n".join(lines) + "\n")
    machine = subprocess.run(["uname", "-m"], check=True, capture_output=True, text=True).stdout.strip()
    include = f"-I/usr/include/{machine}-linux-gnu"
    subprocess.run(["clang", "-O2", "-g", "-target", "bpf", include, "-c", source, "-o", made], check=True)
    return Btf(made)


def cffi_layout(name: str) -> tuple[int, dict[str, int]]:
    kind = ffi.typeof(f"struct {name}")
    return ffi.sizeof(kind), {field: info.offset for field, info in kind.fields}


def btf_layout(struct: dict[str, Any]) -> tuple[int, dict[str, int]]:
    return struct["size"], {member["name"]: member["bits_offset"] // 8 for member in struct["members"]}


@pytest.mark.parametrize("name", shared("struct"))
def test_structs_are_alike(name: str, witness: Btf, built: Btf) -> None:
    assert btf_layout(witness.structs[name]) == cffi_layout(name)
    if name in built.structs:
        assert btf_layout(built.structs[name]) == cffi_layout(name)


@pytest.mark.parametrize("name", shared("enum"))
def test_enums_are_alike(name: str, witness: Btf) -> None:
    values = {each["name"]: each["val"] for each in witness.enums[name]["values"]}
    assert values == ffi.typeof(f"enum {name}").relements


@pytest.mark.parametrize("name", shared("struct"))
def test_no_struct_has_padding_without_a_name(name: str) -> None:
    kind = ffi.typeof(f"struct {name}")
    end = 0
    for field, info in kind.fields:
        assert info.offset == end, field
        end += ffi.sizeof(info.type)
    assert end == ffi.sizeof(kind)


def test_the_object_uses_every_struct_of_its_maps(built: Btf) -> None:
    used = {"bpfuse_name_key", "bpfuse_name_value", "bpfuse_inode_value", "bpfuse_page", "bpfuse_control"}
    assert used | {"bpfuse_entry", "bpfuse_test_args", "bpfuse_map_counts"} <= set(built.structs)


def test_limits_that_stand_twice_in_the_header_agree() -> None:
    assert ffi.sizeof("struct bpfuse_page") == lib.BPFUSE_PAGE
    assert ffi.sizeof(ffi.typeof("struct bpfuse_entry").fields[-1][1].type) == lib.BPFUSE_PAYLOAD
    assert lib.BPFUSE_PAYLOAD == lib.BPFUSE_MAX_WRITE + lib.BPFUSE_PAGE
    assert lib.BPFUSE_OPEN_SLOTS == 1 << 16
    assert ffi.sizeof("struct bpfuse_entry") % lib.BPFUSE_PAGE == 0
    assert max(ffi.typeof("enum bpfuse_outcome").elements) < lib.BPFUSE_OUTCOMES
    assert max(OPCODES) < lib.BPFUSE_OPCODES


def test_records_begin_like_the_attributes_of_the_wire() -> None:
    unused = ("reserved", "padding")
    fields = [name for name, _ in ffi.typeof("struct bpfuse_record").fields if name not in unused]
    wire = list(Attributes.__struct_fields__)
    assert fields[: len(wire)] == wire
