"""Ask about a long text and see what the server holds of it.

python examples/long_document.py
python examples/long_document.py --file README.md --question "What is this about?"
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import Any

import openai
import requests

PLANTED = "The password of the library is 'blue lantern'."


def main() -> None:
    """Stream the answer while watching the server's state."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    parser.add_argument("--file", type=Path, help="text to read; by default one is made up")
    parser.add_argument("--question", default="What is the password of the library?")
    options = parser.parse_args()
    document = options.file.read_text() if options.file else made_up_document()
    before = policy_state(options.url)
    watcher = Watcher(options.url)
    with watcher:
        stream_answer(options.url, f"{document}\n\n{options.question}")
    after = policy_state(options.url)
    if after is None or before is None or watcher.busiest is None:
        print("(this server runs without --kv-policy heterocache)")
        return
    held = sum(watcher.busiest["areas"][name]["used_bytes"] for name in ("resident", "blocks"))
    full = watcher.busiest["full_equivalent_bytes"]
    print(
        f"\nkept {held / 2**20:.1f} of {full / 2**20:.1f} MiB, "
        f"{after['drift']['checks'] - before['drift']['checks']} drift checks, "
        f"{after['drift']['events'] - before['drift']['events']} drifts, "
        f"{(after['bytes_fetched'] - before['bytes_fetched']) / 2**20:.2f} MiB fetched from memd"
    )


def made_up_document() -> str:
    """About 2,000 tokens of notes with one sentence that matters, near the beginning."""
    rooms = ("hall", "kitchen", "tower", "garden", "cellar", "attic", "stable", "chapel")
    notes = [
        f"Note {n}: in the {rooms[n % len(rooms)]} there are {n * 7 % 23 + 2} chairs and "
        f"{n * 5 % 11 + 1} lamps."
        for n in range(1, 80)
    ]
    return " ".join([*notes[:8], PLANTED, *notes[8:]])


def stream_answer(url: str, prompt: str) -> None:
    """Print the answer as it comes."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=64,
        temperature=0,
        stream=True,
    )
    for event in stream:
        for choice in event.choices:
            print(choice.delta.content or "", end="", flush=True)
    print()


def policy_state(url: str) -> dict[str, Any] | None:
    """The policy's part of /server_info; None on a stock server."""
    info = requests.get(f"{url}/server_info", timeout=30).json()
    state: dict[str, Any] | None = info["internal_states"][0].get("heterocache")
    return state


class Watcher:
    """Polls the state in the background and keeps the one with most tokens being decoded."""

    def __init__(self, url: str) -> None:
        self.busiest: dict[str, Any] | None = None
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Watcher:
        """Start polling."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop polling."""
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        most = -1
        while not self._stop.wait(0.1):
            state = policy_state(self._url)
            if state is None:
                return
            # While a prompt is in prefill all of it is held, in the staging area.
            if state["areas"]["staging"]["used_bytes"] == 0:
                live = state["full_equivalent_bytes"]
                if live > most:
                    most, self.busiest = live, state


if __name__ == "__main__":
    main()
