"""Exceptions of memd, for the daemon and for its clients.

Tree::

    MemdError
    ├── ConfigError       a setting, an address or the host's memory does not allow a start
    ├── MemdUnavailable   nobody answers at the address, or the daemon is gone
    │   └── MemdTimeout   somebody is there but did not answer within the deadline
    ├── PoolFull          the region has no room for what was asked
    ├── ProtocolError     the two sides disagree on version, layout or the form of a message
    └── IntegrityError    a bookkeeping invariant does not hold (a bug, never a user's mistake)

Outcomes that a caller has to expect in normal operation (a full pool at ``reserve``, a full landing
ring at ``fetch``) are values, not exceptions.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "IntegrityError",
    "MemdError",
    "MemdTimeout",
    "MemdUnavailable",
    "PoolFull",
    "ProtocolError",
]


class MemdError(Exception):
    """Base of everything that memd raises on purpose."""


class ConfigError(MemdError):
    """A setting is out of range or does not fit this host; the message says what would."""


class MemdUnavailable(MemdError):
    """No daemon can be reached at the address, or it ended."""


class MemdTimeout(MemdUnavailable):
    """The daemon did not answer within the deadline."""


class PoolFull(MemdError):
    """The region has no contiguous room of the asked size; the message says what is free."""


class ProtocolError(MemdError):
    """Version, layout or form of a message does not match on the two sides."""


class IntegrityError(MemdError):
    """A bookkeeping invariant is broken; only ``check_integrity`` raises it."""
