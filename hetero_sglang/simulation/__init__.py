"""An independent simulation of the method: full-cache attention with one mask per KV head.

It shares no code with the plugin, the kernels or memd. Nothing is evicted, moved or fetched here;
a head that "lost" a position merely may not look at it. What a server with real pools and a real
second process answers must be what this computes, token for token; and what a profile does to a
model's answers can be measured with it before anything is served.
"""

from __future__ import annotations

from hetero_sglang.simulation.engine import Simulation, Trace, prefill
from hetero_sglang.simulation.fidelity import Fidelity, compare_distributions, distributions
from hetero_sglang.simulation.method import Method, Profile

__all__ = [
    "Fidelity",
    "Method",
    "Profile",
    "Simulation",
    "Trace",
    "compare_distributions",
    "distributions",
    "prefill",
]
