"""Conducts a run of chaos.

A *survivor* daemon lives through the whole run and is only ever stopped for moments; a *mortal* one
is killed and started again at its address. Workers and vandals of both are killed, stopped and
replaced at random. ``tests.chaos.judge`` says what must hold.

The seed decides which fault comes when, and what each process does. The scheduling of the operating
system it does not decide: a replay repeats the assault, not the microseconds.
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
from tests.chaos.judge import (
    ANSWER_BOUND_S,
    PROGRESS_BOUND_S,
    RECLAIM_BOUND_S,
    SCRUB_BOUND_S,
    Judge,
)
from tests.chaos.processes import Child, Footprint
from tests.chaos.report import Calm, Report
from tests.chaos.reporting import LineReader

if TYPE_CHECKING:
    from tests.chaos.report import Plan

__all__ = ["Chaos"]

_TICK_S = 0.02
_ASK_EVERY_S = 0.05
_LINGER_S = 1.0
_LEAVE_BOUND_S = 20.0
# How long nothing changes in a daemon at rest, and how long it may take to be as it was at first.
_SETTLED_S = 0.3
_SETTLING_BOUND_S = 3.0
_MEAN_VACANCY_S = 0.1
_MAX_PAUSE_S = 1.2
_MAX_DEATH_S = 1.0

# Kinds of faults and how often they are, on the whole; those that find no victim do nothing.
_FAULTS = {
    "kill a process": 0.35,
    "pause a process": 0.27,
    "ask to leave": 0.10,
    "pause a daemon": 0.10,
    "kill a daemon": 0.05,
    "spoil a disk": 0.12,
    "cut a disk": 0.01,
}


@dataclasses.dataclass(frozen=True)
class _Fault:
    """What is done next; all of it is drawn at once, so that it depends on the seed alone.

    Attributes:
        at: Monotonic seconds.
        kind: A key of ``_FAULTS``.
        victim: Picks one of those that there are then, in [0, 1).
        strength: How long it lasts, in [0, 1).
    """

    at: float
    kind: str
    victim: float
    strength: float


@dataclasses.dataclass
class _Actor:
    """A worker or a vandal.

    Attributes:
        name: For events.
        role: ``"worker"`` or ``"vandal"``.
        daemon: Whose client it is.
        child: The process.
        lines: What it says.
        awake_at: Last time when it said something, was started, or was seen stopped.
        ended_at: When it was killed on purpose, or was seen to have ended.
        counts: Its last word on what it did.
    """

    name: str
    role: str
    daemon: Daemon
    child: Child
    lines: LineReader
    awake_at: float
    ended_at: float | None = None
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
        faults, starts = np.random.SeedSequence(plan.seed).spawn(2)
        self._fault_rng = np.random.default_rng(faults)
        self._start_rng = np.random.default_rng(starts)
        self._report = Report(plan)
        self._judge = Judge(self._report)
        self._actors: list[_Actor] = []
        self._num_started = 0
        # When a vacancy is filled, by daemon and role.
        self._vacancies: dict[tuple[str, str], float] = {}
        self._restart_at = math.inf
        # When the first worker since the last calm had a client.
        self._busy_since: float | None = None

    def run(self) -> Report:
        """Do it all; children are gone afterwards, whatever happened."""
        with contextlib.ExitStack() as stack:
            self._survivor, self._mortal = self._daemons = [
                stack.enter_context(self._daemon(name)) for name in ("survivor", "mortal")
            ]
            stack.callback(self._close_actors)
            self._storm()
            if not self._report.violations:
                self._calm_down()
            if not self._report.violations:
                self._end_daemons()
        for daemon in self._daemons:
            if daemon.sockets.exists():
                self._judge.violate(f"{daemon.sockets} is still there")
        return self._report

    def _daemon(self, name: str) -> Daemon:
        plan = self._plan
        return Daemon(
            self._directory,
            name,
            num_bytes=plan.region_bytes,
            disk_bytes=plan.disk_bytes,
            prelude=plan.prelude,
        )

    def _storm(self) -> None:
        """Faults and calms until the time is over or something does not hold."""
        begin = time.monotonic()
        end, calm_after_s = begin + self._plan.duration_s, self._plan.warm_up_s
        fault = self._next_fault(begin)
        while (now := time.monotonic()) < end and not self._report.violations:
            if now >= fault.at:
                self._do(fault)
                fault = self._next_fault(fault.at)
            self._recruit(now)
            self._tick()
            # A slow machine needs seconds to start a worker: they are not counted.
            if self._busy_since is not None and now >= self._busy_since + calm_after_s:
                self._calm_down()
                calm_after_s, self._busy_since = self._plan.calm_every_s, None
                # Nor are faults due for the time that this one took.
                fault = dataclasses.replace(fault, at=fault.at + time.monotonic() - now)

    def _next_fault(self, previous_at: float) -> _Fault:
        rng = self._fault_rng
        return _Fault(
            at=previous_at + rng.exponential(1 / self._plan.faults_per_s),
            kind=str(rng.choice(list(_FAULTS), p=list(_FAULTS.values()))),
            victim=rng.random(),
            strength=rng.random(),
        )

    def _do(self, fault: _Fault) -> None:
        actors = [actor for actor in self._actors if actor.ended_at is None]
        actor = actors[int(fault.victim * len(actors))] if actors else None
        daemon = self._daemons[int(fault.victim * len(self._daemons))]
        pause_s = round(fault.strength * _MAX_PAUSE_S + _TICK_S, 3)
        if fault.kind == "kill a process" and actor is not None:
            self._report.tell("kill", name=actor.name, pid=actor.child.pid)
            actor.child.signal(signal.SIGKILL)
            actor.ended_at = time.monotonic()
            if actor.role == "worker":
                self._judge.client_died(actor.daemon, actor.child.pid)
        elif fault.kind == "pause a process" and actor is not None and not actor.child.is_paused:
            self._report.tell("pause", name=actor.name, seconds=pause_s)
            actor.child.pause(pause_s)
        elif fault.kind == "ask to leave" and actor is not None:
            self._report.tell("ask to leave", name=actor.name)
            actor.child.ask_to_leave()
        elif fault.kind == "pause a daemon" and daemon.is_up:
            self._report.tell("pause", name=daemon.name, seconds=pause_s)
            daemon.pause(pause_s)
        elif fault.kind == "kill a daemon" and self._mortal.is_up:
            self._report.tell("kill", name=self._mortal.name)
            self._mortal.kill()
            self._judge.daemon_died(self._mortal)
            self._restart_at = time.monotonic() + fault.strength * _MAX_DEATH_S

        elif fault.kind == "spoil a disk" and self._plan.disk_bytes:
            # Not the survivor's: after three bad pages in a row it would have no disk any more.
            places = np.random.default_rng(int(fault.strength * 2**53))
            if self._mortal.spoil_disk(places):
                self._report.tell("spoil", name=self._mortal.name)
        elif fault.kind == "cut a disk" and self._plan.disk_bytes and self._mortal.is_up:
            self._report.tell("cut", name=self._mortal.name)
            self._mortal.cut_disk()

    def _recruit(self, now: float) -> None:
        """Replace who is gone, after a while."""
        wanted = {"worker": self._plan.num_workers, "vandal": self._plan.num_vandals}
        for daemon in self._daemons:
            for role, number in wanted.items():
                living = [
                    actor
                    for actor in self._actors
                    if actor.daemon is daemon and actor.role == role and actor.ended_at is None
                ]
                if len(living) >= number:
                    continue
                vacancy = (daemon.name, role)
                if vacancy not in self._vacancies:
                    self._vacancies[vacancy] = now + self._start_rng.exponential(_MEAN_VACANCY_S)
                elif now >= self._vacancies[vacancy]:
                    del self._vacancies[vacancy]
                    self._start(role, daemon)

    def _start(self, role: str, daemon: Daemon) -> None:
        self._num_started += 1
        name = f"{role} {self._num_started} of {daemon.name}"
        seed = int(self._start_rng.integers(2**63))
        out = self._directory / f"{self._num_started}.out"
        child = Child(
            [sys.executable, "-m", f"tests.chaos.{role}", daemon.address, str(seed)],
            out=out,
            log=self._directory / f"{self._num_started}.log",
        )
        self._actors.append(_Actor(name, role, daemon, child, LineReader(out), time.monotonic()))
        self._report.tell("start", name=name, pid=child.pid, seed=seed)

    def _tick(self) -> None:
        """Everything that has to be looked at all the time."""
        if time.monotonic() >= self._restart_at:
            self._restart_at = math.inf
            self._report.tell("start", name=self._mortal.name)
            self._mortal.restart()
        for daemon in self._daemons:
            self._watch(daemon)
        for actor in list(self._actors):
            self._listen(actor)
        time.sleep(_TICK_S)

    def _watch(self, daemon: Daemon) -> None:
        """A daemon runs and answers."""
        daemon.notice_resume()
        is_dead = daemon is self._mortal and self._restart_at != math.inf
        if is_dead or not daemon.is_ready():
            return
        if (status := daemon.child.returncode) is not None:
            self._judge.violate(f"{daemon.name} ended with {status}:\n{daemon.log_tail}")
            return
        assert daemon.probe is not None
        for answer in daemon.probe.answers():
            self._judge.answer(daemon, answer)
        if daemon.probe.waiting_since is not None:
            self._judge.silence(daemon)
        elif time.monotonic() - daemon.probe.asked_at > _ASK_EVERY_S:
            daemon.probe.ask()

    def _listen(self, actor: _Actor) -> None:
        """What an actor says, and whether it still runs as it should."""
        now = time.monotonic()
        returncode = actor.child.returncode
        if actor.child.is_paused:
            actor.awake_at = now
        for line in actor.lines.news():
            actor.awake_at = now
            actor.counts = line.pop("counts", actor.counts)
            if line["event"] == "connected" and self._busy_since is None:
                self._busy_since = now
            if line["event"] != "progress":
                self._report.events.append({**line, "name": actor.name})
            self._judge.line(actor.name, actor.daemon, line)
        if returncode is not None:
            self._bury(actor, returncode)
        elif now - actor.awake_at > PROGRESS_BOUND_S:
            stacks = actor.child.show_stacks()
            self._judge.violate(f"{actor.name} made no step for {PROGRESS_BOUND_S:g} s:\n{stacks}")

    def _bury(self, actor: _Actor, returncode: int) -> None:
        """An actor has ended; what it forked goes a moment later, so that memd must not need it."""
        now = time.monotonic()
        if actor.ended_at is None:
            actor.ended_at = now
            if returncode != 0:
                log = actor.child.show_stacks()
                self._judge.violate(f"{actor.name} ended with {returncode}:\n{log}")
        if now - actor.ended_at > _LINGER_S:
            self._actors.remove(actor)
            actor.child.close()
            self._add_up(actor)

    def _add_up(self, actor: _Actor) -> None:
        for name, count in actor.counts.items():
            self._report.counts[f"{actor.role}: {name}"] += count
        if actor.daemon is self._survivor:
            self._report.num_twins += actor.counts.get("same_name", 0)

    def _close_actors(self) -> None:
        for actor in self._actors:
            actor.child.close()
            self._add_up(actor)
        self._actors.clear()

    def _calm_down(self) -> None:
        """Everybody leaves, and the survivor is measured."""
        self._report.tell("calm")
        for actor in self._actors:
            actor.child.ask_to_leave()
        deadline = time.monotonic() + _LEAVE_BOUND_S
        while self._actors and not self._report.violations:
            if time.monotonic() > deadline:
                for actor in self._actors:
                    stacks = actor.child.show_stacks()
                    self._judge.violate(
                        f"{actor.name} did not leave in {_LEAVE_BOUND_S:g} s:\n{stacks}"
                    )
            self._tick()
        while not self._survivor.is_up:
            self._tick()
        if not self._report.violations:
            self._measure(self._survivor)

    def _measure(self, daemon: Daemon) -> None:
        """A daemon's footprint, once it has let everybody go."""
        began = time.monotonic()
        deadline = began + RECLAIM_BOUND_S + SCRUB_BOUND_S
        first = self._report.calms[0].footprint if self._report.calms else None
        previous: Footprint | None = None
        since = began
        while True:
            self._tick()
            assert daemon.probe is not None
            answer = daemon.probe.wait(ANSWER_BOUND_S)
            if answer is None:
                self._judge.silence(daemon)
                return
            stats, footprint = answer.stats, Footprint.of(daemon.child.pid)
            region = stats["region"]
            is_free = region["free_bytes"] == region["bytes"] and not stats["clients"]
            is_free &= not stats.get("disk", {}).get("pages")
            # Connections that were left are closed by ZeroMQ's own thread, a little later: it is
            # given time to come to what it was at first, or else (at first) to change no more.
            now = time.monotonic()
            if previous is None or footprint.num_fds != previous.num_fds:
                previous, since = footprint, now
            is_settled = now - since > _SETTLED_S
            if first is not None:
                is_as_before = footprint.num_fds == first.num_fds
                is_settled = is_as_before or now - began > _SETTLING_BOUND_S
            if is_free and is_settled:
                break
            if now > deadline:
                self._judge.violate(f"{daemon.name} does not come to rest: {stats}, {footprint}")
                return
        self._report.memd_errors = stats["errors"]
        self._report.memd_disk = stats.get("disk", {})
        self._judge.calm(
            Calm(
                at_s=self._report.elapsed_s(),
                num_requests=sum(stats["requests"].values()) + sum(stats["errors"].values()),
                num_twins=self._report.num_twins,
                footprint=footprint,
                socket_files=[path.name for path in daemon.socket_files()],
                shared_memory_names=_shared_memory_names(daemon.child.pid),
            )
        )

    def _end_daemons(self) -> None:
        """SIGTERM ends a daemon with status 0, and nothing of it is left."""
        while not all(daemon.is_up for daemon in self._daemons):
            self._tick()
        for daemon in self._daemons:
            self._judge.end(daemon, daemon.end())


def _shared_memory_names(pid: int) -> list[str]:
    """Entries of ``/dev/shm`` that a process has mapped or open."""
    proc = Path("/proc") / str(pid)
    mapped = [line.split()[-1] for line in (proc / "maps").read_text().splitlines()]
    opened: list[Any] = []
    for link in (proc / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            opened.append(os.readlink(link))
    return sorted({name for name in mapped + opened if name.startswith("/dev/shm/")})
