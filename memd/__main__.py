"""Command line of memd: ``serve``, ``status``, ``top`` and ``check``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from memd.commands.check import CHECK
from memd.commands.command import EXIT_REFUSED
from memd.commands.serve import SERVE
from memd.commands.status import STATUS
from memd.commands.top import TOP
from memd.errors import MemdError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "parser"]

_DESCRIPTION = """\
memd holds KV pages in shared memory, in a process of its own.

An engine with `--kv-policy heterocache` starts one by itself, so most people never type these
commands. Run one by hand to keep it apart from the engine (a sidecar), or to look into a running
one. `memd check` says whether this host is fit for it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; by default those of the process.

    Returns:
        Exit status: 0 done, 1 refused with one line on stderr, 3 no daemon there. Wrong usage exits
        with 2 by way of argparse.
    """
    try:
        arguments = parser().parse_args(argv)
        status: int = arguments.run(arguments)
    except MemdError as error:
        sys.stderr.write(f"memd: {error}\n")
        return EXIT_REFUSED
    return status


def parser() -> argparse.ArgumentParser:
    """What reads the command line; its result's ``run`` does what was asked for."""
    memd = argparse.ArgumentParser(
        "memd", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = memd.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (SERVE, STATUS, TOP, CHECK):
        command.add_to(commands)
    return memd


if __name__ == "__main__":
    sys.exit(main())
