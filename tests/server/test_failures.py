"""SIGKILL of either side: nobody hangs, nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.server.conftest import PromptSpec, policy_flags
from tests.server.harness import start_server, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.server.conftest import Reference
    from tests.server.harness import Server

pytestmark = [
    pytest.mark.server,
    pytest.mark.multiproc,
    pytest.mark.slow,
    pytest.mark.timeout(2000),
]

PROMPTS = (PromptSpec("code", 2_000), PromptSpec("code", 1_500, 12_000), PromptSpec("prose", 60))
NUM_TOKENS = 80
KILL_AFTER_TOKENS = 12
END_TIMEOUT_S = 60


def is_gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that nobody reaped has)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(pids: list[int]) -> None:
    wait_until(
        lambda: all(map(is_gone, pids)),
        END_TIMEOUT_S,
        lambda: f"still running: {[pid for pid in pids if not is_gone(pid)]}",
    )


def count_tokens(server: Server, prompt: list[int], num_tokens: int, started: list[int]) -> int:
    """Tokens of a stream; ``started`` gets an entry when it is well under way."""
    count = 0
    with server.stream(prompt, num_tokens) as chunks:
        for chunk in chunks:
            if count < KILL_AFTER_TOKENS <= chunk.num_tokens:
                started.append(chunk.num_tokens)
            count = chunk.num_tokens
    return count


def test_requests_finish_when_memd_is_killed_during_decode(
    demo_model_dir: Path, tmp_path: Path, reference: Reference
) -> None:
    prompts = [reference.ids(spec) for spec in PROMPTS]
    with start_server(demo_model_dir, tmp_path, *policy_flags(0.5)) as server:
        memd = server.heterocache()["memd"]["pid"]
        assert memd in [process.pid for process in server.descendants()]
        started: list[int] = []
        with ThreadPoolExecutor(len(prompts)) as pool:
            # Long enough to find out, however late the kill comes.
            wanted = [3 * NUM_TOKENS] * len(prompts)
            counts = [
                pool.submit(count_tokens, server, prompt, num_tokens, started)
                for prompt, num_tokens in zip(prompts, wanted, strict=True)
            ]
            wait_until(lambda: len(started) == len(prompts), 600, lambda: f"started {started}")
            os.kill(memd, signal.SIGKILL)
            assert [count.result(timeout=600) for count in counts] == wanted
        state = server.heterocache()
        assert state["memd"]["state"] == "lost"
        assert state["integrity"] == "ok"
        assert server.log().count("memd is gone") == 1
        # New requests are served too; short ones keep everything and are exact.
        alone = server.generate(prompts[2], 16)
        assert len(server.generate(prompts[0], 16).token_ids) == 16
        assert server.generate(prompts[2], 16).token_ids == alone.token_ids
        server.wait_until_idle()
        after = server.heterocache()
        assert {name: area["used_bytes"] for name, area in after["areas"].items()} == dict.fromkeys(
            after["areas"], 0
        )
        wait_until(server.is_healthy, 60, server.log_tail)


def test_memd_ends_with_a_killed_server(
    demo_model_dir: Path, tmp_path: Path, reference: Reference
) -> None:
    with start_server(demo_model_dir, tmp_path, *policy_flags(0.5)) as server:
        memd = server.heterocache()["memd"]
        family = [process.pid for process in server.descendants()]
        assert memd["pid"] in family
        with server.stream(reference.ids(PROMPTS[0]), NUM_TOKENS) as chunks:
            for chunk in chunks:
                if chunk.num_tokens >= KILL_AFTER_TOKENS:
                    break
            server.kill()
        wait_until_gone(family)
    directory = memd["address"].removeprefix("ipc://").rpartition("/")[0]
    assert not os.path.exists(directory) or not os.listdir(directory)


@pytest.fixture
def own_memd(tmp_path: Path) -> Iterator[str]:
    """Address of a memd that is nobody's child but the test's."""
    address = f"ipc://{tmp_path}/memd/control.sock"
    process = subprocess.Popen(
        [sys.executable, "-m", "memd", "serve", "--bytes", "2GiB", "--address", address],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("READY")
        yield address
    finally:
        process.terminate()
        process.wait(timeout=END_TIMEOUT_S)
        process.stdout.close()


def memd_status(address: str) -> dict[str, Any]:
    """What `memd status --json` says of one daemon."""
    done = subprocess.run(
        [sys.executable, "-m", "memd", "status", "--json", "--wait", "30", "--address", address],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    status: dict[str, Any] = json.loads(done.stdout)[0]
    return status


def test_a_running_memd_takes_a_killed_servers_pages_back(
    demo_model_dir: Path, tmp_path: Path, reference: Reference, own_memd: str
) -> None:
    flags = policy_flags(0.5, "--kv-policy-memd", own_memd)
    empty = memd_status(own_memd)
    with start_server(demo_model_dir, tmp_path / "server", *flags, max_total_tokens=8192) as server:
        # Longer than it takes to ask memd how it is.
        with server.stream(reference.ids(PROMPTS[0]), 20 * NUM_TOKENS) as chunks:
            for chunk in chunks:
                if chunk.num_tokens >= KILL_AFTER_TOKENS:
                    break
            held = memd_status(own_memd)
            assert used_pages(held) > used_pages(empty) == 0
            server.kill()
        wait_until(
            lambda: used_pages(memd_status(own_memd)) == 0,
            END_TIMEOUT_S,
            lambda: f"pages are still used: {memd_status(own_memd)}",
        )
    # It is free when it has been cleaned.
    wait_until(
        lambda: memd_status(own_memd)["region"]["free_bytes"] == empty["region"]["free_bytes"],
        END_TIMEOUT_S,
        lambda: f"bytes are still used: {memd_status(own_memd)}",
    )
    # The next server finds all of the room.
    with start_server(demo_model_dir, tmp_path / "next", *flags, max_total_tokens=8192) as server:
        assert len(server.generate(reference.ids(PROMPTS[1]), 12).token_ids) == 12
    wait_until(
        lambda: used_pages(memd_status(own_memd)) == 0, END_TIMEOUT_S, lambda: "pages are left"
    )


def used_pages(status: dict[str, Any]) -> int:
    """Pages that clients hold."""
    pages: int = sum(
        client["pages_reserved"] + client["pages_sealed"] for client in status["clients"]
    )
    return pages
