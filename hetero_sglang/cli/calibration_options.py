"""Options of every command that watches a model's heads over texts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hetero_sglang.cli.command import whole_numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    from hetero_sglang.profiler import Calibration, CalibrationText

__all__ = ["add_calibration_options", "add_model_options", "calibration_of", "option", "texts_of"]


def option(
    parser: argparse.ArgumentParser,
    name: str,
    *,
    dest: str,
    help: str,
    type: Callable[[str], object] = str,
) -> None:
    """Declares an option that is absent from the namespace if it is not given.

    Its default is that of `Calibration`, which the help repeats.
    """
    parser.add_argument(
        name,
        dest=dest,
        type=type,
        default=argparse.SUPPRESS,
        metavar=name.rpartition("-")[2].upper(),
        help=help,
    )


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """Declares what `calibration_of` and `texts_of` read."""
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        metavar="FILE|DIR",
        help="calibration text or a directory of .txt files, may be repeated; by default the "
        "shipped prose, dialogue and code",
    )
    option(
        parser,
        "--tokens",
        dest="prompt_lengths",
        type=whole_numbers,
        help="prompt length, each text's first tokens; several (2000,5000) read each text at each "
        "length (default: 5000)",
    )
    option(
        parser,
        "--steps",
        dest="num_decode_steps",
        type=int,
        help="decoded tokens to watch after each prompt (default: 100)",
    )
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declares how and where a model runs."""
    option(
        parser,
        "--dtype",
        dest="dtype",
        help="dtype to run the model in: float32, bfloat16, float16, or auto: float32 on a CPU, on "
        "a GPU what the weights are stored in (default: auto)",
    )
    option(
        parser,
        "--device",
        dest="device",
        help="where to run the model: cpu, cuda, or auto: a GPU where there is one (default: auto)",
    )


def calibration_of(arguments: argparse.Namespace, **changes: object) -> Calibration:
    """The settings that were given.

    Args:
        arguments: Parsed options.
        **changes: Settings that decide over those given.

    Raises:
        ConfigError: A value is out of range.
    """
    from hetero_sglang.profiler import Calibration

    names = ("prompt_lengths", "num_decode_steps", "top_k", "dtype", "device", "name")
    given = vars(arguments)
    settings = {name: given[name] for name in names if name in given}
    return Calibration(**{**settings, **changes})


def texts_of(arguments: argparse.Namespace) -> tuple[CalibrationText, ...]:
    """The texts that were given, or the shipped ones.

    Raises:
        ConfigError: One cannot be read.
    """
    from hetero_sglang.profiler import calibration_texts, read_texts

    given = tuple(text for path in arguments.text for text in read_texts(path))
    return given or calibration_texts()
