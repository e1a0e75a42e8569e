"""Entry point of SGLang's plugin group ``sglang.srt.plugins``.

SGLang calls ``register`` in every process. The launcher gets two hooks that add the
flags; without ``--kv-policy heterocache`` that is all, and the server is stock. With it
the launcher also gets the refusals, and scheduler processes the pools and the backend.

SGLang logs and swallows a plugin's exceptions and would then serve stock with a healthy
face. So every failure here ends the process with one line.
"""

from __future__ import annotations

import logging
import os
import sys

from hetero_sglang.errors import HeteroError

logger = logging.getLogger(__name__)

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs."


def register() -> None:
    """Installs what this process needs."""
    from hetero_sglang.sglang_adapter.arguments import ENVIRONMENT_SWITCH, fail

    # Only scheduler processes have imported the scheduler before plugins are loaded.
    is_scheduler = "sglang.srt.managers.scheduler" in sys.modules
    is_switched_on = bool(os.environ.get(ENVIRONMENT_SWITCH))
    is_asked_for = is_switched_on or any("--kv-policy" in word for word in sys.argv)
    try:
        _register_launcher()
        if is_scheduler and is_switched_on:
            _register_scheduler()
    except HeteroError as error:
        if is_asked_for:
            fail(error)
        logger.warning("hetero-sglang is installed but cannot work here: %s", error)
    except Exception as error:
        if is_asked_for:
            fail(f"the plugin could not install itself: {type(error).__name__}: {error}")
        raise


def _register_launcher() -> None:
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from hetero_sglang.sglang_adapter import arguments
    from hetero_sglang.sglang_adapter.compat import LAUNCHER_TARGETS, check_compatibility
    from hetero_sglang.sglang_adapter.validation import validate

    check_compatibility(LAUNCHER_TARGETS)
    HookRegistry.register(_SERVER_ARGS + "add_cli_args", arguments.add_cli_args, HookType.AROUND)
    HookRegistry.register(_SERVER_ARGS + "from_cli_args", arguments.from_cli_args, HookType.AROUND)
    register_resolution_hook("handle_other_validations")(validate)


def _register_scheduler() -> None:
    from hetero_sglang.sglang_adapter.compat import SCHEDULER_TARGETS, check_compatibility
    from hetero_sglang.sglang_adapter.hooks import register_scheduler_hooks

    check_compatibility(SCHEDULER_TARGETS)
    register_scheduler_hooks()


__all__ = ["register"]
