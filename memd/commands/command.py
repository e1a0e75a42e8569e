"""What every command of ``memd`` is made of."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EXIT_OK", "EXIT_REFUSED", "EXIT_UNAVAILABLE", "Command"]

EXIT_OK = 0
EXIT_REFUSED = 1
EXIT_UNAVAILABLE = 3


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: What the user types.
        summary: A line for the list of commands.
        epilog: Closes its help: examples, exit status.
        add_options: Declares its options.
        run: Does it and gives the exit status; raises ``MemdError`` for what the user can mend.
    """

    name: str
    summary: str
    epilog: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]

    def add_to(self, commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        """Add the command to a parser's list."""
        parser = commands.add_parser(
            self.name,
            help=self.summary,
            epilog=self.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(run=self.run)
        self.add_options(parser)
