"""Fetches in turn: whose rows are copied next, and when a fetch may be answered; no sockets here.

The control thread copies too, in pieces of at most a quantum, and looks after its sockets between
two pieces. So nothing needs a lock, one client's large fetch delays another's small one by a
quantum and not by its whole length, and a message is handled in the meantime.

Clients share the copying by deficit round robin: each in turn may copy a quantum of bytes, and what
it could not use for want of room for a whole row it may use in its next turn. A client's own
fetches are copied in the order in which they came.

Source: M. Shreedhar, G. Varghese, Efficient Fair Queuing using Deficit Round Robin (1995).
"""

from __future__ import annotations

import dataclasses
import heapq
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Protocol

from memd.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from memd.transfer import Transfer

__all__ = ["CopyJob", "CopyQueue", "Delay", "NoDelay"]

QUANTUM_BYTES = 4 << 20
"""Copied in 0.2 to 0.5 ms on a common host: what a message may have to wait for."""


class Delay(Protocol):
    """An interconnect that copies are held back by."""

    def finish_time(self, num_bytes: int) -> float:
        """When a transfer of this size, begun now, is at the other side; seconds of the clock."""


class NoDelay:
    """Copies count as soon as they are done."""

    def finish_time(self, num_bytes: int) -> float:
        """Long ago."""
        del num_bytes
        return float("-inf")


@dataclasses.dataclass(eq=False)
class CopyJob:
    """Rows of one fetch on their way into a landing ring.

    Attributes:
        client_id: Whose.
        source_offset: Where row 0 begins, bytes from the region's start.
        row_bytes: Bytes of a row.
        rows: Row indices, int64 [num_rows], checked by the service.
        landing_offset: Where the first copied row goes.
        num_done: Rows copied so far.
        copy_ns: Time spent copying them.
        due: When it may be answered; set once all rows are copied.
    """

    client_id: int
    source_offset: int
    row_bytes: int
    rows: npt.NDArray[np.int64]
    landing_offset: int
    num_done: int = 0
    copy_ns: int = 0
    due: float = float("inf")

    @property
    def num_bytes(self) -> int:
        """Payload of the whole fetch."""
        return len(self.rows) * self.row_bytes


@dataclasses.dataclass
class _Turn:
    """What one client waits for."""

    jobs: deque[CopyJob] = dataclasses.field(default_factory=deque)
    deficit: int = 0


class CopyQueue:
    """All fetches that are being copied or held back.

    Args:
        transfer: Does the copying.
        delay: Interconnect to imitate.
        quantum_bytes: Bytes that a client copies in one turn, at least 1; a row is never cut, so a
            turn may take a row's bytes more time to come.
        clock: Monotonic seconds; the same as the delay's.
    """

    def __init__(
        self,
        transfer: Transfer,
        *,
        delay: Delay | None = None,
        quantum_bytes: int = QUANTUM_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if quantum_bytes < 1:
            raise ValueError(f"quantum_bytes must be at least 1, got {quantum_bytes}")
        self._transfer = transfer
        self._delay = delay or NoDelay()
        self._is_undelayed = delay is None
        self._quantum = quantum_bytes
        self._clock = clock
        # First the client whose turn it is; none without work.
        self._turns: OrderedDict[int, _Turn] = OrderedDict()
        # (due, order of completion, job): copied, but not yet at the other side.
        self._held_back: list[tuple[float, int, CopyJob]] = []
        self._num_copied = 0
        # Not answered, by client; those without any are absent.
        self._num_jobs: dict[int, int] = {}

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to copy (something may be held back)."""
        return not self._turns

    def is_immediate(self, job: CopyJob) -> bool:
        """Whether a fetch waits for nobody and fits one turn, so that `copy_now` may do it."""
        return not self._num_jobs and self._is_undelayed and job.num_bytes <= self._quantum

    def copy_now(self, job: CopyJob) -> None:
        """Copies a fetch that is never submitted; what the transfer raises is passed on."""
        self._copy(job, len(job.rows))

    @property
    def num_jobs(self) -> int:
        """Fetches that are not answered yet."""
        return sum(self._num_jobs.values())

    def num_jobs_of(self, client_id: int) -> int:
        """A client's fetches that are not answered yet."""
        return self._num_jobs.get(client_id, 0)

    def pending_bytes(self, client_id: int) -> int:
        """Bytes of a client's fetches that are still to be copied."""
        turn = self._turns.get(client_id)
        if turn is None:
            return 0
        return sum((len(job.rows) - job.num_done) * job.row_bytes for job in turn.jobs)

    def submit(self, job: CopyJob) -> None:
        """Adds a fetch behind its client's others."""
        self._turns.setdefault(job.client_id, _Turn()).jobs.append(job)
        self._num_jobs[job.client_id] = self._num_jobs.get(job.client_id, 0) + 1

    def step(self) -> None:
        """Copies for one client's turn; does nothing when idle.

        What the transfer raises is passed on; then `drop_current` is to be called.
        """
        if not self._turns:
            return
        client_id, turn = next(iter(self._turns.items()))
        turn.deficit += self._quantum
        while turn.jobs:
            job = turn.jobs[0]
            left = len(job.rows) - job.num_done
            count = min(left, turn.deficit // job.row_bytes) if left else 0
            if left and not count:
                break
            self._copy(job, count)
            turn.deficit -= count * job.row_bytes
            if job.num_done == len(job.rows):
                turn.jobs.popleft()
                self._hold_back(job)
        if turn.jobs:
            self._turns.move_to_end(client_id)
        else:
            # What an idle client did not use is gone: no credit is saved for later.
            del self._turns[client_id]

    def drop_current(self) -> CopyJob:
        """Forgets the fetch that `step` failed in, so that the others go on.

        Returns:
            That fetch.
        """
        client_id, turn = next(iter(self._turns.items()))
        job = turn.jobs.popleft()
        if not turn.jobs:
            del self._turns[client_id]
        self._forget(job)
        return job

    def take_finished(self) -> list[CopyJob]:
        """Fetches that may be answered now, in the order in which they arrived; forgets them."""
        finished = []
        now = self._clock()
        while self._held_back and self._held_back[0][0] <= now:
            job = heapq.heappop(self._held_back)[2]
            finished.append(job)
            self._forget(job)
        return finished

    def next_due(self) -> float | None:
        """When the next fetch that is held back may be answered; None if there is none."""
        return self._held_back[0][0] if self._held_back else None

    def cancel(self, client_id: int) -> list[CopyJob]:
        """Forgets all fetches of a client; none of its rows is written after this.

        Returns:
            The fetches that were not answered, in the order in which they came.
        """
        self._num_jobs.pop(client_id, None)
        held_back = [entry for entry in self._held_back if entry[2].client_id == client_id]
        self._held_back = [entry for entry in self._held_back if entry[2].client_id != client_id]
        heapq.heapify(self._held_back)
        turn = self._turns.pop(client_id, _Turn())
        return [*(job for *_, job in sorted(held_back)), *turn.jobs]

    def check_integrity(self) -> None:
        """Verifies that every waiting client has work and every fetch is where it belongs.

        Raises:
            IntegrityError: Something does not hold.
        """
        found: dict[int, int] = {}
        for job in (
            *(job for turn in self._turns.values() for job in turn.jobs),
            *(job for *_, job in self._held_back),
        ):
            found[job.client_id] = found.get(job.client_id, 0) + 1
        if found != self._num_jobs:
            raise IntegrityError(f"fetches by client are {found}, counted {self._num_jobs}")
        for client_id, turn in self._turns.items():
            if not turn.jobs:
                raise IntegrityError(f"client {client_id} waits for nothing")
            if turn.deficit < 0:
                raise IntegrityError(f"client {client_id} copied {-turn.deficit} bytes too many")
            for job in turn.jobs:
                if job.client_id != client_id:
                    raise IntegrityError(f"client {client_id} waits for client {job.client_id}'s")
            if any(job.num_done for job in list(turn.jobs)[1:]):
                raise IntegrityError(f"client {client_id}'s fetches are copied out of order")
        for _, _, job in self._held_back:
            if job.num_done != len(job.rows):
                raise IntegrityError(f"client {job.client_id} has a fetch held back half copied")

    def _forget(self, job: CopyJob) -> None:
        self._num_jobs[job.client_id] -= 1
        if not self._num_jobs[job.client_id]:
            del self._num_jobs[job.client_id]

    def _copy(self, job: CopyJob, count: int) -> None:
        if not count:
            return
        begin = time.perf_counter_ns()
        self._transfer.gather(
            source_offset=job.source_offset,
            row_bytes=job.row_bytes,
            rows=job.rows[job.num_done : job.num_done + count],
            landing_offset=job.landing_offset + job.num_done * job.row_bytes,
        )
        job.copy_ns += time.perf_counter_ns() - begin
        job.num_done += count

    def _hold_back(self, job: CopyJob) -> None:
        job.due = self._delay.finish_time(job.num_bytes)
        self._num_copied += 1
        heapq.heappush(self._held_back, (job.due, self._num_copied, job))
