"""Is this host fit for memd? Looks at what it offers, measures it, and tries a small daemon."""

from __future__ import annotations

from memd.selftest.finding import Finding, Verdict, worst
from memd.selftest.host import look_at_host
from memd.selftest.measure import measure_disk, measure_host

__all__ = ["Finding", "Verdict", "look_at_host", "measure_disk", "measure_host", "worst"]
