"""Children that never outlive their parent, and what a process holds.

Every child leads a session of its own, so that whatever it forks can be ended with it, and has a
pipe as its standard input: when the parent is gone, however it ended, the child reads its end. A
child that is stopped gets its SIGCONT from a helper that does not need the parent either.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Child", "Footprint"]

_ROOT = Path(__file__).resolve().parents[2]
_PAUSE = 'kill -STOP "$0"; sleep "$1"; kill -CONT "$0"'


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a process holds, as the kernel counts it.

    Attributes:
        private_bytes: Resident anonymous memory; shared regions are not in it.
        num_fds: Open file descriptors.
        num_threads: Threads.
    """

    private_bytes: int
    num_fds: int
    num_threads: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """The footprint of a running process."""
        proc = Path("/proc") / str(pid)
        status = dict(
            line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line
        )
        return cls(
            private_bytes=int(status["RssAnon"].split()[0]) * 1024,
            num_fds=len(os.listdir(proc / "fd")),
            num_threads=int(status["Threads"]),
        )


class Child:
    """A child process in a session of its own; a context manager.

    Its process id, and the id of its group, stay its own until ``close``: nobody waits for it
    before, so no signal can reach a stranger.

    Args:
        command: Program and arguments.
        out: File for its standard output.
        log: File for its standard error; appended to.
        environment: Variables on top of this process's own.

    Attributes:
        pid: Its process id.
        out: File of its standard output.
        log: File of its standard error.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        out: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.out, self.log = out, log
        with out.open("wb") as out_file, log.open("ab") as log_file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=out_file,
                stderr=log_file,
                start_new_session=True,
                cwd=_ROOT,
                env={**os.environ, **(environment or {})},
            )
        self.pid = self._process.pid
        self._pause: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def __enter__(self) -> Child:
        """The child."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End the child."""
        self.close()

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs. Leaves the zombie in place."""
        if self._is_closed:
            return self._process.returncode
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    @property
    def is_paused(self) -> bool:
        """Whether it is stopped by ``pause``."""
        return self._pause is not None and self._pause.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the child alone, not to what it forked."""
        os.kill(self.pid, number)

    def show_stacks(self) -> str:
        """What it is doing, if it has faulthandler listen to SIGUSR1; the end of its log."""
        if self.returncode is None:
            self.signal(signal.SIGUSR1)
            time.sleep(0.5)
        return self.log.read_text()[-3000:]

    def ask_to_leave(self) -> None:
        """Close its standard input; idempotent."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def pause(self, seconds: float) -> None:
        """Stop it, and let it go on after some time; once at a time."""
        assert not self.is_paused, "a pause at a time"
        self._pause = subprocess.Popen(
            ["/bin/sh", "-c", _PAUSE, str(self.pid), f"{seconds:.3f}"], start_new_session=True
        )

    def close(self) -> None:
        """Kill it and all that it forked, and wait for it; idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._pause is not None:
            self._pause.kill()
            self._pause.wait()
        os.killpg(self.pid, signal.SIGKILL)
        self.ask_to_leave()
        self._process.wait()
