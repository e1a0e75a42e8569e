"""Compiles the CPU kernels: ``python -m hetero_kernels.build_native [--out DIR]``.

Owns the compiler call and the names of what it makes; ``native.py`` loads it. Standard library
only, because the installer runs this file by its path, without torch and without the package.

One shared library is built for each instruction level of the machine's architecture; the best one
that the processor knows is picked when it is loaded, so the result can be moved to other machines.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE_DIR = Path(__file__).parent / "csrc"
DEFAULT_OUT_DIR = Path(__file__).parent / "_native"

# Best first. Any other architecture gets one library for what its compiler targets by default.
LEVELS: dict[str, tuple[str, ...]] = {
    "x86_64": ("x86-64-v4-bf16", "x86-64-v4", "x86-64-v3", "x86-64")
}
GENERIC_LEVEL = "generic"

# What selects a level where its name is not an architecture's.
_LEVEL_OPTIONS = {
    "x86-64-v4-bf16": ("-march=x86-64-v4", "-mavx512bf16"),
    GENERIC_LEVEL: (),
}

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
)


class BuildError(RuntimeError):
    """No library could be compiled; the message holds the compiler's own words."""


def levels() -> tuple[str, ...]:
    """Instruction levels that are built on this architecture, best first."""
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    return LEVELS.get(machine, (GENERIC_LEVEL,))


def library_name(level: str) -> str:
    """File name of the library for an instruction level."""
    return f"hetero_kernels-{level}.so"


def source_digest(source_dir: Path = SOURCE_DIR) -> str:
    """Digest of all C++ sources and flags; it is compiled in, to notice stale builds."""
    digest = hashlib.sha256(repr((FLAGS, sorted(_LEVEL_OPTIONS.items()))).encode())
    for path in sorted(source_dir.iterdir()):
        if path.suffix in {".cpp", ".h"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> list[str]:
    """The C++ compiler as a command prefix: ``CXX`` if set, else the first that is installed.

    Raises:
        BuildError: There is none.
    """
    wanted = shlex.split(os.environ.get("CXX", ""))
    if wanted:
        if shutil.which(wanted[0]) is None:
            raise BuildError(f"CXX names {wanted[0]!r}, which is not installed")
        return wanted
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name) is not None:
            return [name]
    raise BuildError("no C++ compiler found (looked for g++, clang++ and c++)")


def build(out_dir: Path | None = None) -> list[Path]:
    """Compile the libraries of all levels, each put in place atomically.

    Args:
        out_dir: Folder to write to, made if absent; by default beside this file, where the package
            looks for them.

    Returns:
        What was built, best level first. A level that the compiler does not know is left out.

    Raises:
        BuildError: There is no compiler, or it could not compile any level.
    """
    out_dir = DEFAULT_OUT_DIR if out_dir is None else Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    compiler = find_compiler()
    digest = source_digest()
    sources = sorted(str(path) for path in SOURCE_DIR.glob("*.cpp"))
    wanted = levels()

    def compile_level(level: str, made: Path) -> subprocess.CompletedProcess[str]:
        options = _LEVEL_OPTIONS.get(level, (f"-march={level}",))
        define = f'-DHK_SOURCE_DIGEST="{digest}"'
        command = [*compiler, *FLAGS, *options, define, *sources, "-o", str(made)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    built: list[Path] = []
    failures: list[str] = []
    with (
        tempfile.TemporaryDirectory(dir=out_dir) as scratch,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
    ):
        files = [Path(scratch) / library_name(level) for level in wanted]
        compiled = pool.map(compile_level, wanted, files)
        for level, made, done in zip(wanted, files, compiled, strict=True):
            if done.returncode != 0:
                failures.append(f"{level}: {done.stderr.strip()[-2000:]}")
                continue
            target = out_dir / made.name
            made.replace(target)
            built.append(target)
    if not built:
        raise BuildError(f"{shlex.join(compiler)} failed:\n" + "\n".join(failures))
    return built


def main(argv: list[str] | None = None) -> int:
    """Command line entry: build, and say what was built.

    Args:
        argv: Arguments without the program's name; ``None`` takes the process's.

    Returns:
        Exit status: 0, or 1 when nothing could be compiled.
    """
    parser = argparse.ArgumentParser(description="Compile the CPU kernels of hetero_kernels.")
    parser.add_argument("--out", type=Path, default=None, help="folder to write to")
    options = parser.parse_args(argv)
    try:
        built = build(options.out)
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for path in built:
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
