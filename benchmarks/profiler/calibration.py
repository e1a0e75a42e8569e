"""What a calibration run costs beside plain generation of the same tokens by Transformers.

Both sides run in processes of their own, in turns, on the same prompt and number of tokens: ours
observes every head at every decoded token and makes a profile, Transformers only generates. Time is
that of the run without loading the model, memory the whole process's peak. Before anything is timed
the roles of a short run must be those that eager attention, which returns all its probabilities,
leads to.

    python -m benchmarks.profiler.calibration
    python -m benchmarks.profiler.calibration --tokens 2048 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import machine, results
from hetero_sglang.profiler import (
    Calibration,
    WatchedModel,
    calibration_prompts,
    calibration_texts,
    classify_heads,
    observe,
)

ROOT = Path(__file__).parents[2]
MOST_TIME = 1.5
"""Times the generation's, at most."""
MOST_MEMORY = 1.3
GATE_TOKENS, GATE_STEPS, GATE_TOP_K = 400, 8, 100


def main() -> int:
    """Run, print a table, write a JSON file; 1 if a bound is not held."""
    options = parse_arguments()
    if options.side:
        sys.stdout.write(json.dumps(run_side(options)) + "\n")
        return 0
    console = Console(stderr=True)
    check_roles(options.model)
    sides: dict[str, list[dict[str, float]]] = {"profiler": [], "transformers": []}
    for turn in range(options.rounds):
        # Who begins alternates, so that a machine that warms up or slows down favours nobody.
        for side in sorted(sides, reverse=bool(turn % 2)):
            console.print(f"round {turn + 1} of {options.rounds}: {side}")
            sides[side].append(start_side(side, options))
    seconds = {side: median(run["seconds"] for run in runs) for side, runs in sides.items()}
    peaks = {side: median(run["peak_bytes"] for run in runs) for side, runs in sides.items()}
    report: dict[str, Any] = {
        "benchmark": "profiler/calibration",
        "machine": machine.describe(),
        "settings": results.settings(options),
        "runs": sides,
        "time_ratio": seconds["profiler"] / seconds["transformers"],
        "memory_ratio": peaks["profiler"] / peaks["transformers"],
    }
    table = Table(title=f"{options.tokens} prompt tokens, {options.steps} decoded")
    for column in ("", "seconds", "peak MiB"):
        table.add_column(column, justify="right")
    for side in sides:
        table.add_row(side, f"{seconds[side]:.2f}", f"{peaks[side] / 2**20:,.0f}")
    table.add_row("ratio", f"{report['time_ratio']:.2f}", f"{report['memory_ratio']:.2f}")
    table.add_row("asked, at most", f"{MOST_TIME}", f"{MOST_MEMORY}")
    Console().print(table)
    console.print(f"written: {results.save('profiler-calibration', report, options.out)}")
    return int(report["time_ratio"] > MOST_TIME or report["memory_ratio"] > MOST_MEMORY)


def start_side(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Runs one side in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.profiler.calibration", "--side", side]
    words += ["--model", str(options.model), "--tokens", str(options.tokens)]
    done = subprocess.run(
        [*words, "--steps", str(options.steps)], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_side(options: argparse.Namespace) -> dict[str, float]:
    """One side's run, in this process."""
    model = WatchedModel(options.model, dtype="float32", device="cpu")
    prompts = calibration_prompts(model, calibration_texts()[-1:], (options.tokens,))
    if options.side == "profiler":
        settings = Calibration(prompt_lengths=(options.tokens,), num_decode_steps=options.steps)
        _ = model.model
        began = time.perf_counter()
        observe(model, prompts, settings).profile()
    else:
        generator = load_for_generation(options.model)
        began = time.perf_counter()
        # The profiler looks at the queries of this many decoded tokens, so it makes one more.
        made = generator.generate(
            prompts[0].token_ids[None],
            max_new_tokens=options.steps + 1,
            min_new_tokens=options.steps + 1,
            do_sample=False,
        )
        if made.shape[1] != options.tokens + options.steps + 1:
            raise SystemExit(f"Transformers made {made.shape[1] - options.tokens} tokens")
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_bytes": peak}


def load_for_generation(folder: Path) -> Any:
    """The model as a user of Transformers would load it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check_roles(folder: Path) -> None:
    """Refuses to go on unless a short run's result is eager attention's."""
    from transformers import AutoModelForCausalLM

    model = WatchedModel(folder, dtype="float32", device="cpu")
    settings = Calibration(
        prompt_lengths=(GATE_TOKENS,), num_decode_steps=GATE_STEPS, top_k=GATE_TOP_K
    )
    prompts = calibration_prompts(model, calibration_texts()[-1:], (GATE_TOKENS,))
    ours = observe(model, prompts, settings).profile()
    eager = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    token_ids = prompts[0].token_ids[None]
    rows = []
    with torch.inference_mode():
        for _ in range(GATE_STEPS + 1):
            output = eager(token_ids, output_attentions=True)
            newest = [layer[0, :, -1, :GATE_TOKENS] for layer in output.attentions]
            rows.append(torch.stack(newest))
            token_ids = torch.cat([token_ids, output.logits[:, -1:].argmax(dim=-1)], dim=1)
    expected = classify_heads(
        rows[0],
        torch.stack(rows[1:]),
        top_k=GATE_TOP_K,
        stable_threshold=settings.thresholds.stable,
        similarity_threshold=settings.thresholds.similarity,
        num_kv_heads=model.shape.num_kv_heads,
    )
    # A position on the edge of a set may fall to the other side by rounding.
    edge = 2.5 / GATE_TOP_K
    assert ours.stability is not None
    assert expected.stability is not None
    worst = float(np.abs(ours.stability - expected.stability).max())
    if worst > edge:
        raise SystemExit(
            f"not timed: a head's stability is {worst:.3f} off that of eager attention"
        )


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given = os.environ.get("HETERO_DEMO_MODEL", ROOT / ".cache" / "demo-model")
    parser.add_argument("--model", type=Path, default=Path(given), help="Transformers directory")
    parser.add_argument("--tokens", type=int, default=4096, help="prompt tokens")
    parser.add_argument("--steps", type=int, default=64, help="decoded tokens")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--side", choices=("profiler", "transformers"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
