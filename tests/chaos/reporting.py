"""What a child of the harness says: one JSON map a line on its standard output."""

from __future__ import annotations

import collections
import faulthandler
import json
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["LineReader", "Orders", "Progress", "say"]

_TELL_EVERY_S = 0.5


def say(event: str, **details: Any) -> None:
    """Tell the conductor; a line is written in one go, so a killed child leaves no mixed ones."""
    line = json.dumps({"event": event, "at": time.monotonic(), **details}) + "\n"
    os.write(1, line.encode())


class Orders:
    """What the conductor wants: the end of standard input means to leave politely.

    It also comes when the conductor is gone, and cannot be missed by a child that is just starting.
    SIGUSR1 makes the child write to its log what it is doing.
    """

    def __init__(self) -> None:
        faulthandler.register(signal.SIGUSR1)

    @property
    def is_leaving(self) -> bool:
        """Whether to leave."""
        return bool(select.select([0], [], [], 0)[0])


class Progress:
    """Tells every now and then that work goes on, and how much was done.

    Attributes:
        counts: What was done so far.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._told_at = 0.0

    def tell(self) -> bool:
        """Say it if it was long ago; whether it was said."""
        now = time.monotonic()
        if now - self._told_at < _TELL_EVERY_S:
            return False
        self._told_at = now
        say("progress", counts=self.counts)
        return True


class LineReader:
    """Reads the lines of a growing file, each once.

    Args:
        path: The file; it exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def news(self) -> list[dict[str, Any]]:
        """The complete lines since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [json.loads(line) for line in complete.splitlines()]
