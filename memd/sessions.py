"""Who is who: processes, their connections, and what those have that are registered.

A session begins when a process attaches and ends with it; its token is what ties a ZeroMQ
connection to it. A connection is *greeting* while its ``Hello`` waits.
"""

from __future__ import annotations

import dataclasses
import secrets
from typing import TYPE_CHECKING

from memd.protocol import SESSION_BYTES, ErrorCode
from memd.refusals import Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from memd.rings import ClientRing
    from memd.store import ClientRecord
    from memd.tiers import ClientTier

__all__ = ["Client", "Session", "Sessions"]


@dataclasses.dataclass(frozen=True, eq=False)
class Client:
    """What a registered process has.

    Attributes:
        record: Its registration.
        tier: Where its pages are; None if all of them are in memory.
        ring: Where its fetched rows go; None if that is its extent's landing ring.
    """

    record: ClientRecord
    tier: ClientTier | None = None
    ring: ClientRing | None = None

    @property
    def landing_rows(self) -> int:
        """Rows of its landing ring, wherever that is."""
        return self.record.landing_rows if self.ring is None else self.ring.num_rows

    @property
    def data_path(self) -> str:
        """What ``HelloReply`` calls the way of its rows."""
        return "host" if self.ring is None else "cuda_ipc"

    @property
    def log_fields(self) -> dict[str, object]:
        """Its fields in the log."""
        record = self.record
        return {"client_id": record.client_id, "client_pid": record.pid, "client_name": record.name}


@dataclasses.dataclass(eq=False)
class Session:
    """A process on the attach socket.

    Attributes:
        pid: As the kernel reported it.
        connection: ZeroMQ routing id that said ``Hello``, None before.
        client: What it has, None before ``Hello`` is answered and after ``Goodbye``.
        is_greeting: Whether its ``Hello`` waits.
        heard_at: When it asked for something last, seconds of the clock.
    """

    pid: int
    connection: bytes | None = None
    client: Client | None = None
    is_greeting: bool = False
    heard_at: float = 0.0


class Sessions:
    """All sessions.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._by_token: dict[bytes, Session] = {}
        # By ZeroMQ routing id; those that are registered or greeting.
        self._by_connection: dict[bytes, Session] = {}

    def __len__(self) -> int:
        """Processes that are attached."""
        return len(self._by_token)

    def open(self, pid: int) -> bytes:
        """A new session; its token."""
        token = secrets.token_bytes(SESSION_BYTES)
        self._by_token[token] = Session(pid)
        return token

    def close(self, token: bytes) -> Session:
        """Forget a session, whose connection may go on until `leave`."""
        return self._by_token.pop(token)

    def find(self, token: bytes) -> Session | None:
        """The session of a token; None if no attached process holds it."""
        return self._by_token.get(token)

    def at(self, connection: bytes) -> Session | None:
        """The session of a connection that is registered or greeting."""
        return self._by_connection.get(connection)

    def is_greeting(self, connection: bytes) -> bool:
        """Whether a connection's ``Hello`` waits."""
        session = self._by_connection.get(connection)
        return session is not None and session.is_greeting

    def greet(self, session: Session, connection: bytes) -> None:
        """Tie a connection to a session: nobody else may say Hello for it, and it for no other."""
        session.connection = connection
        session.is_greeting = True
        self._by_connection[connection] = session

    def dismiss(self, session: Session) -> None:
        """Take `greet` back, so that the same process may say Hello again."""
        connection, session.connection = session.connection, None
        session.is_greeting = False
        if connection is not None:
            del self._by_connection[connection]

    def welcome(self, session: Session, client: Client) -> None:
        """Register a process that was greeting."""
        session.client = client
        session.is_greeting = False
        session.heard_at = self._clock()

    def leave(self, connection: bytes) -> None:
        """Forget a connection; its session says no Hello any more."""
        session = self._by_connection.pop(connection)
        session.client = None
        session.is_greeting = False

    def client(self, connection: bytes) -> Client:
        """What the process behind a connection has; it was heard now.

        Raises:
            Refused: It is not registered.
        """
        session = self._by_connection.get(connection)
        if session is None or session.client is None:
            raise Refused(
                ErrorCode.NOT_REGISTERED, "this connection holds no extent; say Hello first"
            )
        session.heard_at = self._clock()
        return session.client

    def registered(self) -> list[tuple[Session, Client]]:
        """Those that are, with what they have; in the order of their registration."""
        return sorted(
            (
                (session, session.client)
                for session in self._by_connection.values()
                if session.client is not None
            ),
            key=lambda pair: pair[1].record.client_id,
        )
