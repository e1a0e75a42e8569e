"""The compiled gather, where the installation has one.

Owns the loading of the library that ``memd.native.build`` makes; must not know who copies what.
Nothing is lost without it but time: whoever asks gets None and copies with NumPy.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Gather", "NativeError", "gather", "open_gather", "status"]


class NativeError(RuntimeError):
    """The compiled library cannot be used; the message says why."""


class Gather(Protocol):
    """``memd_gather`` of ``gather.cpp``; runs outside the interpreter lock."""

    def __call__(
        self, landing: int, source: int, rows: int, num_rows: int, row_bytes: int, /
    ) -> None:
        """Copy rows; the first three arguments are addresses."""
        ...


def open_gather(directory: Path | None = None) -> Gather:
    """Load the library.

    Args:
        directory: Where it lies; by default where ``memd.native.build`` puts it.

    Raises:
        NativeError: It is not there, cannot be loaded, or was made from another source.
    """
    # Not at the top: ``python -m memd.native.build`` must be the first to import it.
    from memd.native.build import DEFAULT_OUT_DIR, LIBRARY_NAME, source_digest

    path = (directory or DEFAULT_OUT_DIR) / LIBRARY_NAME
    if not path.exists():
        raise NativeError(f"{path.name} is not there")
    try:
        library = ctypes.CDLL(str(path))
        library.memd_source_digest.restype = ctypes.c_char_p
        digest = library.memd_source_digest().decode()
        function = library.memd_gather
        expected = source_digest()
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path.name}: {error}") from error
    if digest != expected:
        raise NativeError(f"{path.name} was made from another source")
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2
    function.restype = None
    found: Gather = function
    return found


def gather() -> Gather | None:
    """The compiled gather, loaded once; None where there is none."""
    return _load()[0]


def status() -> str:
    """``"native"``, or ``"numpy (reason; what to run)"`` when nothing compiled can be used."""
    return _load()[1]


@functools.cache
def _load() -> tuple[Gather | None, str]:
    try:
        return open_gather(), "native"
    except NativeError as error:
        return None, f"numpy ({error}; run: python -m memd.native.build)"
