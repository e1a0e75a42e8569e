"""What a run of chaos does, and what it found."""

from __future__ import annotations

import collections
import dataclasses
import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tests.chaos.processes import Footprint

__all__ = ["PRIVATE_GROWTH_BYTES", "TWIN_BYTES", "Calm", "Plan", "Report"]

PRIVATE_GROWTH_BYTES = 4 << 20
"""What the survivor's heap may grow between the first calm and any later one, twins apart."""

TWIN_BYTES = 36_000
"""What libzmq (4.3.5) keeps for ever of a connection that claims the name of another.

By malloc's own count; a fresh heap shows a third of it, because not all of it is written to.
"""

_MAX_EVENTS_TOLD = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does.

    Attributes:
        seed: Of all decisions.
        duration_s: Length, in seconds, calms and start included.
        warm_up_s: Time before the first calm, whose footprint later ones are compared with.
        calm_every_s: Time from a calm to the next.
        num_workers: Workers of each daemon.
        num_vandals: Vandals of each daemon.
        region_bytes: Region of each daemon.
        disk_bytes: Disk below each daemon, 0 for none.
        faults_per_s: Faults that are injected, on average.
        prelude: Python that both daemons run first, to break them; for tests of the harness.
    """

    seed: int
    duration_s: float
    warm_up_s: float = 5.0
    calm_every_s: float = 60.0
    num_workers: int = 3
    num_vandals: int = 1
    region_bytes: int = 32 << 20
    disk_bytes: int = 8 << 20
    faults_per_s: float = 4.0
    prelude: str = ""


@dataclasses.dataclass(frozen=True)
class Calm:
    """The survivor without a client.

    Attributes:
        at_s: Since the run began.
        num_requests: Requests that it had answered or refused by then.
        num_twins: Connections to it that had claimed another's name by then.
        footprint: What the process holds.
        socket_files: Names in its directory.
        shared_memory_names: Entries of ``/dev/shm`` that it has open or mapped.
    """

    at_s: float
    num_requests: int
    num_twins: int
    footprint: Footprint
    socket_files: list[str]
    shared_memory_names: list[str]

    @property
    def own_private_bytes(self) -> int:
        """Its heap without what libzmq keeps of twins."""
        return self.footprint.private_bytes - TWIN_BYTES * self.num_twins


@dataclasses.dataclass
class Report:
    """What happened.

    Attributes:
        plan: What was to happen.
        events: Everything that the conductor did and the children said, but their progress.
        violations: What did not hold; empty after a good run.
        counts: What workers and vandals did, added up; prefixed with their role.
        answer_s: Times of the daemons' answers to ``stats``.
        reclaim_s: Times from a client's death until memd had let it go.
        calms: Footprints.
        memd_errors: Refused requests by code, of the survivor.
        memd_disk: What the survivor's disk counted; empty without one.
        num_twins: Connections to the survivor that claimed another's name, as far as it is known.
        began_at: Monotonic seconds; times in events are monotonic too.
    """

    plan: Plan
    events: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    violations: list[str] = dataclasses.field(default_factory=list)
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    answer_s: list[float] = dataclasses.field(default_factory=list)
    reclaim_s: list[float] = dataclasses.field(default_factory=list)
    calms: list[Calm] = dataclasses.field(default_factory=list)
    memd_errors: dict[str, int] = dataclasses.field(default_factory=dict)
    memd_disk: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_twins: int = 0
    began_at: float = dataclasses.field(default_factory=time.monotonic)

    def elapsed_s(self, at: float | None = None) -> float:
        """Seconds since the run began, of now or of another monotonic time."""
        return round((time.monotonic() if at is None else at) - self.began_at, 3)

    def tell(self, event: str, **details: Any) -> None:
        """Add an event of now."""
        self.events.append({"event": event, "at": time.monotonic(), **details})

    @property
    def num_requests(self) -> int:
        """Requests that the survivor handled between the first calm and the last."""
        return self.calms[-1].num_requests - self.calms[0].num_requests if self.calms else 0

    @property
    def private_growth_bytes(self) -> int:
        """Growth of the survivor's heap from the first calm to the largest later one.

        Without what libzmq keeps of connections that claim another's name.
        """
        heaps = [calm.own_private_bytes for calm in self.calms]
        return max(heaps[1:], default=0) - heaps[0] if len(heaps) > 1 else 0

    def failure(self) -> str:
        """What a person needs who looks into a failed run."""
        minutes = self.plan.duration_s / 60
        lines = [
            f"chaos with seed {self.plan.seed} found:",
            *(f"  - {violation}" for violation in self.violations),
            f"replay: python -m benchmarks.memd.chaos --seed {self.plan.seed} "
            f"--minutes {minutes:.2f}{'' if self.plan.disk_bytes else ' --no-disk'}",
            f"the last of {len(self.events)} events:",
            *(f"  {event}" for event in self._timed_events()[-_MAX_EVENTS_TOLD:]),
        ]
        return "\n".join(lines)

    def _timed_events(self) -> list[dict[str, Any]]:
        """Events in the order of their times, in seconds since the run began."""
        ordered = sorted(self.events, key=lambda event: float(event["at"]))
        return [{**event, "at": self.elapsed_s(event["at"])} for event in ordered]

    def summary(self) -> dict[str, Any]:
        """The report as plain data, for a file; without single events."""
        return {
            "plan": dataclasses.asdict(self.plan),
            "violations": self.violations,
            "events_by_kind": dict(
                collections.Counter(str(event["event"]) for event in self.events)
            ),
            "counts": dict(sorted(self.counts.items())),
            "answer_s": _spread(self.answer_s),
            "reclaim_s": _spread(self.reclaim_s),
            "survivor": {
                "requests_between_calms": self.num_requests,
                "private_growth_bytes": self.private_growth_bytes,
                "private_growth_bound_bytes": PRIVATE_GROWTH_BYTES,
                "refused_by_code": self.memd_errors,
                "disk": self.memd_disk,
                "calms": [dataclasses.asdict(calm) for calm in self.calms],
            },
        }


def _spread(times_s: list[float]) -> dict[str, float]:
    """Count, median, 99th percentile and maximum, in seconds."""
    if not times_s:
        return {"count": 0}
    values = np.array(times_s)
    return {
        "count": len(times_s),
        "median": round(float(np.median(values)), 4),
        "p99": round(float(np.quantile(values, 0.99)), 4),
        "max": round(float(values.max()), 4),
    }
