"""`hetero-sglang profile show|diff`: what a profile says, and how two differ."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from hetero_sglang.cli.command import Command, numbers, open_profile, stdout_console
from hetero_sglang.config import PRESETS
from hetero_sglang.errors import ConfigError
from hetero_sglang.profile import HeadRole, shard_profile
from hetero_sglang.profile.compare import kappa, rank_correlation, role_changes
from hetero_sglang.report.budgets import ITEM_BYTES, budget_rows, floor, profile_summary

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from rich.console import Console

    from hetero_sglang.profile import HeadProfile

__all__ = ["DIFF", "SHOW", "print_head"]

_LISTED_CHANGES = 40


def _run_show(arguments: argparse.Namespace) -> None:
    if arguments.prompt_tokens < 1:
        raise ConfigError(f"--prompt-tokens must be at least 1, got {arguments.prompt_tokens}")
    for ratio in arguments.ratios:
        if not 0.0 < ratio <= 1.0:
            raise ConfigError(f"--ratios must be above 0 and at most 1, got {ratio:g}")
    if arguments.ranks < 1:
        raise ConfigError(f"--ranks must be at least 1, got {arguments.ranks}")
    profile = open_profile(arguments.profile)
    console = stdout_console()
    print_head(console, profile)
    _print_layers(console, profile)
    _print_budgets(console, profile, arguments.prompt_tokens, arguments.ratios)
    if arguments.ranks > 1:
        _print_ranks(console, profile, arguments.ranks)


def _run_diff(arguments: argparse.Namespace) -> None:
    first, second = open_profile(arguments.first), open_profile(arguments.second)
    changes = role_changes(first, second)
    console = stdout_console()
    console.print(f"A: {arguments.first}, digest {first.digest[:16]}")
    console.print(f"B: {arguments.second}, digest {second.digest[:16]}")
    if not changes:
        console.print(f"The roles of all {first.num_heads} heads agree.")
    else:
        console.print(f"{len(changes)} of {first.num_heads} heads have other roles:")
        pairs = Counter((change.before, change.after) for change in changes)
        for (before, after), count in pairs.most_common():
            console.print(f"  {count:4} {before.name.lower()} -> {after.name.lower()}")
        listed = ", ".join(f"{c.layer}.{c.head}" for c in changes[:_LISTED_CHANGES])
        more = "" if len(changes) <= _LISTED_CHANGES else ", ..."
        console.print(f"  layer.head: {listed}{more}")
    console.print(f"Cohen's kappa of the roles: {kappa(first, second):.3f}")
    if first.stability is not None and second.stability is not None:
        correlation = rank_correlation(first.stability, second.stability)
        console.print(f"Rank correlation of the stability: {correlation:.3f}")
    both = (first.allocation > 0) & (second.allocation > 0)
    if both.any():
        largest = float(np.abs(first.allocation - second.allocation)[both].max())
        console.print(f"Budget weights of heads compressed in both differ by up to {largest:.4f}.")
    moved = sum(
        first.satellites_of[pivot] != second.satellites_of[pivot]
        for pivot in set(first.satellites_of) & set(second.satellites_of)
    )
    console.print(f"Pivots of both with other satellites: {moved}.")


def print_head(console: Console, profile: HeadProfile) -> None:
    """Prints whose profile it is and its summary."""
    model = profile.model
    console.print(
        f"{profile.provenance.model or model.architecture or 'unnamed model'}: {model.num_layers} "
        f"layers of {model.num_q_heads} query and {model.num_kv_heads} KV heads"
    )
    console.print(profile_summary(profile))


def _print_layers(console: Console, profile: HeadProfile) -> None:
    console.print("\nLayers (pivot > its satellites; a: anchors, v: volatile heads)")
    for layer in range(profile.num_layers):
        parts = [
            f"{pivot} > {' '.join(map(str, heads))}"
            for (of, pivot), heads in profile.satellites_of.items()
            if of == layer
        ]
        for mark, role in (("a", HeadRole.ANCHOR), ("v", HeadRole.VOLATILE)):
            heads = np.flatnonzero(profile.roles[layer] == role).tolist()
            if heads:
                parts.append(f"{mark}: {' '.join(map(str, heads))}")
        console.print(f"{layer:4}  {'   '.join(parts)}")


def _print_budgets(
    console: Console, profile: HeadProfile, num_tokens: int, ratios: Sequence[float]
) -> None:
    from rich.table import Table

    full = profile.num_heads * num_tokens * 2 * profile.model.head_dim * ITEM_BYTES
    title = f"A prompt of {num_tokens:,} tokens, 16-bit KV"
    if full:
        title += f" (full attention: {full / 2**20:,.0f} MiB)"
    table = Table(title=f"\n{title}", title_justify="left")
    table.add_column("preset")
    for column in ("ratio", "tokens a head (weight 1)", "least", "most", "on the device"):
        table.add_column(column, justify="right")
    for row in budget_rows(profile, num_tokens, ratios):
        if row.base is None:
            table.add_row(row.preset, f"{row.ratio:g}", f"not above the floor {row.floor:.1%}")
            continue
        size = "" if row.num_bytes is None else f"{row.num_bytes / 2**20:,.0f} MiB"
        numbers = (f"{n:,}" for n in (row.base, row.least, row.most))
        table.add_row(row.preset, f"{row.ratio:g}", *numbers, size)
    console.print(table)


def _add_show_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", metavar="PROFILE", help="a file, or a shipped profile's name")
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=32_768,
        metavar="N",
        help="prompt length of the budgets (default: 32768)",
    )
    parser.add_argument(
        "--ratios",
        type=numbers,
        default=[0.15, 0.3, 0.5, 0.75, 1.0],
        metavar="R,R",
        help="resident shares to show, each above 0 and at most 1 (default: 0.15,0.3,0.5,0.75,1)",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="also show the roles and floors of this many tensor-parallel ranks",
    )


def _print_ranks(console: Console, profile: HeadProfile, num_ranks: int) -> None:
    from rich.table import Table

    table = Table(
        title=f"\nSplit over {num_ranks} tensor-parallel ranks: satellites whose pivot is on "
        "another rank find a new one by similarity, or are anchors if stable, else volatile",
        title_justify="left",
    )
    for column in ("rank", "anchor", "volatile", "pivot", "satellite"):
        table.add_column(column, justify="right")
    for preset in PRESETS:
        table.add_column(f"floor, {preset}", justify="right")
    parts = [("whole", profile)]
    parts += [(str(rank), shard_profile(profile, rank, num_ranks)) for rank in range(num_ranks)]
    for name, part in parts:
        counts = (str(count) for count in part.counts.values())
        table.add_row(name, *counts, *(f"{floor(part, preset):.1%}" for preset in PRESETS))
    console.print(table)
    if profile.similarity is None:
        console.print(
            "This profile keeps no similarity, so such satellites keep everything; profile the "
            "model again to split it well."
        )


def _add_diff_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="a file, or a shipped profile's name")
    parser.add_argument("second", metavar="B", help="the same")


SHOW = Command(
    "show",
    "roles, floors, clusters and budgets of a profile",
    "Shows what a profile says and what ratios mean under it.",
    _add_show_options,
    _run_show,
)

DIFF = Command(
    "diff",
    "how two profiles of one model differ",
    "Compares the roles and weights of two profiles.",
    _add_diff_options,
    _run_diff,
)
