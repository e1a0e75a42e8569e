"""Notice the end of another process, by pidfd where the kernel has it and by polling elsewhere."""

from __future__ import annotations

import os
import select

__all__ = ["ProcessWatch"]


class ProcessWatch:
    """Watches one process from construction on; a context manager.

    A pidfd names the process itself, so a later process with the same number is never mistaken for
    it. A zombie counts as dead: nothing of it runs any more.

    Args:
        pid: The process.
        use_pidfd: False forces the fallback, for tests and old kernels.

    Attributes:
        pid: The process.
    """

    def __init__(self, pid: int, *, use_pidfd: bool = True) -> None:
        self.pid = pid
        self._fd: int | None = None
        self._is_dead = False
        if use_pidfd and hasattr(os, "pidfd_open"):
            try:
                self._fd = os.pidfd_open(pid)
            except ProcessLookupError:
                self._is_dead = True
            except OSError:
                # ENOSYS before Linux 5.3, EPERM under some seccomp profiles, EMFILE: poll instead.
                self._fd = None

    def __enter__(self) -> ProcessWatch:
        """The watch."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the watch."""
        self.close()

    def fileno(self) -> int | None:
        """Descriptor that is readable once the process has ended; None: poll ``is_dead``."""
        return self._fd

    @property
    def is_dead(self) -> bool:
        """Whether the process has ended; once True, always True."""
        if not self._is_dead:
            self._is_dead = self._has_ended()
        return self._is_dead

    def close(self) -> None:
        """Give the file descriptor back; the last answer of ``is_dead`` stays."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _has_ended(self) -> bool:
        if self._fd is not None:
            poller = select.poll()
            poller.register(self._fd, select.POLLIN)
            return bool(poller.poll(0))
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False
