"""A long run of chaos (``tests.chaos``), recorded: what was done to memd, and whether it held.

python -m benchmarks.memd.chaos --seed 20261122 --minutes 10
python -m benchmarks.memd.chaos --seed 7 --minutes 0.5      # replays a failed test
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.common import machine, results
from tests.chaos.harness import Chaos
from tests.chaos.report import Plan, Report


def main() -> int:
    """Run, print a table, write a JSON file; 1 if something did not hold."""
    options = parse_arguments()
    console = Console(width=110)
    console.print(f"chaos with seed {options.seed} for {options.minutes:g} minutes")
    described = machine.describe()
    plan = Plan(
        seed=options.seed,
        duration_s=60 * options.minutes,
        # What is rare has to have happened once before a heap can be flat.
        warm_up_s=min(60.0, 6 * options.minutes),
        calm_every_s=options.calm_every_s,
        disk_bytes=0 if options.no_disk else Plan.disk_bytes,
    )
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        report = Chaos(plan, Path(directory)).run()
    console.print(table(report))
    for violation in report.violations:
        console.print(f"did not hold: {violation}", markup=False)
    data = {"machine": described, "settings": results.settings(options), **report.summary()}
    console.print(f"written: {results.save('memd-chaos', data, options.out)}")
    return 1 if report.violations else 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run chaos against memd, and record it.")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--calm-every-s", type=float, default=60.0, help="time between measures")
    parser.add_argument("--no-disk", action="store_true", help="daemons without a disk below")
    parser.add_argument("--out", type=Path, help="result file")
    return parser.parse_args()


def table(report: Report) -> Table:
    """What a person wants to know of a run."""
    summary = report.summary()
    shown = Table(title=f"memd under chaos, seed {report.plan.seed}")
    shown.add_column("what")
    shown.add_column("number", justify="right")
    rows = {
        "faults and other events": len(report.events),
        "daemons, clients, vandals killed": summary["events_by_kind"].get("kill", 0),
        "stopped for a while": summary["events_by_kind"].get("pause", 0),
        "registrations": report.counts["worker: registrations"],
        "rows verified": report.counts["worker: rows_verified"],
        "pages that went to the survivor's disk": report.memd_disk.get("puts", 0),
        "pages that came back": report.memd_disk.get("gets", 0),
        "fetches refused for a page that had rotted": report.counts["worker: fetches: page_lost"],
        "hostile frames answered": report.counts["vandal: frames_answered"],
        "requests between first and last calm": report.num_requests,
        "heap grown between them, bytes": report.private_growth_bytes,
        "stats answered, longest (ms)": 1000 * summary["answer_s"].get("max", 0),
        "dead client let go, longest (ms)": 1000 * summary["reclaim_s"].get("max", 0),
        "invariants broken": len(report.violations),
    }
    for what, number in rows.items():
        shown.add_row(what, f"{number:,.0f}")
    return shown


if __name__ == "__main__":
    sys.exit(main())
