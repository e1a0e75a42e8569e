"""What the benchmarks of memd share: timing in turns, bounds, the table, the file."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import machine, results
from memd import native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BETWEEN_LOOKS_S = 1.0


@dataclass(frozen=True)
class Row:
    """One line of a result.

    Attributes:
        case: What was measured, column by column.
        measured: Numbers, each with its unit in its name.
        ratio: Ours to the reference, best rounds of the same run; None where there is no reference.
        at_least: What is asked of the ratio, if anything.
        at_most: The same, from above.
    """

    case: dict[str, str | int]
    measured: dict[str, float]
    ratio: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def asked(self) -> str:
        """The bound in words."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return f"<= {self.at_most:g}" if self.at_most is not None else ""

    @property
    def is_missed(self) -> bool:
        """Whether the ratio is out of its bound."""
        return self.ratio is not None and not (
            (self.at_least is None or self.ratio >= self.at_least)
            and (self.at_most is None or self.ratio <= self.at_most)
        )


class WrongResult(RuntimeError):
    """What would be timed is not right; nothing is reported."""


def require(is_right: bool, what: str) -> None:
    """Refuse to time a wrong result.

    Raises:
        WrongResult: It is wrong.
    """
    if not is_right:
        raise WrongResult(f"not timed, because {what} is wrong")


def in_turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round.

    All sides run in every round, so that a slow moment of the machine hits all of them, and another
    one begins each time.

    Args:
        sides: Do something and say how many seconds it took (or the median of many times); called
            once before, to warm up.
        rounds: Timed calls of each.
    """
    names = list(sides)
    seconds = defaultdict(list)
    for turn in range(-1, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken = sides[name]()
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


def best(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Shortest round of each side: others only ever slow us down. Bounds are held against this."""
    return {name: min(taken) for name, taken in seconds.items()}


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median of each side: what to expect, on a machine as busy as it was."""
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def percentile(values: list[float], percent: float) -> float:
    """The value that so many percent do not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Command line with what every benchmark of memd takes."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=rounds, help="timed calls of each side")
    made.add_argument("--out", type=Path, help="result file")
    return made


def report(
    name: str, options: argparse.Namespace, measure: Callable[[argparse.Namespace], Iterable[Row]]
) -> int:
    """Measure, print the table, write the file.

    Args:
        name: The benchmark, for the title and the file.
        options: Parsed command line.
        measure: Yields rows, each checked before it is timed.

    Returns:
        Exit status: 1 if a bound is missed or a result is wrong.
    """
    console = Console(width=120)
    about = machine.describe()
    busy = machine.busy_share(BETWEEN_LOOKS_S)
    try:
        rows = list(measure(options))
    except WrongResult as error:
        console.print(f"[red]{error}", highlight=False)
        return 1
    # Others may have come in the meantime.
    busy = max(busy, machine.busy_share(BETWEEN_LOOKS_S))
    console.print(_table(name, rows))
    if busy > machine.BUSY_SHARE:
        console.print(f"[yellow]others used {busy:.0%} of the machine: measure again when quiet")
    missed = [row for row in rows if row.is_missed]
    console.print(
        f"[red]{len(missed)} of {len(rows)} bounds missed" if missed else "every bound is held"
    )
    content: dict[str, Any] = {
        "benchmark": f"memd/{name}",
        "machine": about | {"busy_share": round(busy, 3)},
        "gather": native.status(),
        "settings": results.settings(options),
        "rows": [asdict(row) for row in rows],
    }
    console.print(f"written: {results.save(f'memd-{name}', content, options.out)}")
    return int(bool(missed))


def _table(name: str, rows: list[Row]) -> Table:
    table = Table(title=f"memd/{name} (gather: {native.status()})")
    for column in rows[0].case:
        table.add_column(column.replace("_", " "))
    measured = list(dict.fromkeys(name for row in rows for name in row.measured))
    for column in (*measured, "ratio", "asked"):
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(
            *(str(value) for value in row.case.values()),
            *(f"{row.measured[name]:,.1f}" if name in row.measured else "" for name in measured),
            f"[red]{ratio}" if row.is_missed else ratio,
            row.asked,
        )
    return table
