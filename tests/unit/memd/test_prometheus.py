from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from memd.metrics import Counters
from memd.prometheus import render
from memd.protocol import REQUEST_TYPES, ErrorCode, KVLayout
from memd.testing import FakeMemd
from memd.transfer.cuda_ipc import CudaCounters

SAMPLE = re.compile(r'([a-z_]+)(\{(?:[a-z_]+="[^"\\\n]*",?)+\})? (\S+)')
DOCUMENT = Path(__file__).parents[3] / "docs" / "memd.md"
LAYOUT = KVLayout(num_heads=2, head_dim=8, dtype="float16", page_tokens=4)


def parse(text: str) -> dict[str, float]:
    """Samples by name and labels, after checking the form of every line."""
    assert text.endswith("\n")
    samples: dict[str, float] = {}
    kinds: dict[str, str] = {}
    helped = set()
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert name not in helped, f"{name} comes twice"
            helped.add(name)
        elif line.startswith("# TYPE "):
            _, _, name, kinds[name] = line.split()
        else:
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            name = match[1]
            family = re.sub("_(bucket|sum|count)$", "", name)
            family = family if kinds.get(family) == "histogram" else name
            assert family in helped, f"{name} has no help"
            assert (kinds[family] == "counter") == name.endswith("_total")
            key = match[1] + (match[2] or "")
            assert key not in samples, f"{key} comes twice"
            samples[key] = float(match[3])
    return samples


@pytest.fixture
def stats() -> dict:
    with FakeMemd.create(LAYOUT, num_pages=4, landing_rows=8) as memd:
        reserved = memd.reserve(3)
        memd.poll()
        memd.commit(reserved.page_ids[:2])
        memd.poll()
        memd.service.handle(b"vandal", b"no frame")
        for duration_ns in (3000, 5000, 9_000_000, 10**11):
            memd.service.metrics.answered("fetch", duration_ns)
        return memd.service.stats()


def test_the_text_is_well_formed_and_tells_the_state(stats: dict) -> None:
    samples = parse(render(stats, age_s=0.25))
    assert samples["memd_clients"] == 1
    assert samples['memd_pages{state="free"}'] == 1
    assert samples['memd_pages{state="reserved"}'] == 1
    assert samples['memd_pages_bytes{state="sealed"}'] == 2 * LAYOUT.page_bytes
    assert samples["memd_region_bytes"] == stats["region"]["bytes"]
    assert samples["memd_clients_registered_total"] == 1
    assert samples['memd_requests_total{type="reserve"}'] == 1
    assert samples['memd_request_errors_total{code="malformed"}'] == 1
    assert samples["memd_integrity_ok"] == 1
    assert samples["memd_snapshot_age_seconds"] == 0.25
    assert samples['memd_state{state="serving"}'] == 1
    assert samples['memd_state{state="draining"}'] == 0


def test_a_histogram_is_cumulative_and_ends_with_everything(stats: dict) -> None:
    samples = parse(render(stats, age_s=0))
    buckets = {
        key.partition('le="')[2][:-2]: count
        for key, count in samples.items()
        if key.startswith('memd_request_duration_seconds_bucket{type="fetch"')
    }
    assert list(buckets.values()) == sorted(buckets.values())
    assert buckets["4.096e-06"] == 1
    assert buckets["8.192e-06"] == 2
    assert buckets["0.016777216"] == 3
    assert buckets["17.17986918"] == 3
    assert buckets["+Inf"] == samples['memd_request_duration_seconds_count{type="fetch"}'] == 4
    total = samples['memd_request_duration_seconds_sum{type="fetch"}']
    assert total == pytest.approx(100.009008)


def test_every_counter_is_there(stats: dict) -> None:
    counters = {field.name: 1000 + i for i, field in enumerate(dataclasses.fields(Counters))}
    values = set(parse(render(stats | {"counters": counters}, age_s=0)).values())
    for name, value in counters.items():
        assert {value, value * 1e-9} & values, f"{name} has no name for Prometheus"


CUDA = {
    "counters": dataclasses.asdict(CudaCounters(copies_done=3, copy_ns=2_000_000_000)),
    "devices": [
        {
            "uuid": f"GPU-{index}",
            "rings": 2,
            "copies": 1,
            "staging_bytes": 100,
            "staging_bytes_used": 40,
            "lost_reason": reason,
        }
        for index, reason in enumerate([None, "it broke"])
    ],
}


def test_gpus_are_summed_up_where_there_may_be_some(stats: dict) -> None:
    samples = parse(render(stats | {"cuda": CUDA}, age_s=0))
    assert samples["memd_cuda_rings"] == 4
    assert samples["memd_cuda_devices_lost"] == 1
    assert samples["memd_cuda_copies_total"] == 3
    assert samples["memd_cuda_copy_seconds_total"] == 2.0
    assert len([name for name in samples if name.startswith("memd_cuda_")]) == 5 + len(
        dataclasses.fields(CudaCounters)
    )
    assert not any(name.startswith("memd_cuda_") for name in parse(render(stats, age_s=0)))


def test_every_name_is_documented(stats: dict) -> None:
    documented = DOCUMENT.read_text()
    stats = stats | {"cuda": CUDA}
    starting = {"region": {"bytes": 100, "ready_bytes": 40}}
    text = render(stats, age_s=0) + render(starting, age_s=0)
    for name in re.findall(r"^# TYPE (\S+)", text, re.MULTILINE):
        assert f"`{name}`" in documented


def test_series_that_have_not_happened_yet_are_zero(stats: dict) -> None:
    samples = parse(render(stats, age_s=0))
    for code in ErrorCode:
        assert f'memd_request_errors_total{{code="{code}"}}' in samples
    for kind in REQUEST_TYPES:
        tag = kind.__struct_config__.tag
        assert f'memd_request_duration_seconds_count{{type="{tag}"}}' in samples


def test_a_daemon_that_starts_has_few_numbers() -> None:
    starting = {
        "daemon": {"pid": 1, "address": "ipc:///x", "state": "starting"},
        "region": {"bytes": 100, "ready_bytes": 40},
    }
    samples = parse(render(starting, age_s=0))
    assert samples["memd_region_ready_bytes"] == 40
    assert samples['memd_state{state="starting"}'] == 1
    assert parse(render({}, age_s=0))['memd_state{state="starting"}'] == 1


def test_broken_books_are_a_zero(stats: dict) -> None:
    assert parse(render(stats | {"integrity": "two owners"}, age_s=0))["memd_integrity_ok"] == 0
