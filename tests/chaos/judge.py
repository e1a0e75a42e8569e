"""What must hold in a run of chaos, and whether it did.

============================================  ====================================================
promise (docs/memd.md)                        judged by
============================================  ====================================================
no wrong byte, ever                           workers compare whole rows
nobody reads another's rows                   workers find new extents all zero
a dead client's pages come back "at once"     gone from ``stats`` in ``RECLAIM_BOUND_S``, all of
                                              its bytes zeroed in another ``SCRUB_BOUND_S``
memd answers, its books hold                  ``stats`` with integrity ok in ``ANSWER_BOUND_S``
only a stop or an end loses memd              every loss that a worker reports
every frame gets one reply                    vandals count
nothing blocks, nothing hangs                 every process makes a step in ``PROGRESS_BOUND_S``
nothing leaks                                 the survivor's footprint whenever it has no client
memd never fails inside                       no ``internal`` error, no traceback in its log
nothing is left                               sockets and directories after SIGTERM, status 0
============================================  ====================================================

Bounds count from the end of a stop or a restart. They are wide because the machine may be busy; the
report has the times that were measured.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tests.chaos.report import PRIVATE_GROWTH_BYTES

if TYPE_CHECKING:
    from tests.chaos.daemon import Daemon
    from tests.chaos.probe import Answer
    from tests.chaos.report import Calm, Report

__all__ = [
    "ANSWER_BOUND_S",
    "PROGRESS_BOUND_S",
    "RECLAIM_BOUND_S",
    "SCRUB_BOUND_S",
    "Judge",
]

ANSWER_BOUND_S = 5.0
RECLAIM_BOUND_S = 5.0
SCRUB_BOUND_S = 5.0
PROGRESS_BOUND_S = 30.0


class Judge:
    """Compares what happens with what must; writes violations into a report.

    Args:
        report: Of the run.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        # Killed clients that were not yet seen to be gone from their daemon's stats.
        self._dying: dict[int, tuple[Daemon, float]] = {}
        # Since when a daemon has had memory to zero.
        self._dirty_since: dict[str, float] = {}

    def client_died(self, daemon: Daemon, pid: int) -> None:
        """A worker was killed; from now on memd has to let it go."""
        self._dying[pid] = (daemon, time.monotonic())

    def daemon_died(self, daemon: Daemon) -> None:
        """A daemon was killed; its next incarnation has never heard of anybody."""
        self._dying = {pid: it for pid, it in self._dying.items() if it[0] is not daemon}
        self._dirty_since.pop(daemon.name, None)

    def silence(self, daemon: Daemon) -> None:
        """Whether a daemon that is up has been silent for too long."""
        assert daemon.probe is not None
        asked_at = daemon.probe.waiting_since
        if asked_at is None or not daemon.is_up:
            return
        waited = time.monotonic() - max(asked_at, daemon.awake_since)
        if waited > ANSWER_BOUND_S:
            stacks = daemon.child.show_stacks()
            self.violate(f"{daemon.name} did not answer stats for {waited:.1f} s:\n{stacks}")

    def answer(self, daemon: Daemon, answer: Answer) -> None:
        """One answer to ``stats``."""
        stats, now, awake_since = answer.stats, answer.answered_at, daemon.awake_since
        if answer.asked_at > awake_since:
            self._report.answer_s.append(now - answer.asked_at)
        if stats["integrity"] != "ok":
            self.violate(f"{daemon.name}: integrity is {stats['integrity']}")
        if stats["errors"].get("internal"):
            self.violate(f"{daemon.name} failed inside:\n{daemon.log_tail}")
        pids = {client["pid"] for client in stats["clients"]}
        for pid, (of, died_at) in list(self._dying.items()):
            if of is not daemon or answer.asked_at < died_at:
                continue
            waited = max(0.0, now - max(died_at, awake_since))
            if pid not in pids:
                del self._dying[pid]
                self._report.reclaim_s.append(waited)
            elif waited > RECLAIM_BOUND_S and daemon.is_up:
                self.violate(f"{daemon.name} still has the client of pid {pid}, dead {waited:g} s")
        if not stats["region"]["dirty_bytes"]:
            self._dirty_since.pop(daemon.name, None)
            return
        waited = now - max(self._dirty_since.setdefault(daemon.name, now), awake_since)
        if waited > SCRUB_BOUND_S:
            self.violate(f"{daemon.name} has had bytes to zero for {waited:g} s")

    def line(self, name: str, daemon: Daemon, line: dict[str, Any]) -> None:
        """One thing that a worker or a vandal said."""
        if line["event"] == "violation":
            self.violate(f"{name}: {line['what']}")
        elif line["event"] == "lost":
            self._loss(name, daemon, line)
        elif line["event"] == "unanswered" and not daemon.was_dead(line["since"]):
            self.violate(f"{name}: {line['count']} frames got no answer")

    def calm(self, calm: Calm) -> None:
        """The survivor without a client, compared with the first time."""
        self._report.calms.append(calm)
        first = self._report.calms[0]
        for what in ("num_fds", "num_threads"):
            now, before = getattr(calm.footprint, what), getattr(first.footprint, what)
            if now != before:
                self.violate(f"{what} of the survivor was {before} and is {now}")
        if calm.socket_files != first.socket_files:
            self.violate(f"files were {first.socket_files} and are {calm.socket_files}")
        if calm.shared_memory_names:
            self.violate(f"names in /dev/shm: {calm.shared_memory_names}")
        growth = calm.own_private_bytes - first.own_private_bytes
        if growth > PRIVATE_GROWTH_BYTES:
            self.violate(f"the survivor's heap has grown by {growth} bytes")

    def end(self, daemon: Daemon, status: int | None) -> None:
        """A daemon after SIGTERM."""
        if status != 0:
            stacks = daemon.child.show_stacks()
            self.violate(f"{daemon.name} ended with {status} on SIGTERM:\n{stacks}")
        if left := daemon.socket_files():
            self.violate(f"{daemon.name} left {left}")
        if "Traceback" in daemon.log:
            self.violate(f"{daemon.name} failed inside:\n{daemon.log_tail}")

    def violate(self, what: str) -> None:
        """Something does not hold."""
        self._report.violations.append(what)
        self._report.tell("violation", what=what)

    def _loss(self, name: str, daemon: Daemon, line: dict[str, Any]) -> None:
        """A client may lose memd only to what was done to memd."""
        reason, at, since = line["reason"], line["at"], line["since"]
        if reason in ("it has ended", "the connection to memd broke"):
            is_explained = daemon.was_dead(since)
        elif reason.startswith("memd did not answer"):
            # The impatient may also lose a memd that only had to wait for a processor.
            is_explained = line["deadline_s"] < 1.0 or any(
                outage.begin < at and outage.end > since for outage in daemon.outages
            )
        else:
            is_explained = False
        if not is_explained:
            self.violate(f"{name} lost {daemon.name}, and nobody knows why: {reason}")
