"""Roles, clusters and weights against those that the authors' own tool finds.

The expected values in `tests/data/published-classification.json` were printed by the profiling tool
published with HeteroCache (`tools/get_cluster.py` of github ponytaill/HeteroCache, commit
a6d0be2165ca6a8bd5b60ce8cc20df63a39759f9), run unchanged on the attention that `attention` makes
here. It was given:

- a file `attn_weights_{layer}_{step}.pt` for each layer and step, fp32 [1, num_q_heads, 1,
  num_positions + step], with the prompt as step num_positions (the tool numbers steps by position)
  and, for each decoded token, one more column that `--max_length num_positions` cuts off again;
- a Llama configuration with the case's head counts;
- `--topk`, `--stable_threshold`, `--sim_threshold` of the case, and `--decode_step num_positions`,
  so that heads are compared where the prompt ends, as for the published profiles.

The file keeps the tool's numbers as printed; it gives pivots and volatile heads the weight -1.
Seeds were taken such that in every row the last position in the set and the first outside differ
by more than 1e-5 of their value, far over the rounding of fp32: no case hangs on ties.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from hetero_sglang.profile import HeadRole
from hetero_sglang.profiler import classify_heads

if TYPE_CHECKING:
    from hetero_sglang.profile import HeadProfile

DATA = Path(__file__).parents[2] / "data" / "published-classification.json"
CASES = json.loads(DATA.read_text())["cases"]
each_case = pytest.mark.parametrize("case", [pytest.param(case, id=case["id"]) for case in CASES])


def attention(
    *,
    seed: int,
    num_layers: int,
    num_kv_heads: int,
    group_size: int,
    num_positions: int,
    num_steps: int,
    num_themes: int,
) -> torch.Tensor:
    """Softmax attention of a prompt's last token and of the tokens decoded after it.

    In each layer a few themes are laid out over the prompt. Each KV head follows one of them, more
    or less closely, and while decoding keeps to what it saw, more or less. Everything is drawn
    uniformly: these draws are NumPy's simplest, so the likeliest to stay what they are.

    Returns:
        fp32 [num_steps + 1, num_layers, num_kv_heads * group_size, num_positions].
    """
    random = np.random.Generator(np.random.PCG64(seed)).random
    heads = (num_layers, num_kv_heads)
    themes = random((num_layers, num_themes, num_positions))
    followed = (random(heads) * num_themes).astype(int)
    # Most heads are close to their theme, else clusters would hardly outgrow pairs.
    likeness, drift = 1.0 - random((*heads, 1)) ** 2, random((*heads, 1))
    sharpness = 4.0 + 16.0 * random((*heads, 1, 1))
    own = random((*heads, num_positions))
    at_prompt = likeness * themes[np.arange(num_layers)[:, None], followed] + (1 - likeness) * own
    elsewhere = random((num_steps, *heads, num_positions))
    scores = np.concatenate([at_prompt[None], (1 - drift) * at_prompt + drift * elsewhere])
    of_queries = 0.2 * random((num_steps + 1, *heads, group_size, num_positions))
    logits = sharpness * (scores[..., None, :] + of_queries)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return torch.from_numpy(
        weights.reshape(num_steps + 1, num_layers, -1, num_positions).astype(np.float32)
    )


def classify(case: dict[str, Any]) -> HeadProfile:
    steps = attention(**case["attention"])
    return classify_heads(
        steps[0],
        steps[1:],
        num_kv_heads=case["attention"]["num_kv_heads"],
        **case["settings"],
    )


@each_case
def test_roles_clusters_and_weights_are_those_of_the_published_tool(case: dict[str, Any]) -> None:
    profile = classify(case)

    assert profile.roles.tolist() == case["roles"]
    assert dict(profile.satellites_of) == {
        (cluster["layer"], cluster["pivot"]): tuple(cluster["satellites"])
        for cluster in case["satellites_of"]
    }
    expected = np.array(case["allocation"])
    np.testing.assert_allclose(
        profile.allocation, np.where(expected < 0, 0.0, expected), rtol=1e-5, atol=0
    )


@each_case
def test_every_role_comes_up(case: dict[str, Any]) -> None:
    assert {role for layer in case["roles"] for role in layer} == set(HeadRole)
