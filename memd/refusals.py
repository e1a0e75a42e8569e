"""What a request that fails is answered with; all are counted, and one of each kind is logged."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from memd.cuda.errors import DeviceLost, RingRefused
from memd.errors import PoolFull, ProtocolError
from memd.protocol import ErrorCode, ErrorReply
from memd.store import OutOfRange, WrongState

if TYPE_CHECKING:
    from memd.metrics import Metrics

__all__ = ["MAX_MESSAGE_CHARS", "Refusals", "Refused", "printable"]

_LOG = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 1000
"""Of a text that repeats a peer's words."""

_CODES: dict[type[Exception], ErrorCode] = {
    ProtocolError: ErrorCode.MALFORMED,
    PoolFull: ErrorCode.POOL_FULL,
    OutOfRange: ErrorCode.OUT_OF_RANGE,
    WrongState: ErrorCode.WRONG_STATE,
    RingRefused: ErrorCode.DEVICE_REFUSED,
    DeviceLost: ErrorCode.DEVICE_LOST,
}


def printable(text: str, max_chars: int) -> str:
    """A peer's words, so that they can neither steer a terminal nor begin a line of a log."""
    shown = text if len(text) <= max_chars else text[:max_chars] + "..."
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


class Refused(Exception):
    """A request that gets an ``ErrorReply``.

    Attributes:
        code: Reason for programs; the text is the one for people.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Refusals:
    """Makes error replies.

    Args:
        metrics: Where they are counted.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def of(self, request_id: int | None, error: Exception) -> ErrorReply:
        """The reply to a request that ended with an error.

        Args:
            request_id: Of the request; None when the frame could not be read.
            error: What it raised; what is no refusal is a failure of memd, and logged as one.
        """
        if isinstance(error, Refused):
            return self.make(request_id, error.code, str(error))
        code = _CODES.get(type(error))
        if code is None:
            _LOG.error("request %s failed", request_id, exc_info=error)
            return self.make(request_id, ErrorCode.INTERNAL, "memd failed; see its log")
        return self.make(request_id, code, str(error))

    def make(self, request_id: int | None, code: ErrorCode, message: str) -> ErrorReply:
        """A reply with this code and text."""
        errors = self._metrics.errors
        errors[code] += 1
        # A peer that repeats itself must not fill the disk: one line for each kind of error.
        message = printable(message, MAX_MESSAGE_CHARS)
        if errors[code] == 1:
            _LOG.warning("refused (%s, further ones are only counted): %s", code, message)
        return ErrorReply(request_id=request_id, code=code, message=message)
