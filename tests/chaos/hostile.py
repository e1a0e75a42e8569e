"""Frames that nobody should send: valid ones, and every way to spoil them.

Requests are plain maps here, in the form that ``docs/memd.md`` shows. Each way to spoil is a pure
function of a frame and a random generator, so that a seed tells the frame.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from memd.protocol import PROTOCOL_VERSION, REQUEST_TYPES, SESSION_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["REQUEST_TAGS", "hostile_frame", "valid_request"]

REQUEST_TAGS = tuple(str(kind.__struct_config__.tag) for kind in REQUEST_TYPES)
"""Tags of all requests."""

Plain = dict[str, Any]

_MAX_NESTING = 3000
_MAX_TEXT = 5000
_NUMBERS = (0, 1, 2, -1, 255, 1 << 20, (1 << 20) + 1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63)
_SCALARS: tuple[Any, ...] = (
    None,
    True,
    False,
    0.5,
    2.0,
    "",
    "x",
    b"",
    b"\0" * 7,
    [],
    {},
    *_NUMBERS,
)


def valid_request(tag: str, rng: np.random.Generator, session: bytes = bytes(16)) -> Plain:
    """A well-formed request; whether memd can grant it is another matter.

    Args:
        tag: One of ``REQUEST_TAGS``.
        rng: Source of its values.
        session: For a ``hello``.
    """
    few = int(rng.integers(6))
    values: dict[str, Plain] = {
        "hello": {
            "version": PROTOCOL_VERSION,
            "session": session,
            "pid": 1,
            "layout": {"num_heads": 2, "head_dim": 8, "dtype": "float16", "page_tokens": 4},
            "num_pages": 1 + few,
            "landing_bytes": 32 * few,
            "name": "x" * few,
        },
        "reserve": {"num_pages": few},
        "commit": {"page_ids": rng.permutation(6)[:few].tolist()},
        "fetch": {
            "rows": rng.integers(32, size=few, dtype=np.uint32).tobytes(),
            "landing_row": int(rng.integers(20)),
        },
        "release": {"page_ids": rng.permutation(6)[:few].tolist()},
        "freeze": {
            "page_ids": rng.permutation(6)[:few].tolist(),
            "depths": list(range(few)) if rng.random() < 0.5 else [],
        },
        "thaw": {"page_ids": rng.permutation(6)[:few].tolist()},
    }
    return {"type": tag, "request_id": int(rng.integers(1 << 20)), **values.get(tag, {})}


def hostile_frame(rng: np.random.Generator, session: bytes = bytes(16)) -> bytes:
    """One frame: random bytes, or a valid request that was spoilt in up to three ways."""
    if rng.random() < 0.1:
        return rng.bytes(int(rng.integers(300)))
    tag = REQUEST_TAGS[rng.integers(len(REQUEST_TAGS))]
    request = valid_request(tag, rng, session)
    for _ in range(rng.integers(3)):
        request = _MAP_SPOILERS[rng.integers(len(_MAP_SPOILERS))](request, rng)
    frame = msgspec.msgpack.encode(request)
    if rng.random() < 0.5:
        frame = _BYTE_SPOILERS[rng.integers(len(_BYTE_SPOILERS))](frame, rng)
    return frame


def _any_key(request: Plain, rng: np.random.Generator) -> str:
    return str(rng.choice(sorted(request, key=str)))


def _without_a_field(request: Plain, rng: np.random.Generator) -> Plain:
    gone = _any_key(request, rng) if request else ""
    return {key: value for key, value in request.items() if key != gone}


def _with_another_type(request: Plain, rng: np.random.Generator) -> Plain:
    if not request:
        return request
    return {**request, _any_key(request, rng): _SCALARS[rng.integers(len(_SCALARS))]}


def _with_another_tag(request: Plain, rng: np.random.Generator) -> Plain:
    tags = (*REQUEST_TAGS, "pong", "welcome", "spill", "x" * int(rng.integers(_MAX_TEXT)))
    return {**request, "type": str(rng.choice(tags))}


def _with_an_extra_field(request: Plain, rng: np.random.Generator) -> Plain:
    return {**request, f"extra_{rng.integers(9)}": _SCALARS[rng.integers(len(_SCALARS))]}


def _with_nesting(request: Plain, rng: np.random.Generator) -> Plain:
    inner: Any = 0
    for _ in range(rng.integers(100)):
        inner = [inner] if rng.random() < 0.5 else {"layout": inner}
    key = _any_key(request, rng) if request and rng.random() < 0.5 else "extra"
    return {**request, key: inner}


def _with_another_length(request: Plain, rng: np.random.Generator) -> Plain:
    length = int(rng.integers(2000))
    key = str(rng.choice(["rows", "session", "page_ids", "name"]))
    wrong = {
        "rows": rng.bytes(length),
        "session": rng.bytes(int(rng.choice([0, SESSION_BYTES - 1, SESSION_BYTES + 1]))),
        "page_ids": rng.integers(1 << 33, size=length).tolist(),
        "name": "n" * length,
    }
    return {**request, key: wrong[key]}


def _truncated(frame: bytes, rng: np.random.Generator) -> bytes:
    return frame[: int(rng.integers(len(frame)))]


def _flipped(frame: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(frame)
    for _ in range(rng.integers(1, 5)):
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(data)


def _followed(frame: bytes, rng: np.random.Generator) -> bytes:
    return frame + rng.bytes(int(rng.integers(1, 20)))


def _with_a_huge_declared_length(frame: bytes, rng: np.random.Generator) -> bytes:
    """An array, map, string or binary of up to 2**32 elements that are not there."""
    code = int(rng.choice([0xDD, 0xDF, 0xDB, 0xC6]))
    at = int(rng.integers(1, len(frame) + 1))
    return frame[:at] + struct.pack(">BI", code, int(rng.integers(1 << 16, 1 << 32)))


def _with_a_duplicate_key(frame: bytes, rng: np.random.Generator) -> bytes:
    """One more pair than the map had, under a key that it has already."""
    if not 0x80 <= frame[0] < 0x8F:
        return frame
    key = str(rng.choice(["type", "request_id", "page_ids", "num_pages", "layout"]))
    value = _SCALARS[rng.integers(len(_SCALARS))]
    pair = msgspec.msgpack.encode(key) + msgspec.msgpack.encode(value)
    return bytes([frame[0] + 1]) + frame[1:] + pair


def _deeply_nested(frame: bytes, rng: np.random.Generator) -> bytes:
    depth = int(rng.integers(1, _MAX_NESTING))
    return b"\x82\xa4type\xa4ping\xa1x" + bytes([0x91]) * depth + frame


_MAP_SPOILERS: tuple[Callable[[Plain, np.random.Generator], Plain], ...] = (
    _without_a_field,
    _with_another_type,
    _with_another_tag,
    _with_an_extra_field,
    _with_nesting,
    _with_another_length,
)
_BYTE_SPOILERS: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    _truncated,
    _flipped,
    _followed,
    _with_a_huge_declared_length,
    _with_a_duplicate_key,
    _deeply_nested,
)
