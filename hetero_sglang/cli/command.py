"""What every command of `hetero-sglang` is made of."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from hetero_sglang.profile import HeadProfile

__all__ = ["Command", "numbers", "open_profile", "say", "stdout_console", "whole_numbers"]


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: What the user types.
        summary: A line for the list of commands.
        description: Opens its help.
        add_options: Declares its options.
        run: Does it; raises `HeteroError` or `OSError` for what the user can mend.
        epilog: Closes its help: examples.
    """

    name: str
    summary: str
    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    epilog: str = ""

    def add_to(self, commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        """Adds the command to a parser's list."""
        parser = commands.add_parser(
            self.name,
            help=self.summary,
            description=self.description,
            epilog=self.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # First, so that options may set defaults of their own.
        parser.set_defaults(run=self.run)
        self.add_options(parser)


def say(text: str) -> None:
    """Writes a line to stdout."""
    sys.stdout.write(text + "\n")


def stdout_console() -> Console:
    """A console that prints text as it is, for tables."""
    from rich.console import Console

    return Console(highlight=False, markup=False, soft_wrap=True)


def open_profile(name: str) -> HeadProfile:
    """A profile by its file, or a shipped one by its name.

    Raises:
        ProfileError: There is none, or it is damaged.
    """
    from hetero_sglang.profile import load_profile, shipped_profiles

    if not Path(name).exists() and name in (shipped := shipped_profiles()):
        return shipped[name]
    return load_profile(name)


def numbers(text: str) -> tuple[float, ...]:
    """An option's numbers, separated by commas; argparse names what is none."""
    return tuple(float(part) for part in text.split(","))


def whole_numbers(text: str) -> tuple[int, ...]:
    """An option's whole numbers, separated by commas; argparse names what is none."""
    return tuple(int(part) for part in text.split(","))
