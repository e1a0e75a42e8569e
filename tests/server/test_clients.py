"""Programs that people run against SGLang work unchanged: the openai client, SGLang's frontend."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.server.conftest import PromptSpec, policy_flags

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.server.conftest import Reference, ServerPool
    from tests.server.harness import Server

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def server(servers: ServerPool) -> Server:
    """A server with the policy's defaults."""
    return servers.get(*policy_flags(0.5))


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def stream_chat(client: openai.OpenAI, messages: list[Any], max_tokens: int) -> tuple[str, str]:
    """The streamed answer and why it ended."""
    (model,) = client.models.list().data
    text, reason, num_events = "", "", 0
    for event in client.chat.completions.create(
        model=model.id, messages=messages, max_tokens=max_tokens, temperature=0, stream=True
    ):
        for choice in event.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
            num_events += 1
    assert num_events > 3
    return text, reason


def test_a_streamed_chat_answers_the_question(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": "What is the capital of France?"}
    text, reason = stream_chat(client, [question], 64)
    assert "Paris" in text
    assert reason == "stop"


def test_a_chat_over_a_compressed_document_finds_its_beginning(
    client: openai.OpenAI, server: Server, reference: Reference
) -> None:
    document = reference.tokenizer.decode(reference.ids(PromptSpec("prose", 1_500, 50_000)))
    before = server.heterocache()["drift"]["checks"]
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": f"My name is Alice.\n\n{document}\n\nWhat is my name?"},
    ]
    text, _ = stream_chat(client, messages, 48)
    assert "Alice" in text
    # It was compressed, or there would have been no checks.
    assert server.heterocache()["drift"]["checks"] > before


def test_a_frontend_program_generates_and_branches(server: Server) -> None:
    import sglang as sgl

    @sgl.function
    def tutor(s: Any, topic: str) -> None:
        s += sgl.system("You are a helpful assistant.")
        s += sgl.user(f"Name one {topic}.")
        s += sgl.assistant(sgl.gen("name", max_tokens=12, temperature=0, stop="\n"))
        s += sgl.user("Answer with a number from 1 to 9: how many letters are in 'cat'?")
        s += sgl.assistant(sgl.gen("count", regex="[1-9]", temperature=0))
        forks = s.fork(2)
        for index, fork in enumerate(forks):
            fork += sgl.user(f"Tip {index + 1}, please.")
            fork += sgl.assistant(sgl.gen("tip", max_tokens=8, temperature=0))
        s["tips"] = [fork["tip"] for fork in forks]

    backend = sgl.RuntimeEndpoint(server.url)
    state = tutor.run(topic="color", backend=backend)
    assert state["name"].strip()
    assert re.fullmatch("[1-9]", state["count"])
    assert len(state["tips"]) == 2
    assert all(tip.strip() for tip in state["tips"])


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("chat.py", ("--once", "What is the capital of France?"), "Paris"),
        ("frontend.py", (), r"days: [1-9]"),
        ("long_document.py", (), r"kept .* MiB, [1-9]\d* drift checks"),
    ],
)
def test_examples_run(
    server: Server, script: str, arguments: tuple[str, ...], expected: str
) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, "--url", server.url, *arguments],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(expected, done.stdout), done.stdout


def test_sampling_with_penalties_and_several_choices(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    reply = client.completions.create(
        model=model.id,
        prompt="The sea is",
        n=3,
        max_tokens=8,
        temperature=1.2,
        top_p=0.9,
        frequency_penalty=0.5,
    )
    assert sorted(choice.index for choice in reply.choices) == [0, 1, 2]
    assert reply.usage is not None
    assert 0 < reply.usage.completion_tokens <= 24
