"""How log records look on stderr: lines for people, or one JSON object a line.

A record's fields (``extra=`` at the call) are in JSON only; the text says the same in words.

===========  =======================================================================================
``time``     UTC, RFC 3339 with milliseconds
``level``    ``debug``, ``info``, ``warning``, ``error``, ``critical``
``logger``   module that speaks
``message``  the text
``pid``      this daemon's process id
``error``    traceback, where there is one
(others)     the record's fields, such as ``client_id``, ``client_pid``, ``region_bytes``
===========  =======================================================================================
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import TextIO

__all__ = ["LOG_FORMATS", "LOG_LEVELS", "JsonFormatter", "configure_logs"]

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")

_LOG = logging.getLogger(__name__)

_TEXT = "%(asctime)s memd[%(process)d] %(levelname)s %(message)s"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object without a line break."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        entry: dict[str, object] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
        }
        if record.exc_info is not None:
            entry["error"] = self.formatException(record.exc_info)
        fields = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        return json.dumps(entry | fields, default=str)


def configure_logs(level: str, log_format: str, *, stream: TextIO | None = None) -> None:
    """Send the log of this process to a stream.

    Args:
        level: Least level that is shown, one of ``LOG_LEVELS``.
        log_format: One of ``LOG_FORMATS``.
        stream: By default stderr.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if log_format == "json":
        # What Python would print itself is many lines, and none of them is an object.
        sys.excepthook = _log_uncaught
        threading.excepthook = lambda uncaught: _log_uncaught(
            uncaught.exc_type, uncaught.exc_value, uncaught.exc_traceback
        )


def _log_uncaught(
    kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None
) -> None:
    del traceback
    _LOG.critical("uncaught %s", kind.__name__, exc_info=error)
