from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memd.tiers.header import HEADER_BYTES, PageIdentity, SlotHeader, checksum, read_header

_U64 = st.integers(0, (1 << 64) - 1)
HEADERS = st.builds(
    SlotHeader, st.builds(PageIdentity, _U64, _U64, _U64), _U64, st.integers(0, (1 << 32) - 1)
)


@given(HEADERS, st.binary(max_size=64))
def test_a_header_is_read_back_whatever_follows_it(header: SlotHeader, rest: bytes) -> None:
    packed = header.pack()
    assert len(packed) == HEADER_BYTES
    assert read_header(packed + rest) == header
    assert read_header(memoryview(packed + rest)) == header


def test_the_bytes_on_disk_are_these() -> None:
    header = SlotHeader(PageIdentity(1, 2, 3), 4, 5)
    assert header.pack().hex() == (
        "6d656d64736c6f74"
        "0100000000000000"
        "0200000000000000"
        "0300000000000000"
        "0400000000000000"
        "05000000"
        "07045652"
    )


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_any_bytes_are_a_header_or_none_and_never_an_error(data: bytes) -> None:
    header = read_header(data)
    assert header is None or header.pack() == data[:HEADER_BYTES]


@given(HEADERS, st.integers(0, HEADER_BYTES * 8 - 1))
def test_one_wrong_bit_makes_it_none(header: SlotHeader, bit: int) -> None:
    packed = bytearray(header.pack())
    packed[bit // 8] ^= 1 << bit % 8
    assert read_header(packed) is None


@given(HEADERS, st.data())
def test_wrong_bytes_make_it_none(header: SlotHeader, data: st.DataObject) -> None:
    packed = header.pack()
    start = data.draw(st.integers(0, HEADER_BYTES - 1))
    other = data.draw(st.binary(min_size=1, max_size=HEADER_BYTES - start))
    spoilt = packed[:start] + other + packed[start + len(other) :]
    assert (read_header(spoilt) is None) == (spoilt != packed)


@pytest.mark.parametrize("data", [b"", b"\0" * 4096, b"memdslot", b"\xff" * 4096])
def test_what_an_empty_disk_holds_is_no_header(data: bytes) -> None:
    assert read_header(data) is None


def test_another_files_header_is_none() -> None:
    fields = b"otherfmt" + SlotHeader(PageIdentity(1, 2, 3), 4, 5).pack()[8:-4]
    assert read_header(fields + zlib.crc32(fields).to_bytes(4, "little")) is None


def test_two_blocks_that_change_places_change_the_checksum() -> None:
    first, second = b"\1" * 4096, b"\2" * 4096
    assert checksum(first + second) != checksum(second + first)
