"""SipHash-2-4-128, against the vectors of its authors: the key is 00 .. 0f, the message 00, 01, 02 and so on."""

from __future__ import annotations

import pytest

from fuseclient.native import hash_name

KEY = (0x0706050403020100, 0x0F0E0D0C0B0A0908)

#: By the length of the message; t1_bpf_answers has the BPF program compute the same.
VECTORS = {
    0: "a3817f04ba25a8e66df67214c7550293",
    1: "da87c1d86b99af44347659119b22fc45",
    2: "8177228da4a45dc7fca38bdef60affe4",
    12: "d626b266905ef35882634df68532c125",
    13: "9869e247e9c08b10d029934fc4b952f7",
    14: "31fcefac66d7de9c7ec7485fe4494902",
    15: "5493e99933b0a8117e08ec0f97cfc3d9",
    16: "6ee2a4ca67b054bbfd3315bf85230577",
    17: "473d06e8738db89854c066c47ae47740",
    18: "a426e5e423bf4885294da481feaef723",
    19: "78017731cf65fab074d5208952512eb1",
    20: "9e25fc833f2290733e9344a5e83839eb",
    32: "7c3956ca5eeafc3e363e9d556546eb68",
    60: "e3040c00eb28f15366ca73cbd872e740",
    61: "7697009a6a831dfecca91c5993670f7a",
    62: "5853542321f567a005d547a4f04759bd",
    63: "5150d1772f50834a503e069a973fbd7c",
}


def words(digest: str) -> tuple[int, int]:
    raw = bytes.fromhex(digest)
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


@pytest.mark.parametrize("length", VECTORS)
def test_official_vectors(length: int) -> None:
    assert hash_name(bytes(range(length)), KEY) == words(VECTORS[length])


def test_every_length_of_name_has_a_hash_of_its_own() -> None:
    assert len({hash_name(bytes(length), KEY) for length in range(256)}) == 256


def test_every_bit_of_the_key_matters() -> None:
    bits = [1 << bit for bit in range(64)]
    keys = [KEY, *((KEY[0] ^ bit, KEY[1]) for bit in bits), *((KEY[0], KEY[1] ^ bit) for bit in bits)]
    assert len({hash_name(b"name", key) for key in keys}) == 129


def test_a_name_that_is_too_long_is_refused() -> None:
    hash_name(bytes(255), KEY)
    with pytest.raises(ValueError, match="256 bytes"):
        hash_name(bytes(256), KEY)
