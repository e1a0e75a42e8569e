"""Hostile inputs by the hundred thousand, recorded: frames at the service, babble at the client.

Every answer of the service is compared with a model (``tests.chaos.judged``); the client may lose
memd, and nothing else. Each input has a seed of its own, so that a failure names the input.

    python -m benchmarks.memd.fuzz --inputs 100000 --seed 20261122
"""

from __future__ import annotations

import argparse
import collections
import gc
import logging
import os
import secrets
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import machine, results
from memd.protocol import REPLY_TYPES, encode
from tests.chaos.hostile import hostile_frame
from tests.chaos.judged import FRAME_BOUND_S, JudgedService, send_hostile_frames
from tests.chaos.lying import LyingChannel, client_of
from tests.chaos.processes import Footprint

CAMPAIGN = 500
"""Frames that one daemon gets, and words that one client hears before the next one."""

CLIENT_SHARE = 0.1
WARM_UP_SHARE = 0.1
GROWTH_BOUND_BYTES = 4 << 20
MOST_OPEN = 4


def main() -> int:
    """Run, print a table, write a JSON file; 1 if an input broke something."""
    options = parse_arguments()
    console = Console(width=110)
    described = machine.describe()
    # What it says of each refusal and each loss is for people; here there are thousands.
    logging.getLogger("memd").setLevel(logging.ERROR)
    begin = time.monotonic()
    fuzz = Fuzz(options.seed, options.inputs)
    failure = fuzz.run()
    data: dict[str, Any] = {
        "machine": described,
        "settings": results.settings(options),
        "seconds": round(time.monotonic() - begin, 1),
        "service_frames": fuzz.num_frames,
        "client_words": fuzz.num_words,
        "answers": dict(sorted(fuzz.answers.items())),
        "longest_frame_s": round(fuzz.longest_s, 4),
        "longest_frame_bound_s": FRAME_BOUND_S,
        "heap_growth_bytes": fuzz.growth_bytes,
        "heap_growth_bound_bytes": GROWTH_BOUND_BYTES,
        "failure": failure,
    }
    console.print(table(data))
    if failure:
        console.print(failure, markup=False)
    console.print(f"written: {results.save('memd-fuzz', data, options.out)}")
    return 1 if failure else 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Send memd hostile inputs, and record the answers."
    )
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--out", type=Path, help="result file")
    return parser.parse_args()


class Fuzz:
    """One run.

    Args:
        seed: Of all inputs.
        num_inputs: How many, service and client together.

    Attributes:
        num_frames: Frames that the service got.
        num_words: Frames that a client got.
        answers: Of the service, by kind.
        longest_s: Most processor time that a frame took.
        growth_bytes: What the heap has grown by since the warm-up.
    """

    def __init__(self, seed: int, num_inputs: int) -> None:
        self.num_frames = 0
        self.num_words = 0
        self.answers: collections.Counter[str] = collections.Counter()
        self.longest_s = 0.0
        self.growth_bytes = 0
        self._num_inputs = num_inputs
        self._seeds = np.random.SeedSequence(seed)

    def run(self) -> str | None:
        """Send everything; what went wrong, if anything did."""
        heap_after_warm_up: int | None = None
        while (done := self.num_frames + self.num_words) < self._num_inputs:
            (child,) = self._seeds.spawn(1)
            seeds = child.generate_state(CAMPAIGN, dtype=np.uint64).tolist()
            try:
                if self.num_words < CLIENT_SHARE * done:
                    self._babble(seeds)
                else:
                    self._send(seeds)
            except Exception:
                return f"with the seeds from {seeds[0]} on:\n{traceback.format_exc()}"
            if heap_after_warm_up is None and done >= WARM_UP_SHARE * self._num_inputs:
                heap_after_warm_up = _heap_bytes()
        self.growth_bytes = _heap_bytes() - (heap_after_warm_up or 0)
        if self.growth_bytes > GROWTH_BOUND_BYTES:
            return f"the heap has grown by {self.growth_bytes} bytes"
        return None

    def _send(self, seeds: list[int]) -> None:
        """Frames at a service; every other one copies so slowly that fetches have to wait."""
        is_slow = self.num_frames // CAMPAIGN % 2 == 1
        with JudgedService(is_slow=is_slow) as judged:
            send_hostile_frames(judged, seeds)
            self.answers += judged.counts
            self.longest_s = max(self.longest_s, judged.longest_s)
        self.num_frames += len(seeds)

    def _babble(self, seeds: list[int]) -> None:
        """Words at a client that waits for answers: it loses memd, and every ticket ends."""
        for index, seed in enumerate(seeds):
            rng = np.random.default_rng(seed)
            channel = LyingChannel()
            client = client_of(channel)
            tickets = [client.reserve(1) for _ in range(rng.integers(1, MOST_OPEN))]
            client.stats()
            channel.frames.append(_word(rng, is_reply=index % 2 == 1))
            client.poll()
            if client.is_alive or not all(ticket.is_done for ticket in tickets):
                raise AssertionError(f"the client goes on after what seed {seed} made")
            client.close()
        self.num_words += len(seeds)


def _word(rng: np.random.Generator, *, is_reply: bool) -> bytes:
    """Babble, or a reply to a request that was never sent."""
    if not is_reply:
        return hostile_frame(rng)
    kind = REPLY_TYPES[rng.integers(len(REPLY_TYPES))]
    fields: dict[str, Any] = dict.fromkeys(kind.__struct_fields__, 0)
    fields |= {"page_ids": None, "stats": {}, "code": "internal", "message": ""}
    fields = {name: fields[name] for name in kind.__struct_fields__}
    fields["request_id"] = int(rng.integers(1 << 20, 1 << 62))
    return encode(kind(**fields))


def _heap_bytes() -> int:
    gc.collect()
    return Footprint.of(os.getpid()).private_bytes


def table(data: dict[str, Any]) -> Table:
    """What a person wants to know of a run."""
    shown = Table(title=f"memd against hostile inputs, seed {data['settings']['seed']}")
    shown.add_column("what")
    shown.add_column("number", justify="right")
    for what in ("service_frames", "client_words", "seconds", "heap_growth_bytes"):
        shown.add_row(what.replace("_", " "), f"{data[what]:,}")
    shown.add_row("longest frame (ms of processor)", f"{1000 * data['longest_frame_s']:.1f}")
    for kind, count in data["answers"].items():
        shown.add_row(f"answered {kind}", f"{count:,}")
    shown.add_row("broken", "1" if data["failure"] else "0")
    return shown


if __name__ == "__main__":
    sys.exit(main())
