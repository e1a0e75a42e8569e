from __future__ import annotations

import io

import pytest
from rich.console import Console

from memd.dashboard import Sample, frame
from memd.protocol import KVLayout
from memd.testing import FakeMemd

LAYOUT = KVLayout(num_heads=2, head_dim=8, dtype="float16", page_tokens=4)


def shown(before: Sample | None, now: Sample, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(frame(before, now))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def words_of(text: str, first: str) -> list[str]:
    """Words of the last line that begins with a word, without the frame."""
    lines = [line.strip(" │").split() for line in text.splitlines()]
    return [line for line in lines if line[:1] == [first]][-1]


@pytest.fixture
def stats() -> dict:
    with FakeMemd.create(LAYOUT, num_pages=4, landing_rows=8) as memd:
        reserved = memd.reserve(3)
        memd.poll()
        memd.commit(reserved.page_ids[:2])
        memd.poll()
        stats = memd.service.stats()
    # On a busy machine that took a second.
    stats["daemon"]["uptime_s"] = 0.0
    for client in stats["clients"]:
        client["silent_s"] = 0.0
    return stats


def later(stats: dict, **counters: int) -> dict:
    return stats | {"counters": stats["counters"] | counters}


def latency(*buckets: tuple[int, int]) -> dict:
    return {"count": sum(count for _, count in buckets), "buckets": [list(b) for b in buckets]}


def test_pool_and_clients_are_shown(stats: dict) -> None:
    text = shown(None, Sample(stats, 0.0))
    daemon = stats["daemon"]
    assert f"memd {daemon['pid']}  serving  up 0 s  in-process" in text
    assert "integrity ok" in text
    assert "8 KiB of 8 KiB given to clients" in text
    pid = str(stats["clients"][0]["pid"])
    assert words_of(text, "1") == ["1", pid, "3", "4", "768", "B", "8", "0", "s", "fake"]


def test_rates_are_those_between_two_samples(stats: dict) -> None:
    before = later(stats, fetches=100, rows_fetched=1000, bytes_fetched=0, gather_ns=0)
    now = later(
        stats,
        fetches=300,
        rows_fetched=11_000,
        bytes_fetched=4 << 30,
        gather_ns=500_000_000,
    )
    text = shown(Sample(before, 10.0), Sample(now, 12.0))
    assert "fetch 100/s, 5,000 rows/s, 2 GiB/s (8 GiB/s while gathering, 25% of the time)" in text


def test_percentiles_are_those_between_two_samples(stats: dict) -> None:
    slow_start = {"fetch": latency((10**9, 1000)), "ping": latency((2000, 1))}
    since = {
        "fetch": latency((1_000_000, 98), (3_000_000, 2), (10**9, 1000)),
        "ping": latency((2000, 1)),
        "commit": latency((7000, 10)),
    }
    text = shown(
        Sample(stats | {"latencies": slow_start}, 0.0), Sample(stats | {"latencies": since}, 1.0)
    )
    assert words_of(text, "fetch") == ["fetch", "100", "1", "ms", "1", "ms", "3", "ms"]
    assert words_of(text, "control") == ["control", "10", "7", "us", "7", "us", "7", "us"]


def test_a_quiet_interval_has_no_percentiles(stats: dict) -> None:
    text = shown(Sample(stats, 0.0), Sample(stats, 1.0))
    assert words_of(text, "fetch") == ["fetch", "0", "-", "-", "-"]


def test_troubles_are_named(stats: dict) -> None:
    quiet = shown(None, Sample(stats, 0.0))
    assert "since the start: no errors" in quiet
    broken = later(stats, clients_reclaimed=2) | {
        "errors": {"malformed": 3},
        "integrity": "two owners share an extent",
    }
    text = shown(None, Sample(broken, 0.0))
    assert "malformed 3, clients reclaimed 2" in text
    assert "integrity two owners share an extent" in text


def test_a_clients_name_is_text_and_no_markup(stats: dict) -> None:
    stats["clients"][0]["name"] = "[red]x[/red]"
    assert "[red]x[/red]" in shown(None, Sample(stats, 0.0))


def test_a_narrow_terminal_and_an_empty_daemon_are_fine(stats: dict) -> None:
    text = shown(None, Sample(stats | {"clients": [], "latencies": {}}, 0.0), width=40)
    assert "no clients" in text


def test_gpus_are_shown_where_memd_holds_something_of_them(stats: dict) -> None:
    device = {
        "uuid": "GPU-1",
        "rings": 2,
        "copies": 3,
        "staging_bytes": 2048,
        "staging_bytes_used": 1024,
        "lost_reason": None,
    }
    lost = device | {"uuid": "GPU-2", "lost_reason": "it broke"}

    def sample(num_bytes: int, at: float) -> Sample:
        cuda = {"counters": {"bytes_copied": num_bytes}, "devices": [device, lost]}
        return Sample(stats | {"cuda": cuda}, at)

    text = shown(sample(0, 0.0), sample(4096, 2.0))
    assert "to GPUs 2 KiB/s" in text
    assert "GPU-1: 2 ring(s), 3 copies under way, 1 KiB of 2 KiB staging" in text
    assert "GPU-2: lost, it broke" in text
    assert "GPU" not in shown(None, Sample(stats, 0.0))
