"""`hetero-sglang profile sweep`: what thresholds and set sizes do to a model's answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hetero_sglang.cli.calibration_options import (
    add_calibration_options,
    calibration_of,
    option,
    texts_of,
)
from hetero_sglang.cli.command import Command, numbers, say, stdout_console, whole_numbers
from hetero_sglang.errors import ConfigError
from hetero_sglang.progress import shown_progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from hetero_sglang.profiler.sweep import SweepPoint

__all__ = ["SWEEP"]

_DESCRIPTION = """\
Makes a profile for every combination of thresholds (and sizes of the compared sets), lets each
answer by simulation at the given ratios, and compares the next-token distributions with full
attention's while the text's own words are fed:

  floor  share of a prompt's KV that no ratio can take away
  KL     how far the distributions are from full attention's, nats a token; lower is better
  top 1  share of tokens whose likeliest candidate is full attention's; higher is better

No text is judged by a profile that has seen it: each text judges profiles made of the others, or
the --judge texts do. The model runs in float32.
"""

_EPILOG = """\
A profile's settings are chosen on its own model: take thresholds from the best cells, then
  hetero-sglang profile --model DIR --stable-threshold S --similarity-threshold T --out FILE

examples:
  hetero-sglang profile sweep --model models/smollm2 --csv sweep.csv --svg sweep.svg
  hetero-sglang profile sweep --model models/mine --similarity 0.3,0.5,0.7 --stable 0.5 \\
      --ratios 0.25 --judge held-out.txt --csv sweep.csv
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="Transformers model directory"
    )
    parser.add_argument("--csv", type=Path, required=True, metavar="OUT", help="table to write")
    parser.add_argument("--svg", type=Path, metavar="OUT", help="heat maps to write")
    grid = (
        ("--stable", "stable", numbers, "thresholds of stability (default: 0.4,0.5,0.6,0.7)"),
        (
            "--similarity",
            "similarity",
            numbers,
            "thresholds of similarity (default: 0.4,0.5,0.6,0.7)",
        ),
        ("--top-k", "top_k", whole_numbers, "sizes of the compared sets (default: 1024)"),
        ("--ratios", "ratios", numbers, "resident shares to answer at (default: 0.3,0.5)"),
    )
    for name, dest, type_, help_ in grid:
        option(parser, name, dest=dest, type=type_, help=help_)
    option(
        parser,
        "--fed",
        dest="num_fed",
        type=int,
        help="tokens that are fed after each judging prompt (default: 64)",
    )
    parser.add_argument(
        "--preset",
        choices=("default", "paper"),
        default="default",
        help="the method's settings, as --kv-policy-preset of a server (default: default)",
    )
    parser.add_argument(
        "--judge",
        type=Path,
        action="append",
        default=[],
        metavar="FILE|DIR",
        help="text to judge by, which no profile is made of; may be repeated",
    )
    add_calibration_options(parser)
    option(
        parser,
        "--name",
        dest="name",
        help="the model's name in the figure (default: the directory's)",
    )


def _run(arguments: argparse.Namespace) -> None:
    from hetero_sglang.profiler import WatchedModel, read_texts
    from hetero_sglang.profiler.sweep import Sweep, sweep_profiles, to_csv
    from hetero_sglang.report.heat_map import render_sweep

    given = vars(arguments)
    names = ("stable", "similarity", "top_k", "ratios", "num_fed")
    sweep = Sweep(
        is_paper=arguments.preset == "paper",
        **{name: given[name] for name in names if name in given},
    )
    if given.get("dtype", "float32") not in ("auto", "float32"):
        raise ConfigError(
            f"--dtype must be float32 for a sweep, got {given['dtype']}; leave it out"
        )
    # The largest set size stands for all: every prompt must be longer than it.
    calibration = calibration_of(arguments, dtype="float32", top_k=max(sweep.top_k))
    model = WatchedModel(arguments.model, dtype="float32", device=calibration.device)
    judges = tuple(text for path in arguments.judge for text in read_texts(path))
    with shown_progress() as progress:
        points = sweep_profiles(
            model, texts_of(arguments), calibration, sweep, judges=judges, progress=progress
        )
    _write(arguments.csv, to_csv(points))
    if arguments.svg is not None:
        title = f"{calibration.name or model.name}, preset {arguments.preset}"
        _write(arguments.svg, render_sweep(points, title=title))
    _print(points)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    say(f"{path}: written")


def _print(points: Sequence[SweepPoint]) -> None:
    from rich.table import Table

    # Narrow enough for 80 columns, which is what a pipe is taken for.
    table = Table(box=None, pad_edge=False, caption="-: the ratio is not above the floor")
    columns = "top k,stable,similar,anch.,vol.,pivot,sat.,floor,ratio,KL,top 1"
    for column in columns.split(","):
        table.add_column(column, justify="right", no_wrap=True)
    for p in points:
        table.add_row(
            *(str(n) for n in (p.top_k, f"{p.stable:g}", f"{p.similarity:g}")),
            *(str(n) for n in (p.anchor, p.volatile, p.pivot, p.satellite)),
            f"{p.floor:.1%}",
            f"{p.ratio:g}",
            "-" if p.kl is None else f"{p.kl:.5f}",
            "-" if p.top1 is None else f"{p.top1:.1%}",
        )
    stdout_console().print(table)


SWEEP = Command(
    "sweep",
    "what thresholds and set sizes do to a model's answers",
    _DESCRIPTION,
    _add_options,
    _run,
    _EPILOG,
)
