"""The daemon's own heap: memory that was freed stays with the process.

A fetch of many rows needs temporaries of megabytes for a moment. By default the C library gives
them back to the kernel each time, and every page of the next ones is faulted in anew, which takes
as long as copying the rows. And each thread gets an arena of its own, although what one takes
another often frees (a frame comes from ZeroMQ's thread and goes with the loop's), so that arenas
fill with holes. The region is not concerned: it is mapped once.
"""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

# <malloc.h> of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# The largest that glibc takes; longer blocks still come from the kernel.
_MMAP_THRESHOLD_BYTES = 32 << 20
_TRIM_THRESHOLD_BYTES = 128 << 20


def keep_freed_memory() -> bool:
    """Let this process keep up to 128 MiB of freed memory for later, in one place for all threads.

    Called before any thread starts: one that has an arena keeps it.

    Returns:
        Whether the C library can be told so; where not, it goes on as before.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
        and mallopt(_M_ARENA_MAX, 1)
    )
