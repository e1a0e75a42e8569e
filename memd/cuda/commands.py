"""What the control thread and a device's worker say to each other: plain values, no handles.

A command has the outcomes that are named with it; they come in the order in which things happened.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memd.cuda.ring import RingHandle

__all__ = [
    "Close",
    "Closed",
    "Command",
    "Idle",
    "Landed",
    "Lost",
    "Open",
    "Opened",
    "Outcome",
    "Refused",
    "Send",
    "Stop",
]


@dataclasses.dataclass(frozen=True)
class Open:
    """Map a client's ring: `Opened` or `Refused`."""

    client_id: int
    handle: RingHandle


@dataclasses.dataclass(frozen=True)
class Send:
    """Copy staging bytes into a client's ring: `Landed`.

    Attributes:
        client_id: Whose ring.
        copy_id: What `Landed` is to say.
        staging_offset: First byte, counted from the start of the staging memory.
        ring_offset: Where they go.
        num_bytes: How many.
    """

    client_id: int
    copy_id: int
    staging_offset: int
    ring_offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Close:
    """Unmap a client's ring, or one that was refused, when its copies have landed: `Closed`."""

    client_id: int


@dataclasses.dataclass(frozen=True)
class Stop:
    """End the thread; no ring is open."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A ring can be sent to."""

    client_id: int


@dataclasses.dataclass(frozen=True)
class Refused:
    """A ring was not opened, and nothing is left of the attempt."""

    client_id: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Landed:
    """A copy is done: the device neither reads its source nor writes its target any more."""

    copy_id: int


@dataclasses.dataclass(frozen=True)
class Closed:
    """A ring is unmapped; its owner may free it."""

    client_id: int


@dataclasses.dataclass(frozen=True)
class Idle:
    """No ring is open, and nothing is held of the device or of the staging memory any more."""


@dataclasses.dataclass(frozen=True)
class Lost:
    """The device failed and is given up; nothing follows."""

    reason: str


Command = Open | Send | Close | Stop
Outcome = Opened | Refused | Landed | Closed | Idle | Lost
