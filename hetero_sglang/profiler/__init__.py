"""Makes head profiles: runs calibration text through a model and sorts its KV heads into roles.

`classify_heads` is the method on given attention probabilities; `profile_model` gets them from a
Transformers model without ever holding more than one step of them; `observe` does so from anything
that can be watched. Nothing here knows of SGLang or of serving; the result is a
`hetero_sglang.profile.HeadProfile`.
"""

from __future__ import annotations

from hetero_sglang.profiler.behaviour import HeadBehaviour, watch_behaviour
from hetero_sglang.profiler.calibration import (
    Agreement,
    Calibration,
    Observations,
    Prompt,
    calibration_prompts,
    observe,
    profile_model,
)
from hetero_sglang.profiler.classify import assign_roles, classify_heads
from hetero_sglang.profiler.observation import HeadObserver, PromptObservation
from hetero_sglang.profiler.texts import CalibrationText, calibration_texts, read_text, read_texts
from hetero_sglang.profiler.watching import Watchable, WatchedModel

__all__ = [
    "Agreement",
    "Calibration",
    "CalibrationText",
    "HeadBehaviour",
    "HeadObserver",
    "Observations",
    "Prompt",
    "PromptObservation",
    "Watchable",
    "WatchedModel",
    "assign_roles",
    "calibration_prompts",
    "calibration_texts",
    "classify_heads",
    "observe",
    "profile_model",
    "read_text",
    "read_texts",
    "watch_behaviour",
]
