"""MessagePack by hand, from its specification: what a client in another language would use.

Only the types that memd's frames contain: nil, booleans, unsigned integers, str, bin, arrays, maps.
"""

from __future__ import annotations

import struct
from typing import Any

__all__ = ["pack", "unpack"]


def pack(value: Any) -> bytes:
    """The MessagePack form of plain data."""
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return bytes([value]) if value < 0x80 else b"\xcf" + struct.pack(">Q", value)
    if isinstance(value, str):
        text = value.encode()
        return b"\xdb" + struct.pack(">I", len(text)) + text
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, list):
        return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(pack, value))
    pairs = b"".join(pack(key) + pack(item) for key, item in value.items())
    return b"\xdf" + struct.pack(">I", len(value)) + pairs


def unpack(data: bytes) -> Any:
    """Plain data of one MessagePack value; nothing may follow it."""
    value, end = _unpack(data, 0)
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes follow the value")
    return value


_NUMBERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xCA: ">f", 0xCB: ">d"}
_NUMBERS |= {0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_LENGTHS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_SIZES = {0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}


def _unpack(data: bytes, at: int) -> tuple[Any, int]:
    tag = data[at]
    at += 1
    if tag < 0x80:
        return tag, at
    if tag < 0x90:
        return _unpack_map(data, at, tag & 0x0F)
    if tag < 0xA0:
        return _unpack_list(data, at, tag & 0x0F)
    if tag < 0xC0:
        end = at + (tag & 0x1F)
        return data[at:end].decode(), end
    if tag in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[tag], at
    if tag in _NUMBERS:
        size = struct.calcsize(_NUMBERS[tag])
        return struct.unpack(_NUMBERS[tag], data[at : at + size])[0], at + size
    if tag in _LENGTHS:
        size = struct.calcsize(_LENGTHS[tag])
        begin = at + size
        end = begin + struct.unpack(_LENGTHS[tag], data[at:begin])[0]
        return (data[begin:end].decode() if tag >= 0xD9 else data[begin:end]), end
    if tag in _SIZES:
        size = struct.calcsize(_SIZES[tag])
        count = struct.unpack(_SIZES[tag], data[at : at + size])[0]
        read = _unpack_list if tag <= 0xDD else _unpack_map
        return read(data, at + size, count)
    if tag >= 0xE0:
        return tag - 0x100, at
    raise ValueError(f"unexpected tag 0x{tag:02x}")


def _unpack_list(data: bytes, at: int, count: int) -> tuple[list[Any], int]:
    items = []
    for _ in range(count):
        item, at = _unpack(data, at)
        items.append(item)
    return items, at


def _unpack_map(data: bytes, at: int, count: int) -> tuple[dict[Any, Any], int]:
    pairs = {}
    for _ in range(count):
        key, at = _unpack(data, at)
        pairs[key], at = _unpack(data, at)
    return pairs, at
