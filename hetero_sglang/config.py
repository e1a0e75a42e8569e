"""Configuration of the policy: one frozen record for every process of a server.

Flags are parsed in SGLang's main process; the record travels to the scheduler as plain
data. Every check is made here, with the flag's name in the message.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from hetero_sglang.errors import ConfigError

RetrievalMode = Literal["async", "sync", "off"]

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


@dataclass(frozen=True)
class HeteroConfig:
    """Settings of the HeteroCache policy.

    Attributes:
        profile: Path of a head profile, or "auto" for a shipped one.
        ratio: Resident share of a prompt's KV bytes, (0, 1]; 1 is full attention.
        drift_threshold: A pivot drifts when its median overlap falls below this, [0, 1].
        drift_interval: Decode steps between two drift checks, at least 1.
        memd_address: "auto" for a memd of the server's own, or ``ipc://...`` of a running one.
        memd_bytes: Bytes to ask of memd; 0 takes what every token's compressed heads need.
        min_tokens: Shorter prompts keep everything, tokens.
        retrieval: "async" hides fetches behind decode steps, "sync" installs them before the
            next step, "off" never fetches.
        block_tokens: Rows of one block of the block pool.
        page_tokens: Token ids of one page of memd.
        landing_rows: Rows of the landing ring; also the most rows of one fetch.
        sync_timeout_s: Longest wait of "sync" retrieval for one step, seconds.
    """

    profile: str = "auto"
    ratio: float = 0.5
    drift_threshold: float = 0.5
    drift_interval: int = 5
    memd_address: str = "auto"
    memd_bytes: int = 0
    min_tokens: int = 1024
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

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the way to another process."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HeteroConfig:
        """The record behind ``to_dict``."""
        return cls(**data)
