"""Where pages are written and read: a thread of its own, so that nobody else waits for a disk.

The control thread hands over a job, is woken when it is done, and does the books. Jobs run one
after the other in the order in which they came.

A disk that never answers keeps the thread, and whoever waits for its pages, but not the daemon.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Job", "Running", "ThreadRunner", "run_at_once"]

_LOG = logging.getLogger(__name__)


class Job(Protocol):
    """Work that touches nothing of which the control thread keeps a book."""

    def run(self) -> None:
        """Do it; what goes wrong is kept in the job."""
        ...


class Running:
    """A job that was handed over.

    Attributes:
        job: It.
        is_done: Whether it has run.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.is_done = False

    def run(self) -> None:
        """Run the job; an error that it did not expect leaves it as one that has not run."""
        try:
            self.job.run()
        except Exception:
            _LOG.exception("moving a page failed")
        finally:
            # The last thing, and a single write: whoever sees it may look at the job.
            self.is_done = True


def run_at_once(job: Job) -> Running:
    """Run a job in the caller's thread."""
    running = Running(job)
    running.run()
    return running


class ThreadRunner:
    """Runs jobs on one thread; a context manager, which ends it.

    Args:
        notify: Called from that thread when a job is done; must not block.
        end_wait_s: How long ending waits for a job that is running, in seconds.
    """

    def __init__(self, notify: Callable[[], None], *, end_wait_s: float = 2.0) -> None:
        self._notify = notify
        self._end_wait_s = end_wait_s
        self._jobs: queue.SimpleQueue[Running | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ThreadRunner:
        """The runner, with its thread."""
        # A daemon thread: one that waits for a dead disk must not keep the process.
        self._thread = threading.Thread(target=self._work, name="memd-disk", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the runner."""
        self.close()

    def __call__(self, job: Job) -> Running:
        """Have a job run; returns at once."""
        running = Running(job)
        self._jobs.put(running)
        return running

    def close(self) -> bool:
        """End the thread after the jobs that it has; idempotent.

        Returns:
            Whether it has ended within the bound. If not, what its job reads and writes must stay.
        """
        if self._thread is None:
            return True
        self._jobs.put(None)
        self._thread.join(self._end_wait_s)
        if self._thread.is_alive():
            _LOG.error("the disk did not answer in %g s", self._end_wait_s)
            return False
        self._thread = None
        return True

    def _work(self) -> None:
        while (running := self._jobs.get()) is not None:
            running.run()
            self._notify()
