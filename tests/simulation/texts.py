"""Prompts of any length from text that every Python brings: the language reference and code.

Neither is the text that the shipped profile was calibrated on.
"""

from __future__ import annotations

import argparse
import inspect
from pydoc_data import topics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCES = ("prose", "code")


def text(source: str) -> str:
    """All text of a source: 'prose' (the Python language reference) or 'code' (argparse)."""
    if source == "prose":
        return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    if source == "code":
        return inspect.getsource(argparse)
    raise ValueError(f"source {source!r} is none of {SOURCES}")


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, source: str, num_tokens: int, *, skip_chars: int = 0
) -> list[int]:
    """Exactly ``num_tokens`` token ids of a source, from character ``skip_chars`` on."""
    # No token of the models used here is shorter than one character, most are near four.
    excerpt = text(source)[skip_chars : skip_chars + 12 * num_tokens + 64]
    # Not verbose: the excerpt may be longer than the context, the part that is used is not.
    ids = tokenizer(excerpt, add_special_tokens=False, verbose=False)["input_ids"][:num_tokens]
    if len(ids) != num_tokens:
        raise ValueError(f"{source} has only {len(ids)} tokens after {skip_chars} characters")
    return ids
