"""Texts of the studies: excerpts with the words that really follow.

From the Python language reference and the standard library's sources, which every Python brings
and which no shipped profile was calibrated on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.simulation.texts import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def excerpts(tokenizer: PreTrainedTokenizerBase, num_following: int) -> list[Excerpt]:
    """All texts, each with ``num_following`` tokens after its prompt."""
    found: list[Excerpt] = []
    for source, num_tokens, skip in EXCERPTS:
        ids = prompt_ids(tokenizer, source, num_tokens + num_following, skip_chars=skip)
        found.append(Excerpt(f"{source} {num_tokens}", ids[:num_tokens], ids[num_tokens:]))
    return found
