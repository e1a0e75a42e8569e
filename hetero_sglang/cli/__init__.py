"""The command `hetero-sglang`: prepares what a server needs before it starts.

A command is one `Command`: a name, help, a function that declares its options and one that runs it.
What it needs of torch and Transformers is imported when it runs, so that `--help` is immediate.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import hetero_sglang
from hetero_sglang.cli.demo_model import DEMO_MODEL
from hetero_sglang.cli.profile import PROFILE
from hetero_sglang.errors import HeteroError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_PROGRAM = "hetero-sglang"

_DESCRIPTION = """\
HeteroCache for SGLang keeps part of the KV cache on the device and the rest in host memory.
This command prepares what such a server needs; the server itself is SGLang's own:

  hetero-sglang demo-model --out models/smollm2
  python -m sglang.launch_server --model-path models/smollm2 --kv-policy heterocache
"""

_COMMANDS = (DEMO_MODEL, PROFILE)


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
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_to(commands)
    return parser
