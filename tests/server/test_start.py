"""Flags and configuration file reach the policy; what cannot work is refused by name."""

from __future__ import annotations

import contextlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil
import pytest

from hetero_sglang.simulation.method import Method, held_heads
from tests.server.conftest import POLICY, PROFILE_PATH, policy_flags
from tests.server.harness import run_to_refusal, start_server

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    from tests.server.conftest import Reference, ServerPool

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(1500)]

# What each of these says is what a user has to find out what to do: flag, value, reason. One or two
# for each place that refuses; all others are in tests/unit/sglang_adapter/test_arguments.py.
REFUSED = {
    "ratio under the paper's floor": (
        policy_flags(0.3, "--kv-policy-preset", "paper"),
        r"--kv-policy-ratio 0\.3.*floor 0\.3556.*--kv-policy-pivot-rows budget",
    ),
    "a flag without the policy": (
        ("--kv-policy-ratio", "0.6"),
        r"--kv-policy-ratio.*--kv-policy heterocache",
    ),
    "an unknown policy": (("--kv-policy", "magic"), r"--kv-policy.*magic.*heterocache"),
    "no such profile": (
        policy_flags(0.5, "--kv-policy-profile", "/nonexistent/profile.json"),
        r"/nonexistent/profile\.json",
    ),
    "no such text to calibrate on": (
        (
            *policy_flags(0.5, "--kv-policy-profile", "calibrate"),
            *("--kv-policy-calibration-text", "/nonexistent/text.txt"),
        ),
        r"cannot read text /nonexistent/text\.txt",
    ),
    "no such memd": (
        policy_flags(0.5, "--kv-policy-memd", "ipc:///nonexistent/memd/control.sock"),
        r"--kv-policy-memd.*/nonexistent/memd",
    ),
    "another attention backend": (
        (*POLICY, "--attention-backend", "torch_native"),
        r"--attention-backend torch_native",
    ),
    "speculative decoding": (
        (*POLICY, "--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "4"),
        r"--speculative-algorithm",
    ),
    "KV of another dtype": (
        (*POLICY, "--kv-cache-dtype", "bf16"),
        r"torch\.bfloat16 for a model of torch\.float32.*leave --kv-cache-dtype to auto",
    ),
    "8-bit KV": ((*POLICY, "--kv-cache-dtype", "fp8_e4m3"), r"--kv-cache-dtype fp8_e4m3"),
}


@pytest.fixture(scope="module")
def refusals(
    request: pytest.FixtureRequest, demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[tuple[int, str]]]:
    """Exit code and output of each case that is asked for; two at a time, most of it is imports."""
    mine = [item for item in request.session.items if item.path == request.path]
    params = [item.callspec.params for item in mine if hasattr(item, "callspec")]
    cases = [each["case"] for each in params if "case" in each]
    base = tmp_path_factory.mktemp("refusals")
    with ThreadPoolExecutor(2) as pool:
        return {
            case: pool.submit(run_to_refusal, demo_model_dir, base / str(index), *REFUSED[case][0])
            for index, case in enumerate(REFUSED)
            if case in cases
        }


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_by_name(
    refusals: dict[str, Future[tuple[int, str]]], case: str
) -> None:
    code, output = refusals[case].result()
    assert code != 0
    assert re.search(REFUSED[case][1], output), output[-3000:]


def test_a_profile_of_another_model_is_refused(demo_model_dir: Path, tmp_path: Path) -> None:
    profile = json.loads(PROFILE_PATH.read_text())
    profile["model"]["hidden_size"] += 64
    del profile["digest"], profile["fingerprint"]
    path = tmp_path / "other.json"
    path.write_text(json.dumps(profile))
    flags = policy_flags(0.5, "--kv-policy-profile", str(path))
    code, output = run_to_refusal(demo_model_dir, tmp_path / "server", *flags)
    assert code != 0
    assert "hidden_size" in output, output[-3000:]


def test_an_edited_profile_is_refused(demo_model_dir: Path, tmp_path: Path) -> None:
    profile = json.loads(PROFILE_PATH.read_text())
    # Still a valid profile, but not the one that its digest speaks of.
    profile["stability"][0][0] *= 0.99
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(profile))
    flags = policy_flags(0.5, "--kv-policy-profile", str(path))
    code, output = run_to_refusal(demo_model_dir, tmp_path / "server", *flags)
    assert code != 0
    assert "edited.json: digest" in output, output[-3000:]


def test_a_config_file_sets_the_same_flags(
    demo_model_dir: Path, tmp_path: Path, reference: Reference
) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(
        "kv-policy: heterocache\n"
        "kv-policy-ratio: 0.7\n"
        "kv-policy-drift-interval: 3\n"
        "kv-policy-drift-threshold: 0.4\n"
        "kv-policy-retrieval: sync\n"
        "kv-policy-preset: paper\n"
        "kv-policy-pivot-rows: budget\n"
        "kv-policy-watch-dtype: int4\n"
        "kv-policy-window: 16\n"
        "kv-policy-min-tokens: 64\n"
        "kv-policy-memd-bytes: 512MiB\n"
        f"kv-policy-profile: {PROFILE_PATH}\n"
    )
    with start_server(
        *(demo_model_dir, tmp_path / "server", "--config", str(config)), max_total_tokens=4096
    ) as server:
        state = server.heterocache()
    assert state["enabled"] is True
    assert state["ratio"] == 0.7
    assert state["drift_interval"] == 3
    assert state["drift_threshold"] == 0.4
    assert state["retrieval"] == "sync"
    assert state["min_tokens"] == 64
    assert state["profile"] == str(PROFILE_PATH)
    assert state["preset"] == "paper"
    assert state["pivot_rows"] == "budget"
    assert state["watch_dtype"] == "int4"
    assert state["window"] == 16
    assert state["is_filling"] is False
    method = Method.paper(0.7, has_budgeted_pivots=True, watched_bits=4)
    held = held_heads(reference.profile, method, reference.model.config.head_dim)
    assert state["floor"] == pytest.approx(held / 90)
    # int4 with a 16-bit scale for 32 elements, of 30 pivots, for every token id.
    assert state["areas"]["watch"]["capacity_bytes"] == 4097 * 30 * (32 + 4)
    assert state["prefix_reuse"] is False


def test_without_the_flag_the_server_is_stock(servers: ServerPool) -> None:
    server = servers.get()
    state = server.state()
    assert "heterocache" not in state
    assert state["disable_radix_cache"] is False
    assert state["attention_backend"] != "heterocache"
    names = []
    for process in server.descendants():
        with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
            names.append(" ".join(process.cmdline()))
    assert not [name for name in names if "memd" in name]
    assert "heterocache" not in server.log()
