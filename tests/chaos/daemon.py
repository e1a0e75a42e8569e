"""A memd that may be stopped, killed and started again at its address."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import signal
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.chaos.probe import Probe
from tests.chaos.processes import Child

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

__all__ = ["Daemon", "Outage"]

_START_BOUND_S = 60.0
_STOP_BOUND_S = 10.0
_STATS_BOUND_S = 10.0
_SPOILT_PLACES = 400

# A daemon keeps what it frees, up to a bound of many megabytes. Without that, and with a C library
# that gives long blocks back at once, what is kept is a leak.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
_KEEP_NOTHING = "import memd.heap; memd.heap.keep_freed_memory = lambda: False"

_SHOW_STACKS = "import faulthandler, signal; faulthandler.register(signal.SIGUSR1)"
_SERVE = "import sys; from memd.__main__ import main; sys.exit(main())"


@dataclasses.dataclass
class Outage:
    """A time in which a daemon was not to be reached, through no fault of its own.

    Attributes:
        is_death: Whether it was killed; else it was stopped for a while.
        begin: Monotonic seconds.
        end: Monotonic seconds; infinite while it lasts.
    """

    is_death: bool
    begin: float
    end: float = float("inf")


class Daemon:
    """One ``memd serve`` after the other at the same address; a context manager.

    Args:
        directory: Where its sockets' directory, output and log go.
        name: For files and messages.
        num_bytes: Size of the region.
        disk_bytes: Size of the disk below it, 0 for none.
        prelude: Python that runs in the daemon first; a test of the harness breaks it this way.
        arguments: Further ones of ``memd serve``.

    Attributes:
        name: As given.
        sockets: Directory of its sockets.
        address: Where it serves.
        child: The process.
        outages: All of them so far, oldest first.
        num_starts: How often it was started.
        probe: Connection to the running incarnation, None while it is not ready.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        num_bytes: int,
        disk_bytes: int = 0,
        prelude: str = "",
        arguments: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.sockets = directory / name
        self.address = f"ipc://{self.sockets / 'control.sock'}"
        self.outages: list[Outage] = []
        self.num_starts = 0
        self.probe: Probe | None = None
        self._directory = directory
        code = f"{_SHOW_STACKS}\n{_KEEP_NOTHING}\n{prelude}\n{_SERVE}"
        self._command = [sys.executable, "-c", code, "serve", "--address", self.address]
        self._command += ["--bytes", str(num_bytes), "--parent-pid", str(os.getpid()), *arguments]
        self._disk_bytes = disk_bytes
        if disk_bytes:
            self._command += ["--disk-dir", str(directory), "--disk-bytes", str(disk_bytes)]

    def __enter__(self) -> Daemon:
        """The daemon, ready."""
        self.restart()
        try:
            while not self.is_ready():
                time.sleep(0.01)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Kill it, and remove what a killed daemon leaves."""
        self._drop_probe()
        self.child.close()
        for path in self.socket_files():
            path.unlink()
        if self.sockets.exists():
            self.sockets.rmdir()

    @property
    def is_up(self) -> bool:
        """Whether it has said READY, was not killed since, and is not stopped now."""
        return self.probe is not None and not self.child.is_paused

    @property
    def awake_since(self) -> float:
        """End of the last outage, in monotonic seconds; 0 if there was none."""
        return self.outages[-1].end if self.outages else 0.0

    @property
    def log(self) -> str:
        """All that its incarnations wrote to stderr."""
        return self.child.log.read_text()

    @property
    def log_tail(self) -> str:
        """The end of its log, for messages."""
        return self.log[-3000:]

    def was_dead(self, since: float) -> bool:
        """Whether it was dead at some time after ``since``, in monotonic seconds."""
        return any(outage.is_death and outage.end >= since for outage in self.outages)

    def stats(self) -> dict[str, Any]:
        """Its answer to ``Stats`` now."""
        assert self.probe is not None, "not ready"
        answer = self.probe.wait(_STATS_BOUND_S)
        assert answer is not None, f"no answer to stats within {_STATS_BOUND_S:g} s"
        return answer.stats

    def socket_files(self) -> list[Path]:
        """What lies in its directory."""
        return sorted(self.sockets.iterdir()) if self.sockets.exists() else []

    def is_ready(self) -> bool:
        """Look whether a start is through; True once the daemon has said READY."""
        if self.probe is not None:
            return True
        if self.child.out.read_text().startswith("READY "):
            self.probe = Probe(self.address)
            self._end_outage()
            return True
        waited = time.monotonic() - self._started_at
        if self.child.returncode is not None or waited > _START_BOUND_S:
            raise AssertionError(f"memd did not start within {waited:.0f} s:\n{self.log[-2000:]}")
        return False

    def pause(self, seconds: float) -> None:
        """Stop the process for a time."""
        self.outages.append(Outage(is_death=False, begin=time.monotonic()))
        self.child.pause(seconds)

    def notice_resume(self) -> None:
        """Write down the end of a pause; to be called often."""
        if self.outages and not self.outages[-1].is_death and not self.child.is_paused:
            self._end_outage()

    def kill(self) -> None:
        """SIGKILL; the address is left as a killed daemon leaves it."""
        self._end_outage()
        self.outages.append(Outage(is_death=True, begin=time.monotonic()))
        self._drop_probe()
        self.child.close()

    def cut_disk(self) -> None:
        """Let every write to its disk fail, for as long as it lives."""
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(self.child.pid, resource.RLIMIT_FSIZE, (0, 0))

    def spoil_disk(self, rng: np.random.Generator) -> bool:
        """Flip a bit in each of many places of its disk; False if it has none (yet)."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for entry in Path(f"/proc/{self.child.pid}/fd").iterdir():
                found = entry.stat()
                is_disk = stat.S_ISREG(found.st_mode) and found.st_nlink == 0
                # The region is an unlinked file, too, but of a larger size.
                if is_disk and found.st_size == self._disk_bytes:
                    with entry.open("r+b", buffering=0) as file:
                        for offset in rng.integers(found.st_size, size=_SPOILT_PLACES).tolist():
                            byte = os.pread(file.fileno(), 1, offset)
                            os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << offset % 8]), offset)
                    return True
        return False

    def restart(self) -> None:
        """Start, at first or after ``kill``; ``is_ready`` tells when it serves."""
        self.num_starts += 1
        self._started_at = time.monotonic()
        self.child = Child(
            self._command,
            out=self._directory / f"{self.name}.out",
            log=self._directory / f"{self.name}.log",
            environment=_ENVIRONMENT,
        )

    def end(self) -> int | None:
        """SIGTERM; the exit status, None if it did not end in time."""
        self._drop_probe()
        self.child.signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_BOUND_S
        while self.child.returncode is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.child.returncode

    def _end_outage(self) -> None:
        if self.outages and self.outages[-1].end == float("inf"):
            self.outages[-1].end = time.monotonic()

    def _drop_probe(self) -> None:
        if self.probe is not None:
            self.probe.close()
            self.probe = None
