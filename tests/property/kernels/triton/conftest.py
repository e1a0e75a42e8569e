"""The Triton kernels: in Triton's interpreter on CPU tensors, compiled (marker `gpu`) on CUDA.

The interpreter runs a program after the other in NumPy, so examples here are few and small, and its
bf16 products are only as good as `hetero_kernels.triton_support.widens_bf16` makes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from hetero_kernels import triton_support

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreted"),
        pytest.param("cuda", id="compiled", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        if not triton_support.is_installed():
            pytest.skip("Triton is not installed")
        if not triton_support.is_interpreted():
            pytest.skip("a GPU is there: Triton compiles (TRITON_INTERPRET=1 interprets)")
    return request.param


@pytest.fixture
def replay(device: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Makes of a call what a CUDA graph makes of it: the same launches on the same addresses."""

    def record(call: Callable[[], None]) -> Callable[[], None]:
        if device == "cpu":
            return call
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    return record
