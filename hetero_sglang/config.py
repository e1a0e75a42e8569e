"""Configuration of the policy: one frozen record for every process of a server.

Flags are parsed in SGLang's main process; the record travels to the scheduler as plain
data. Every check is made here, with the flag's name in the message.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hetero_sglang.errors import ConfigError
from hetero_sglang.policy.budget import BudgetRule
from hetero_sglang.policy.roles import PivotRows, RoleTables

RetrievalMode = Literal["async", "sync", "off"]
WatchDtype = Literal["model", "int8", "int4"]
Preset = Literal["default", "paper"]

MAX_WINDOW = 256
PRESETS: dict[Preset, dict[str, Any]] = {
    # What measures best (docs/method.md, "Measured").
    "default": {
        "pivot_rows": "budget",
        "watch_dtype": "int8",
        "window": 32,
        "refresh_share": 0.25,
        "min_tokens": 1024,
        "is_filling": True,
    },
    # arXiv 2601.13684 to the letter: every pivot keeps all K and V, one query selects, budgets of
    # clamped heads are lost, and no prompt is too short.
    "paper": {
        "pivot_rows": "all",
        "watch_dtype": "model",
        "window": 1,
        "refresh_share": 1.0,
        "min_tokens": 1,
        "is_filling": False,
    },
}
"""Settings that belong together; a flag of its own overrides its part."""


def profile_cache_dir() -> Path:
    """Where profiles that servers made are kept, after the XDG base directories."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hetero-sglang" / "profiles"


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from ``4096``, ``512MiB``, ``8GiB`` or ``auto`` (0).

    Raises:
        ConfigError: The text is none of these.
    """
    if text == "auto":
        return 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(
            f"--kv-policy-memd-bytes {text!r} is not a size; write bytes, 512MiB, 8GiB or auto"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def resolve_preset(preset: Preset, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a preset with what was given in their place.

    Args:
        preset: A preset's name.
        given: Values by field of ``HeteroConfig``; None means not given.

    Returns:
        Fields of ``HeteroConfig``, ``preset`` included.
    """
    fields = {**PRESETS[preset], **{k: v for k, v in given.items() if v is not None}}
    if fields["pivot_rows"] == "all" and given.get("watch_dtype") is None:
        fields["watch_dtype"] = "model"
    return {"preset": preset, **fields}


@dataclass(frozen=True)
class HeteroConfig:
    """Settings of the HeteroCache policy.

    Attributes:
        profile: Path of a head profile, "auto" for a shipped one, or "calibrate" to make one of the
            loaded model at start.
        calibration_text: Text file or directory of such to calibrate on; "shipped": those that come
            with the package.
        calibration_tokens: Tokens of each text to calibrate on.
        ratio: Resident share of a prompt's KV bytes, (0, 1]; 1 is full attention.
        drift_threshold: A pivot drifts when its median overlap falls below this, [0, 1].
        drift_interval: Decode steps between two drift checks, at least 1.
        memd_address: "auto" for a memd of the server's own, or ``ipc://...`` of a running one.
        memd_bytes: Bytes to ask of memd; 0 takes what every token's compressed heads need.
        min_tokens: Shorter prompts keep everything, tokens.
        preset: Where the settings below come from unless a flag of their own says otherwise.
        pivot_rows: "all" rows of a prompt stay for pivots, or a "budget" like their satellites'.
        watch_dtype: What budgeted pivots' keys are kept in to watch drift: "model" (the KV dtype),
            "int8" or "int4". With ``pivot_rows`` "all" always "model": the rows themselves.
        window: Prompt queries whose mean attention selects, at least 1; 1 is the paper (last
            query, maximum over the group, nothing protected).
        refresh_share: Share of a head's budget that its pivot's best positions must have after a
            drift, (0, 1]; 1 is the paper.
        is_filling: Whether budgets of clamped heads go to the others.
        retrieval: "async" hides fetches behind decode steps, "sync" installs them before the
            next step, "off" never fetches.
        block_tokens: Rows of one block of the block pool.
        page_tokens: Token ids of one page of memd.
        landing_rows: Rows of the landing ring; also the most rows of one fetch.
        sync_timeout_s: Longest wait of "sync" retrieval for one step, seconds.
    """

    profile: str = "auto"
    calibration_text: str = "shipped"
    calibration_tokens: int = 5000
    ratio: float = 0.5
    drift_threshold: float = 0.5
    drift_interval: int = 5
    memd_address: str = "auto"
    memd_bytes: int = 0
    min_tokens: int = 1024
    preset: Preset = "default"
    pivot_rows: PivotRows = "budget"
    watch_dtype: WatchDtype = "int8"
    window: int = 32
    refresh_share: float = 0.25
    is_filling: bool = True
    retrieval: RetrievalMode = "async"
    block_tokens: int = 32
    page_tokens: int = 64
    landing_rows: int = 65536
    sync_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ConfigError: Naming flag, value and rule.
        """
        rules = [
            (
                "--kv-policy-calibration-text",
                self.calibration_text,
                self.calibration_text == "shipped" or self.is_calibrating,
                "left out without --kv-policy-profile calibrate",
            ),
            (
                "--kv-policy-calibration-tokens",
                self.calibration_tokens,
                self.calibration_tokens == HeteroConfig.calibration_tokens or self.is_calibrating,
                "left out without --kv-policy-profile calibrate",
            ),
            ("--kv-policy-ratio", self.ratio, 0.0 < self.ratio <= 1.0, "a share in (0, 1]"),
            (
                "--kv-policy-drift-threshold",
                self.drift_threshold,
                0.0 <= self.drift_threshold <= 1.0,
                "an overlap in [0, 1]",
            ),
            (
                "--kv-policy-drift-interval",
                self.drift_interval,
                1 <= self.drift_interval <= 256,
                "between 1 and 256 steps",
            ),
            ("--kv-policy-min-tokens", self.min_tokens, self.min_tokens >= 1, "at least 1 token"),
            ("--kv-policy-memd-bytes", self.memd_bytes, self.memd_bytes >= 0, "not negative"),
            (
                "--kv-policy-retrieval",
                self.retrieval,
                self.retrieval in get_args(RetrievalMode),
                "async, sync or off",
            ),
            ("--kv-policy-preset", self.preset, self.preset in PRESETS, "default or paper"),
            (
                "--kv-policy-pivot-rows",
                self.pivot_rows,
                self.pivot_rows in get_args(PivotRows),
                "all or budget",
            ),
            (
                "--kv-policy-watch-dtype",
                self.watch_dtype,
                self.watch_dtype in get_args(WatchDtype),
                "model, int8 or int4",
            ),
            (
                "--kv-policy-watch-dtype",
                self.watch_dtype,
                self.watch_dtype == "model" or self.pivot_rows == "budget",
                "model (or left out) with --kv-policy-pivot-rows all: those pivots watch with the "
                "rows they keep",
            ),
            (
                "--kv-policy-window",
                self.window,
                1 <= self.window <= MAX_WINDOW,
                f"between 1 and {MAX_WINDOW} prompt tokens",
            ),
            (
                "--kv-policy-refresh-share",
                self.refresh_share,
                0.0 < self.refresh_share <= 1.0,
                "a share in (0, 1]",
            ),
            (
                "--kv-policy-memd",
                self.memd_address,
                self.memd_address == "auto" or self.memd_address.startswith("ipc://"),
                "auto or an ipc:// address (memd serve prints it)",
            ),
        ]
        for flag, value, holds, rule in rules:
            if not holds:
                raise ConfigError(f"{flag} must be {rule}, got {value!r}")

    @property
    def is_calibrating(self) -> bool:
        """Whether the profile is made of the loaded model."""
        return self.profile == "calibrate"

    @property
    def is_watching(self) -> bool:
        """Whether drift is looked for: not without retrieval, nor where everything is kept."""
        return self.retrieval != "off" and not (self.ratio >= 1.0 and self.is_filling)

    @property
    def has_watch_pool(self) -> bool:
        """Whether pivots' keys are held beside their rows."""
        return self.is_watching and self.pivot_rows == "budget"

    def budget_rule(self, tables: RoleTables) -> BudgetRule:
        """How this ratio is split over these heads."""
        return BudgetRule(
            ratio=self.ratio,
            held_heads=tables.held_heads,
            num_heads=tables.num_heads,
            min_tokens=self.min_tokens,
            is_filling=self.is_filling,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the way to another process."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HeteroConfig:
        """The record behind ``to_dict``."""
        return cls(**data)
