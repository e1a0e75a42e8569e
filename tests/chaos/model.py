"""What memd must answer to any frame: its rules once more, as plainly as they can be said.

The model knows sessions, connections and page states, and no memory. Where the choice is memd's (a
place for an extent, whether one fits), it takes memd's answer over and checks that it can be.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from memd.errors import ProtocolError
from memd.greeting import MAX_PAGES_PER_CLIENT
from memd.protocol import (
    PROTOCOL_VERSION,
    Commit,
    CommitReply,
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
    StatsReply,
    Thaw,
    ThawReply,
    decode_request,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "FREE",
    "FROZEN",
    "LEAVING",
    "RESERVED",
    "SEALED",
    "Expectation",
    "Model",
    "ModelClient",
]

FREE, RESERVED, SEALED = "free", "reserved", "sealed"
FROZEN, LEAVING = "frozen", "leaving"


_OfClient = Reserve | Commit | Fetch | Release | Freeze | Thaw | Goodbye
# What is answered with what, and the states of pages that it needs.
_OF_PAGES: dict[type[Request], tuple[type[Reply], set[str]]] = {
    Commit: (CommitReply, {RESERVED}),
    Release: (ReleaseReply, {RESERVED, SEALED, FROZEN}),
    Freeze: (FreezeReply, {SEALED}),
    Thaw: (ThawReply, {FROZEN}),
}


@dataclasses.dataclass(eq=False)
class ModelClient:
    """A registered client.

    Attributes:
        hello: What memd told it.
        layout: Layout of its pages.
        states: State of each page.
        readers: Fetches that still read each page.
    """

    hello: HelloReply
    layout: KVLayout
    states: list[str]
    readers: list[int]

    def unpin(self, page_ids: Sequence[int]) -> None:
        """A fetch that read these pages has been answered."""
        for page in page_ids:
            self.readers[page] -= 1
            if not self.readers[page] and self.states[page] == LEAVING:
                self.states[page] = FREE


@dataclasses.dataclass
class Expectation:
    """What a frame must be answered with.

    Attributes:
        kind: Type of the reply.
        request_id: It must carry; None for a frame that cannot be read.
        codes: Of an ``ErrorReply``, one of these.
        client: Who asked, if registered.
        request: The frame's message, if it is one.
        page_ids: Pages that a ``Reserve`` must give, or that a ``Fetch`` reads.
    """

    kind: type[Reply]
    request_id: int | None
    codes: tuple[ErrorCode, ...] = ()
    client: ModelClient | None = None
    request: Request | None = None
    page_ids: list[int] | None = None

    def check(self, reply: Reply) -> None:
        """The reply is the expected one."""
        assert reply.request_id == self.request_id, (self, reply)
        if isinstance(reply, ErrorReply):
            assert reply.code in self.codes, (self, reply)
            return
        assert isinstance(reply, self.kind), (self, reply)
        if isinstance(reply, ReserveReply):
            assert reply.page_ids == self.page_ids, (self, reply)
            assert self.client is not None
            assert reply.free_pages == self.client.states.count(FREE) - len(reply.page_ids or [])
        elif isinstance(reply, FetchReply):
            assert isinstance(self.request, Fetch)
            assert self.client is not None
            assert reply.num_rows == len(self.request.rows) // self.client.hello.row_index_bytes


class Model:
    """Sessions, connections and pages of one daemon.

    Args:
        region_bytes: Size of its region.
        max_frame_bytes: Longest frame that it reads.

    Attributes:
        sessions: Of attached processes; True once they have said ``Hello``.
        clients: Registered clients by connection.
    """

    def __init__(self, region_bytes: int, max_frame_bytes: int) -> None:
        self.sessions: dict[bytes, bool] = {}
        self.clients: dict[bytes, ModelClient] = {}
        self._region_bytes = region_bytes
        self._max_frame_bytes = max_frame_bytes
        self._session_of: dict[bytes, bytes] = {}

    def expect(self, connection: bytes, frame: bytes) -> Expectation:
        """What a frame must be answered with; changes nothing."""
        if len(frame) > self._max_frame_bytes:
            return Expectation(ErrorReply, None, (ErrorCode.TOO_LARGE,))
        try:
            request = decode_request(frame)
        except ProtocolError:
            return Expectation(ErrorReply, None, (ErrorCode.MALFORMED,))
        if isinstance(request, Hello):
            return self._expect_hello(connection, request)
        if isinstance(request, Ping):
            return Expectation(Pong, request.request_id)
        client = self.clients.get(connection)
        if isinstance(request, _OfClient):
            if client is None:
                return _refusal(request, ErrorCode.NOT_REGISTERED)
            return _expect_of_client(client, request)
        return Expectation(StatsReply, request.request_id)

    def attach(self, session: bytes) -> None:
        """A process attached."""
        self.sessions[session] = False

    def detach(self, session: bytes) -> ModelClient | None:
        """A process is gone; the client that it was."""
        del self.sessions[session]
        for connection, owner in list(self._session_of.items()):
            if owner == session:
                return self._forget(connection)
        return None

    def happen(self, connection: bytes, expected: Expectation, reply: Reply) -> None:
        """Take in what a reply says; not for a fetch that waits, see ``begin_fetch``."""
        request, client = expected.request, expected.client
        if isinstance(reply, ErrorReply):
            return
        if isinstance(reply, HelloReply):
            assert isinstance(request, Hello)
            self._register(connection, request, reply)
        elif isinstance(reply, GoodbyeReply):
            self._forget(connection)
        elif isinstance(reply, ReserveReply):
            assert client is not None
            for page in reply.page_ids or []:
                client.states[page] = RESERVED
        elif isinstance(reply, CommitReply | FreezeReply | ThawReply):
            assert isinstance(request, Commit | Freeze | Thaw)
            assert client is not None
            for page in request.page_ids:
                client.states[page] = FROZEN if isinstance(request, Freeze) else SEALED
        elif isinstance(reply, ReleaseReply):
            assert isinstance(request, Release)
            assert client is not None
            for page in request.page_ids:
                client.states[page] = LEAVING if client.readers[page] else FREE

    def _expect_hello(self, connection: bytes, hello: Hello) -> Expectation:
        if hello.version != PROTOCOL_VERSION:
            return _refusal(hello, ErrorCode.VERSION)
        if hello.session not in self.sessions:
            return _refusal(hello, ErrorCode.UNKNOWN_SESSION)
        if self.sessions[hello.session] or connection in self.clients:
            return _refusal(hello, ErrorCode.ALREADY_REGISTERED)
        if hello.num_pages > MAX_PAGES_PER_CLIENT:
            return _refusal(hello, ErrorCode.QUOTA)
        if hello.landing_bytes % hello.layout.row_bytes:
            return _refusal(hello, ErrorCode.OUT_OF_RANGE)
        # Whether there is room depends on where the others lie, which is memd's choice.
        full = (ErrorCode.POOL_FULL,)
        return Expectation(HelloReply, hello.request_id, full, request=hello)

    def _register(self, connection: bytes, hello: Hello, reply: HelloReply) -> None:
        layout = hello.layout
        assert (reply.row_bytes, reply.page_bytes) == (layout.row_bytes, layout.page_bytes)
        assert reply.landing_rows * layout.row_bytes == hello.landing_bytes
        assert reply.landing_offset >= hello.num_pages * layout.page_bytes
        assert reply.landing_offset + hello.landing_bytes <= reply.extent_bytes
        extents = [(client.hello.extent_offset, client.hello) for client in self.clients.values()]
        extents = sorted([*extents, (reply.extent_offset, reply)], key=lambda extent: extent[0])
        end = 0
        for offset, extent in extents:
            assert end <= offset, "extents overlap"
            end = offset + extent.extent_bytes
        assert end <= self._region_bytes
        self.sessions[hello.session] = True
        self._session_of[connection] = hello.session
        num_pages = hello.num_pages
        self.clients[connection] = ModelClient(reply, layout, [FREE] * num_pages, [0] * num_pages)

    def _forget(self, connection: bytes) -> ModelClient:
        del self._session_of[connection]
        return self.clients.pop(connection)


def _refusal(request: Request, code: ErrorCode) -> Expectation:
    return Expectation(ErrorReply, request.request_id, (code,))


def _expect_of_client(client: ModelClient, request: _OfClient) -> Expectation:
    """What a registered client's request must be answered with."""
    states = client.states
    expected = Expectation(GoodbyeReply, request.request_id, client=client, request=request)
    if isinstance(request, Reserve):
        free = [page for page, state in enumerate(states) if state == FREE]
        expected.kind = ReserveReply
        expected.page_ids = free[: request.num_pages] if request.num_pages <= len(free) else None
    elif isinstance(request, Commit | Release | Freeze | Thaw):
        ids = request.page_ids
        expected.kind, allowed = _OF_PAGES[type(request)]
        if isinstance(request, Freeze) and request.depths and len(request.depths) != len(ids):
            return _refusal(request, ErrorCode.OUT_OF_RANGE)
        if len(set(ids)) != len(ids) or not all(page < len(states) for page in ids):
            return _refusal(request, ErrorCode.OUT_OF_RANGE)
        if not all(states[page] in allowed for page in ids):
            return _refusal(request, ErrorCode.WRONG_STATE)
    elif isinstance(request, Fetch):
        expected.kind = FetchReply
        width = client.hello.row_index_bytes
        if len(request.rows) % width:
            return _refusal(request, ErrorCode.MALFORMED)
        rows = np.frombuffer(request.rows, dtype=f"<u{width}").tolist()
        if request.landing_row + len(rows) > client.hello.landing_rows:
            return _refusal(request, ErrorCode.OUT_OF_RANGE)
        if any(row >= len(states) * client.layout.rows_per_page for row in rows):
            return _refusal(request, ErrorCode.OUT_OF_RANGE)
        expected.page_ids = sorted({row // client.layout.rows_per_page for row in rows})
        if any(states[page] not in (SEALED, FROZEN) for page in expected.page_ids):
            return _refusal(request, ErrorCode.WRONG_STATE)
    return expected
