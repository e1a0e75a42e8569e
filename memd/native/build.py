"""Compiles the gather: ``python -m memd.native.build [--out DIR]``.

Owns the compiler call and the name of what it makes; the package loads it. Standard library only,
because the installer runs this file by its path, without the package.

One small library without any dependency: on x86-64 it holds the gather for three instruction
levels and picks one when it is loaded, so the result can be moved to other machines.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = [
    "DEFAULT_OUT_DIR",
    "LIBRARY_NAME",
    "BuildError",
    "build",
    "find_compiler",
    "main",
    "source_digest",
]

DEFAULT_OUT_DIR = Path(__file__).with_name("_built")
"""Where the package looks for the library."""

LIBRARY_NAME = "libmemd_gather.so"
"""File name of the library."""

_SOURCE = Path(__file__).with_name("gather.cpp")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall")
# Not every architecture, compiler and C library can choose a function when it is loaded.
_VARIANTS = (("-DMEMD_LEVELS",), ())


class BuildError(RuntimeError):
    """Nothing could be compiled; the message holds the compiler's own words."""


def source_digest() -> str:
    """Digest of the source and the flags; it is compiled in, to notice stale builds."""
    return hashlib.sha256(" ".join(_FLAGS).encode() + _SOURCE.read_bytes()).hexdigest()[:16]


def find_compiler() -> list[str]:
    """The C++ compiler as a command prefix: ``CXX`` if set, else the first that is installed.

    Raises:
        BuildError: There is none.
    """
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]) is not None:
            return command
    raise BuildError(f"no C++ compiler found (looked for {wanted or 'g++, clang++ and c++'})")


def build(out_dir: Path | None = None) -> Path:
    """Compile the library and put it in place atomically.

    Args:
        out_dir: Folder to write to, made if absent; by default ``DEFAULT_OUT_DIR``.

    Returns:
        Where it is.

    Raises:
        BuildError: There is no compiler, or it failed.
    """
    out_dir = DEFAULT_OUT_DIR if out_dir is None else Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    compiler = find_compiler()
    digest = f'-DMEMD_SOURCE_DIGEST="{source_digest()}"'
    with tempfile.TemporaryDirectory(dir=out_dir) as scratch:
        made = Path(scratch) / LIBRARY_NAME
        for variant in _VARIANTS:
            command = [*compiler, *_FLAGS, *variant, digest, str(_SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return made.replace(out_dir / LIBRARY_NAME)
    raise BuildError(f"{shlex.join(compiler)} failed:\n{done.stderr.strip()[-2000:]}")


def main(argv: list[str] | None = None) -> int:
    """Command line entry: build, and say what was built.

    Args:
        argv: Arguments without the program's name; None takes the process's.

    Returns:
        Exit status: 0, or 1 when nothing could be compiled.
    """
    parser = argparse.ArgumentParser(description="Compile memd's gather.")
    parser.add_argument("--out", type=Path, help="folder to write to")
    options = parser.parse_args(argv)
    try:
        built = build(options.out)
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{built}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
