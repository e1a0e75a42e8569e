"""`hetero-sglang profile import`: a published profile becomes one of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from hetero_sglang.cli.command import Command, stdout_console
from hetero_sglang.cli.look import print_head
from hetero_sglang.errors import ConfigError

if TYPE_CHECKING:
    import argparse

__all__ = ["IMPORT"]

_DESCRIPTION = """\
Reads the JSON files of github.com/ponytaill/HeteroCache (tools/get_cluster.py), in either of their
vocabularies, and checks them against the model.
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the published file")
    parser.add_argument(
        "--model-config",
        type=Path,
        required=True,
        metavar="CONFIG",
        help="config.json of the model it was made for",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="profile to write (JSON)"
    )
    parser.add_argument("--name", default="", help="the model's name, for people")


def _run(arguments: argparse.Namespace) -> None:
    from hetero_sglang.profile import ModelShape, save_profile
    from hetero_sglang.profile.published import import_published

    try:
        config = json.loads(arguments.model_config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"--model-config {arguments.model_config} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--model-config {arguments.model_config} holds no model configuration")
    profile = import_published(
        arguments.file.read_bytes(),
        ModelShape.from_config(config),
        origin=arguments.file.name,
        name=arguments.name,
    )
    save_profile(profile, arguments.out)
    console = stdout_console()
    console.print(f"{arguments.out}: written")
    print_head(console, profile)


IMPORT = Command(
    "import",
    "turn a profile published with the paper into one of ours",
    _DESCRIPTION,
    _add_options,
    _run,
)
