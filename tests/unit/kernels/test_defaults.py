"""What a process sets as torch's defaults (SGLang loads models under bf16) changes no result."""

from __future__ import annotations

import contextlib

import pytest
import torch

from hetero_kernels import (
    DecodeWorkspace,
    extend_attention,
    pack_positions,
    plan_delta,
    score_positions,
    top_bits,
    top_positions,
    topk_overlap,
    triton_support,
    window_scores,
)
from hetero_kernels.testing import implementations, using


def results(impl, tensors):
    """Every operation that makes its own result, by name."""
    k, slots, lengths = tensors["k"], tensors["slots"], tensors["lengths"]
    scale = 0.25
    found = {
        "score_positions": score_positions(tensors["group"], k, scale, slots=slots, impl=impl),
        "extend_attention": extend_attention(
            tensors["q"], k, k, prefix_len=3, scale=scale, impl=impl
        ),
        "top_positions": top_positions(tensors["scores"], 7, order="best", impl=impl),
        "top_bits": top_bits(tensors["scores"], 7, 2, impl=impl),
        "pack_positions": pack_positions(tensors["positions"], 2),
    }
    found["overlap"], found["newest"] = topk_overlap(
        tensors["queries"],
        keys=k,
        planes=tensors["planes"],
        req_to_token=slots[None],
        rows=tensors["rows"],
        prompt_lens=lengths,
        top_k=lengths // 2,
        reference=tensors["positions"][:1],
        scale=scale,
        impl=impl,
    )
    if impl != "native":
        found["window_scores"] = window_scores(tensors["window"], k, scale, impl=impl)
        plan = plan_delta(tensors["positions"], tensors["positions"].flip(0), 64, impl=impl)
        found |= {f"plan_delta {name}": part for name, part in plan._asdict().items()}
    return found


@pytest.mark.parametrize("name", [*implementations(), "reference", "triton"])
def test_results_do_not_depend_on_the_defaults_of_the_process(name):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {
        "q": normal(37, 4, 16),
        "k": normal(2, 40, 16),
        "group": normal(2, 2, 16),
        "window": normal(2, 5, 2, 16),
        "queries": normal(1, 5, 3, 16),
        "scores": normal(2, 40),
        "slots": torch.randperm(40, generator=generator).int(),
        "positions": torch.stack(
            [torch.randperm(40, generator=generator)[:9] for _ in range(2)]
        ).int(),
        "planes": torch.ones(1, dtype=torch.int32),
        "rows": torch.zeros(1, dtype=torch.int64),
        "lengths": torch.full((1,), 40, dtype=torch.int32),
    }
    if name == "triton" and not (triton_support.is_installed() and triton_support.is_interpreted()):
        pytest.skip("Triton is not there, or compiles for a GPU")
    with contextlib.nullcontext("triton") if name == "triton" else using(name) as impl:
        expected = results(impl, tensors)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                actual = results(impl, tensors)
        finally:
            torch.set_default_dtype(before)
    for operation, result in expected.items():
        assert torch.equal(actual[operation], result), operation
        assert actual[operation].dtype == result.dtype, operation


def test_a_workspace_holds_fp32_whatever_the_default_is():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        workspace = DecodeWorkspace.allocate(2, 3, 4, 64, torch.device("cpu"), num_programs=5)
    finally:
        torch.set_default_dtype(before)
    assert workspace.sums.dtype == workspace.accumulators.dtype == torch.float32
