"""Bytes as people write and read them; binary units only, so nobody has to guess."""

from __future__ import annotations

import re

from memd.errors import ConfigError

__all__ = ["format_bytes", "parse_bytes"]

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_bytes(text: str) -> int:
    """Bytes in ``"123"``, ``"64MiB"`` or ``"1.5GiB"``; binary units only, so nobody has to guess.

    Raises:
        ConfigError: The text is something else, or not a whole positive number of bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|KiB|MiB|GiB|TiB)\s*", text)
    num_bytes = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if num_bytes < 1 or num_bytes != int(num_bytes):
        raise ConfigError(
            f"a size is a number with KiB, MiB, GiB or TiB, for example 4GiB; got {text!r}"
        )
    return int(num_bytes)


def format_bytes(num_bytes: int) -> str:
    """``num_bytes`` for people, in the largest binary unit that leaves at least 1."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if num_bytes >= _UNITS[unit]:
            return f"{num_bytes / _UNITS[unit]:.4g} {unit}"
    return f"{num_bytes} B"
