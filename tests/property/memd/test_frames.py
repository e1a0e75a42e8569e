"""No bytes that a peer can send make the daemon fail: each frame is answered, and nothing leaks."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memd.errors import ProtocolError
from memd.protocol import (
    PROTOCOL_VERSION,
    ErrorCode,
    ErrorReply,
    Hello,
    KVLayout,
    decode_reply,
    decode_request,
    decode_welcome,
    encode,
)
from memd.service import Service
from memd.store import Store
from memd.transfer import HostTransfer

LAYOUT = KVLayout(num_heads=2, head_dim=8, dtype="float16", page_tokens=4)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=10)
    | st.binary(max_size=40)
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)
TAGS = ["hello", "reserve", "commit", "fetch", "release", "stats", "ping", "goodbye"]
FIELDS = ["num_pages", "page_ids", "rows", "landing_row", "version", "session", "layout", "pid"]
PAGES = st.lists(st.integers(0, 5) | st.integers(-(2**63), 2**64 - 1), max_size=4)
NEARLY = st.fixed_dictionaries(
    {"type": st.sampled_from(TAGS) | st.text(max_size=8)},
    optional={
        "request_id": st.integers(0, 9) | PLAIN,
        "num_pages": st.integers(0, 6) | PLAIN,
        "page_ids": PAGES | PLAIN,
        "rows": st.lists(st.integers(0, 80), max_size=8).map(
            lambda rows: np.array(rows, dtype="<u4").tobytes()
        )
        | PLAIN,
        "landing_row": st.integers(0, 20) | PLAIN,
        **dict.fromkeys(FIELDS[4:], PLAIN),
    },
)
FRAMES = (
    st.binary(max_size=200)
    | PLAIN.map(msgspec.msgpack.encode)
    | NEARLY.map(msgspec.msgpack.encode)
    | NEARLY.map(msgspec.msgpack.encode).flatmap(
        lambda frame: st.builds(
            lambda at, byte: frame[:at] + bytes([byte]) + frame[at + 1 :],
            st.integers(0, len(frame) - 1),
            st.integers(0, 255),
        )
    )
)


@given(frames=st.lists(FRAMES, min_size=1, max_size=30))
def test_every_frame_is_answered_and_the_books_hold(frames: list[bytes]) -> None:
    region = np.zeros(1 << 16, dtype=np.uint8)
    store = Store(region.size)
    service = Service(store, HostTransfer(region))
    hello = Hello(
        request_id=0,
        version=PROTOCOL_VERSION,
        session=service.open_session(1),
        pid=1,
        layout=LAYOUT,
        num_pages=4,
        landing_bytes=16 * LAYOUT.row_bytes,
    )
    service.handle(b"client", encode(hello))
    for frame in frames:
        reply = decode_reply(service.handle(b"client", frame))
        assert not (isinstance(reply, ErrorReply) and reply.code is ErrorCode.INTERNAL)
        store.check_integrity()
    stats = service.stats()
    assert sum(stats["requests"].values()) + sum(stats["errors"].values()) == len(frames) + 1
    assert len(stats["clients"]) <= 1


@given(frame=FRAMES)
def test_decoders_decode_or_refuse(frame: bytes) -> None:
    for decode in (decode_request, decode_reply, decode_welcome):
        try:
            message = decode(frame)
        except ProtocolError:
            continue
        assert decode(encode(message)) == message
