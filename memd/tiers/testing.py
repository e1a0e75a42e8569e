"""A file that errs as it is told, for tests of the disk tier."""

from __future__ import annotations

import collections
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FakeFile"]


class FakeFile:
    """Memory in place of a disk; a ``TierFile``.

    Args:
        num_bytes: Size.

    Attributes:
        data: Its bytes, to be looked at and spoilt.
        write_errors: ``errno`` numbers that the next writes fail with, first one first.
        read_errors: The same for reads.
        num_writes_to_lose: Next writes that say they are done, and are not.
        most_bytes: Bytes that one call moves at most; None for all.
        is_closed: Whether it was closed.
    """

    def __init__(self, num_bytes: int) -> None:
        self.data = bytearray(num_bytes)
        self.write_errors: collections.deque[int] = collections.deque()
        self.read_errors: collections.deque[int] = collections.deque()
        self.num_writes_to_lose = 0
        self.most_bytes: int | None = None
        self.is_closed = False

    def pwritev(self, parts: Sequence[memoryview], offset: int) -> int:
        """Write, or fail; see ``TierFile.pwritev``."""
        if self.write_errors:
            raise _os_error(self.write_errors.popleft())
        content = b"".join(parts)[: self.most_bytes]
        content = content[: max(0, len(self.data) - offset)]
        if self.num_writes_to_lose:
            self.num_writes_to_lose -= 1
        else:
            self.data[offset : offset + len(content)] = content
        return len(content)

    def preadv(self, parts: Sequence[memoryview], offset: int) -> int:
        """Read, or fail; see ``TierFile.preadv``."""
        if self.read_errors:
            raise _os_error(self.read_errors.popleft())
        num_left = len(self.data) - offset
        if self.most_bytes is not None:
            num_left = min(num_left, self.most_bytes)
        num_read = 0
        for part in parts:
            length = min(part.nbytes, num_left - num_read)
            if length <= 0:
                break
            start = offset + num_read
            part[:length] = self.data[start : start + length]
            num_read += length
        return num_read

    def close(self) -> None:
        """Close; see ``TierFile.close``."""
        self.is_closed = True


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
