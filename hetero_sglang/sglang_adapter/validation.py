"""The last word before SGLang starts: refusals, model and profile (launcher process)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from hetero_sglang.config import HeteroConfig
from hetero_sglang.errors import HeteroError
from hetero_sglang.sglang_adapter.arguments import fail, read_model_config, resolve_profile
from hetero_sglang.sglang_adapter.refusals import check_model_config, check_server_args
from hetero_sglang.sglang_adapter.setup import heads_of

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


def validate(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Checks resolved arguments when the policy is on (resolution hook).

    A model that is not a local folder is checked in the scheduler, which loads it.
    """
    previous(server_args)
    plain = getattr(server_args, "_hetero", None)
    if plain is None:
        return
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(server_args)
    try:
        check_server_args(view)
        model_config = read_model_config(view.model_path)
        if model_config is not None:
            check_model_config(model_config)
            config = HeteroConfig.from_dict(plain)
            if config.is_calibrating:
                # Roles and floor are known when the scheduler has loaded the model; that the texts
                # can be read is known now.
                from hetero_sglang.sglang_adapter.calibration import texts_to_read

                texts_to_read(config)
                return
            profile = resolve_profile(config, model_config)
            # Only fp32 is not two bytes; the scheduler checks again with the dtype it loaded.
            item_bytes = 4 if view.dtype in ("float", "float32") else 2
            logger.info(
                "HeteroCache: profile %s, preset %s, ratio %.3f, floor %.3f, retrieval %s",
                profile.origin,
                config.preset,
                config.ratio,
                heads_of(config, profile, item_bytes).floor,
                config.retrieval,
            )
    except HeteroError as error:
        fail(error)
