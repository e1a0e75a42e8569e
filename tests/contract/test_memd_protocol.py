"""The wire protocol may not change unnoticed: golden bytes of all messages, plain MessagePack."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest

from memd.errors import ProtocolError
from memd.protocol import (
    MAX_PAGES_PER_MESSAGE,
    PROTOCOL_VERSION,
    REPLY_TYPES,
    REQUEST_TYPES,
    Commit,
    CommitReply,
    DeviceRing,
    ErrorCode,
    ErrorReply,
    Fetch,
    FetchReply,
    Freeze,
    FreezeReply,
    Goodbye,
    GoodbyeReply,
    Hello,
    HelloReply,
    KVLayout,
    Ping,
    Pong,
    Release,
    ReleaseReply,
    Reply,
    Request,
    Reserve,
    ReserveReply,
    Stats,
    StatsReply,
    Thaw,
    ThawReply,
    Welcome,
    decode_reply,
    decode_request,
    decode_welcome,
    encode,
)
from tests.contract.plain_msgpack import pack, unpack

SESSION = bytes(range(16))
LAYOUT = KVLayout(num_heads=2, head_dim=4, dtype="float32", page_tokens=8)

GOLDEN: list[tuple[Any, bytes]] = [
    (
        Hello(
            request_id=0,
            version=1,
            session=SESSION,
            pid=7,
            layout=LAYOUT,
            num_pages=3,
            landing_bytes=64,
            name="e",
            host_pages=2,
        ),
        b"\x8b\xa4type\xa5hello\xa7version\x01\xa7session\xc4\x10" + SESSION + b"\xa3pid\x07"
        b"\xa6layout\x84\xa9num_heads\x02\xa8head_dim\x04\xa5dtype\xa7float32\xabpage_tokens\x08"
        b"\xa9num_pages\x03\xadlanding_bytes@\xa4name\xa1e\xaahost_pages\x02\xa4ring\xc0"
        b"\xaarequest_id\x00",
    ),
    (
        Hello(
            request_id=0,
            version=1,
            session=SESSION,
            pid=7,
            layout=LAYOUT,
            num_pages=3,
            landing_bytes=0,
            ring=DeviceRing(handle=b"h\0", base_offset=5, num_bytes=64, device_uuid=SESSION),
        ),
        b"\x8b\xa4type\xa5hello\xa7version\x01\xa7session\xc4\x10" + SESSION + b"\xa3pid\x07"
        b"\xa6layout\x84\xa9num_heads\x02\xa8head_dim\x04\xa5dtype\xa7float32\xabpage_tokens\x08"
        b"\xa9num_pages\x03\xadlanding_bytes\x00\xa4name\xa0\xaahost_pages\x00"
        b"\xa4ring\x84\xa6handle\xc4\x02h\x00\xabbase_offset\x05\xa9num_bytes@"
        b"\xabdevice_uuid\xc4\x10" + SESSION + b"\xaarequest_id\x00",
    ),
    (
        Reserve(request_id=1, num_pages=2),
        b"\x83\xa4type\xa7reserve\xa9num_pages\x02\xaarequest_id\x01",
    ),
    (
        Commit(request_id=2, page_ids=[0, 1]),
        b"\x83\xa4type\xa6commit\xa8page_ids\x92\x00\x01\xaarequest_id\x02",
    ),
    (
        Fetch(request_id=3, rows=b"\1\0\0\0\2\0\0\0", landing_row=5),
        b"\x84\xa4type\xa5fetch\xa4rows\xc4\x08\x01\x00\x00\x00\x02\x00\x00\x00"
        b"\xablanding_row\x05\xaarequest_id\x03",
    ),
    (
        Release(request_id=4, page_ids=[1]),
        b"\x83\xa4type\xa7release\xa8page_ids\x91\x01\xaarequest_id\x04",
    ),
    (
        Freeze(request_id=8, page_ids=[1, 0], depths=[3, 2]),
        b"\x84\xa4type\xa6freeze\xa8page_ids\x92\x01\x00\xa6depths\x92\x03\x02\xaarequest_id\x08",
    ),
    (
        Thaw(request_id=9, page_ids=[1]),
        b"\x83\xa4type\xa4thaw\xa8page_ids\x91\x01\xaarequest_id\x09",
    ),
    (Stats(request_id=5), b"\x82\xa4type\xa5stats\xaarequest_id\x05"),
    (Ping(request_id=6), b"\x82\xa4type\xa4ping\xaarequest_id\x06"),
    (Goodbye(request_id=7), b"\x82\xa4type\xa7goodbye\xaarequest_id\x07"),
    (
        HelloReply(
            request_id=0,
            version=1,
            client_id=1,
            extent_offset=4096,
            extent_bytes=8192,
            landing_offset=4096,
            landing_rows=2,
            row_bytes=32,
            page_bytes=512,
            row_index_bytes=4,
            max_frame_bytes=1024,
            host_pages=3,
            data_path="cuda_ipc",
        ),
        b"\x8e\xa4type\xabhello_reply\xa7version\x01\xa9client_id\x01\xadextent_offset\xcd\x10\x00"
        b"\xacextent_bytes\xcd\x20\x00\xaelanding_offset\xcd\x10\x00\xaclanding_rows\x02"
        b"\xa9row_bytes\x20\xaapage_bytes\xcd\x02\x00\xafrow_index_bytes\x04\xafmax_frame_bytes\xcd\x04\x00"
        b"\xaahost_pages\x03\xa9data_path\xa8cuda_ipc"
        b"\xaarequest_id\x00",
    ),
    (
        ReserveReply(request_id=1, page_ids=[0, 1], free_pages=1),
        b"\x84\xa4type\xadreserve_reply\xa8page_ids\x92\x00\x01\xaafree_pages\x01\xaarequest_id\x01",
    ),
    (
        ReserveReply(request_id=1, page_ids=None, free_pages=1),
        b"\x84\xa4type\xadreserve_reply\xa8page_ids\xc0\xaafree_pages\x01\xaarequest_id\x01",
    ),
    (CommitReply(request_id=2), b"\x82\xa4type\xaccommit_reply\xaarequest_id\x02"),
    (
        FetchReply(request_id=3, num_rows=2, gather_ns=1000, copy_ns=7),
        b"\x85\xa4type\xabfetch_reply\xa8num_rows\x02\xa9gather_ns\xcd\x03\xe8\xa7copy_ns\x07"
        b"\xaarequest_id\x03",
    ),
    (ReleaseReply(request_id=4), b"\x82\xa4type\xadrelease_reply\xaarequest_id\x04"),
    (FreezeReply(request_id=8), b"\x82\xa4type\xacfreeze_reply\xaarequest_id\x08"),
    (
        ThawReply(request_id=9, lost=[1]),
        b"\x83\xa4type\xaathaw_reply\xa4lost\x91\x01\xaarequest_id\x09",
    ),
    (
        StatsReply(request_id=5, stats={"integrity": "ok"}),
        b"\x83\xa4type\xabstats_reply\xa5stats\x81\xa9integrity\xa2ok\xaarequest_id\x05",
    ),
    (Pong(request_id=6), b"\x82\xa4type\xa4pong\xaarequest_id\x06"),
    (
        GoodbyeReply(request_id=7),
        b"\x83\xa4type\xadgoodbye_reply\xaeis_ring_closed\xc3\xaarequest_id\x07",
    ),
    (
        ErrorReply(request_id=None, code=ErrorCode.MALFORMED, message="no"),
        b"\x84\xa4type\xaberror_reply\xaarequest_id\xc0\xa4code\xa9malformed\xa7message\xa2no",
    ),
    (
        Welcome(version=1, session=SESSION, pid=9, region_bytes=1 << 20),
        b"\x85\xa4type\xa7welcome\xa7version\x01\xa7session\xc4\x10" + SESSION + b"\xa3pid\x09"
        b"\xacregion_bytes\xce\x00\x10\x00\x00",
    ),
]
GOLDEN_IDS = [f"{type(message).__name__}-{index}" for index, (message, _) in enumerate(GOLDEN)]


def _decode(message: Any, frame: bytes) -> Any:
    if isinstance(message, Welcome):
        return decode_welcome(frame)
    return (decode_request if isinstance(message, REQUEST_TYPES) else decode_reply)(frame)


@pytest.mark.parametrize(("message", "frame"), GOLDEN, ids=GOLDEN_IDS)
def test_bytes_of_every_message_are_golden(message: Any, frame: bytes) -> None:
    assert encode(message) == frame
    assert _decode(message, frame) == message


@pytest.mark.parametrize(("message", "frame"), GOLDEN, ids=GOLDEN_IDS)
def test_plain_messagepack_reads_and_writes_every_message(message: Any, frame: bytes) -> None:
    plain = unpack(frame)
    expected = msgspec.to_builtins(message, builtin_types=(bytes,))
    assert plain == {"type": type(message).__struct_config__.tag, **expected}
    assert _decode(message, pack(plain)) == message


def test_every_message_type_has_golden_bytes() -> None:
    assert {type(message) for message, _ in GOLDEN} == {*REQUEST_TYPES, *REPLY_TYPES, Welcome}


def test_unions_and_registries_name_the_same_types() -> None:
    assert set(get_args(Request)) == set(REQUEST_TYPES)
    assert set(get_args(Reply)) == set(REPLY_TYPES)


def test_tags_are_unique() -> None:
    tags = [kind.__struct_config__.tag for kind in (*REQUEST_TYPES, *REPLY_TYPES, Welcome)]
    assert len(tags) == len(set(tags))


def test_error_codes_are_golden() -> None:
    assert [code.value for code in ErrorCode] == [
        "malformed",
        "too_large",
        "version",
        "unknown_session",
        "already_registered",
        "not_registered",
        "pool_full",
        "out_of_range",
        "wrong_state",
        "quota",
        "too_many",
        "peer_refused",
        "no_room",
        "page_lost",
        "device_refused",
        "device_lost",
        "draining",
        "internal",
    ]


def test_version_is_raised_together_with_this_file() -> None:
    assert PROTOCOL_VERSION == 1


def test_a_newer_sides_extra_field_is_ignored() -> None:
    frame = pack({"type": "reserve", "request_id": 1, "num_pages": 2, "colour": "blue"})
    assert decode_request(frame) == Reserve(request_id=1, num_pages=2)


def test_a_field_with_a_default_may_be_missing() -> None:
    frame = pack({"type": "fetch_reply", "request_id": 1, "num_rows": 2})
    assert decode_reply(frame) == FetchReply(request_id=1, num_rows=2, gather_ns=0)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x00" * 64,
        pack(None),
        pack([]),
        pack({}),
        pack({"type": "no_such_request", "request_id": 1}),
        pack({"type": "ping"}),
        pack({"type": "ping", "request_id": "1"}),
        pack({"type": "ping", "request_id": 1 << 63}),
        pack({"type": "reserve", "request_id": 1, "num_pages": "many"}),
        pack({"type": "commit", "request_id": 1, "page_ids": [1 << 40]}),
        pack({"type": "commit", "request_id": 1, "page_ids": ["0"]}),
        pack({"type": "fetch", "request_id": 1, "rows": [1, 2], "landing_row": 0}),
        pack({"type": "pong", "request_id": 1}),
        encode(Ping(request_id=1)) + b"\x00",
        encode(Ping(request_id=1))[:-1],
        b"\x91" * 5000,
    ],
)
def test_a_frame_that_is_no_request_is_a_protocol_error(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_request(frame)


def test_a_hello_with_an_impossible_layout_is_a_protocol_error() -> None:
    plain = unpack(GOLDEN[0][1])
    plain["layout"]["dtype"] = "float64"
    with pytest.raises(ProtocolError, match="dtype must be one of"):
        decode_request(pack(plain))


def test_a_session_of_another_length_is_a_protocol_error() -> None:
    plain = unpack(GOLDEN[0][1])
    plain["session"] = b"short"
    with pytest.raises(ProtocolError):
        decode_request(pack(plain))


@pytest.mark.parametrize(
    "change",
    [
        {"handle": bytes(257)},
        {"handle": "text"},
        {"base_offset": 1 << 63},
        {"num_bytes": 1 << 63},
        {"device_uuid": bytes(15)},
    ],
)
def test_a_hello_with_an_impossible_ring_is_a_protocol_error(change: dict[str, object]) -> None:
    plain = unpack(GOLDEN[1][1])
    plain["ring"] |= change
    with pytest.raises(ProtocolError):
        decode_request(pack(plain))


def test_sides_of_which_one_knows_no_rings_understand_each_other() -> None:
    plain = unpack(GOLDEN[0][1])
    del plain["ring"]
    assert decode_request(pack(plain)) == GOLDEN[0][0]
    assert decode_reply(pack({"type": "goodbye_reply", "request_id": 7})).is_ring_closed


def test_too_many_page_ids_are_a_protocol_error() -> None:
    frame = encode(Commit(request_id=1, page_ids=[0] * (MAX_PAGES_PER_MESSAGE + 1)))
    with pytest.raises(ProtocolError):
        decode_request(frame)


def test_requests_are_no_replies_and_the_reverse() -> None:
    for message, frame in GOLDEN:
        if isinstance(message, REQUEST_TYPES):
            with pytest.raises(ProtocolError):
                decode_reply(frame)
        elif isinstance(message, REPLY_TYPES):
            with pytest.raises(ProtocolError):
                decode_request(frame)
