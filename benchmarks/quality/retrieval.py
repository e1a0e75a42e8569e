"""What retrieval brings when the output moves over the whole prompt: facts in another order.

Each prompt is text with 30 four-digit codes strewn into it, each under a name; then the sentences
with 16 of the codes are fed, names in random order, and it is counted how many of the digits each
method would have said itself (teacher-forced, simulated by masks like ``fidelity``). At the end of
the prompt nobody can know which code comes next, so the first selection cannot do it alone.

Eager checks after every step, sees drift at a threshold of 0.7 and gives whole budgets to the
pivot's best. Retrieval off is shown twice: at the same bytes (nobody watches, so there is room for
more rows) and with the same rows.

    python -m benchmarks.quality.retrieval
"""

from __future__ import annotations

import random
import statistics
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.common import results
from benchmarks.quality._study import load_subject, new_report, study_parser
from hetero_sglang.simulation.engine import Simulation, prefill
from hetero_sglang.simulation.method import Method, Profile
from tests.simulation import texts

if TYPE_CHECKING:
    import argparse

    from transformers import PreTrainedTokenizerBase

NAMES = [
    "Amber",
    "Basil",
    "Cedar",
    "Delta",
    "Ember",
    "Falcon",
    "Garnet",
    "Harbor",
    "Indigo",
    "Jasper",
    "Kestrel",
    "Lotus",
    "Maple",
    "Nectar",
    "Onyx",
    "Pepper",
    "Quartz",
    "Raven",
    "Saffron",
    "Topaz",
    "Umber",
    "Violet",
    "Willow",
    "Yarrow",
    "Zephyr",
    "Acorn",
    "Birch",
    "Coral",
    "Daisy",
    "Eagle",
]
NUM_ASKED = 16
TEXT_CHARS = 12_000

METHODS: dict[str, tuple[dict[str, Any], bool]] = {
    # Name: settings, whether the shipped profile's roles are used.
    "default": ({}, True),
    "default, int4": ({"watched_bits": 4}, True),
    "default, eager": ({"drift_interval": 1, "drift_threshold": 0.7, "refresh_share": 1.0}, True),
    "default, int4, eager": (
        {
            "watched_bits": 4,
            "drift_interval": 1,
            "drift_threshold": 0.7,
            "refresh_share": 1.0,
        },
        True,
    ),
    "retrieval off, same bytes": ({"is_retrieving": False}, True),
    "retrieval off, same rows": ({"is_retrieving": False, "priced_bits": 8}, True),
    "SnapKV, same bytes": ({"is_retrieving": False}, False),
}


@dataclass(frozen=True)
class Task:
    """A prompt and what is fed after it.

    Attributes:
        prompt: Token ids.
        following: Token ids of the sentences.
        is_code: Which of these are digits of a code.
    """

    prompt: list[int]
    following: list[int]
    is_code: torch.Tensor


def make_task(tokenizer: PreTrainedTokenizerBase, seed: int) -> Task:
    """A task; another text, other codes and another order for every seed."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    rng = random.Random(seed)
    codes = {name: str(rng.randrange(1_000, 10_000)) for name in NAMES}
    begin = 40_000 * seed
    sentences = texts.text("prose")[begin : begin + TEXT_CHARS].split(". ")
    strewn = rng.sample(NAMES, len(NAMES))
    every = max(1, len(sentences) // len(NAMES))
    body: list[str] = []
    for index, sentence in enumerate(sentences):
        body.append(sentence)
        if index % every == 0 and strewn:
            name = strewn.pop()
            body.append(f"The secret code of {name} is {codes[name]}")
    following: list[int] = []
    is_code: list[bool] = []
    for name in rng.sample(NAMES, NUM_ASKED):
        for text, counts in (
            (f"The secret code of {name} is", False),
            (f" {codes[name]}", True),
            (".\n", False),
        ):
            piece = ids(text)
            following += piece
            is_code += [counts] * len(piece)
    prompt = ids(". ".join(body) + ".\n\nHere are all the secret codes again.\n")
    return Task(prompt, following, torch.tensor(is_code))


def main() -> int:
    """Run, print a table, write a JSON file."""
    options = parse_arguments()
    console = Console(stderr=True)
    subject = load_subject(options)
    found: dict[str, list[tuple[float, float, float]]] = {}
    with Progress(console=console) as progress:
        bar = progress.add_task("simulating", total=options.tasks * (1 + len(METHODS)))
        for seed in range(1, options.tasks + 1):
            task = make_task(subject.tokenizer, seed)
            prompt = prefill(subject.model, task.prompt)
            following = torch.tensor(task.following)

            def run(
                method: Method,
                profile: Profile,
                task: Task = task,
                prompt: Any = prompt,
            ) -> tuple[torch.Tensor, float]:
                trace = Simulation(subject.model, profile, method).follow(
                    prompt, task.following, with_distributions=True
                )
                progress.advance(bar)
                share = trace.num_drifts / len(trace.checks) if trace.checks else 0.0
                return torch.stack(trace.distributions), share

            full, _ = run(Method(1.0), subject.uniform)
            cases = {"full attention": (full, 0.0)}
            for name, (settings, has_roles) in METHODS.items():
                method = Method(options.ratio, item_bits=options.item_bits, **settings)
                cases[name] = run(method, subject.roles if has_roles else subject.uniform)
            for name, (ours, drifts) in cases.items():
                is_right = (ours.argmax(-1) == following)[task.is_code].float().mean().item()
                kl = (full.exp() * (full - ours)).sum(-1)[1:].mean().item()
                found.setdefault(name, []).append((is_right, kl, drifts))
    report = new_report("retrieval", options) | {
        "methods": {
            name: {
                "digits_right": round(statistics.mean(v[0] for v in values), 4),
                "digits_right_by_task": [round(v[0], 4) for v in values],
                "kl": round(statistics.mean(v[1] for v in values), 5),
                "drifts_per_check": round(statistics.mean(v[2] for v in values), 4),
            }
            for name, values in found.items()
        },
    }
    table = Table(title=f"Codes recited at share {options.ratio} ({options.tasks} prompts)")
    for column in ("method", "digits right", "KL to full", "drifts a check"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, values in report["methods"].items():
        table.add_row(
            name,
            f"{values['digits_right']:.1%}",
            f"{values['kl']:.3f}",
            f"{values['drifts_per_check']:.1%}",
        )
    Console().print(table)
    console.print(f"written: {results.save('quality-retrieval', report, options.out)}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = study_parser(__doc__)
    parser.add_argument("--ratio", type=float, default=0.3, help="resident share")
    parser.add_argument("--tasks", type=int, default=4, help="prompts")
    parser.add_argument(
        "--item-bits", type=int, default=16, help="bits of the KV dtype that bytes are counted in"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
