"""What the studies share: command line, model, texts and the frame of a report.

The texts are excerpts with the words that really follow, from the Python language reference and the
standard library's sources, which every Python brings and which no shipped profile was calibrated
on.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import machine, results
from hetero_sglang.simulation.method import Profile
from tests.simulation.texts import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).parents[2]

# Source, prompt tokens, characters to skip: 3,000 to 6,000 tokens, most of it prose.
EXCERPTS = (
    ("prose", 3_000, 5_000),
    ("prose", 3_500, 60_000),
    ("prose", 4_000, 120_000),
    ("prose", 4_500, 180_000),
    ("prose", 5_000, 240_000),
    ("prose", 6_000, 320_000),
    ("code", 3_000, 4_000),
    ("code", 4_000, 40_000),
)


@dataclass(frozen=True)
class Excerpt:
    """A prompt and its continuation.

    Attributes:
        name: For tables.
        prompt: Token ids.
        following: Token ids that the text goes on with.
    """

    name: str
    prompt: list[int]
    following: list[int]


@dataclass(frozen=True)
class Subject:
    """What is studied.

    Attributes:
        tokenizer: Its tokenizer.
        model: Transformers model, fp32.
        roles: Its head profile.
        uniform: A profile in which all heads are alike and nobody watches.
    """

    tokenizer: PreTrainedTokenizerBase
    model: Any
    roles: Profile
    uniform: Profile


def study_parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line with what every study takes."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given = os.environ.get("HETERO_DEMO_MODEL", ROOT / ".cache" / "demo-model")
    shipped = ROOT / "profiles" / "smollm2-135m-instruct.json"
    parser.add_argument("--model", type=Path, default=Path(given), help="Transformers directory")
    parser.add_argument("--profile", type=Path, default=shipped, help="its head profile")
    parser.add_argument("--out", type=Path, help="result file")
    return parser


def load_subject(options: argparse.Namespace) -> Subject:
    """The model and profile that the command line names."""
    roles = Profile.load(options.profile)
    return Subject(
        AutoTokenizer.from_pretrained(options.model),
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval(),
        roles,
        Profile.uniform(roles.num_layers, roles.num_heads),
    )


def new_report(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A report that says what ran where."""
    return {
        "benchmark": f"quality/{name}",
        "machine": machine.describe(),
        "settings": results.settings(options),
    }


def excerpts(tokenizer: PreTrainedTokenizerBase, num_following: int) -> list[Excerpt]:
    """All texts, each with ``num_following`` tokens after its prompt."""
    found: list[Excerpt] = []
    for source, num_tokens, skip in EXCERPTS:
        ids = prompt_ids(tokenizer, source, num_tokens + num_following, skip_chars=skip)
        found.append(Excerpt(f"{source} {num_tokens}", ids[:num_tokens], ids[num_tokens:]))
    return found
