"""Conducts a run of chaos and judges it.

A *survivor* daemon lives through the whole run and is only ever stopped for moments; a *mortal* one
is killed and started again at its address. Workers and vandals of both are killed, stopped and
replaced at random. All decisions come from one seed; the operating system's scheduling does not, so
a replay repeats the same assault, not the same microseconds.

What must hold, and how it is judged:

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

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.chaos.daemon import Daemon
from tests.chaos.processes import Child, Footprint
from tests.chaos.report import PRIVATE_GROWTH_BYTES, Calm, Report
from tests.chaos.reporting import LineReader

if TYPE_CHECKING:
    from tests.chaos.probe import Answer
    from tests.chaos.report import Plan

__all__ = ["Chaos"]

ANSWER_BOUND_S = 5.0
RECLAIM_BOUND_S = 5.0
SCRUB_BOUND_S = 5.0
PROGRESS_BOUND_S = 30.0
LEAVE_BOUND_S = 20.0

_TICK_S = 0.02
_ASK_EVERY_S = 0.05
_MAX_PAUSE_S = 1.2
_LINGER_S = 1.0


@dataclasses.dataclass
class _Actor:
    """A worker or a vandal.

    Attributes:
        name: For events.
        role: ``"worker"`` or ``"vandal"``.
        daemon: Whose client it is.
        child: The process.
        lines: What it says.
        awake_at: Last time when it said something, was started, or went on after a stop.
        killed_at: When it was killed on purpose.
        counts: Its last word on what it did.
    """

    name: str
    role: str
    daemon: Daemon
    child: Child
    lines: LineReader
    awake_at: float
    killed_at: float | None = None
    counts: dict[str, int] = dataclasses.field(default_factory=dict)


class Chaos:
    """One run; call ``run`` once.

    Args:
        plan: What to do.
        directory: Where sockets, outputs and logs go; short, because sockets lie in it.
    """

    def __init__(self, plan: Plan, directory: Path) -> None:
        self._plan = plan
        self._directory = directory
        self._rng = np.random.default_rng(plan.seed)
        self._report = Report(plan)
        self._actors: list[_Actor] = []
        self._num_started = 0
        # Processes that were killed and not yet seen to be gone from their daemon's stats.
        self._dying: dict[int, tuple[Daemon, float]] = {}
        # When memory that is still to be zeroed was first seen, by daemon.
        self._dirty_since: dict[str, float] = {}
        self._restart_at = math.inf
        self._is_calming = False

    def run(self) -> Report:
        """Do it all; children are gone afterwards, whatever happened."""
        plan = self._plan
        self._began_at = time.monotonic()
        end = self._began_at + plan.duration_s
        with contextlib.ExitStack() as stack:
            self._survivor, self._mortal = (
                stack.enter_context(
                    Daemon(self._directory, name, num_bytes=plan.region_bytes, prelude=plan.prelude)
                )
                for name in ("survivor", "mortal")
            )
            stack.callback(self._close_actors)
            next_calm = self._began_at + plan.warm_up_s
            next_action = time.monotonic()
            while time.monotonic() < end and not self._report.violations:
                if (now := time.monotonic()) >= next_action:
                    self._act()
                    next_action = now + self._rng.exponential(1 / plan.actions_per_s)
                self._tick()
                if now >= next_calm:
                    self._calm_down()
                    next_calm = time.monotonic() + plan.calm_every_s
            if not self._report.violations:
                self._calm_down()
            if not self._report.violations:
                self._end_daemons()
        for name in ("survivor", "mortal"):
            if (left := self._directory / name).exists():
                self._violate(f"{left} is still there")
        return self._report

    def _act(self) -> None:
        """One random fault."""
        actors = [actor for actor in self._actors if actor.killed_at is None]
        victim = actors[self._rng.integers(len(actors))] if actors else None
        daemon = self._survivor if self._rng.random() < 0.5 else self._mortal
        draw = self._rng.random()
        if draw < 0.40 and victim is not None:
            self._kill(victim)
        elif draw < 0.75 and victim is not None:
            if not victim.child.is_paused:
                self._tell("pause", name=victim.name, seconds=(seconds := self._pause_s()))
                victim.child.pause(seconds)
        elif draw < 0.85 and victim is not None:
            self._tell("ask to leave", name=victim.name)
            victim.child.ask_to_leave()
        elif draw < 0.95 and daemon.is_up:
            self._tell("pause", name=daemon.name, seconds=(seconds := self._pause_s()))
            daemon.pause(seconds)
        elif self._mortal.is_up:
            self._tell("kill", name=self._mortal.name)
            self._mortal.kill()
            # The next incarnation has never heard of them.
            self._dying = {pid: it for pid, it in self._dying.items() if it[0] is self._survivor}
            self._dirty_since.pop(self._mortal.name, None)
            self._restart_at = time.monotonic() + self._rng.uniform(0, 1.0)

    def _pause_s(self) -> float:
        return round(float(self._rng.uniform(0.02, _MAX_PAUSE_S)), 3)

    def _kill(self, actor: _Actor) -> None:
        self._tell("kill", name=actor.name, pid=actor.child.pid)
        actor.child.signal(signal.SIGKILL)
        actor.killed_at = time.monotonic()
        if actor.role == "worker":
            self._dying[actor.child.pid] = (actor.daemon, actor.killed_at)

    def _tick(self) -> None:
        """Everything that has to be looked at all the time."""
        now = time.monotonic()
        if now >= self._restart_at:
            self._restart_at = math.inf
            self._tell("start", name=self._mortal.name)
            self._mortal.restart()
        for daemon in (self._survivor, self._mortal):
            self._watch(daemon)
        for actor in list(self._actors):
            self._listen(actor)
        if not self._is_calming:
            self._recruit()
        time.sleep(_TICK_S)

    def _watch(self, daemon: Daemon) -> None:
        """A daemon runs, answers, and has nothing to hide."""
        daemon.notice_resume()
        if self._restart_at != math.inf and daemon is self._mortal:
            return
        if not daemon.is_ready():
            return
        if daemon.child.returncode is not None:
            self._violate(f"{daemon.name} ended with {daemon.child.returncode}:\n{_tail(daemon)}")
            return
        assert daemon.probe is not None
        for answer in daemon.probe.answers():
            self._judge(daemon, answer)
        now = time.monotonic()
        asked_at = daemon.probe.waiting_since
        if asked_at is None:
            if now - daemon.probe.asked_at > _ASK_EVERY_S:
                daemon.probe.ask()
        elif daemon.is_up and now - max(asked_at, daemon.awake_since) > ANSWER_BOUND_S:
            self._violate_silence(daemon)

    def _violate_silence(self, daemon: Daemon) -> None:
        daemon.show_stacks()
        what = f"{daemon.name} did not answer stats within {ANSWER_BOUND_S:g} s"
        self._violate(f"{what}:\n{_tail(daemon)}")

    def _judge(self, daemon: Daemon, answer: Answer) -> None:
        """One answer to ``stats``."""
        stats, now = answer.stats, answer.answered_at
        awake_since = daemon.awake_since
        if answer.asked_at > awake_since:
            self._report.answer_s.append(now - answer.asked_at)
        if stats["integrity"] != "ok":
            self._violate(f"{daemon.name}: integrity is {stats['integrity']}")
        if stats["errors"].get("internal"):
            self._violate(f"{daemon.name} failed inside:\n{_tail(daemon)}")
        pids = {client["pid"] for client in stats["clients"]}
        for pid, (of, killed_at) in list(self._dying.items()):
            if of is not daemon or answer.asked_at < killed_at:
                continue
            waited = now - max(killed_at, awake_since)
            if pid not in pids:
                del self._dying[pid]
                self._report.reclaim_s.append(max(0.0, waited))
            elif waited > RECLAIM_BOUND_S and daemon.is_up:
                self._violate(f"{daemon.name} still has the client of pid {pid}, dead {waited:g} s")
        if not stats["region"]["dirty_bytes"]:
            self._dirty_since.pop(daemon.name, None)
        dirty_since = max(self._dirty_since.setdefault(daemon.name, now), awake_since)
        if stats["region"]["dirty_bytes"] and now - dirty_since > SCRUB_BOUND_S:
            self._violate(f"{daemon.name} has had bytes to zero for {now - dirty_since:g} s")

    def _listen(self, actor: _Actor) -> None:
        """What an actor says, and whether it still runs as it should."""
        now = time.monotonic()
        returncode = actor.child.returncode
        if actor.child.is_paused:
            actor.awake_at = now
        for line in actor.lines.news():
            actor.awake_at = now
            actor.counts = line.pop("counts", actor.counts)
            if line["event"] != "progress":
                self._report.events.append(
                    {**line, "at": round(line["at"] - self._began_at, 3), "name": actor.name}
                )
            if line["event"] == "violation":
                self._violate(f"{actor.name}: {line['what']}")
            elif line["event"] == "lost":
                self._judge_loss(actor, line)
            elif line["event"] == "unanswered" and not _has_died(actor.daemon, line["since"]):
                self._violate(f"{actor.name}: {line['count']} frames got no answer")
        if returncode is not None:
            self._bury(actor, returncode)
        elif now - actor.awake_at > PROGRESS_BOUND_S:
            self._violate(f"{actor.name} made no step for {PROGRESS_BOUND_S:g} s")

    def _judge_loss(self, actor: _Actor, line: dict[str, Any]) -> None:
        """A client may lose memd only to what was done to memd."""
        reason, at, since = line["reason"], line["at"], line["since"]
        daemon, deadline_s = actor.daemon, line["deadline_s"]
        if reason in ("it has ended", "the connection to memd broke"):
            is_explained = _has_died(daemon, since)
        elif reason.startswith("memd did not answer"):
            # The impatient may also lose a memd that only had to wait for a processor.
            is_explained = deadline_s < 1.0 or any(
                outage.begin < at and outage.end > since for outage in daemon.outages
            )
        else:
            is_explained = False
        if not is_explained:
            self._violate(f"{actor.name} lost {daemon.name}, and nobody knows why: {reason}")

    def _bury(self, actor: _Actor, returncode: int) -> None:
        """An actor has ended; what it forked goes a moment later, so that memd must not need it."""
        now = time.monotonic()
        if actor.killed_at is None:
            if returncode != 0:
                log = actor.child.log.read_text()[-2000:]
                self._violate(f"{actor.name} ended with {returncode}:\n{log}")
            actor.killed_at = now
        if now - actor.killed_at > _LINGER_S:
            self._actors.remove(actor)
            actor.child.close()
            self._add_up(actor)

    def _add_up(self, actor: _Actor) -> None:
        for name, count in actor.counts.items():
            self._report.counts[f"{actor.role}: {name}"] += count

    def _recruit(self) -> None:
        """Replace who is gone, not always at once."""
        for daemon in (self._survivor, self._mortal):
            for role, wanted in (
                ("worker", self._plan.num_workers),
                ("vandal", self._plan.num_vandals),
            ):
                living = [
                    actor
                    for actor in self._actors
                    if actor.daemon is daemon and actor.role == role and actor.killed_at is None
                ]
                if len(living) < wanted and self._rng.random() < 0.2:
                    self._start(role, daemon)

    def _start(self, role: str, daemon: Daemon) -> None:
        self._num_started += 1
        name = f"{role} {self._num_started} of {daemon.name}"
        seed = int(self._rng.integers(2**63))
        out = self._directory / f"{self._num_started}.out"
        child = Child(
            [sys.executable, "-m", f"tests.chaos.{role}", daemon.address, str(seed)],
            out=out,
            log=self._directory / f"{self._num_started}.log",
        )
        self._actors.append(_Actor(name, role, daemon, child, LineReader(out), time.monotonic()))
        self._tell("start", name=name, pid=child.pid, seed=seed)

    def _calm_down(self) -> None:
        """Everybody leaves, the survivor is measured, and the storm may go on."""
        self._is_calming = True
        self._tell("calm")
        for actor in self._actors:
            actor.child.ask_to_leave()
        deadline = time.monotonic() + LEAVE_BOUND_S
        while self._actors and not self._report.violations:
            if time.monotonic() > deadline:
                names = [actor.name for actor in self._actors]
                self._violate(f"{names} did not leave within {LEAVE_BOUND_S:g} s")
            self._tick()
        if not self._report.violations:
            self._measure()
        self._is_calming = False

    def _measure(self) -> None:
        """The survivor's footprint, once it has let everybody go."""
        daemon = self._survivor
        deadline = time.monotonic() + RECLAIM_BOUND_S + SCRUB_BOUND_S
        previous: Footprint | None = None
        while True:
            self._tick()
            if self._report.violations or not daemon.is_up:
                return
            assert daemon.probe is not None
            answer = daemon.probe.wait(ANSWER_BOUND_S)
            if answer is None:
                self._violate_silence(daemon)
                return
            footprint = Footprint.of(daemon.child.pid)
            region = answer.stats["region"]
            is_free = region["free_bytes"] == region["bytes"] and not answer.stats["clients"]
            if is_free and previous is not None and footprint.num_fds == previous.num_fds:
                break
            previous = footprint
            if time.monotonic() > deadline:
                self._violate(f"{daemon.name} does not come to rest: {answer.stats}, {footprint}")
                return
        self._report.memd_errors = answer.stats["errors"]
        calm = Calm(
            at_s=round(time.monotonic() - self._began_at, 1),
            num_requests=sum(answer.stats["requests"].values())
            + sum(answer.stats["errors"].values()),
            footprint=footprint,
            socket_files=[path.name for path in daemon.socket_files()],
            shared_memory_names=_shared_memory_names(daemon.child.pid),
        )
        self._report.calms.append(calm)
        self._judge_calm(calm, self._report.calms[0])

    def _judge_calm(self, calm: Calm, first: Calm) -> None:
        for what in ("num_fds", "num_threads"):
            now, before = getattr(calm.footprint, what), getattr(first.footprint, what)
            if now != before:
                self._violate(f"{what} of the survivor was {before} and is {now}")
        if calm.socket_files != first.socket_files:
            self._violate(f"files were {first.socket_files} and are {calm.socket_files}")
        if calm.shared_memory_names:
            self._violate(f"names in /dev/shm: {calm.shared_memory_names}")
        growth = calm.footprint.private_bytes - first.footprint.private_bytes
        if growth > PRIVATE_GROWTH_BYTES:
            self._violate(f"the survivor's heap has grown by {growth} bytes")

    def _end_daemons(self) -> None:
        """SIGTERM ends a daemon with status 0, and nothing of it is left."""
        for daemon in (self._survivor, self._mortal):
            while not daemon.is_up:
                self._tick()
            if (status := daemon.end()) != 0:
                daemon.show_stacks()
                self._violate(f"{daemon.name} ended with {status} on SIGTERM:\n{_tail(daemon)}")
            if left := daemon.socket_files():
                self._violate(f"{daemon.name} left {left}")
            if "Traceback" in daemon.log:
                self._violate(f"{daemon.name} failed inside:\n{_tail(daemon)}")

    def _close_actors(self) -> None:
        for actor in self._actors:
            actor.child.close()
            self._add_up(actor)
        self._actors.clear()

    def _tell(self, event: str, **details: Any) -> None:
        at = round(time.monotonic() - self._began_at, 3)
        self._report.events.append({"event": event, "at": at, **details})

    def _violate(self, what: str) -> None:
        self._report.violations.append(what)
        self._tell("violation", what=what)


def _has_died(daemon: Daemon, since: float) -> bool:
    """Whether a daemon was dead at some time after ``since``."""
    return any(outage.is_death and outage.end >= since for outage in daemon.outages)


def _tail(daemon: Daemon) -> str:
    return daemon.log[-3000:]


def _shared_memory_names(pid: int) -> list[str]:
    """Entries of ``/dev/shm`` that a process has mapped or open."""
    proc = Path("/proc") / str(pid)
    mapped = [line.split()[-1] for line in (proc / "maps").read_text().splitlines()]
    opened = []
    for link in (proc / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            opened.append(os.readlink(link))
    return sorted({name for name in mapped + opened if name.startswith("/dev/shm/")})
