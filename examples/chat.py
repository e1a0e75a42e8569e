"""Chat with the server through the official openai client, one line at a time.

python examples/chat.py
python examples/chat.py --once "What is the capital of France?"
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import openai

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam


def main() -> None:
    """Read questions until an empty line or end of input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    parser.add_argument("--once", metavar="QUESTION", help="ask this and end")
    options = parser.parse_args()
    client = openai.OpenAI(base_url=f"{options.url}/v1", api_key="unused")
    model = client.models.list().data[0].id
    messages: list[ChatCompletionMessageParam] = []
    while question := options.once or ask():
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer(client, model, messages)})
        if options.once:
            return


def ask() -> str:
    """A line from the user; empty at the end of input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def answer(client: openai.OpenAI, model: str, messages: list[ChatCompletionMessageParam]) -> str:
    """Stream the answer to the screen and return it."""
    text = ""
    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=256, temperature=0, stream=True
    )
    for event in stream:
        piece = event.choices[0].delta.content or "" if event.choices else ""
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


if __name__ == "__main__":
    main()
