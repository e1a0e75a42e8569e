"""Time per output token and prefill time, stock SGLang against the policy, in one run.

Both servers of a pair live side by side and are asked in turns, so that a slow minute of the
machine hits both; the one that waits sleeps. Nothing is reported unless the two agree on the
answer first and the policy really compressed.

    python -m benchmarks.serving.decode
    python -m benchmarks.serving.decode --contexts 128,7500 --dtypes float32 --rounds 2
    python -m benchmarks.serving.decode --also paper,unwatched

What a context costs is the time of a token after a long prompt less that after a short one; its
floor is the time that the machine's own read bandwidth needs for the KV that the policy keeps.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.common import machine, results
from hetero_sglang.profile import ModelShape
from tests.server.harness import Server, ServerError, start_server
from tests.simulation.texts import prompt_ids

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
CONTEXT_LENGTH = 8192
# Two correct bf16 servers may round a logit differently by this much.
LOGPROB_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15}
MIN_COMPRESSED_TOKENS = 1024
UNWATCHED = "unwatched"
"""Name of the side whose pivots do not watch for drift."""

STATE_KEYS = (
    *("ratio", "floor", "preset", "pivot_rows", "watch_dtype", "window", "refresh_share"),
    *("min_tokens", "kernels", "drift", "fetches", "areas"),
)

console = Console(stderr=True)


class GateError(RuntimeError):
    """What would be timed is not right; nothing is reported."""


@dataclass
class Timing:
    """Streams of one server at one context length."""

    tpot_s: list[float] = field(default_factory=list)
    """Seconds per token of each request: first to last token, drift checks and fetches included."""
    gaps_s: list[float] = field(default_factory=list)
    """Seconds between neighbouring tokens, of all requests."""
    ttft_s: list[float] = field(default_factory=list)
    """Seconds from sending a request to its first token; with a prefix hit where one is served."""

    def summary(self) -> dict[str, Any]:
        """Medians and spread, in milliseconds."""
        gaps = sorted(self.gaps_s)
        return {
            "tpot_ms": _ms(statistics.median(self.tpot_s)),
            "tpot_all_ms": [_ms(value) for value in self.tpot_s],
            "gap_median_ms": _ms(statistics.median(gaps)),
            "gap_p95_ms": _ms(gaps[math.ceil(0.95 * len(gaps)) - 1]),
            "num_requests": len(self.tpot_s),
        }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def main() -> int:
    """Run, print a table, write a JSON file."""
    options = parse_arguments()
    busy = machine.busy_share()
    if busy > machine.BUSY_SHARE:
        text = f"the machine is {busy:.0%} busy: timings will not mean much"
        if not options.allow_busy:
            console.print(f"[red]{text}; wait, or give --allow-busy")
            return 2
        console.print(f"[yellow]{text}")
    bandwidth = machine.read_bandwidth_gb_s()
    report: dict[str, Any] = {
        "benchmark": "serving/decode",
        "machine": machine.describe() | {"busy_share_before": round(busy, 3)},
        "read_bandwidth_gb_s": round(bandwidth, 1),
        "settings": results.settings(options),
        "decode": {},
        "prefill": {},
    }
    prompts = Prompts(options.model)
    path: Path | None = options.out
    try:
        for part, dtypes, measure in (
            ("decode", options.dtypes, partial(measure_decode, bandwidth_gb_s=bandwidth)),
            ("prefill", options.prefill_dtypes, measure_prefill),
        ):
            for dtype in dtypes:
                report[part][dtype] = measure(options, dtype, prompts)
                # What has been measured stays, whatever happens to the rest.
                path = results.save("serving-decode", report, path)
    except (GateError, ServerError) as error:
        console.print(f"[red]refused: {error}", markup=True, highlight=False)
        return 1
    print_tables(report, options)
    console.print(f"written: {results.save('serving-decode', report, path)}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given = os.environ.get("HETERO_DEMO_MODEL", ROOT / ".cache" / "demo-model")
    parser.add_argument("--model", type=Path, default=Path(given), help="Transformers directory")
    parser.add_argument("--ratio", type=float, default=0.5, help="resident share of the policy")
    parser.add_argument("--contexts", type=_numbers, default=[128, 1024, 4096, 7500])
    parser.add_argument("--dtypes", type=_names, default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3, help="requests a side and context")
    parser.add_argument("--tokens", type=int, default=64, help="tokens a request generates")
    parser.add_argument(
        "--prefill-dtypes", type=_names, default=["float32"], help="'' leaves prefill out"
    )
    parser.add_argument("--prefill-tokens", type=int, default=7500)
    parser.add_argument(
        "--prefill-chunks",
        type=_numbers,
        default=[1024, 2048, 4096, 8192],
        help="chunk sizes that stock is tried with; the policy keeps its default",
    )
    parser.add_argument("--profile", default="auto", help="as --kv-policy-profile")
    parser.add_argument(
        "--preset", default="default", help="as --kv-policy-preset, of the side named policy"
    )
    parser.add_argument(
        "--also",
        type=_names,
        default=[],
        help="more sides to decode with: presets, for example paper, or unwatched: the preset "
        "without drift checks and fetches, which shows what those cost",
    )
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--allow-busy", action="store_true", help="measure on a busy machine too")
    options = parser.parse_args()
    # Presets of the servers with the policy, by the name of their side.
    presets = {name: options.preset if name == UNWATCHED else name for name in options.also}
    options.sides = {"policy": options.preset, **presets}
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


class Prompts:
    """Prompts of any length; another text for every round."""

    def __init__(self, model_dir: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def ids(self, num_tokens: int, round_number: int) -> list[int]:
        """Token ids of prose."""
        return prompt_ids(
            self._tokenizer, "prose", num_tokens, skip_chars=40_000 * (round_number + 1)
        )


@contextlib.contextmanager
def serve(options: argparse.Namespace, dtype: str, name: str, *flags: str) -> Iterator[Server]:
    """A server for the length of the block; its log goes to a directory that is then removed."""
    with (
        tempfile.TemporaryDirectory(prefix="hetero-bench-") as directory,
        console.status(f"{dtype}: starting {name}"),
        contextlib.ExitStack() as stack,
    ):
        server = stack.enter_context(
            start_server(
                *(options.model, Path(directory), *flags),
                max_total_tokens=2 * CONTEXT_LENGTH,
                dtype=dtype,
                environment={},
            )
        )
        console.print(f"{dtype}: {name} runs")
        yield server


def policy_flags(options: argparse.Namespace, preset: str) -> tuple[str, ...]:
    """Flags of a side with the policy."""
    return (
        *("--kv-policy", "heterocache", "--kv-policy-ratio", str(options.ratio)),
        *("--kv-policy-profile", options.profile, "--kv-policy-preset", preset),
    )


def measure_decode(
    options: argparse.Namespace, dtype: str, prompts: Prompts, *, bandwidth_gb_s: float
) -> dict[str, Any]:
    """Time per token of all sides at every context length."""
    with contextlib.ExitStack() as stack:
        sides = {"stock": stack.enter_context(serve(options, dtype, "stock"))}
        for name, preset in options.sides.items():
            flags = policy_flags(options, preset)
            if name == UNWATCHED:
                flags += ("--kv-policy-retrieval", "off")
            sides[name] = stack.enter_context(serve(options, dtype, name, *flags))
        for context in options.contexts:
            check_answers(sides, prompts.ids(context, 0), dtype)
        timings = {(side, context): Timing() for side in sides for context in options.contexts}
        checks_before = {side: num_checks(sides[side]) for side in options.sides}
        for turn in range(options.rounds):
            for context in options.contexts:
                prompt = prompts.ids(context, turn)
                # The side that goes first changes from round to round.
                for side in sorted(sides, reverse=turn % 2 == 0):
                    time_stream(sides[side], prompt, options.tokens, timings[side, context])
                    latest = timings[side, context].tpot_s[-1]
                    console.print(f"{dtype} {context:>5} {side:<6} {_ms(latest):8.2f} ms/token")
        states = {side: sides[side].heterocache() for side in options.sides}
        for side, state in states.items():
            more = state["drift"]["checks"] - checks_before[side]
            check_policy(state, options, num_checks=more, is_watched=side != UNWATCHED)
    summary: dict[str, Any] = {
        side: {str(context): timings[side, context].summary() for context in options.contexts}
        for side in sides
    }
    for side, state in states.items():
        summary[f"{side}_state"] = {key: state[key] for key in STATE_KEYS}
    summary["context"] = context_costs(options, dtype, summary, bandwidth_gb_s)
    return summary


def context_costs(
    options: argparse.Namespace, dtype: str, summary: dict[str, Any], bandwidth_gb_s: float
) -> dict[str, Any]:
    """What the longest context costs over the shortest on each side, in milliseconds a token."""
    low, high = min(options.contexts), max(options.contexts)
    costs = {
        side: summary[side][str(high)]["tpot_ms"] - summary[side][str(low)]["tpot_ms"]
        for side in ("stock", *options.sides)
    }
    shortest = summary["policy_state"]["min_tokens"]

    def kept(num_tokens: int) -> float:
        return num_tokens * (options.ratio if num_tokens > shortest else 1.0)

    num_bytes = (kept(high) - kept(low)) * token_bytes(options.model, dtype)
    return {
        "from": low,
        "to": high,
        "cost_ms": {side: round(cost, 3) for side, cost in costs.items()},
        "kept_bytes": int(num_bytes),
        "floor_ms": _ms(num_bytes / bandwidth_gb_s / 1e9),
    }


def token_bytes(model_dir: Path, dtype: str) -> int:
    """Bytes of one token's K and V over all heads of all layers."""
    shape = ModelShape.from_config(json.loads((model_dir / "config.json").read_text()))
    row_bytes = 2 * shape.head_dim * {"float32": 4, "bfloat16": 2}[dtype]
    return shape.num_layers * shape.num_kv_heads * row_bytes


def num_checks(server: Server) -> int:
    """Drift checks since the server's start."""
    count: int = server.heterocache()["drift"]["checks"]
    return count


def check_answers(sides: dict[str, Server], prompt: list[int], dtype: str) -> None:
    """Refuse to time servers that disagree on the token after the prompt.

    That token comes from full attention on both sides, at every ratio.
    """
    answers = {
        side: server.generate(prompt, 2, with_logprobs=True) for side, server in sides.items()
    }
    stock = answers.pop("stock")
    for side, answer in answers.items():
        error = abs(stock.logprobs[0] - answer.logprobs[0])
        if error > LOGPROB_TOLERANCE[dtype]:
            raise GateError(
                f"{dtype}, {len(prompt)} tokens: log-probabilities of the first tokens of stock "
                f"and {side} ({stock.token_ids[0]}, {answer.token_ids[0]}) differ by {error:.2g}"
            )
        if dtype == "float32" and stock.token_ids[0] != answer.token_ids[0]:
            raise GateError(f"{len(prompt)} tokens: the first tokens of stock and {side} differ")


def check_policy(
    state: dict[str, Any], options: argparse.Namespace, *, num_checks: int, is_watched: bool
) -> None:
    """Refuse a run in which the policy's side did not do what it is timed for."""
    if state["integrity"] != "ok":
        raise GateError(f"integrity: {state['integrity']}")
    if state["ratio"] != options.ratio:
        raise GateError(f"the server runs at ratio {state['ratio']}")
    is_compressing = max(options.contexts) >= MIN_COMPRESSED_TOKENS and options.ratio < 1
    if is_compressing and is_watched and num_checks == 0:
        raise GateError("no drift check ever ran, so nothing was compressed")
    if not is_watched and num_checks:
        raise GateError(f"{num_checks} drift checks of the side that has none")


def time_stream(server: Server, prompt: list[int], num_tokens: int, timing: Timing) -> None:
    """One streamed request."""
    start = time.perf_counter()
    with server.stream(prompt, num_tokens) as stream:
        chunks = list(stream)
    if chunks[-1].num_tokens != num_tokens:
        raise GateError(f"{chunks[-1].num_tokens} tokens instead of {num_tokens}")
    first, last = chunks[0], chunks[-1]
    timing.ttft_s.append(first.at_s - start)
    if last.num_tokens > first.num_tokens:
        timing.tpot_s.append((last.at_s - first.at_s) / (last.num_tokens - first.num_tokens))
    for before, after in itertools.pairwise(chunks):
        count = after.num_tokens - before.num_tokens
        timing.gaps_s.extend([(after.at_s - before.at_s) / count] * count)


def measure_prefill(options: argparse.Namespace, dtype: str, prompts: Prompts) -> dict[str, Any]:
    """Time to the first token of cold prompts; stock with several chunk sizes."""
    times: dict[str, list[float]] = {"policy": []}
    with serve(options, dtype, "heterocache", *policy_flags(options, options.preset)) as policy:
        for chunk in options.prefill_chunks:
            name = f"stock {chunk}"
            flags = ("--chunked-prefill-size", str(chunk), "--disable-radix-cache")
            with serve(options, dtype, name, *flags) as stock:
                for turn in range(2):
                    prompt = prompts.ids(options.prefill_tokens, turn)
                    for side, server in ((name, stock), ("policy", policy)):
                        timing = Timing()
                        time_stream(server, prompt, 2, timing)
                        times.setdefault(side, []).append(timing.ttft_s[0])
                        console.print(f"{dtype} prefill {side:<10} {timing.ttft_s[0]:6.2f} s")
    return {
        side: {
            "ttft_s": round(statistics.median(values), 3),
            "all_s": [round(v, 3) for v in values],
        }
        for side, values in times.items()
    }


def print_tables(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Show the result on stdout."""
    out = Console()
    out.print(
        f"{report['machine']['cpu']}, {report['machine']['num_cores']} cores, reads memory at "
        f"{report['read_bandwidth_gb_s']} GB/s; ratio {options.ratio}"
    )
    for dtype, sides in report["decode"].items():
        table = Table(title=f"Time per output token, {dtype} (ms; median of requests)")
        others = [side for side in options.sides if side != "policy"]
        for column in ("context", "stock", "policy", "stock / policy", "policy p95 gap", *others):
            table.add_column(column, justify="right")
        for context in map(str, options.contexts):
            ours, theirs = sides["policy"][context], sides["stock"][context]
            table.add_row(
                context,
                f"{theirs['tpot_ms']:.1f}",
                f"{ours['tpot_ms']:.1f}",
                f"{theirs['tpot_ms'] / ours['tpot_ms']:.2f}x",
                f"{ours['gap_p95_ms']:.1f}",
                *(f"{sides[side][context]['tpot_ms']:.1f}" for side in others),
            )
        if len(options.contexts) > 1:
            context = sides["context"]
            costs = context["cost_ms"]
            # A cost that drowns in the spread of two medians has no ratio.
            is_measurable = costs["policy"] > 0
            ratio = (
                f"{costs['stock'] / costs['policy']:.2f}x" if is_measurable else "not measurable"
            )
            table.add_section()
            table.add_row(
                f"{context['to']} - {context['from']}",
                f"{costs['stock']:.1f}",
                f"{costs['policy']:.1f}",
                ratio,
                f"floor {context['floor_ms']:.1f}",
                *(f"{costs[side]:.1f}" for side in others),
            )
        out.print(table)
    for dtype, sides in report["prefill"].items():
        title = f"Cold prefill of {options.prefill_tokens} tokens, {dtype} (time to first token)"
        table = Table(title=title)
        for column in ("side", "s"):
            table.add_column(column, justify="right")
        for side, values in sides.items():
            table.add_row(side, f"{values['ttft_s']:.2f}")
        out.print(table)


if __name__ == "__main__":
    sys.exit(main())
