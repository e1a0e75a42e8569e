"""How far profiles of one model agree, by text, by length and by number of decoded tokens.

Every text is read at every length and watched while tokens are decoded. Profiles made of one text
each are compared (Cohen's kappa of the roles, Spearman's rank correlation of the stability), and
profiles of shorter runs with the one of the longest. The size of the compared sets is either fixed
or a share of the prompt: two random sets of k out of N positions share k / N, so with a fixed size
everything looks stable and alike in a short prompt.

    python -m benchmarks.quality.calibration
    python -m benchmarks.quality.calibration --lengths 2000,4000 --steps 32
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.common import machine, results
from hetero_sglang.profile import Thresholds
from hetero_sglang.profile.compare import kappa, rank_correlation
from hetero_sglang.profiler import (
    Calibration,
    CalibrationText,
    HeadObserver,
    Observations,
    PromptObservation,
    WatchedModel,
    calibration_prompts,
    calibration_texts,
)
from hetero_sglang.profiler.observation import pooled_stability
from tests.simulation import texts as more_texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero_sglang.profile import HeadProfile

ROOT = Path(__file__).parents[2]
SHARE = 0.2
"""Of the prompt, where the compared sets grow with it; the paper's 1,024 of 5,000 is near it."""
SETS = ("fixed", "share")


def main() -> int:
    """Run, print tables, write a JSON file."""
    options = parse_arguments()
    console = Console(stderr=True)
    model = WatchedModel(options.model, dtype="float32")
    runs = watch(model, options, console)
    report: dict[str, Any] = {
        "benchmark": "quality/calibration",
        "machine": machine.describe(),
        "settings": results.settings(options),
        "by_length": by_length(runs, options),
        "by_steps": by_steps(runs, options),
        "by_texts": by_texts(runs, options),
    }
    print_tables(report)
    console.print(f"written: {results.save('quality-calibration', report, options.out)}")
    return 0


def watch(
    model: WatchedModel, options: argparse.Namespace, console: Console
) -> dict[tuple[str, int], Observations]:
    """Observations of all texts by kind of set and prompt length."""
    lengths = options.lengths
    found: dict[tuple[str, int], list[PromptObservation]] = {
        (kind, length): [] for kind in SETS for length in lengths
    }
    with Progress(console=console) as progress:
        texts = all_texts()
        task = progress.add_task("watching", total=len(texts) * sum(lengths))
        for text, length in itertools.product(texts, lengths):
            (prompt,) = calibration_prompts(model, [text], (length,))
            observers = {kind: HeadObserver(set_size(kind, length, options.top_k)) for kind in SETS}
            for index, step in enumerate(model.attention(prompt.token_ids, options.steps)):
                for observer in observers.values():
                    (observer.add_step if index else observer.begin_prompt)(step)
            for kind, observer in observers.items():
                found[kind, length].append(observer.result(text.name))
            progress.advance(task, length)
    return {
        (kind, length): Observations(
            name=model.name,
            shape=model.shape,
            prompts=tuple(prompts),
            calibration=Calibration(
                prompt_lengths=(length,),
                num_decode_steps=options.steps,
                top_k=set_size(kind, length, options.top_k),
                thresholds=options.thresholds,
            ),
            dtype=model.dtype,
            text_digest="",
        )
        for (kind, length), prompts in found.items()
    }


def set_size(kind: str, length: int, top_k: int) -> int:
    """Positions of the compared sets."""
    return top_k if kind == "fixed" else round(SHARE * length)


def all_texts() -> list[CalibrationText]:
    """The shipped calibration texts, and two that no shipped profile was made of."""
    return [
        *calibration_texts(),
        CalibrationText("language reference", more_texts.text("prose")),
        CalibrationText("argparse", more_texts.text("code")),
    ]


def by_length(
    runs: dict[tuple[str, int], Observations], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Agreement between texts at each length, and of all texts with the longest length."""
    rows = []
    for kind in SETS:
        longest = runs[kind, max(options.lengths)]
        for length in options.lengths:
            if set_size(kind, length, options.top_k) >= length:
                continue
            run = runs[kind, length]
            agreement = run.agreement()
            assert agreement is not None
            rows.append(
                {
                    "sets": kind,
                    "length": length,
                    "set_size": set_size(kind, length, options.top_k),
                    "kappa_between_texts": agreement.kappa,
                    "least_kappa": agreement.least_kappa,
                    "least_pair": agreement.least_pair,
                    "rank_correlation_between_texts": agreement.rank_correlation,
                    "median_stability": float(
                        sorted(run.profile().stability.ravel())[run.shape.num_heads // 2]
                    ),
                    "counts": counts(run.profile()),
                    **compared(run, longest, "longest"),
                }
            )
    return rows


def by_steps(
    runs: dict[tuple[str, int], Observations], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Profiles of the first decoded tokens against those of all, at the paper's length."""
    full = runs["fixed", nearest(options.lengths, 5000)]
    rows = []
    for num_steps in sorted({min(n, options.steps) for n in (8, 16, 32, 64, options.steps)}):
        part = dataclasses.replace(
            full,
            prompts=tuple(
                dataclasses.replace(prompt, overlaps=prompt.overlaps[:num_steps])
                for prompt in full.prompts
            ),
        )
        rows.append({"steps": num_steps, **compared(part, full, "all")})
    return rows


def by_texts(
    runs: dict[tuple[str, int], Observations], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Profiles of some texts against profiles of the others: every split of the texts."""
    run = runs["fixed", nearest(options.lengths, 5000)]
    rows = []
    for count in range(1, len(run.prompts)):
        pairs = [
            (some, [prompt for prompt in run.prompts if prompt not in some])
            for some in map(list, itertools.combinations(run.prompts, count))
        ]
        rows.append(
            {
                "texts": count,
                "kappa_with_the_others": mean(
                    kappa(run.profile(prompts=a), run.profile(prompts=b)) for a, b in pairs
                ),
                "rank_correlation_with_the_others": mean(
                    rank_correlation(pooled_stability(a), pooled_stability(b)) for a, b in pairs
                ),
            }
        )
    return rows


def compared(run: Observations, other: Observations, name: str) -> dict[str, float]:
    """Kappa and rank correlation of two runs' profiles."""
    return {
        f"kappa_with_{name}": kappa(run.profile(), other.profile()),
        f"rank_correlation_with_{name}": rank_correlation(
            pooled_stability(run.prompts), pooled_stability(other.prompts)
        ),
    }


def counts(profile: HeadProfile) -> dict[str, int]:
    """Heads by role."""
    return {role.name.lower(): count for role, count in profile.counts.items()}


def nearest(values: Sequence[int], wanted: int) -> int:
    """The value nearest to the wanted one."""
    return min(values, key=lambda value: abs(value - wanted))


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given = os.environ.get("HETERO_DEMO_MODEL", ROOT / ".cache" / "demo-model")
    parser.add_argument("--model", type=Path, default=Path(given), help="Transformers directory")
    parser.add_argument(
        "--lengths",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[1500, 2000, 3000, 4000, 5000, 5700],
    )
    parser.add_argument("--steps", type=int, default=100, help="decoded tokens")
    parser.add_argument("--top-k", type=int, default=1024, help="size of the fixed sets")
    parser.add_argument("--stable", type=float, default=0.5, help="threshold of stability")
    parser.add_argument("--similarity", type=float, default=0.5, help="threshold of similarity")
    parser.add_argument("--out", type=Path, help="result file")
    options = parser.parse_args()
    options.thresholds = Thresholds(stable=options.stable, similarity=options.similarity)
    return options


def print_tables(report: dict[str, Any]) -> None:
    """Show every part on stdout."""
    console = Console()
    for part in ("by_length", "by_steps", "by_texts"):
        rows = report[part]
        table = Table(title=part.replace("_", " "))
        names = [name for name in rows[0] if name not in ("counts", "least_pair")]
        for name in names:
            table.add_column(name.replace("_", " "), justify="right")
        for row in rows:
            cells = (row[name] for name in names)
            table.add_row(*(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells))
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
