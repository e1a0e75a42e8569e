"""Replies: made, counted, and kept for those whose requests were not answered at once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from memd.fetches import FetchEnd
from memd.protocol import ErrorCode, Fetch, FetchReply, Request, encode
from memd.refusals import Refusals
from memd.turns import Turn

if TYPE_CHECKING:
    from collections.abc import Generator

    from memd.copying import CopyJob
    from memd.fetches import Ended
    from memd.metrics import Metrics
    from memd.protocol import ErrorReply, Reply
    from memd.turns import Wait

__all__ = ["Answers", "Waiting"]


class Waiting(Turn["Reply | None"]):
    """A request that waits, and who asked it when.

    Attributes:
        connection: Who is to be answered.
        request: What was asked.
        begun_ns: When, by the performance counter.
    """

    def __init__(
        self,
        steps: Generator[Wait, None, Reply | None],
        connection: bytes,
        request: Request,
        begun_ns: int,
    ) -> None:
        super().__init__(steps)
        self.connection = connection
        self.request = request
        self.begun_ns = begun_ns


class Answers:
    """Makes replies.

    Args:
        metrics: Where they are counted.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._refusals = Refusals(metrics)
        self._outbox: list[tuple[bytes, bytes]] = []

    @property
    def has_any(self) -> bool:
        """Whether `take` has something to give."""
        return bool(self._outbox)

    def take(self) -> list[tuple[bytes, bytes]]:
        """Replies that may go now, as (ZeroMQ routing id, frame)."""
        replies, self._outbox = self._outbox, []
        return replies

    def answered(self, request: Request, begun_ns: int) -> None:
        """Count a request that got what it asked for."""
        tag = str(type(request).__struct_config__.tag)
        self._metrics.answered(tag, time.perf_counter_ns() - begun_ns)

    def refuse(self, request_id: int | None, error: Exception) -> ErrorReply:
        """The reply to a request that ended with an error."""
        return self._refusals.of(request_id, error)

    def fetched(self, request_id: int, job: CopyJob, copy_ns: int = 0) -> FetchReply:
        """The reply to a fetch whose rows have landed."""
        num_rows = len(job.rows)
        self._metrics.fetched(num_rows=num_rows, num_bytes=job.num_bytes, gather_ns=job.copy_ns)
        return FetchReply(
            request_id=request_id, num_rows=num_rows, gather_ns=job.copy_ns, copy_ns=copy_ns
        )

    def put_turn(self, turn: Turn[Reply | None]) -> None:
        """Keep the reply of a request that waited and is over."""
        assert isinstance(turn, Waiting), "nobody else waits"
        if turn.error is not None:
            self._put(turn.connection, self.refuse(turn.request.request_id, turn.error))
        elif turn.result is not None:
            self.answered(turn.request, turn.begun_ns)
            self._put(turn.connection, turn.result)

    def put_fetch(self, ended: Ended) -> None:
        """Keep the reply of a fetch that was copied in turn."""
        fetch = ended.fetch
        if ended.end is FetchEnd.LANDED:
            reply: Reply = self.fetched(fetch.request_id, fetch.job, ended.copy_ns)
            tag = str(Fetch.__struct_config__.tag)
            self._metrics.answered(tag, time.perf_counter_ns() - fetch.begun_ns)
        elif ended.end is FetchEnd.DEVICE_LOST:
            assert fetch.ring is not None, "only a ring has a device"
            reply = self.refuse(fetch.request_id, fetch.ring.lost())
        else:
            text = "memd failed to copy; see its log"
            reply = self._refusals.make(fetch.request_id, ErrorCode.INTERNAL, text)
        self._put(fetch.connection, reply)

    def put_gone(self, connection: bytes, request_id: int) -> None:
        """Keep the reply to a request of a client that has left."""
        text = "the client left before its request was done"
        self._put(connection, self._refusals.make(request_id, ErrorCode.NOT_REGISTERED, text))

    def _put(self, connection: bytes, reply: Reply) -> None:
        self._outbox.append((connection, encode(reply)))
