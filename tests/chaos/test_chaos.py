"""Short runs of chaos; the long one is ``benchmarks/memd/chaos.py``."""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.chaos.harness import Chaos
from tests.chaos.report import Plan, Report

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.multiproc, pytest.mark.slow]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory whose name leaves room for sockets; pytest's own is too long for some."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        yield Path(name)


def run(directory: Path, seed: int, duration_s: float, disk_bytes: int) -> Report:
    plan = Plan(seed=seed, duration_s=duration_s, warm_up_s=5.0, disk_bytes=disk_bytes)
    return Chaos(plan, directory).run()


def test_memd_withstands_a_known_storm(directory: Path) -> None:
    report = run(directory, seed=20261122, duration_s=25.0, disk_bytes=Plan.disk_bytes)
    assert not report.violations, report.failure()
    # The storm was one: everything that it is for has happened, and often enough.
    kinds = {event["event"] for event in report.events}
    assert kinds >= {"kill", "pause", "ask to leave", "connected", "lost", "left", "calm", "spoil"}
    assert report.counts["worker: rows_verified"] > 10_000
    assert report.counts["worker: pools_full"] > 0
    assert report.counts["worker: rings_full"] > 0
    assert report.counts["vandal: frames_answered"] > 100
    assert report.num_requests > 1_000
    assert report.memd_disk["puts"] > 100
    assert report.memd_disk["gets"] > 50
    assert len(report.reclaim_s) > 3
    assert len(report.calms) == 2


def test_memd_withstands_a_storm_that_nobody_has_seen(directory: Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # noqa: T201 - pytest shows it with a failure
    # Without a disk memory is zeroed instead of given back, and there are fewer ways to wait.
    report = run(directory, seed=seed, duration_s=15.0, disk_bytes=0)
    assert not report.violations, report.failure()
