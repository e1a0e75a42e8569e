"""Bytes of the areas."""

from __future__ import annotations

import pytest

from hetero_sglang.cache.sizing import GENERATED_SHARE, SizingRule
from hetero_sglang.errors import ConfigError

RULE = SizingRule(
    ratio=0.5,
    num_planes=32,
    num_compressed=58,
    row_bytes=512,
    block_tokens=32,
    context_tokens=8192,
)


def test_a_token_costs_its_share_and_the_reserve_for_generated_tokens() -> None:
    assert RULE.block_rows_per_token == pytest.approx(45 - 32 + 58 * GENERATED_SHARE)
    full = 90 * 512
    assert RULE.bytes_per_token / full == pytest.approx(0.5 + 58 / 90 * GENERATED_SHARE, abs=1e-3)


def test_the_areas_of_many_tokens_cost_what_the_rule_says() -> None:
    shape = RULE.shape_for(200_000)
    assert shape.total_bytes == pytest.approx(
        200_000 * RULE.bytes_per_token + RULE.fixed_bytes(), rel=1e-3
    )
    assert shape.total_bytes < 0.6 * 200_000 * 90 * 512


def test_one_longest_request_that_keeps_everything_always_fits() -> None:
    for num_tokens in (100, 8192, 20_000):
        shape = RULE.shape_for(num_tokens)
        longest = min(8192, num_tokens)
        assert shape.num_blocks * shape.block_tokens >= longest * shape.num_compressed
        assert shape.staging_tokens == longest


def test_ratio_one_has_a_block_row_for_every_compressed_row() -> None:
    rule = SizingRule(1.0, 32, 58, 512, 32, 8192)
    assert rule.block_rows_per_token == 58


def test_watched_keys_are_paid_for_out_of_the_same_ratio() -> None:
    # SmolLM2 with budgeted pivots: 2 volatile heads, 30 pivots whose int8 keys are 66 bytes.
    rule = SizingRule(0.3, 2, 88, 512, 32, 8192, watched_bytes=30 * 66)
    kept = rule.block_rows_per_token - 88 * GENERATED_SHARE
    assert 2 * 512 + 30 * 66 + kept * 512 == pytest.approx(0.3 * 90 * 512)
    assert rule.bytes_per_token == pytest.approx((27 + 88 * GENERATED_SHARE) * 512, abs=2)
    shape = rule.shape_for(200_000)
    assert shape.watch_bytes == 200_001 * 30 * 66
    assert shape.total_bytes == pytest.approx(
        200_000 * rule.bytes_per_token + rule.fixed_bytes(), rel=1e-3
    )


def test_no_room_is_refused_with_the_flags_that_help() -> None:
    with pytest.raises(ConfigError, match=r"--mem-fraction-static or --max-total-tokens"):
        RULE.shape_for(0)
