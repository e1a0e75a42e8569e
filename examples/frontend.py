"""An SGLang program against the server: system prompt, two answers in parallel, a choice.

python examples/frontend.py
"""

from __future__ import annotations

import argparse
import os
from typing import Any

# Read by SGLang when it is imported; without it a machine without GPU is not recognised.
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import sglang as sgl


@sgl.function
def travel_guide(s: Any, city: str) -> None:
    """Ask two things about a city at once, then for a number."""
    s += sgl.system("You are a helpful travel guide. Answer in one sentence.")
    s += sgl.user(f"I am going to {city}.")
    s += sgl.assistant("How nice! What would you like to know?")
    topics = ("food", "museums")
    for topic, fork in zip(topics, s.fork(len(topics)), strict=True):
        fork += sgl.user(f"Tell me about the {topic}.")
        fork += sgl.assistant(sgl.gen("tip", max_tokens=48, temperature=0))
        s[topic] = fork["tip"]
    s += sgl.user("How many days should I stay? Answer with a number.")
    s += sgl.assistant(sgl.gen("days", regex="[1-9]", temperature=0))


def main() -> None:
    """Run the program and print what it filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    parser.add_argument("--city", default="Paris")
    options = parser.parse_args()
    state = travel_guide.run(city=options.city, backend=sgl.RuntimeEndpoint(options.url))
    for name in ("food", "museums", "days"):
        print(f"{name}: {state[name].strip()}")


if __name__ == "__main__":
    main()
