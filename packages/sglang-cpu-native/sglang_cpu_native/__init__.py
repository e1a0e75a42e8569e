"""SGLang platform plugin for a plain CPU: stands in for sgl-kernel and torchvision.

SGLang calls :func:`activate` on the first ``import sglang`` of every process (entry point group
``sglang.srt.platforms``). A general plugin would be too late: SGLang's own modules import both
packages at module level before general plugins are loaded.

This module owns the two stand-ins and nothing else. It must not import SGLang, and it must leave
an installation with a GPU, or with the real packages, exactly as it is.
"""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import NoReturn

__all__ = ["activate"]


class _KernelStandIn(ModuleType):
    """``sgl_kernel`` whose every function exists and says, when called, that it does not.

    SGLang imports these names at module level (helpers of speculative decoding and of KV copies);
    plain prefill and decode call none of them.
    """

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_args: object, **_kwargs: object) -> NoReturn:
            raise NotImplementedError(
                f"sgl_kernel.{name} is not available: SGLang runs here without sgl-kernel "
                "(CPU, distribution sglang-cpu-native)"
            )

        missing.__name__ = missing.__qualname__ = name
        return missing


class _InterpolationMode(enum.Enum):
    """The members of ``torchvision.transforms.InterpolationMode`` that SGLang's configs name."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def _with_spec(module: ModuleType, *, is_package: bool) -> ModuleType:
    """Give a stand-in a module spec: ``importlib.util.find_spec`` raises on modules without one."""
    module.__spec__ = importlib.machinery.ModuleSpec(
        module.__name__, loader=None, is_package=is_package
    )
    if is_package:
        module.__path__ = []
    return module


def _stand_in_for_sgl_kernel() -> None:
    doc = "Stand-in: the kernels of sgl-kernel are not available on this machine."
    sys.modules["sgl_kernel"] = _with_spec(_KernelStandIn("sgl_kernel", doc), is_package=False)


def _stand_in_for_torchvision() -> None:
    # Transformers caches the answer; asked before the stand-in exists, it keeps knowing that
    # torchvision is absent and never takes a path that needs the real one.
    from transformers.utils.import_utils import is_torchvision_available

    is_torchvision_available()

    doc = "Stand-in: torchvision is not installed."
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    root, transforms, functional = (
        _with_spec(ModuleType(name, doc), is_package=True) for name in names
    )
    root.transforms = transforms  # type: ignore[attr-defined]
    transforms.functional = functional  # type: ignore[attr-defined]
    transforms.InterpolationMode = _InterpolationMode  # type: ignore[attr-defined]
    functional.InterpolationMode = _InterpolationMode  # type: ignore[attr-defined]
    sys.modules.update(zip(names, (root, transforms, functional), strict=True))


def activate() -> None:
    """Prepare SGLang's imports on a machine without CUDA device; do nothing elsewhere.

    Returns:
        ``None``: SGLang reads a class path here if a plugin brings a platform of its own. This one
        does not, so SGLang goes on with its in-tree CPU platform.
    """
    import torch

    if torch.cuda.is_available():
        return
    if importlib.util.find_spec("sgl_kernel") is None:
        _stand_in_for_sgl_kernel()
    if importlib.util.find_spec("torchvision") is None:
        _stand_in_for_torchvision()
