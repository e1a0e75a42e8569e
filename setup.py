"""Packages, their folders, and what is compiled; everything else is in pyproject.toml.

The CPU kernels and memd's gather are plain C++ without any header or library of others. They are
optional: without a C++ compiler the installation succeeds and says so, ``hetero_kernels`` computes
with torch instead, and memd copies with NumPy.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
KERNELS = ROOT / "kernels" / "hetero_kernels"
GATHER = ROOT / "memd" / "native"


def compile_by(script: Path, out_dir: Path, instead: str) -> None:
    """Compile one library by its own build script.

    Args:
        script: Module with ``build(out_dir)`` and ``BuildError``.
        out_dir: Where the package that is imported looks for the library.
        instead: What happens without it, for people.
    """
    # Loaded by path: importing its package would import torch or NumPy, absent in an isolated
    # build.
    spec = importlib.util.spec_from_file_location(f"_hetero_{script.parent.name}", script)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"cannot load {script}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    try:
        module.build(out_dir)
    except (module.BuildError, OSError) as error:
        print(
            f"hetero-sglang: {script} compiled nothing ({error}); {instead}, which is slower. "
            "Install a C++ compiler (g++ or clang++) and install again.",
            file=sys.stderr,
        )


class BuildCompiled(build_py):
    """``build_py`` that also compiles, into the source tree when editable."""

    def run(self) -> None:
        """Copy the Python files, then compile."""
        super().run()
        installed = Path(self.build_lib)
        kernels = KERNELS if self.editable_mode else installed / "hetero_kernels"
        compile_by(KERNELS / "build_native.py", kernels / "_native", "torch computes instead")
        gather = GATHER if self.editable_mode else installed / "memd" / "native"
        compile_by(GATHER / "build.py", gather / "_built", "memd copies with NumPy")


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and any Python: the kernels are loaded with ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the wheel's tags."""
        return ("py3", "none", super().get_tag()[2])


class PlatformDistribution(Distribution):
    """A distribution that is not pure Python although it has no extension modules."""

    def has_ext_modules(self) -> bool:
        """Say that the result depends on the platform."""
        return True


setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildCompiled, "bdist_wheel": PlatformWheel},
    packages=[
        *find_packages(include=["hetero_sglang*", "memd*"]),
        *find_packages("kernels", include=["hetero_kernels*"]),
        "hetero_sglang.shipped_profiles",
    ],
    package_dir={
        "hetero_kernels": "kernels/hetero_kernels",
        "hetero_sglang.shipped_profiles": "profiles",
    },
    package_data={
        "hetero_kernels": ["csrc/*", "_native/*"],
        "hetero_sglang": ["**/*.txt", "**/*.json", "**/*.txt.gz", "py.typed"],
        "hetero_sglang.shipped_profiles": ["*.json"],
        "memd": ["py.typed", "native/*.cpp", "native/_built/*"],
    },
    include_package_data=False,
)
