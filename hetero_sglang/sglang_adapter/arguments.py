"""Command line flags of the policy and their way into SGLang's server arguments."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, NoReturn, get_args

from hetero_sglang.config import (
    PRESETS,
    HeteroConfig,
    Preset,
    RetrievalMode,
    WatchDtype,
    parse_bytes,
    resolve_preset,
)
from hetero_sglang.errors import ConfigError, HeteroError
from hetero_sglang.policy.roles import PivotRows
from hetero_sglang.profile import HeadProfile, find_shipped, load_profile

ATTENTION_BACKEND = "heterocache"
ENVIRONMENT_SWITCH = "HETERO_KV_POLICY"
"""Set in the main process when the policy is on, so that children register their hooks."""

_GLUE_GRAPH = "SGLANG_ENABLE_METADATA_GLUE_GRAPH"

DEFAULT_MAX_RUNNING_REQUESTS = 64
"""SGLang's own default (thousands of rows) would make per-request tables huge."""

_DEFAULTS = HeteroConfig()


def fail(error: HeteroError | str) -> NoReturn:
    """Ends the process with one clear line, as argparse does."""
    raise SystemExit(f"hetero-sglang: error: {error}")


def _describe_preset(preset: Preset) -> str:
    """A preset's settings as flags, for ``--help``."""
    fields = PRESETS[preset]
    names = ("pivot_rows", "watch_dtype", "window", "refresh_share", "min_tokens")
    return ", ".join(f"{name.replace('_', '-')} {fields[name]}" for name in names)


def add_cli_args(original: Any, parser: argparse.ArgumentParser) -> None:
    """Adds the policy's flags after SGLang's own (AROUND ``ServerArgs.add_cli_args``)."""
    original(parser)
    group = parser.add_argument_group("HeteroCache KV policy (hetero-sglang)")
    group.add_argument(
        "--kv-policy",
        choices=["none", "heterocache"],
        default="none",
        help="How KV is kept. 'none' is stock SGLang. 'heterocache' keeps a share of the prompt's "
        "KV on the device, the rest in memd, and fetches it back when attention drifts.",
    )
    group.add_argument(
        "--kv-policy-profile",
        default=_DEFAULTS.profile,
        metavar="PATH|auto|calibrate",
        help="Head profile (hetero-sglang profile makes one). 'auto' takes a shipped profile that "
        "fits the model's architecture. 'calibrate' makes one of the loaded model at start and "
        "keeps it in a cache, by weights, text and settings.",
    )
    group.add_argument(
        "--kv-policy-calibration-text",
        default=_DEFAULTS.calibration_text,
        metavar="FILE|DIR|shipped",
        help="With --kv-policy-profile calibrate: text, or directory of .txt files, to calibrate "
        "on; take what the server will see. 'shipped' is prose, dialogue and code.",
    )
    group.add_argument(
        "--kv-policy-calibration-tokens",
        type=int,
        default=_DEFAULTS.calibration_tokens,
        metavar="TOKENS",
        help="With --kv-policy-profile calibrate: first tokens of each text that are read.",
    )
    group.add_argument(
        "--kv-policy-ratio",
        type=float,
        default=_DEFAULTS.ratio,
        help="Share of a prompt's KV bytes that stays on the device, above the profile's floor and "
        "at most 1 (= full attention; with --kv-policy-preset paper a little less).",
    )
    group.add_argument(
        "--kv-policy-preset",
        choices=list(PRESETS),
        default=_DEFAULTS.preset,
        help="Settings that belong together, each overridden by its own flag. 'default' is what "
        "measures best: "
        f"{_describe_preset('default')}. 'paper' is arXiv 2601.13684: {_describe_preset('paper')}, "
        "and what budgets of clamped heads leave over is lost.",
    )
    group.add_argument(
        "--kv-policy-pivot-rows",
        choices=get_args(PivotRows),
        default=None,
        help="What pivot heads keep of a prompt: 'all' rows, or a 'budget' like their satellites', "
        "beside all their keys in --kv-policy-watch-dtype. 'budget' lowers the floor of the ratio. "
        "(default: the preset's)",
    )
    group.add_argument(
        "--kv-policy-watch-dtype",
        choices=get_args(WatchDtype),
        default=None,
        help="What the keys are kept in with which budgeted pivots watch for drift: the KV dtype "
        "('model'), 'int8' (a quarter of a 16-bit row) or 'int4' (an eighth). (default: the "
        "preset's)",
    )
    group.add_argument(
        "--kv-policy-window",
        type=int,
        default=None,
        metavar="TOKENS",
        help="Select by the mean attention of this many last prompt tokens, and always keep them "
        "and the first few tokens. 1 is the paper: the last token alone, nothing protected. "
        "(default: the preset's)",
    )
    group.add_argument(
        "--kv-policy-refresh-share",
        type=float,
        default=None,
        metavar="SHARE",
        help="After a drift, the share of a head's budget that the pivot's best positions must "
        "have; of the rest the worst go. 1 is the paper: the whole budget. (default: the preset's)",
    )
    group.add_argument(
        "--kv-policy-drift-threshold",
        type=float,
        default=_DEFAULTS.drift_threshold,
        help="A pivot head has drifted when the median overlap of its newest attention with its "
        "reference falls below this. Higher fetches more often.",
    )
    group.add_argument(
        "--kv-policy-drift-interval",
        type=int,
        default=_DEFAULTS.drift_interval,
        help="Decode steps between two drift checks of a request.",
    )
    group.add_argument(
        "--kv-policy-memd",
        default=_DEFAULTS.memd_address,
        metavar="ADDRESS|auto",
        help="'auto' starts a memory daemon of the server's own and stops it with the server; "
        "an ipc:// address joins a running one (memd serve).",
    )
    group.add_argument(
        "--kv-policy-memd-bytes",
        default="auto",
        metavar="BYTES|auto",
        help="Host memory to take from memd, for example 8GiB. 'auto' takes what the compressed "
        "heads of every token need.",
    )
    group.add_argument(
        "--kv-policy-min-tokens",
        type=int,
        default=None,
        help="Prompts shorter than this keep everything. (default: the preset's)",
    )
    group.add_argument(
        "--kv-policy-retrieval",
        choices=get_args(RetrievalMode),
        default=_DEFAULTS.retrieval,
        help="'async' hides fetches behind decode steps. 'sync' installs fetched rows before the "
        "next step: deterministic, for tests and study. 'off' never fetches.",
    )


def config_from_namespace(args: argparse.Namespace) -> HeteroConfig | None:
    """The policy's settings, or None when the policy is off.

    Raises:
        ConfigError: A flag has a value that cannot work, or is given without the policy.
    """
    if getattr(args, "kv_policy", "none") == "none":
        _refuse_orphan_flags(args)
        return None
    return HeteroConfig(
        profile=args.kv_policy_profile,
        calibration_text=args.kv_policy_calibration_text,
        calibration_tokens=args.kv_policy_calibration_tokens,
        ratio=args.kv_policy_ratio,
        drift_threshold=args.kv_policy_drift_threshold,
        drift_interval=args.kv_policy_drift_interval,
        memd_address=args.kv_policy_memd,
        memd_bytes=parse_bytes(args.kv_policy_memd_bytes),
        retrieval=args.kv_policy_retrieval,
        **resolve_preset(
            args.kv_policy_preset,
            {
                "pivot_rows": args.kv_policy_pivot_rows,
                "watch_dtype": args.kv_policy_watch_dtype,
                "window": args.kv_policy_window,
                "refresh_share": args.kv_policy_refresh_share,
                "min_tokens": args.kv_policy_min_tokens,
            },
        ),
    )


def _refuse_orphan_flags(args: argparse.Namespace) -> None:
    """A policy flag without the policy would silently serve stock: refuse it."""
    parser = argparse.ArgumentParser()
    add_cli_args(lambda _: None, parser)
    for action in parser._actions:
        name = action.dest
        if not name.startswith("kv_policy_") or not hasattr(args, name):
            continue
        if getattr(args, name) != action.default:
            raise ConfigError(
                f"{action.option_strings[0]} {getattr(args, name)} has no effect without "
                "--kv-policy heterocache; add that flag or remove this one"
            )


def from_cli_args(original: Any, cls: Any, args: argparse.Namespace) -> Any:
    """Carries the settings on the server arguments (AROUND ``ServerArgs.from_cli_args``).

    ``_hetero`` is plain data, so it survives pickling to every child. Fields that early
    resolution reads are set here, on the raw record.
    """
    try:
        config = config_from_namespace(args)
    except HeteroError as error:
        fail(error)
    server_args = original(cls, args)
    if config is None:
        os.environ.pop(ENVIRONMENT_SWITCH, None)
        return server_args
    for field in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        given = getattr(server_args, field)
        if given not in (None, ATTENTION_BACKEND):
            flag = "--" + field.replace("_", "-")
            fail(
                f"{flag} {given} contradicts --kv-policy heterocache, which brings its own; drop it"
            )
    if (glue := os.environ.get(_GLUE_GRAPH, "")).lower() in ("1", "true", "yes", "y"):
        fail(
            f"{_GLUE_GRAPH}={glue} does not go with --kv-policy heterocache: what the host does "
            "before a decode step would be captured in a graph, and done once; unset it"
        )
    from sglang.srt.arg_groups.choices import add_attention_backend_choices

    add_attention_backend_choices([ATTENTION_BACKEND])
    server_args.attention_backend = ATTENTION_BACKEND
    # Prefix reuse needs the compressed heads of a prefix back from memd before a hit can be
    # prefilled; until that exists every prompt is computed (docs/architecture.md).
    server_args.disable_radix_cache = True
    if server_args.max_running_requests is None:
        server_args.max_running_requests = DEFAULT_MAX_RUNNING_REQUESTS
    server_args._hetero = config.to_dict()
    os.environ[ENVIRONMENT_SWITCH] = "1"
    os.environ["SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"] = "0"
    return server_args


def resolve_profile(config: HeteroConfig, model_config: dict[str, Any]) -> HeadProfile:
    """The profile that these settings name, checked against the model.

    Args:
        config: Settings.
        model_config: Contents of the model's ``config.json``.

    Returns:
        A profile of this architecture.

    Raises:
        ProfileError: No such file, malformed, or of another model.
    """
    if config.profile == "auto":
        profile = find_shipped(model_config)
    else:
        profile = load_profile(Path(config.profile))
        profile.check_fits(model_config)
    return profile


def read_model_config(model_path: str) -> dict[str, Any] | None:
    """``config.json`` of a local model folder; None when the path is not one."""
    path = Path(model_path) / "config.json"
    if not path.is_file():
        return None
    return dict(json.loads(path.read_text(encoding="utf-8")))
