"""``memd top``: watch running daemons, a frame a second."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING

from memd.commands.command import EXIT_OK, EXIT_UNAVAILABLE, Command
from memd.commands.daemons import add_address_option, ask_all, has_answered, nobody_there
from memd.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from rich.console import RenderableType

    from memd.dashboard import Sample

__all__ = ["TOP"]

_EPILOG = """\
examples:
  memd top                  every daemon of this user; q or Ctrl-C leaves
  memd top --once           one frame, for pipes; its rates are those of one interval

Rates and percentiles are those of the last interval. `control` is every request but fetches.

exit status: 0, or 3 if --once found no daemon
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_address_option(parser)
    parser.add_argument("--once", action="store_true", help="print one frame and leave")
    parser.add_argument(
        "--interval",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds between frames, 0.1 to 60 (default: %(default)g)",
    )


def _run(arguments: argparse.Namespace) -> int:
    if not 0.1 <= arguments.interval <= 60:
        raise ConfigError(f"--interval must be 0.1 to 60 seconds, got {arguments.interval:g}")
    if arguments.once or not sys.stdout.isatty():
        return _print_once(arguments.address, arguments.interval)
    _watch(arguments.address, arguments.interval)
    return EXIT_OK


def _print_once(address: str | None, interval_s: float) -> int:
    from rich.console import Console

    before = _samples(address)
    if before:
        time.sleep(interval_s)
    now = _samples(address)
    if not now:
        sys.stderr.write(f"memd: {nobody_there(address)}\n")
        return EXIT_UNAVAILABLE
    Console(highlight=False).print(_frames(before, now))
    return EXIT_OK


def _watch(address: str | None, interval_s: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)
    before: dict[int, Sample] = {}
    # Ignored in what a script starts in the background; who looks at a terminal wants to leave.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (
        contextlib.suppress(KeyboardInterrupt),
        _single_keys(),
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        # A terminal that was closed is none any more.
        while sys.stdout.isatty():
            now = _samples(address)
            live.update(_frames(before, now) if now else Text(nobody_there(address)), refresh=True)
            before = now
            if _is_told_to_leave(time.monotonic() + interval_s):
                return


def _samples(address: str | None) -> dict[int, Sample]:
    """A sample of each daemon that answers, by its process id."""
    from memd.dashboard import Sample

    return {
        stats["daemon"]["pid"]: Sample(stats, time.monotonic())
        for stats in ask_all(address)
        if has_answered(stats)
    }


def _frames(before: dict[int, Sample], now: dict[int, Sample]) -> RenderableType:
    from rich.console import Group

    from memd.dashboard import frame

    return Group(*(frame(before.get(pid), sample) for pid, sample in now.items()))


@contextlib.contextmanager
def _single_keys() -> Iterator[None]:
    """The terminal hands over each key as it is pressed, and does not show it."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    previous = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, previous)


def _is_told_to_leave(deadline: float) -> bool:
    """Wait until the deadline, a ``q`` or the end of the terminal; False for the deadline."""
    while (left := deadline - time.monotonic()) > 0:
        if not sys.stdin.isatty():
            time.sleep(left)
        elif select.select([sys.stdin], [], [], left)[0]:
            keys = os.read(sys.stdin.fileno(), 64)
            if not keys or b"q" in keys.lower():
                return True
    return False


TOP = Command(
    name="top",
    summary="watch running daemons: pool, clients, rates, latencies",
    epilog=_EPILOG,
    add_options=_add_options,
    run=_run,
)
