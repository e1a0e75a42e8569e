"""Results on disk: one JSON file per run, never overwritten."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parents[1] / "results"


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
