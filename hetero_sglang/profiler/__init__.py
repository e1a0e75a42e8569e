"""Makes head profiles: runs calibration text through a model and sorts its KV heads into roles.

`classify_heads` is the method on given attention probabilities; `profile_model` gets them from a
Transformers model without ever holding more than one step of them. Nothing here knows of SGLang or
of serving; the result is a `hetero_sglang.profile.HeadProfile`.
"""

from __future__ import annotations

from hetero_sglang.profiler.calibration import Calibration, profile_model
from hetero_sglang.profiler.classify import assign_roles, classify_heads
from hetero_sglang.profiler.observation import HeadObserver
from hetero_sglang.profiler.texts import CalibrationText, calibration_texts, read_text, read_texts

__all__ = [
    "Calibration",
    "CalibrationText",
    "HeadObserver",
    "assign_roles",
    "calibration_texts",
    "classify_heads",
    "profile_model",
    "read_text",
    "read_texts",
]
