"""`hetero-sglang profile`: makes a head profile, and holds the actions on those that exist."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hetero_sglang.cli.calibration_options import (
    add_calibration_options,
    calibration_of,
    option,
    texts_of,
)
from hetero_sglang.cli.command import Command, say
from hetero_sglang.cli.convert import IMPORT
from hetero_sglang.cli.look import DIFF, SHOW
from hetero_sglang.cli.page import REPORT
from hetero_sglang.cli.sweep import SWEEP
from hetero_sglang.progress import shown_progress

if TYPE_CHECKING:
    import argparse

    from hetero_sglang.profiler import Agreement

__all__ = ["PROFILE"]

_ACTIONS = (SHOW, DIFF, REPORT, SWEEP, IMPORT)

_DESCRIPTION = """\
Finds out which KV heads of a model can do with a part of the prompt. Calibration texts go through
the model; heads that keep looking at the same positions (stable) or look where a neighbour looks
(similar) are compressed in serving, the others keep everything:

  anchor     stable, unlike the others   keeps its best positions
  volatile   drifting, unlike the others keeps everything
  pivot      centre of a cluster         watches for drift with all its keys, keeps its best
                                         positions (--kv-policy-pivot-rows all: everything)
  satellite  like its pivot              keeps its best positions, refreshed when the pivot drifts
"""

_EPILOG = """\
Volatile heads and the pivots' watched keys (with --kv-policy-pivot-rows all: all their rows) are
the floor: --kv-policy-ratio must be above it. A lower --similarity-threshold makes larger clusters,
a lower --stable-threshold turns volatile heads into anchors; both tend to lower the floor and to
ask more of each budget.

examples:
  hetero-sglang profile --model models/smollm2 --out smollm2.json
  hetero-sglang profile show smollm2.json --ratios 0.3,0.5
  hetero-sglang profile --model models/mine --out mine.json --text notes.txt --tokens 3000
  python -m sglang.launch_server --model-path models/mine --kv-policy heterocache \\
      --kv-policy-profile mine.json
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    # Required, but not of the actions on profiles that exist.
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="Transformers model directory (required)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="profile to write (required)")
    parser.set_defaults(refuse_usage=parser.error)
    add_calibration_options(parser)
    option(
        parser,
        "--top-k",
        dest="top_k",
        type=int,
        help="a head is known by its best positions; how many of them (default: 1024)",
    )
    option(
        parser,
        "--stable-threshold",
        dest="stable",
        type=float,
        help="share of the best positions that a stable head keeps, 0 to 1 (default: 0.5)",
    )
    option(
        parser,
        "--similarity-threshold",
        dest="similarity",
        type=float,
        help="share of the best positions that similar heads have in common, 0 to 1 (default: 0.5)",
    )
    option(
        parser,
        "--name",
        dest="name",
        help="the model's name in the profile (default: the directory's)",
    )
    actions = parser.add_subparsers(
        title="with profiles that exist", metavar="ACTION", dest="action"
    )
    for action in _ACTIONS:
        action.add_to(actions)


def _run(arguments: argparse.Namespace) -> None:
    missing = [f"--{name}" for name in ("model", "out") if getattr(arguments, name) is None]
    if missing:
        arguments.refuse_usage(f"the following arguments are required: {', '.join(missing)}")
    from hetero_sglang.profile import Thresholds, save_profile
    from hetero_sglang.profiler import Calibration, WatchedModel, calibration_prompts, observe
    from hetero_sglang.report import profile_summary

    defaults, given = Calibration().thresholds, vars(arguments)
    calibration = calibration_of(
        arguments,
        thresholds=Thresholds(
            stable=given.get("stable", defaults.stable),
            similarity=given.get("similarity", defaults.similarity),
        ),
    )
    model = WatchedModel(arguments.model, dtype=calibration.dtype, device=calibration.device)
    prompts = calibration_prompts(model, texts_of(arguments), calibration.prompt_lengths)
    # Beside the profile, so that the same command goes on where it was cut off.
    checkpoint = arguments.out.with_name(arguments.out.name + ".partial")
    with shown_progress() as progress:
        run = observe(model, prompts, calibration, progress=progress, checkpoint=checkpoint)
    profile = run.profile()
    save_profile(profile, arguments.out)
    checkpoint.unlink(missing_ok=True)
    say(f"{arguments.out}: {profile_summary(profile)}")
    agreement = run.agreement()
    if agreement is not None:
        say(_describe(agreement, len(run.prompts)))


def _describe(agreement: Agreement, num_prompts: int) -> str:
    least = " and ".join(agreement.least_pair)
    return (
        f"agreement of the {num_prompts} prompts, each taken alone: Cohen's kappa of roles "
        f"{agreement.kappa:.2f} (least {agreement.least_kappa:.2f}: {least}), rank correlation of "
        f"stability {agreement.rank_correlation:.2f}"
    )


PROFILE = Command(
    "profile", "sort a model's KV heads into roles", _DESCRIPTION, _add_options, _run, _EPILOG
)
