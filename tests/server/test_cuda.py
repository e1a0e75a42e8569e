"""A server on a GPU gives stock's greedy tokens at ratio 1, with CUDA graphs and without.

Not yet run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.server.conftest import PromptSpec, policy_flags
from tests.server.harness import SHARED_CORES, start_server

if TYPE_CHECKING:
    from pathlib import Path

    from tests.server.conftest import Reference

pytestmark = [pytest.mark.gpu, pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(1200)]

NUM_TOKENS = 32
PROMPTS = (
    PromptSpec("prose", 5, 20_000),
    PromptSpec("code", 700, 30_000),
    PromptSpec("code", 1_400),
)
# Later flags win over the harness's own.
ON_CUDA = ("--device", "cuda", "--mem-fraction-static", "0.5")
ENVIRONMENT = {
    **SHARED_CORES,
    "SGLANG_USE_CPU_ENGINE": "0",
    "HETERO_SGLANG_UNTESTED_CUDA": "1",
}


def answers(model: Path, directory: Path, reference: Reference, *flags: str) -> list[list[int]]:
    with start_server(model, directory, *ON_CUDA, *flags, environment=ENVIRONMENT) as server:
        prompts = [reference.ids(spec) for spec in PROMPTS]
        return [answer.token_ids for answer in server.generate_all(prompts, NUM_TOKENS)]


@pytest.fixture(scope="module")
def stock(
    demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory, reference: Reference
) -> list[list[int]]:
    """Stock's tokens; Triton's backend, because others do not serve fp32."""
    directory = tmp_path_factory.mktemp("stock")
    return answers(demo_model_dir, directory, reference, "--attention-backend", "triton")


@pytest.mark.parametrize("flags", [(), ("--disable-cuda-graph",)], ids=["graphs", "eager"])
def test_ratio_one_gives_stocks_tokens(
    demo_model_dir: Path,
    tmp_path: Path,
    reference: Reference,
    stock: list[list[int]],
    flags: tuple[str, ...],
) -> None:
    given = answers(demo_model_dir, tmp_path, reference, *policy_flags(1.0, *flags))
    assert given == stock


def test_rows_are_fetched_and_everything_is_given_back(
    demo_model_dir: Path, tmp_path: Path, reference: Reference
) -> None:
    # A threshold of 1 makes nearly every check drift.
    flags = policy_flags(0.3, "--kv-policy-drift-threshold", "1.0")
    with start_server(
        demo_model_dir, tmp_path, *ON_CUDA, *flags, environment=ENVIRONMENT
    ) as server:
        ids = reference.ids(PROMPTS[-1])
        assert len(server.generate(ids, 4 * NUM_TOKENS).token_ids) == 4 * NUM_TOKENS
        server.wait_until_idle()
        state = server.heterocache()
    assert state["integrity"] == "ok"
    assert state["rows_installed"] > 0
    assert state["areas"]["blocks"]["used_bytes"] == 0
