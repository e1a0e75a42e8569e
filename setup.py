"""Packages, their folders, and the compiled CPU kernels; everything else is in pyproject.toml.

The kernels are plain C++ without any header or library of torch. They are optional: without a C++
compiler the installation succeeds, says so, and ``hetero_kernels`` computes with torch instead.
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


def build_kernels(package_dir: Path) -> None:
    """Compile the kernels into an (installed or editable) ``hetero_kernels`` folder.

    Args:
        package_dir: Folder of the package that will be imported.
    """
    # Loaded by path: importing hetero_kernels would import torch, absent in an isolated build.
    script = KERNELS / "build_native.py"
    spec = importlib.util.spec_from_file_location("_hetero_build_native", script)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"cannot load {script}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    try:
        module.build(package_dir / "_native")
    except (module.BuildError, OSError) as error:
        print(
            f"hetero-sglang: the CPU kernels were not compiled ({error}); torch computes instead, "
            "which is slower. Install a C++ compiler (g++ or clang++) and install again.",
            file=sys.stderr,
        )


class BuildWithKernels(build_py):
    """``build_py`` that also compiles the kernels, into the source tree when editable."""

    def run(self) -> None:
        """Copy the Python files, then compile."""
        super().run()
        build_kernels(KERNELS if self.editable_mode else Path(self.build_lib) / "hetero_kernels")


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
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel},
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
        "memd": ["py.typed"],
    },
    include_package_data=False,
)
