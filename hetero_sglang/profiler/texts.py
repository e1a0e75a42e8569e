"""Calibration texts: those that are shipped, and the user's own."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hetero_sglang.errors import ConfigError

if TYPE_CHECKING:
    import os

__all__ = ["CalibrationText", "calibration_texts", "read_text", "read_texts"]


@dataclass(frozen=True)
class CalibrationText:
    """One text and the name it has in a profile's provenance."""

    name: str
    """The file's name."""
    text: str
    """Its contents."""


def calibration_texts() -> tuple[CalibrationText, ...]:
    """The shipped texts, in alphabetical order; `texts/README.md` says where they come from.

    Returns:
        Texts of different kinds, each of more than 5,000 tokens for common tokenizers.
    """
    folder = importlib.resources.files("hetero_sglang.profiler").joinpath("texts")
    files = sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(".txt")),
        key=lambda entry: entry.name,
    )
    return tuple(CalibrationText(file.name, file.read_text(encoding="utf-8")) for file in files)


def read_texts(path: str | os.PathLike[str]) -> tuple[CalibrationText, ...]:
    """Reads a calibration text, or every ``.txt`` file of a directory in alphabetical order.

    Args:
        path: A UTF-8 text file, or a directory of such.

    Returns:
        The texts, each named after its file.

    Raises:
        ConfigError: A file cannot be read or is no UTF-8 text, or the directory has none.
    """
    path = Path(path)
    if not path.is_dir():
        return (read_text(path),)
    files = sorted(entry for entry in path.iterdir() if entry.suffix == ".txt" and entry.is_file())
    if not files:
        raise ConfigError(f"directory {path} holds no .txt file; give a file or another directory")
    return tuple(read_text(file) for file in files)


def read_text(path: str | os.PathLike[str]) -> CalibrationText:
    """Reads the user's own calibration text.

    Args:
        path: A UTF-8 text file.

    Returns:
        The text, named after the file.

    Raises:
        ConfigError: The file cannot be read or is no UTF-8 text.
    """
    path = Path(path)
    try:
        return CalibrationText(path.name, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no UTF-8 text: {error}") from error
