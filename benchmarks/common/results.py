"""Results on disk: one JSON file per run, never overwritten."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

DIRECTORY = Path(__file__).parents[1] / "results"
_ROOT = Path(__file__).resolve().parents[2]


def settings(options: argparse.Namespace) -> dict[str, str]:
    """A command line as plain text, without anything of the machine's folders.

    A path inside the repository is written from its root on, any other by its last part.
    """
    return {name: _plain(value) for name, value in vars(options).items()}


def _plain(value: object) -> str:
    if not isinstance(value, Path):
        return str(value)
    path = value.resolve()
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else path.name


def save(name: str, data: dict[str, Any], path: Path | None = None) -> Path:
    """Write a result.

    Args:
        name: Benchmark's name, for the file's name.
        data: Plain data.
        path: Where to, instead of `benchmarks/results/<name>-<UTC time>.json`.

    Returns:
        The file's path.
    """
    if path is None:
        path = DIRECTORY / f"{name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path
