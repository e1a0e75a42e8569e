"""What the benchmarks of operations share: timing, the table, the file."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import machine, results
from hetero_kernels import native_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Row:
    """One line of the table: an operation at one shape.

    Attributes:
        case: Shape in words.
        dtype: Dtype's name.
        native_us: Time of the compiled kernel.
        torch_us: Time of the torch implementation; ``None`` if not timed.
        others_us: Times of what else it is held against, by name.
        num_bytes: Bytes that have to be read; 0 where that is not the point.
        num_flops: Floating-point operations; 0 where that is not the point.
    """

    case: str
    dtype: str
    native_us: float
    torch_us: float | None = None
    num_bytes: int = 0
    num_flops: int = 0
    others_us: dict[str, float] = field(default_factory=dict)


def timed_us(function: Callable[[], object], budget_s: float = 1.0) -> float:
    """Microseconds of a call: the best median of many short rounds.

    Other processes only ever slow us down, and a round is short enough to fall between them.

    Args:
        function: What to time; called twice before, to warm up.
        budget_s: Time to spend.
    """
    function()
    start = time.perf_counter()
    function()
    seconds = max(1e-6, time.perf_counter() - start)
    num_rounds = 25
    num_calls = max(1, min(200, int(budget_s / num_rounds / seconds)))
    medians = []
    deadline = time.perf_counter() + 3 * budget_s
    while len(medians) < num_rounds and (len(medians) < 3 or time.perf_counter() < deadline):
        times = []
        for _ in range(num_calls):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times))
    return min(medians) * 1e6


def main(name: str, rows: Callable[[argparse.Namespace], Iterator[Row]]) -> None:
    """Run a benchmark from the command line, print its table and write its file.

    Args:
        name: The operation.
        rows: Yields results for the parsed options, each checked before it is timed.
    """
    parser = argparse.ArgumentParser(description=f"Time {name}.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", type=Path, help="result file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console = Console(width=150)
    before = machine.read_bandwidth_gb_s()
    measured = list(rows(options))
    # Again afterwards: the better one is what the memory can do.
    bandwidth = max(before, machine.read_bandwidth_gb_s())
    table = Table(title=f"{name} ({native_status()}, {options.threads} threads)")
    others = list(dict.fromkeys(name for row in measured for name in row.others_us))
    if any(row.torch_us for row in measured):
        others.insert(0, "torch")
    for column in ("case", "dtype", "native us", *_columns(others), "GB/s", "of memory", "GFLOP/s"):
        table.add_column(column, justify="left" if column in ("case", "dtype") else "right")
    for row in measured:
        speed = row.num_bytes / row.native_us / 1e3
        times = {"torch": row.torch_us, **row.others_us}
        table.add_row(
            row.case,
            row.dtype,
            f"{row.native_us:,.1f}",
            *(cell for name in others for cell in _against(times.get(name), row.native_us)),
            f"{speed:.1f}" if row.num_bytes else "",
            f"{speed / bandwidth:.0%}" if row.num_bytes else "",
            f"{row.num_flops / row.native_us / 1e3:.0f}" if row.num_flops else "",
        )
    console.print(table)
    console.print(f"memory reads at {bandwidth:.1f} GB/s (fp32 sum, {options.threads} threads)")
    report: dict[str, Any] = {
        "machine": machine.describe(),
        "kernels": native_status(),
        "threads": options.threads,
        "read_bandwidth_gb_s": bandwidth,
        "rows": [asdict(row) for row in measured],
    }
    console.print(f"written: {results.save(f'ops-{name}', report, options.out)}")


def _columns(others: list[str]) -> list[str]:
    return [text for name in others for text in (f"{name} us", "ratio")]


def _against(other_us: float | None, native_us: float) -> tuple[str, str]:
    """Two cells: the other's time, and how often ours fits into it."""
    return ("", "") if other_us is None else (f"{other_us:,.1f}", f"{other_us / native_us:.2f}x")


def check(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Refuse to time a wrong result.

    Raises:
        AssertionError: It differs from the reference.
    """
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
