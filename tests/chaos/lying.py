"""A real client whose daemon is a script: it may tell the truth, lie, babble, or say nothing."""

from __future__ import annotations

import collections
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from memd.client import MemdClient
from memd.protocol import (
    PROTOCOL_VERSION,
    Commit,
    CommitReply,
    Fetch,
    FetchReply,
    Freeze,
    FreezeReply,
    Goodbye,
    GoodbyeReply,
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
    decode_request,
    encode,
)
from memd.registration import Registration

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DEADLINE_S",
    "LANDING_ROWS",
    "LAYOUT",
    "NUM_PAGES",
    "LyingChannel",
    "client_of",
    "honest_reply",
]

LAYOUT = KVLayout(num_heads=2, head_dim=8, dtype="float16", page_tokens=4)
NUM_PAGES, LANDING_ROWS = 8, 32
DEADLINE_S = 10.0
_ENDLESS = 10_000


class LyingChannel:
    """What the client believes to be memd: it remembers requests and says what it is told to.

    Attributes:
        open: Requests that were not answered; whoever answers one removes it.
        frames: Said at the next polls.
        endless: Said again and again, once `frames` are said; None: silence.
        stats: Answer to every ``Stats``, given at once; None: it stays open.
        is_closed: Whether the daemon has ended.
        now: The client's clock, in seconds.
    """

    def __init__(self) -> None:
        self.open: dict[int, Request] = {}
        self.frames: collections.deque[bytes] = collections.deque()
        self.endless: bytes | None = None
        self.stats: dict[str, Any] | None = None
        self.num_repeated = 0
        self.is_closed = False
        self.now = 0.0

    def send(self, frame: bytes) -> bool:
        request = decode_request(frame)
        self.open[request.request_id] = request
        if self.stats is not None and isinstance(request, Stats):
            self.frames.append(encode(StatsReply(request_id=request.request_id, stats=self.stats)))
        return not self.is_closed

    def receive(self) -> bytes | None:
        if self.frames:
            return self.frames.popleft()
        if self.endless is not None:
            self.num_repeated += 1
            assert self.num_repeated < _ENDLESS, "a call goes on for as long as memd speaks"
        return self.endless

    def peer_has_closed(self) -> bool:
        return self.is_closed

    def wait(self, timeout_s: float) -> None:
        """Nothing comes while it waits; only a test lets time pass."""

    def close(self) -> None:
        self.is_closed = True


def honest_reply(request: Request, free: list[int]) -> Reply:
    """What a real memd would answer; ``free`` are the pages that it may give."""
    request_id = request.request_id
    if isinstance(request, Reserve):
        fits = request.num_pages <= len(free)
        ids = free[: request.num_pages] if fits else None
        return ReserveReply(request_id=request_id, page_ids=ids, free_pages=len(free))
    if isinstance(request, Fetch):
        return FetchReply(request_id=request_id, num_rows=len(request.rows) // 4)
    if isinstance(request, Stats):
        return StatsReply(request_id=request_id, stats=_honest_stats(free))
    kinds: dict[type[Request], Callable[..., Reply]] = {
        Commit: CommitReply,
        Release: ReleaseReply,
        Freeze: FreezeReply,
        Thaw: ThawReply,
        Goodbye: GoodbyeReply,
        Ping: Pong,
    }
    return kinds[type(request)](request_id=request_id)


def _honest_stats(free: list[int]) -> dict[str, Any]:
    """What a client looks for in the stats of a memd in which nothing is reserved."""
    mine = {
        "pages_free": len(free),
        "pages_reserved": 0,
        "pages_sealed": NUM_PAGES - len(free),
        "pages_frozen": 0,
    }
    return {"integrity": "ok", "clients": [{"client_id": 1, **mine}]}


def client_of(channel: LyingChannel) -> MemdClient:
    """A client that is registered already."""
    pages_bytes = NUM_PAGES * LAYOUT.page_bytes
    extent = np.zeros(pages_bytes + LANDING_ROWS * LAYOUT.row_bytes, dtype=np.uint8)
    hello = HelloReply(
        request_id=0,
        version=PROTOCOL_VERSION,
        client_id=1,
        extent_offset=0,
        extent_bytes=extent.size,
        landing_offset=pages_bytes,
        landing_rows=LANDING_ROWS,
        row_bytes=LAYOUT.row_bytes,
        page_bytes=LAYOUT.page_bytes,
        row_index_bytes=4,
    )
    return MemdClient(
        Registration(channel, hello, extent, os.getpid()),
        LAYOUT,
        num_pages=NUM_PAGES,
        address="lies",
        deadline_s=DEADLINE_S,
        clock=lambda: channel.now,
    )
