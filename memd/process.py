"""Start a memd as a child of this process, and stop it again."""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from memd.config import runtime_directory
from memd.endpoint import Endpoint, remove_leftovers
from memd.errors import MemdTimeout, MemdUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["MemdProcess", "spawn_memd"]

_START_S = 60.0
_SLOWEST_S_PER_BYTE = 2.0 / (1 << 30)


class MemdProcess:
    """A memd child; a context manager. It ends with its parent, however the parent ends.

    Attributes:
        address: Where it serves.
        pid: Its process id.
    """

    def __init__(self, child: subprocess.Popen[bytes], address: str) -> None:
        self.address = address
        self.pid = child.pid
        self._child = child

    def __enter__(self) -> MemdProcess:
        """The process."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop the child."""
        self.close()

    @property
    def is_running(self) -> bool:
        """Whether the child has not ended; also collects its exit status."""
        return self._child.poll() is None

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._child.poll()

    def close(self, timeout_s: float = 5.0) -> None:
        """Have the child end at once, wait, and kill it when it does not in time; idempotent."""
        if self._child.poll() is None:
            # Not SIGTERM, by which it would wait for clients to leave: whoever closes their memory
            # is done with it.
            self._child.send_signal(signal.SIGINT)
            try:
                self._child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        # What a killed daemon leaves behind is names of sockets, never memory.
        remove_leftovers(Endpoint.parse(self.address))


def spawn_memd(
    *,
    num_bytes: int,
    directory: Path | None = None,
    ready_timeout_s: float | None = None,
    options: Sequence[str] = (),
) -> MemdProcess:
    """Start a memd that serves this process and ends with it; returns when it is ready.

    Args:
        num_bytes: Size of its region.
        directory: Where its sockets go; created 0700 if missing. A new private one by default.
        ready_timeout_s: Bound of the start, in seconds; by default one that a host reaches which
            allocates half a GiB a second.
        options: Further options of ``memd serve``.

    Raises:
        MemdUnavailable: It ended at once; its own message went to stderr and is repeated here.
        MemdTimeout: It was not ready in time, and was killed.
    """
    if directory is None:
        directory = runtime_directory() / f"memd-{os.getpid()}-{secrets.token_hex(4)}"
    endpoint = Endpoint.parse(f"ipc://{directory.absolute() / 'control.sock'}")
    command = [sys.executable, "-m", "memd", "serve"]
    command += ["--address", endpoint.address, "--bytes", str(num_bytes)]
    command += ["--parent-pid", str(os.getpid()), *options]
    if ready_timeout_s is None:
        ready_timeout_s = _START_S + num_bytes * _SLOWEST_S_PER_BYTE
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        # A Ctrl-C in the terminal is for the engine: memd goes when the engine has gone.
        start_new_session=True,
    )
    process = MemdProcess(child, endpoint.address)
    assert child.stdout is not None
    try:
        with child.stdout as stdout:
            line = _first_line(stdout.fileno(), time.monotonic() + ready_timeout_s)
    except BaseException:
        process.close(0.0)
        raise
    if line != f"READY {endpoint.address}":
        child.wait(ready_timeout_s)
        process.close()
        raise MemdUnavailable(
            f"memd with {num_bytes} bytes did not start (exit status {child.returncode}); "
            f"its reason is on stderr"
        )
    return process


def _first_line(fd: int, deadline: float) -> str:
    """The first line that arrives, without its end; what there is when the writer ends before."""
    text = b""
    while b"\n" not in text:
        left = deadline - time.monotonic()
        if left <= 0:
            raise MemdTimeout("memd was not ready in time; give it longer or a smaller region")
        if select.select([fd], [], [], left)[0]:
            chunk = os.read(fd, 4096)
            if not chunk:
                break
            text += chunk
    return text.partition(b"\n")[0].decode(errors="replace").rstrip()
