"""The harness finds what it is for: daemons that are broken on purpose do not pass."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

from tests.chaos.harness import Chaos
from tests.chaos.report import Plan

pytestmark = [pytest.mark.multiproc, pytest.mark.slow]

WRONG_BYTE = """
from memd.transfer.host import HostTransfer
gather = HostTransfer.gather
def spoil(self, **where):
    gather(self, **where)
    if where["rows"].size:
        self._region[where["landing_offset"] + where["row_bytes"] - 1] ^= 1
HostTransfer.gather = spoil
"""
NOTHING_ZEROED = """
from memd.transfer.host import HostTransfer
HostTransfer.zero = lambda self, **where: None
"""
DEAD_CLIENTS_KEPT = """
from memd.service import Service
Service.close_session = lambda self, token, reason: self._sessions.close(token)
"""
MEMORY_LEAK = """
from memd.service import Service
handle, kept = Service.handle, []
def leak(self, connection, frame):
    kept.append(bytes(4096))
    return handle(self, connection, frame)
Service.handle = leak
"""
DESCRIPTOR_LEAK = """
import os
from memd.service import Service
open_session = Service.open_session
def leak(self, pid):
    os.dup(0)
    return open_session(self, pid)
Service.open_session = leak
"""
# A page too many is counted as free. Whoever comes first finds it: memd's own check, a worker that
# asks for it, or one that was given pages it cannot have.
BROKEN_BOOKS = """
from memd.store import PageTable
commit, calls = PageTable.commit, []
def miscount(self, page_ids):
    commit(self, page_ids)
    calls.append(self)
    if len(calls) % 200 == 0:
        self._counts[0] += 1
PageTable.commit = miscount
"""

# Not in a row's first word, which names its owner: then a page that is reserved again would be
# found to be another's before anybody compared its rows.
WRONG_FROM_DISK = """
from memd.tiers.disk import GetJob
run = GetJob.run
def misread(self):
    run(self)
    self.into[21] ^= 1
GetJob.run = misread
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("prelude", "finding"),
    [
        pytest.param(WRONG_BYTE, "wrong rows", id="a wrong byte"),
        pytest.param(NOTHING_ZEROED, "old bytes", id="another's bytes"),
        pytest.param(
            DEAD_CLIENTS_KEPT, "still has the client|does not come to rest", id="dead clients kept"
        ),
        pytest.param(MEMORY_LEAK, "heap has grown", id="a leak of memory"),
        pytest.param(DESCRIPTOR_LEAK, "num_fds of the survivor was", id="a leak of descriptors"),
        pytest.param(WRONG_FROM_DISK, "wrong rows", id="a wrong byte from disk"),
        pytest.param(
            BROKEN_BOOKS,
            "integrity is|books differ|pages that cannot be|so many were not free|another number",
            id="broken books",
        ),
    ],
)
def test_a_broken_daemon_is_found_out(prelude: str, finding: str) -> None:
    plan = Plan(
        seed=1,
        # It ends with the first finding.
        duration_s=100.0,
        warm_up_s=2.0,
        calm_every_s=5.0,
        disk_bytes=Plan.disk_bytes if prelude == WRONG_FROM_DISK else 0,
        prelude=prelude,
    )
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        report = Chaos(plan, Path(name)).run()
    assert re.search(finding, "\n".join(report.violations)), report.failure()


def test_a_failure_tells_seed_events_and_how_to_replay() -> None:
    plan = Plan(seed=42, duration_s=60.0, warm_up_s=59.0, prelude=WRONG_BYTE)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        text = Chaos(plan, Path(name)).run().failure()
    assert "chaos with seed 42 found" in text
    assert "benchmarks.memd.chaos --seed 42 --minutes 1.00" in text
    assert "{'event': 'connected'" in text
