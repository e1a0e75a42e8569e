"""How often a drift check decides otherwise when the watched keys are quantised.

One run of the paper's method over each text, with exact keys, decides what happens. At every check
of every pivot the same queries are put to quantised keys as well: the reference set is made anew
with them, as a server would have, and verdict and chosen set are compared. For int4 the study also
tries what the shipped format was chosen among: one scale a key, or one for 16 or 32 elements.

    python -m benchmarks.quality.watch_precision
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import results
from benchmarks.quality._study import excerpts, load_subject, new_report, study_parser
from hetero_sglang.simulation.engine import Simulation, prefill
from hetero_sglang.simulation.method import (
    Method,
    best_first,
    median,
    overlap,
    pooled_scores,
)

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

    from hetero_sglang.simulation.engine import Look

FORMATS = {
    # Name: bits, elements of a scale (0: the whole key).
    "int8": (8, 0),
    "int4, one scale": (4, 0),
    "int4, scale for 32": (4, 32),
    "int4, scale for 16": (4, 16),
}


def fake_quantise(keys: Tensor, bits: int, group: int) -> Tensor:
    """Keys [N, D] after a way through ``bits`` bits with a bf16 scale for ``group`` elements."""
    groups = keys.unflatten(-1, (-1, group or keys.shape[-1]))
    largest = 2 ** (bits - 1) - 1
    step = (groups.abs().amax(-1, keepdim=True) / largest).bfloat16().float().clamp_min(1e-30)
    return ((groups / step).round().clamp(-largest, largest) * step).flatten(-2)


@dataclass
class Count:
    """What one format did over all checks.

    Attributes:
        is_other: Whether the verdict differed, by check.
        shared: Share of the newest query's exact set that the format also chose, by check.
        error: Distance of the median overlaps, by check.
    """

    is_other: list[bool] = field(default_factory=list)
    shared: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)


class Comparison:
    """Looks at every check with every format."""

    def __init__(self, threshold: float) -> None:
        self.counts = {name: Count() for name in FORMATS}
        self.num_checks = self.num_drifts = 0
        self._threshold = threshold

    def __call__(self, look: Look) -> None:
        """Decides one check with exact and with quantised keys."""
        self.num_checks += 1
        self.num_drifts += look.has_drifted
        middle, newest = self._decide(look, look.keys)
        assert (middle < self._threshold) == look.has_drifted
        for name, (bits, group) in FORMATS.items():
            count = self.counts[name]
            other, chosen = self._decide(look, fake_quantise(look.keys, bits, group))
            count.is_other.append((other < self._threshold) != look.has_drifted)
            count.shared.append(overlap(newest, chosen))
            count.error.append(abs(other - middle))

    @staticmethod
    def _decide(look: Look, keys: Tensor) -> tuple[float, Tensor]:
        """Median overlap and the newest query's set."""
        queries = torch.cat([look.reference_queries[None], look.queries])
        sets = best_first(pooled_scores(queries, keys, look.scale))[:, : look.size]
        return median([overlap(sets[0], row) for row in sets[1:]]), sets[-1]


def main() -> int:
    """Run, print a table, write a JSON file."""
    options = parse_arguments()
    console = Console(stderr=True)
    subject = load_subject(options)
    method = Method.paper(options.ratio)
    comparison = Comparison(method.drift_threshold)
    texts = excerpts(subject.tokenizer, options.tokens)[: options.texts]
    for text in track(texts, "texts", console=console):
        simulation = Simulation(subject.model, subject.roles, method, observer=comparison)
        simulation.follow(prefill(subject.model, text.prompt), text.following)
    report = new_report("watch_precision", options) | {
        "num_checks": comparison.num_checks,
        "num_drifts": comparison.num_drifts,
        "formats": {name: summary(count) for name, count in comparison.counts.items()},
    }
    print_table(report)
    console.print(f"written: {results.save('quality-watch-precision', report, options.out)}")
    return 0


def summary(count: Count) -> dict[str, float]:
    """Shares and means of one format."""
    return {
        "other_verdicts": round(statistics.mean(count.is_other), 5),
        "set_shared_mean": round(statistics.mean(count.shared), 5),
        "set_shared_least": round(min(count.shared), 5),
        "overlap_error_mean": round(statistics.mean(count.error), 5),
    }


def print_table(report: dict[str, Any]) -> None:
    """Show the result on stdout."""
    table = Table(
        title=f"Quantised against exact watched keys, {report['num_checks']} checks of pivots "
        f"({report['num_drifts']} drifts)"
    )
    for column in ("format", "other verdicts", "set shared", "least", "overlap off by"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for name, found in report["formats"].items():
        table.add_row(
            name,
            f"{found['other_verdicts']:.2%}",
            f"{found['set_shared_mean']:.2%}",
            f"{found['set_shared_least']:.2%}",
            f"{found['overlap_error_mean']:.4f}",
        )
    Console().print(table)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = study_parser(__doc__)
    parser.add_argument("--ratio", type=float, default=0.5, help="resident share, above the floor")
    parser.add_argument("--tokens", type=int, default=64, help="tokens fed after each prompt")
    parser.add_argument("--texts", type=int, default=99, help="use the first so many texts only")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
