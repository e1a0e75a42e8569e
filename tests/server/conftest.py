"""Servers shared between tests, and the simulation that judges their answers."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hetero_sglang.simulation.engine import Prefill, Simulation, prefill
from hetero_sglang.simulation.method import Method, Profile
from tests.server.harness import Answer, Server, start_server
from tests.simulation.compare import Stream, Verdict, compare
from tests.simulation.texts import prompt_ids

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

PROFILE_PATH = Path(__file__).parents[2] / "profiles" / "smollm2-135m-instruct.json"
POLICY = ("--kv-policy", "heterocache")
MAX_SERVERS = 3
"""Idle servers cost memory (about 4 GB each), not time."""


def policy_flags(ratio: float, *more: str) -> tuple[str, ...]:
    """Flags of a server with the policy."""
    return (*POLICY, "--kv-policy-ratio", str(ratio), *more)


class ServerPool:
    """Starts servers on demand and keeps the last few for the next test that wants the same."""

    def __init__(self, model_dir: Path, base: Path) -> None:
        self._model_dir = model_dir
        self._base = base
        self._alive: OrderedDict[Any, tuple[Server, contextlib.ExitStack]] = OrderedDict()
        self._count = 0

    def get(self, *flags: str, max_total_tokens: int = 32768) -> Server:
        """An idle, healthy server with exactly these flags."""
        key = (flags, max_total_tokens)
        if key in self._alive and not self._alive[key][0].is_healthy():
            self._alive.pop(key)[1].close()
        if key not in self._alive:
            while len(self._alive) >= MAX_SERVERS:
                self._alive.popitem(last=False)[1][1].close()
            self._count += 1
            directory = self._base / f"server-{self._count}"
            with contextlib.ExitStack() as stack:
                server = stack.enter_context(
                    start_server(
                        self._model_dir, directory, *flags, max_total_tokens=max_total_tokens
                    )
                )
                self._alive[key] = (server, stack.pop_all())
        self._alive.move_to_end(key)
        return self._alive[key][0]

    def alive(self) -> list[Server]:
        """The servers that are kept now."""
        return [server for server, _ in self._alive.values()]

    def close(self) -> None:
        """Stop them all."""
        with contextlib.ExitStack() as everything:
            for _, stack in self._alive.values():
                everything.push(stack)
        self._alive.clear()


@pytest.fixture(scope="session")
def servers(demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPool]:
    """Servers by their flags."""
    pool = ServerPool(demo_model_dir, tmp_path_factory.mktemp("servers"))
    try:
        yield pool
    finally:
        pool.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of every living server's log with a failure."""
    report = yield
    if report.when == "call" and report.failed:
        pool = getattr(item, "funcargs", {}).get("servers")
        for server in pool.alive() if isinstance(pool, ServerPool) else []:
            report.sections.append((f"log of {server.url}", server.log_tail()))
    return report


@dataclass(frozen=True)
class PromptSpec:
    """A prompt by where its text comes from, so that it can name a test and key a cache."""

    source: str
    num_tokens: int
    skip_chars: int = 0

    def __str__(self) -> str:
        return f"{self.source}-{self.num_tokens}"


class Reference:
    """The demo model in Transformers, its shipped profile, and prompts run through it once."""

    def __init__(self, model_dir: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.profile = Profile.load(PROFILE_PATH)
        self._model_dir = model_dir
        self.prefill = functools.cache(self._prefill)
        self.ids = functools.cache(self._ids)

    @functools.cached_property
    def model(self) -> Any:
        """The model in fp32."""
        return AutoModelForCausalLM.from_pretrained(self._model_dir, dtype=torch.float32).eval()

    @property
    def row_bytes(self) -> int:
        """Bytes of K and V of one head of one token in fp32."""
        head_dim: int = self.model.config.head_dim
        return 2 * 4 * head_dim

    @property
    def token_bytes(self) -> int:
        """Bytes of all heads' K and V of one token in fp32."""
        return self.profile.num_layers * self.profile.num_heads * self.row_bytes

    def _ids(self, spec: PromptSpec) -> list[int]:
        return prompt_ids(self.tokenizer, spec.source, spec.num_tokens, skip_chars=spec.skip_chars)

    def _prefill(self, spec: PromptSpec) -> Prefill:
        return prefill(self.model, self.ids(spec))

    def simulation(self, method: Method) -> Simulation:
        """The simulation with the shipped profile."""
        return Simulation(self.model, self.profile, method)

    def judge(self, method: Method, spec: PromptSpec, answer: Answer) -> Verdict:
        """Compare an answer with the simulation."""
        stream = Stream(answer.token_ids, answer.logprobs)
        return compare(self.simulation(method), self.prefill(spec), stream)


@pytest.fixture(scope="session")
def reference(demo_model_dir: Path) -> Reference:
    """What judges the servers."""
    return Reference(demo_model_dir)
