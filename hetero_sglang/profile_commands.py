"""`hetero-sglang profile show|diff|report|import`: look at profiles, and bring in published ones.

What they print is built here as plain data first, so that it can be tested; `rich` draws it.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hetero_sglang.config import PRESETS, HeteroConfig, Preset, resolve_preset
from hetero_sglang.errors import BudgetError, ConfigError
from hetero_sglang.policy.budget import allocate_budget
from hetero_sglang.profile import HeadRole, ModelShape, load_profile, save_profile, shipped_profiles
from hetero_sglang.profile.published import import_published

if TYPE_CHECKING:
    import argparse

    from numpy.typing import NDArray
    from rich.console import Console

    from hetero_sglang.policy.roles import RoleTables
    from hetero_sglang.profile import HeadProfile

__all__ = [
    "BudgetRow",
    "RoleChange",
    "add_profile_actions",
    "budget_rows",
    "kappa",
    "profile_summary",
    "rank_correlation",
    "role_changes",
]

_ITEM_BYTES = 2
"""Of KV elements in the tables: 16-bit KV."""
_LISTED_CHANGES = 40


@dataclass(frozen=True)
class BudgetRow:
    """What one ratio means for one prompt length.

    Attributes:
        preset: Preset of the settings.
        ratio: Resident share of the prompt's KV bytes.
        floor: Share that no budget takes away.
        base: Tokens of a head of weight 1; None where the ratio is not above the floor.
        least: Smallest budget of a compressed head, tokens.
        most: Largest budget, tokens.
        num_bytes: Bytes of the prompt on the device, 16-bit KV; None where the model's head
            dimension is not known.
    """

    preset: Preset
    ratio: float
    floor: float
    base: int | None = None
    least: int = 0
    most: int = 0
    num_bytes: int | None = None


@dataclass(frozen=True)
class RoleChange:
    """A head that two profiles see differently.

    Attributes:
        layer: Layer.
        head: KV head in the layer.
        before: Role in the first profile.
        after: Role in the second.
    """

    layer: int
    head: int
    before: HeadRole
    after: HeadRole


def budget_rows(profile: HeadProfile, num_tokens: int, ratios: list[float]) -> list[BudgetRow]:
    """Budgets of a prompt under each preset and ratio."""
    found: list[BudgetRow] = []
    head_dim = profile.model.head_dim
    for preset in PRESETS:
        for ratio in ratios:
            config = HeteroConfig(ratio=ratio, **resolve_preset(preset, {}))
            tables = _tables(profile, config)
            rule = config.budget_rule(tables)
            try:
                budget = allocate_budget(tables.allocation, num_tokens, rule)
            except BudgetError:
                found.append(BudgetRow(preset, ratio, rule.floor))
                continue
            rows = rule.held_heads * num_tokens + int(budget.tokens.sum())
            found.append(
                BudgetRow(
                    preset,
                    ratio,
                    rule.floor,
                    budget.base,
                    int(budget.tokens.min(initial=num_tokens)),
                    int(budget.tokens.max(initial=0)),
                    round(rows * 2 * head_dim * _ITEM_BYTES) if head_dim else None,
                )
            )
    return found


def role_changes(first: HeadProfile, second: HeadProfile) -> list[RoleChange]:
    """Heads whose roles differ, in order.

    Raises:
        ConfigError: The profiles have not the same number of layers and heads.
    """
    if first.roles.shape != second.roles.shape:
        shapes = [f"{p.num_layers} layers of {p.num_kv_heads} KV heads" for p in (first, second)]
        raise ConfigError(f"the profiles are of different models: {shapes[0]} and {shapes[1]}")
    return [
        RoleChange(
            layer, head, HeadRole(first.roles[layer, head]), HeadRole(second.roles[layer, head])
        )
        for layer, head in np.argwhere(first.roles != second.roles).tolist()
    ]


def kappa(first: HeadProfile, second: HeadProfile) -> float:
    """Cohen's kappa of the roles: 1 is agreement on every head, 0 what chance would give.

    Where both profiles give every head one and the same role, there is nothing to agree on by
    chance and the result is 1.
    """
    a, b = first.roles.ravel(), second.roles.ravel()
    observed = float((a == b).mean())
    expected = sum(float((a == role).mean() * (b == role).mean()) for role in HeadRole)
    return 1.0 if expected == 1.0 else (observed - expected) / (1.0 - expected)


def rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Spearman's correlation: 1 if both order all values alike, NaN if one has no order.

    Args:
        first: Values, any shape.
        second: Values of the same shape.
    """
    a, b = _ranks(first.ravel()), _ranks(second.ravel())
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means = last - (counts + 1) / 2
    return np.asarray(means[group], dtype=np.float64)


def _tables(profile: HeadProfile, config: HeteroConfig) -> RoleTables:
    from hetero_sglang.cache.watch import tables_for

    # The watched share hardly depends on the head dimension; 128 stands in for an unknown one.
    return tables_for(config, profile, _ITEM_BYTES, head_dim=128)


# -- commands ------------------------------------------------------------------------------------


def add_profile_actions(parser: argparse.ArgumentParser) -> None:
    """Adds `show`, `diff`, `report` and `import` below `hetero-sglang profile`."""
    actions = parser.add_subparsers(
        title="with profiles that exist", metavar="ACTION", dest="action"
    )

    show = actions.add_parser(
        "show",
        help="roles, floors, clusters and budgets of a profile",
        description="Shows what a profile says and what ratios mean under it.",
    )
    show.add_argument("profile", metavar="PROFILE", help="a file, or a shipped profile's name")
    show.add_argument(
        "--prompt-tokens",
        type=int,
        default=32_768,
        metavar="N",
        help="prompt length of the budgets",
    )
    show.add_argument(
        "--ratios",
        type=_ratios,
        default=[0.15, 0.3, 0.5, 0.75, 1.0],
        metavar="R,R",
        help="resident shares to show (default: 0.15,0.3,0.5,0.75,1)",
    )
    show.set_defaults(run=_run_show)

    diff = actions.add_parser(
        "diff",
        help="how two profiles of one model differ",
        description="Compares the roles and weights of two profiles.",
    )
    diff.add_argument("first", metavar="A", help="a file, or a shipped profile's name")
    diff.add_argument("second", metavar="B", help="the same")
    diff.set_defaults(run=_run_diff)

    report = actions.add_parser(
        "report",
        help="a profile as a page to look at",
        description="Draws a profile as one HTML page that needs neither scripts nor the network: "
        "roles, stability, similarity, weights, and what ratios cost in bytes.",
    )
    report.add_argument("profile", metavar="PROFILE", help="a file, or a shipped profile's name")
    report.add_argument("--html", type=Path, required=True, metavar="OUT", help="page to write")
    report.set_defaults(run=_run_report)

    bring = actions.add_parser(
        "import",
        help="turn a profile published with the paper into one of ours",
        description="Reads the JSON files of github.com/ponytaill/HeteroCache "
        "(tools/get_cluster.py), in either of their vocabularies, and checks them against the "
        "model.",
    )
    bring.add_argument("file", type=Path, metavar="FILE", help="the published file")
    bring.add_argument(
        "--model-config",
        type=Path,
        required=True,
        metavar="CONFIG",
        help="config.json of the model it was made for",
    )
    bring.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="profile to write (JSON)"
    )
    bring.add_argument("--name", default="", help="the model's name, for people")
    bring.set_defaults(run=_run_import)


def _run_report(arguments: argparse.Namespace) -> None:
    from hetero_sglang.profile_report import render_report

    page = render_report(_open(arguments.profile))
    arguments.html.write_text(page, encoding="utf-8")
    _console().print(f"{arguments.html}: written, {len(page) / 1024:.0f} KiB")


def _run_show(arguments: argparse.Namespace) -> None:
    if arguments.prompt_tokens < 1:
        raise ConfigError(f"--prompt-tokens must be at least 1, got {arguments.prompt_tokens}")
    profile = _open(arguments.profile)
    console = _console()
    _print_head(console, profile)
    _print_layers(console, profile)
    _print_budgets(console, profile, arguments.prompt_tokens, arguments.ratios)


def _run_diff(arguments: argparse.Namespace) -> None:
    first, second = _open(arguments.first), _open(arguments.second)
    changes = role_changes(first, second)
    console = _console()
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


def _run_import(arguments: argparse.Namespace) -> None:
    try:
        config = json.loads(arguments.model_config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"--model-config {arguments.model_config} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--model-config {arguments.model_config} holds no model configuration")
    profile = import_published(
        arguments.file.read_bytes(),
        ModelShape.from_config(config),
        origin=arguments.file.name,
        name=arguments.name,
    )
    save_profile(profile, arguments.out)
    console = _console()
    console.print(f"{arguments.out}: written")
    _print_head(console, profile)


# -- output --------------------------------------------------------------------------------------


def _open(name: str) -> HeadProfile:
    if not Path(name).exists() and name in (shipped := shipped_profiles()):
        return shipped[name]
    return load_profile(name)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, soft_wrap=True)


def profile_summary(profile: HeadProfile) -> str:
    """Heads, floors and names of a profile, a line each."""
    counts = ", ".join(f"{count} {role.name.lower()}" for role, count in profile.counts.items())
    floors = ", ".join(
        f"{_floor(profile, preset):.1%} with --kv-policy-preset {preset}" for preset in PRESETS
    )
    return (
        f"{profile.num_heads} KV heads: {counts}\n"
        f"--kv-policy-ratio must be above the floor (16-bit KV): {floors}\n"
        f"fingerprint {profile.fingerprint}, digest {profile.digest[:16]}"
    )


def _print_head(console: Console, profile: HeadProfile) -> None:
    model = profile.model
    console.print(
        f"{profile.provenance.model or model.architecture or 'unnamed model'}: {model.num_layers} "
        f"layers of {model.num_q_heads} query and {model.num_kv_heads} KV heads"
    )
    console.print(profile_summary(profile))


def _floor(profile: HeadProfile, preset: Preset) -> float:
    return _tables(profile, HeteroConfig(ratio=0.5, **resolve_preset(preset, {}))).floor


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
    console: Console, profile: HeadProfile, num_tokens: int, ratios: list[float]
) -> None:
    from rich.table import Table

    full = profile.num_heads * num_tokens * 2 * profile.model.head_dim * _ITEM_BYTES
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


def _ratios(text: str) -> list[float]:
    ratios = [float(part) for part in text.split(",") if part]
    if not ratios or not all(0.0 < ratio <= 1.0 for ratio in ratios):
        raise ValueError(text)
    return ratios
