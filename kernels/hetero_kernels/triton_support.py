"""Whether Triton kernels can run here, without importing Triton.

The kernels lie in each operation's ``triton.py`` and in the modules ``triton_*.py``; those import
Triton, so nobody imports them before ``require`` has said yes. On CPU tensors they run in Triton's
interpreter only, which is for tests: it is slow, and it has to be on (``TRITON_INTERPRET=1`` in the
environment) before anything imports Triton.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

# Thread blocks that share a multiprocessor in the kernels with a fixed grid. Two, so that one
# computes while the other waits for memory; their tiles (96 KiB each at the largest head_dim) fit
# into the 227 KiB of shared memory that an H100 has.
_PROGRAMS_PER_PROCESSOR = 2
# In the interpreter programs run one after the other; a few are enough to meet every path.
_INTERPRETED_PROGRAMS = 5


@functools.cache
def is_installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton, as it was imported, interprets its kernels on CPU tensors."""
    import triton

    # Triton decides for each function when it is defined, its own library's functions included.
    library = type(triton.language.standard.sum).__name__
    return bool(triton.knobs.runtime.interpret) and library == "InterpretedFunction"


def require(device: torch.device) -> None:
    """Make sure that Triton kernels can run on a device.

    Raises:
        ValueError: They cannot; the message says what to do.
    """
    if not is_installed():
        raise ValueError("impl='triton' needs Triton, which is not installed: pip install triton")
    if device.type == "cuda":
        # Triton launches on the current device whatever its tensors are on, and an address of
        # another one is an error that no process survives.
        if device.index is not None and device.index != (now := torch.cuda.current_device()):
            raise ValueError(
                f"impl='triton' runs on the current device, cuda:{now}, got tensors on {device}: "
                f"enter torch.cuda.device({str(device)!r})"
            )
        return
    if device.type != "cpu":
        raise ValueError(f"impl='triton' runs on CUDA tensors, got {device}")
    if not is_interpreted():
        raise ValueError(
            "impl='triton' runs on CUDA tensors, got cpu; to check the kernels on a CPU, set "
            "TRITON_INTERPRET=1 in the environment before anything imports Triton"
        )


def widens_bf16(dtype: torch.dtype) -> bool:
    """Whether products must widen their operands first.

    The interpreter keeps bf16 as 16-bit integers and multiplies those.
    """
    return dtype == torch.bfloat16 and is_interpreted()


@functools.cache
def num_programs(device: torch.device) -> int:
    """Programs of a kernel with a fixed grid: as many as run at a time."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return _PROGRAMS_PER_PROCESSOR * processors


def power_of_2(number: int) -> int:
    """The least power of two that is not below ``number`` (at least 1)."""
    return 1 << max(0, number - 1).bit_length()
