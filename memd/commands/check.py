"""``memd check``: is this host fit for memd?"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from memd.commands.command import EXIT_OK, EXIT_REFUSED, Command
from memd.config import MemdConfig
from memd.errors import ConfigError
from memd.sizes import parse_bytes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from memd.selftest import Finding

__all__ = ["CHECK"]

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}

_EPILOG = """\
examples:
  memd check --bytes 64GiB          will a pool of this size start here?
  memd check --bytes 64GiB --lock   and locked into memory?
  memd check --disk-dir /mnt/nvme   how fast do pages come back from there?
  memd check --json                 for programs: {"verdict": ..., "findings": [...]}

Takes a few seconds and half a GiB of memory: it measures copies and tries a small daemon.

exit status: 0 memd runs here, 1 something fails (warnings do not count)
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bytes",
        type=parse_bytes,
        default=1 << 30,
        metavar="N[MiB|GiB]",
        help="size of the pool that is planned (default: 1GiB)",
    )
    parser.add_argument(
        "--numa",
        default=MemdConfig.numa,
        metavar="POLICY",
        help="as for `memd serve` (default: %(default)s)",
    )
    parser.add_argument("--lock", action="store_true", help="the pool is to be locked into memory")
    parser.add_argument(
        "--disk-dir",
        default="",
        metavar="DIR",
        help="as for `memd serve`; writes and reads 128 MiB there (default: no disk)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(arguments: argparse.Namespace) -> int:
    from memd.numa import choose_nodes, is_policy, read_nodes, running_cpu
    from memd.selftest import Verdict, look_at_host, measure_disk, measure_host, worst

    if not is_policy(arguments.numa):
        raise ConfigError(
            f"--numa must be interleave, local or a list of nodes, got {arguments.numa}"
        )
    findings = look_at_host(arguments.bytes, numa=arguments.numa, lock=arguments.lock)
    is_placeable = all(f.verdict is not Verdict.FAIL for f in findings if f.name == "numa")
    nodes = choose_nodes(arguments.numa, read_nodes(), running_cpu()) if is_placeable else ()
    findings += measure_host(nodes)
    if arguments.disk_dir:
        findings.append(measure_disk(Path(arguments.disk_dir)))
    verdict = worst(findings)
    if arguments.json:
        answer = {"verdict": verdict, "findings": [dataclasses.asdict(each) for each in findings]}
        sys.stdout.write(json.dumps(answer, indent=2) + "\n")
    else:
        _print(findings)
    return EXIT_REFUSED if verdict is Verdict.FAIL else EXIT_OK


def _print(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")
    for finding in findings:
        style = _STYLES[finding.verdict]
        table.add_row(Text(finding.verdict, style), finding.name, Text(finding.detail))
        if finding.remedy:
            table.add_row("", "", Text(f"-> {finding.remedy}", style))
    # A pipe has no width that lines would have to be broken for.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


CHECK = Command(
    name="check",
    summary="say whether this host is fit for memd, and how fast its memory is",
    epilog=_EPILOG,
    add_options=_add_options,
    run=_run,
)
