"""How near each method's next-token distributions are to full attention's, at equal bytes.

Teacher-forced: after each prompt the text's own next tokens are fed, and at every one the
distribution is compared with that of full attention (KL divergence, nats). Methods are simulated
by masks on the Transformers model (hetero_sglang/simulation), rows that are fetched count from the
next step on. All methods hold the same bytes of the prompt: a watched key is paid for at its share
of a row in the given dtype.

    python -m benchmarks.quality.fidelity
    python -m benchmarks.quality.fidelity --ratios 0.3 --methods "default;SnapKV"
"""

from __future__ import annotations

import statistics
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.common import results
from benchmarks.quality._study import excerpts, load_subject, new_report, study_parser
from hetero_sglang.simulation.engine import Simulation, prefill
from hetero_sglang.simulation.fidelity import compare_distributions, distributions
from hetero_sglang.simulation.method import Method, Profile, held_heads

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable


METHODS: dict[str, tuple[Callable[..., Method], dict[str, Any], bool]] = {
    # Name: method, its settings, whether the shipped profile's roles are used.
    "paper": (Method.paper, {}, True),
    "default": (Method, {}, True),
    "default, exact keys": (Method, {"watched_bits": 32, "priced_bits": 8}, True),
    "default, int4": (Method, {"watched_bits": 4}, True),
    "default, whole refresh": (Method, {"refresh_share": 1.0}, True),
    "default, retrieval off": (Method, {"is_retrieving": False}, True),
    "SnapKV": (Method, {"is_retrieving": False}, False),
}
"""SnapKV is every head alike, with a window and no retrieval. Exact keys are charged for like int8
ones, so that only the rounding differs."""


def main() -> int:
    """Run, print a table, write a JSON file."""
    options = parse_arguments()
    console = Console(stderr=True)
    subject = load_subject(options)
    texts = excerpts(subject.tokenizer, options.tokens)[: options.texts]
    report: dict[str, Any] = new_report("fidelity", options) | {
        "kl": {},
    }
    kl: dict[tuple[float, str], list[float]] = {}
    total = len(texts) * len(options.ratios) * len(options.methods)
    with Progress(console=console) as progress:
        task = progress.add_task("simulating", total=total)
        for text in texts:
            prompt = prefill(subject.model, text.prompt)
            full = distributions(
                Simulation(subject.model, subject.uniform, Method(1.0)), prompt, text.following
            )
            for ratio in options.ratios:
                for name in options.methods:
                    make, settings, has_roles = METHODS[name]
                    method = make(ratio, item_bits=options.item_bits, **settings)
                    profile = subject.roles if has_roles else subject.uniform
                    progress.advance(task)
                    if not fits(profile, method, subject.model.config.head_dim):
                        continue
                    simulation = Simulation(subject.model, profile, method)
                    ours = distributions(simulation, prompt, text.following)
                    value = compare_distributions(full, ours).kl
                    kl.setdefault((ratio, name), []).append(value)
                    progress.console.print(f"{text.name:<11} {ratio} {name:<24} {value:.5f}")
    for (ratio, name), values in kl.items():
        report["kl"].setdefault(str(ratio), {})[name] = {
            "mean": round(statistics.mean(values), 6),
            "by_text": {t.name: round(v, 6) for t, v in zip(texts, values, strict=True)},
        }
    print_table(report, options)
    console.print(f"written: {results.save('quality-fidelity', report, options.out)}")
    return 0


def fits(profile: Profile, method: Method, head_dim: int) -> bool:
    """Whether the ratio is above the method's floor."""
    num_heads = profile.num_layers * profile.num_heads
    return method.ratio * num_heads > held_heads(profile, method, head_dim)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = study_parser(__doc__)
    parser.add_argument(
        "--ratios", type=lambda text: [float(r) for r in text.split(",")], default=[0.5, 0.6]
    )
    parser.add_argument(
        "--methods",
        type=lambda text: text.split(";"),
        default=list(METHODS),
        help="separated by ';'; default: all",
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens fed after each prompt")
    parser.add_argument("--texts", type=int, default=99, help="use the first so many texts only")
    parser.add_argument(
        "--item-bits", type=int, default=16, help="bits of the KV dtype that bytes are counted in"
    )
    options = parser.parse_args()
    unknown = sorted(set(options.methods) - set(METHODS))
    if unknown:
        parser.error(f"--methods {unknown} are none of {list(METHODS)}")
    return options


def print_table(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Show the means on stdout."""
    table = Table(title="KL to full attention (nats a token, mean over texts; lower is better)")
    table.add_column("method")
    for ratio in options.ratios:
        table.add_column(f"share {ratio}", justify="right")
    for name in options.methods:
        cells = []
        for ratio in options.ratios:
            found = report["kl"].get(str(ratio), {}).get(name)
            cells.append("under its floor" if found is None else f"{found['mean']:.5f}")
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
