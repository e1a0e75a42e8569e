"""`hetero-sglang profile import`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hetero_sglang import cli
from hetero_sglang.profile import load_profile
from tests.unit.profile.test_published import published

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_import_writes_a_profile_of_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, config, out = (tmp_path / name for name in ("p.json", "config.json", "out.json"))
    source.write_text(json.dumps(published()))
    config.write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "num_hidden_layers": 2,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "hidden_size": 512,
                "vocab_size": 1000,
            }
        )
    )
    words = ["profile", "import", str(source), "--model-config", str(config), "--out", str(out)]
    assert cli.main([*words, "--name", "toy"]) == 0
    profile = load_profile(out)
    assert profile.model.head_dim == 64
    assert profile.provenance.model == "toy"
    assert "8 KV heads: 2 anchor, 1 volatile, 2 pivot, 3 satellite" in capsys.readouterr().out

    config.write_text(
        config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    out.unlink()
    assert cli.main(words) == 1
    assert "each of the model's 3 layers" in capsys.readouterr().err
    assert not out.exists()
