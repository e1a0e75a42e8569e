"""Memory of a shared file given back to the kernel, and taken again; addresses stay valid.

A hole reads as zeros in every process that maps the file. Whoever writes there takes memory again,
and gets SIGBUS where there is none: so memd fills a hole before it tells anybody to write there.
"""

from __future__ import annotations

import ctypes
import errno
import os

__all__ = ["allocated_bytes", "fill_hole", "punch_hole"]

_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_NO_MEMORY = frozenset({errno.ENOMEM, errno.ENOSPC})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the memory behind a range back. Its bytes are zero from now on.

    Args:
        fd: A memfd that is not sealed against writing.
        offset: First byte.
        length: Bytes, >= 1. Memory pages that lie in the range only in part are zeroed there, and
            kept.

    Raises:
        OSError: The file system cannot do that, or the range is none.
    """
    if _libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def fill_hole(fd: int, offset: int, length: int) -> bool:
    """Put memory behind a range; what has some keeps its bytes.

    Args:
        fd: A memfd.
        offset: First byte.
        length: Bytes, >= 1, inside the file's size.

    Returns:
        False if the kernel has not that much.

    Raises:
        OSError: The range is none.
    """
    try:
        os.posix_fallocate(fd, offset, length)
    except OSError as error:
        if error.errno in _NO_MEMORY:
            return False
        raise
    return True


def allocated_bytes(fd: int) -> int:
    """Memory that a file takes."""
    # The unit of st_blocks, whatever the file system's own blocks are.
    return os.fstat(fd).st_blocks * 512
