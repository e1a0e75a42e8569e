"""Every message between a client and memd, as tagged Structs.

A frame is one MessagePack map. Its ``type`` key is the tag and its other keys are the field names,
so that any MessagePack library can speak to memd (``docs/memd.md`` shows the maps). Rules:

- every request gets exactly one reply that carries its ``request_id``; requests take effect in
  their order, and so do replies come, but for those that wait: a fetch is answered when its rows
  have landed, in the order of the client's fetches, a ``Hello`` when its memory is clean and its
  ring mapped, a ``Goodbye`` when its ring is unmapped, and with pages on disk a ``Reserve`` or
  ``Thaw`` when its pages are in memory;
- a tag is never reused, a field never changes its meaning, a new field has a default;
- nothing on the wire is code: a typed decoder reads frames, and unknown tags are refused.

``Welcome`` is the one message that does not travel over ZeroMQ: memd sends it, together with the
region's file descriptor, to a process that connects to the attach socket.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any

import msgspec

from memd.protocol.layout import KVLayout

__all__ = [
    "MAX_PAGES_PER_MESSAGE",
    "MAX_RING_HANDLE_BYTES",
    "PROTOCOL_VERSION",
    "REPLY_TYPES",
    "REQUEST_TYPES",
    "SESSION_BYTES",
    "Commit",
    "CommitReply",
    "DeviceRing",
    "ErrorCode",
    "ErrorReply",
    "Fetch",
    "FetchReply",
    "Freeze",
    "FreezeReply",
    "Goodbye",
    "GoodbyeReply",
    "Hello",
    "HelloReply",
    "Ping",
    "Pong",
    "Release",
    "ReleaseReply",
    "Reply",
    "Request",
    "Reserve",
    "ReserveReply",
    "Stats",
    "StatsReply",
    "Thaw",
    "ThawReply",
    "Welcome",
]

PROTOCOL_VERSION = 1
"""Both sides must have the same; raised with every change that an older side would misread."""

SESSION_BYTES = 16
"""Length of the random token that ties a ``Hello`` to a process on the attach socket."""

MAX_PAGES_PER_MESSAGE = 1 << 20
"""Most page ids in one ``Commit``, ``Release``, ``Freeze`` or ``Thaw``."""

MAX_RING_HANDLE_BYTES = 256
"""Longest ``DeviceRing.handle``; CUDA's have 64 bytes, and others are refused with a reason."""

_INT63 = (1 << 63) - 1
_RequestId = Annotated[int, msgspec.Meta(ge=0, le=_INT63)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=_INT63)]
_PageIds = Annotated[
    list[Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]],
    msgspec.Meta(max_length=MAX_PAGES_PER_MESSAGE),
]


class ErrorCode(enum.StrEnum):
    """Why a request was refused; the text beside it is for people, the code is for programs."""

    MALFORMED = "malformed"
    """The frame is not a request of this protocol version."""
    TOO_LARGE = "too_large"
    """The frame is longer than memd's limit."""
    VERSION = "version"
    """``Hello`` names another protocol version."""
    UNKNOWN_SESSION = "unknown_session"
    """``Hello`` carries a session that no attached process holds."""
    ALREADY_REGISTERED = "already_registered"
    """A second ``Hello`` for one session or one connection."""
    NOT_REGISTERED = "not_registered"
    """The request needs a ``Hello`` first, or memd has already let this client go."""
    POOL_FULL = "pool_full"
    """The region has no contiguous room for the extent."""
    OUT_OF_RANGE = "out_of_range"
    """A page id, a row index or a landing row lies outside the client's extent."""
    WRONG_STATE = "wrong_state"
    """A page is not in the state that the request needs, for example a fetch of an unsealed one."""
    QUOTA = "quota"
    """``Hello`` asks for more than one client may have."""
    TOO_MANY = "too_many"
    """The client has too many fetches in flight."""
    PEER_REFUSED = "peer_refused"
    """The process on the attach socket has another user id, or there are too many of them."""
    NO_ROOM = "no_room"
    """A fetch or a ``Thaw`` needs more pages in memory at a time than may be there."""
    PAGE_LOST = "page_lost"
    """A page that was on disk did not come back as it went; the message names it."""
    DEVICE_REFUSED = "device_refused"
    """memd cannot or will not copy into the ring that ``Hello`` names; the message says why."""
    DEVICE_LOST = "device_lost"
    """memd has given up the device that the client's ring is on; its fetches fail from now on."""
    DRAINING = "draining"
    """memd is ending: it goes on for the clients it has and takes no new ones."""
    INTERNAL = "internal"
    """memd failed; it logs the reason and goes on."""


class _Message(msgspec.Struct, frozen=True, kw_only=True):
    request_id: _RequestId


class DeviceRing(msgspec.Struct, frozen=True, kw_only=True):
    """A landing ring in a GPU's memory, as ``memd.cuda.export_ring`` describes it.

    Attributes:
        handle: CUDA's IPC handle of the allocation that holds it.
        base_offset: Where the ring begins in the allocation, in bytes.
        num_bytes: Bytes of the ring, a multiple of the layout's ``row_bytes``.
        device_uuid: The device that the memory is on.
    """

    handle: Annotated[bytes, msgspec.Meta(max_length=MAX_RING_HANDLE_BYTES)]
    base_offset: _Count
    num_bytes: _Count
    device_uuid: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Hello(_Message, frozen=True, tag="hello"):
    """Asks for an extent of pages and a landing ring; the first request of every client.

    Attributes:
        version: The client's ``PROTOCOL_VERSION``.
        session: Token from ``Welcome``, 16 bytes.
        pid: The client's process id as it sees itself; shown by ``memd status``. What memd watches
            is the process id that the kernel reports for the attach socket.
        layout: Layout of the client's pages.
        num_pages: Pages wanted, >= 1.
        landing_bytes: Bytes of the landing ring, a multiple of the layout's ``row_bytes``; 0 with
            a ``ring``, which is in its place.
        name: Free text for ``memd status``.
        host_pages: How many of the pages need memory at a time, where memd has a disk for the
            others; 0 means all of them.
        ring: Where fetched rows are to land instead of in the extent; None: in the extent.
    """

    version: int
    session: Annotated[bytes, msgspec.Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
    pid: _Count
    layout: KVLayout
    num_pages: Annotated[int, msgspec.Meta(ge=1, le=(1 << 32) - 1)]
    landing_bytes: _Count
    name: Annotated[str, msgspec.Meta(max_length=128)] = ""
    host_pages: Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)] = 0
    ring: DeviceRing | None = None


class Reserve(_Message, frozen=True, tag="reserve"):
    """Asks for ``num_pages`` free pages; all of them or none."""

    num_pages: _Count


class Commit(_Message, frozen=True, tag="commit"):
    """Seals reserved pages: their bytes are complete and may be fetched from now on."""

    page_ids: _PageIds


class Fetch(_Message, frozen=True, tag="fetch"):
    """Asks memd to gather rows of sealed pages into consecutive landing rows.

    Attributes:
        rows: Flat row indices, little-endian unsigned integers of ``HelloReply.row_index_bytes``
            each.
        landing_row: First row of the landing ring to write.
    """

    rows: bytes
    landing_row: _Count


class Release(_Message, frozen=True, tag="release"):
    """Gives reserved, sealed or frozen pages back."""

    page_ids: _PageIds


class Freeze(_Message, frozen=True, tag="freeze"):
    """Promises not to write sealed pages until ``Thaw``; from now on they may go to disk.

    Attributes:
        page_ids: Which.
        depths: How deep in a prompt each of them lies, the first page at 0, for policies that keep
            what is shared most; empty says nothing.
    """

    page_ids: _PageIds
    depths: _PageIds = []


class Thaw(_Message, frozen=True, tag="thaw"):
    """Takes the promise back; once it is answered the pages are in memory and may be written."""

    page_ids: _PageIds


class Stats(_Message, frozen=True, tag="stats"):
    """Asks for the daemon's state; needs no ``Hello``."""


class Ping(_Message, frozen=True, tag="ping"):
    """Asks for a sign of life; needs no ``Hello``."""


class Goodbye(_Message, frozen=True, tag="goodbye"):
    """Ends the registration: every page and the extent go back."""


class HelloReply(_Message, frozen=True, tag="hello_reply"):
    """The client's extent of the shared region.

    Attributes:
        version: memd's ``PROTOCOL_VERSION``.
        client_id: Never used twice by one daemon.
        extent_offset: First byte of the extent in the region, a multiple of the mapping
            granularity.
        extent_bytes: Bytes of the extent: the pages, padding, the landing ring.
        landing_offset: First byte of the landing ring, counted from the extent's start.
        landing_rows: Rows of the landing ring, wherever it is.
        row_bytes: Bytes of a row as memd computes it from the layout.
        page_bytes: Bytes of a page as memd computes it from the layout.
        row_index_bytes: 4 or 8, the width of an index in ``Fetch.rows``.
        max_frame_bytes: Longest request that memd reads; 0 from a memd that does not say.
        host_pages: How many pages may be in memory at a time; ``num_pages`` if none goes to disk, 0
            from a memd that does not say, where none does.
        data_path: Where fetched rows land: ``host``, the extent, or ``cuda_ipc``, the ``ring`` of
            ``Hello``. A memd that does not know rings says nothing, which is ``host``.
    """

    version: int
    client_id: int
    extent_offset: int
    extent_bytes: int
    landing_offset: int
    landing_rows: int
    row_bytes: int
    page_bytes: int
    row_index_bytes: int
    max_frame_bytes: int = 0
    host_pages: int = 0
    data_path: str = "host"


class ReserveReply(_Message, frozen=True, tag="reserve_reply"):
    """The reserved pages, ascending, or None when fewer than asked are free."""

    page_ids: list[int] | None
    free_pages: int


class CommitReply(_Message, frozen=True, tag="commit_reply"):
    """The pages are sealed."""


class FetchReply(_Message, frozen=True, tag="fetch_reply"):
    """The rows lie in the landing ring.

    Attributes:
        num_rows: Rows written.
        gather_ns: Time that memd spent copying.
        copy_ns: Time from the moment that the rows could be gathered for the device until they had
            landed there; 0 without a device.
    """

    num_rows: int
    gather_ns: int = 0
    copy_ns: int = 0


class ReleaseReply(_Message, frozen=True, tag="release_reply"):
    """The pages are free."""


class FreezeReply(_Message, frozen=True, tag="freeze_reply"):
    """The pages may go to disk."""


class ThawReply(_Message, frozen=True, tag="thaw_reply"):
    """The pages are in memory.

    Attributes:
        lost: Those whose bytes did not come back from disk; release them.
    """

    lost: list[int] = []


class StatsReply(_Message, frozen=True, tag="stats_reply"):
    """The daemon's state as plain data; ``memd.metrics`` documents the keys."""

    stats: dict[str, Any]


class Pong(_Message, frozen=True, tag="pong"):
    """Sign of life."""


class GoodbyeReply(_Message, frozen=True, tag="goodbye_reply"):
    """The registration has ended.

    Attributes:
        is_ring_closed: Whether memd maps no memory of the client's device any more, so that the
            ring may be freed; False after the device was lost, for as long as memd lives.
    """

    is_ring_closed: bool = True


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True, tag="error_reply"):
    """The request was refused and changed nothing.

    Attributes:
        request_id: Of the refused request; None when the frame could not be read.
        code: Reason for programs.
        message: Reason for people: the rule and the value.
    """

    request_id: _RequestId | None
    code: ErrorCode
    message: str


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """First message on the attach socket; the region's file descriptor travels with it.

    Attributes:
        version: memd's ``PROTOCOL_VERSION``.
        session: Token for ``Hello``, random, valid while the attach connection is open.
        pid: memd's process id.
        region_bytes: Size of the region behind the file descriptor.
    """

    version: int
    session: bytes
    pid: int
    region_bytes: int


Request = Hello | Reserve | Commit | Fetch | Release | Freeze | Thaw | Stats | Ping | Goodbye
Reply = (
    HelloReply
    | ReserveReply
    | CommitReply
    | FetchReply
    | ReleaseReply
    | FreezeReply
    | ThawReply
    | StatsReply
    | Pong
    | GoodbyeReply
    | ErrorReply
)

REQUEST_TYPES: tuple[type[Request], ...] = (
    Hello,
    Reserve,
    Commit,
    Fetch,
    Release,
    Freeze,
    Thaw,
    Stats,
    Ping,
    Goodbye,
)
"""All requests; the service checks at import that it handles each of them."""

REPLY_TYPES: tuple[type[Reply], ...] = (
    HelloReply,
    ReserveReply,
    CommitReply,
    FetchReply,
    ReleaseReply,
    FreezeReply,
    ThawReply,
    StatsReply,
    Pong,
    GoodbyeReply,
    ErrorReply,
)
"""All replies."""
