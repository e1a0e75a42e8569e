"""Progress of long work: how it is told, and how the command line shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Progress", "no_progress", "shown_progress"]

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)` while work goes on; returns quickly.

`done` never falls while the total stays the same.
"""


def no_progress(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Shows progress on stderr.

    Yields:
        What to call: on a terminal it moves a bar with the time that is left, which vanishes at the
        end; elsewhere it writes a line when a stage begins.
    """
    # Here, so that `--help` need not wait for it.
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _stage_lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        yield show


def _stage_lines(console: Console) -> Progress:
    shown = ""

    def show(stage: str, done: int, total: int) -> None:
        nonlocal shown
        if stage != shown:
            shown = stage
            console.print(stage, highlight=False, markup=False)

    return show
