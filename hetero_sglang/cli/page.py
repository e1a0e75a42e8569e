"""`hetero-sglang profile report`: a profile, and a model's heads under it, as a page to look at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hetero_sglang.cli.calibration_options import add_model_options, option
from hetero_sglang.cli.command import Command, open_profile, say
from hetero_sglang.errors import ConfigError
from hetero_sglang.progress import shown_progress

if TYPE_CHECKING:
    import argparse

    import torch

    from hetero_sglang.profile import HeadProfile
    from hetero_sglang.profiler import Watchable
    from hetero_sglang.profiler.behaviour import HeadBehaviour

__all__ = ["REPORT"]

_TOKENS, _STEPS, _TOP_K = 5000, 64, 1024
"""Defaults; the last where a profile does not record the size of its sets of best positions."""

_DESCRIPTION = """\
Draws a profile as one HTML page that needs neither scripts nor the network: roles, stability,
similarity, weights, and what ratios cost in bytes.

With --model and --prompt the model reads one more text and decodes, and the page shows what came of
the profile's promises there: whether stable heads stay where they look, whether a pivot looks where
its satellites look, and where in the prompt that is, step by step. Take a text like those that will
be served, and none that the profile was made of.
"""

_EPILOG = """\
examples:
  hetero-sglang profile report smollm2-135m-instruct --html page.html
  hetero-sglang profile report mine.json --model models/mine --prompt held-out.txt --html page.html
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", metavar="PROFILE", help="a file, or a shipped profile's name")
    parser.add_argument("--html", type=Path, required=True, metavar="OUT", help="page to write")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="Transformers directory of the profile's model; needs --prompt",
    )
    parser.add_argument(
        "--prompt", type=Path, metavar="FILE", help="text for the model to read; needs --model"
    )
    option(
        parser,
        "--tokens",
        dest="num_tokens",
        type=int,
        help="of the text, its first ones; more than the profile's best positions (default: "
        f"{_TOKENS}, or all if there are fewer)",
    )
    option(
        parser,
        "--steps",
        dest="num_steps",
        type=int,
        help=f"tokens to decode after it (default: {_STEPS})",
    )
    add_model_options(parser)


def _run(arguments: argparse.Namespace) -> None:
    from hetero_sglang.report import render_report

    is_watched = _is_watched(arguments)
    profile = open_profile(arguments.profile)
    # First, so that a place that cannot be written is told before the model runs.
    arguments.html.parent.mkdir(parents=True, exist_ok=True)
    behaviour = _watch(arguments, profile) if is_watched else None
    page = render_report(profile, behaviour=behaviour)
    _replace(arguments.html, page)
    say(f"{arguments.html}: written, {len(page) / 1024:.0f} KiB")


def _is_watched(arguments: argparse.Namespace) -> bool:
    """Whether a model is to be run.

    Raises:
        ConfigError: Only a part of what that needs was given.
    """
    if arguments.model is not None and arguments.prompt is None:
        raise ConfigError("--model needs a text to read; add --prompt FILE")
    if arguments.prompt is not None and arguments.model is None:
        raise ConfigError("--prompt needs the model that reads it; add --model DIR")
    if arguments.model is not None:
        return True
    for flag, name in (
        ("--tokens", "num_tokens"),
        ("--steps", "num_steps"),
        ("--dtype", "dtype"),
        ("--device", "device"),
    ):
        if name in vars(arguments):
            raise ConfigError(
                f"{flag} is about running a model; add --model DIR and --prompt FILE, or leave it "
                "out"
            )
    return False


def _watch(arguments: argparse.Namespace, profile: HeadProfile) -> HeadBehaviour:
    from hetero_sglang.profiler import WatchedModel, read_text
    from hetero_sglang.profiler.behaviour import watch_behaviour
    from hetero_sglang.profiler.watching import read_model_config

    profile.check_fits(read_model_config(arguments.model))
    text = read_text(arguments.prompt)
    given = vars(arguments)
    model = WatchedModel(
        arguments.model, **{name: given[name] for name in ("dtype", "device") if name in given}
    )
    top_k = profile.provenance.top_k or _TOP_K
    with shown_progress() as progress:
        return watch_behaviour(
            model,
            _prompt(model, text.text, given.get("num_tokens"), top_k),
            profile,
            top_k=top_k,
            num_steps=given.get("num_steps", _STEPS),
            progress=progress,
        )


def _prompt(model: Watchable, text: str, num_tokens: int | None, top_k: int) -> torch.Tensor:
    """The text's first tokens.

    Raises:
        ConfigError: They are too few.
    """
    token_ids = model.tokenize(text)
    if num_tokens is None:
        # Sets of more than half of all positions would overlap whatever the heads do.
        num_tokens = min(max(_TOKENS, 2 * top_k), len(token_ids))
    elif num_tokens <= top_k:
        raise ConfigError(
            f"--tokens must be above the {top_k} best positions that the profile compares, got "
            f"{num_tokens}"
        )
    if not top_k < num_tokens <= len(token_ids):
        raise ConfigError(
            f"the text of --prompt has {len(token_ids)} tokens for this model, needed are "
            f"{max(num_tokens, top_k + 1)}; give a longer one"
        )
    return token_ids[:num_tokens]


def _replace(path: Path, page: str) -> None:
    """Writes the page; readers see the old one or the new one, never a part."""
    staging = path.with_name(f".{path.name}.new")
    staging.write_text(page, encoding="utf-8")
    os.replace(staging, path)


REPORT = Command(
    "report", "a profile as a page to look at", _DESCRIPTION, _add_options, _run, _EPILOG
)
