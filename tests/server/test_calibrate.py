"""`--kv-policy-profile calibrate`: a server makes the profile of the model that it has loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hetero_sglang.profile import load_profile
from hetero_sglang.profiler import (
    Calibration,
    WatchedModel,
    calibration_prompts,
    calibration_texts,
    observe,
)
from tests.server.conftest import policy_flags
from tests.server.harness import run_to_refusal, start_server

if TYPE_CHECKING:
    from tests.server.harness import Server

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(2000)]

# More than one chunk of the calibration's own prefill.
NUM_TOKENS = 2200


def start_flags(text: Path) -> tuple[str, ...]:
    return (
        *policy_flags(0.5, "--kv-policy-profile", "calibrate"),
        *("--kv-policy-calibration-text", str(text)),
        *("--kv-policy-calibration-tokens", str(NUM_TOKENS)),
    )


def profile_path(server: Server) -> Path:
    return Path(server.heterocache()["profile"])


def test_a_server_calibrates_once_and_serves_with_what_transformers_would_have_found(
    demo_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    narrative = next(text for text in calibration_texts() if text.name == "narrative.txt")
    text = tmp_path / narrative.name
    text.write_text(narrative.text, encoding="utf-8")

    with start_server(demo_model_dir, tmp_path / "first", *start_flags(text)) as server:
        path = profile_path(server)
        assert "calibration   0 %, narrative.txt: prompt" in server.log()
        answer = server.generate(list(range(1000, 2200)), 8)
        assert len(answer.token_ids) == 8
    assert path.parent == tmp_path / "cache" / "hetero-sglang" / "profiles"
    served = load_profile(path)

    model = WatchedModel(demo_model_dir, dtype="float32")
    prompts = calibration_prompts(model, [narrative], (NUM_TOKENS,))
    expected = observe(model, prompts, Calibration(prompt_lengths=(NUM_TOKENS,))).profile()
    made, wanted = served.provenance, expected.provenance
    assert made.text_digest == wanted.text_digest
    assert (made.top_k, made.num_decode_steps, made.dtype) == (1024, 100, "float32")
    # Positions on the edge of a set of 1,024 may fall to either side by rounding.
    assert served.stability is not None
    assert served.similarity is not None
    np.testing.assert_allclose(served.stability, expected.stability, atol=3 / 1024)
    np.testing.assert_allclose(served.similarity, expected.similarity, atol=3 / 1024)
    on_a_line = np.abs(served.stability - 0.5).min() < 3 / 1024
    on_a_line |= np.abs(served.similarity - 0.5).min() < 3 / 1024
    assert on_a_line or np.array_equal(served.roles, expected.roles)

    # The second start finds the profile.
    with start_server(demo_model_dir, tmp_path / "second", *start_flags(text)) as server:
        assert "calibrated before" in server.log()
        assert profile_path(server) == path


def test_a_text_longer_than_the_context_is_refused(demo_model_dir: Path, tmp_path: Path) -> None:
    flags = policy_flags(0.5, "--kv-policy-profile", "calibrate")
    code, output = run_to_refusal(
        demo_model_dir, tmp_path, *flags, "--kv-policy-calibration-tokens", "8150"
    )
    assert code != 0
    assert "--kv-policy-calibration-tokens 8150 and 100 decoded tokens do not fit" in output
