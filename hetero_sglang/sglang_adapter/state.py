"""The policy's part of ``/server_info``."""

from __future__ import annotations

from typing import Any


def server_state(scheduler: Any) -> dict[str, Any]:
    """Plain data for ``internal_states[0]["heterocache"]``.

    Args:
        scheduler: SGLang's scheduler.

    Returns:
        Settings, bytes of each area, counters and memd's state. ``full_equivalent_bytes``
        is what stock SGLang would hold for the same live tokens.
    """
    allocator = scheduler.token_to_kv_pool_allocator
    pool = allocator.get_kvcache()
    runtime = allocator.runtime
    setup, shape = pool.setup, pool.shape
    token_bytes = setup.tables.num_heads * shape.row_bytes
    live = allocator.size - allocator.available_size()
    state: dict[str, Any] = runtime.state()
    state["areas"]["resident"] = {
        "capacity_bytes": shape.resident_bytes,
        "used_bytes": live * setup.tables.num_planes * shape.row_bytes,
    }
    state["areas"]["watch"] = {
        "capacity_bytes": shape.watch_bytes,
        "used_bytes": live * shape.watched_bytes,
    }
    return {
        "enabled": True,
        "profile": setup.profile.origin,
        "profile_digest": setup.profile.digest,
        "prefix_reuse": False,
        "drift_threshold": setup.config.drift_threshold,
        "drift_interval": setup.config.drift_interval,
        "full_equivalent_bytes": live * token_bytes,
        "full_equivalent_capacity_bytes": allocator.size * token_bytes,
        **state,
    }
