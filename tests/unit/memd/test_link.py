from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memd.link import Link

# 8 gigabits a second are 1e9 bytes a second.
GB_PER_S = 8.0
RATE = 1e9


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_transfer_takes_its_bytes_over_the_rate_plus_the_latency(clock: Clock) -> None:
    link = Link(GB_PER_S, 50, clock)
    assert link.finish_time(3_000_000) == pytest.approx(100.003050)


def test_transfers_queue_and_pay_the_latency_side_by_side(clock: Clock) -> None:
    link = Link(GB_PER_S, 500, clock)
    times = [link.finish_time(1_000_000) for _ in range(3)]
    assert times == pytest.approx([100.0015, 100.0025, 100.0035])


def test_a_transfer_waits_only_for_what_is_left_of_the_one_before(clock: Clock) -> None:
    link = Link(GB_PER_S, 0, clock)
    link.finish_time(10_000_000)
    clock.now += 0.004
    assert link.finish_time(1_000_000) == pytest.approx(100.011)


def test_idle_time_is_not_saved_up(clock: Clock) -> None:
    link = Link(GB_PER_S, 0, clock)
    link.finish_time(1)
    clock.now += 60
    assert link.finish_time(2_000_000) == pytest.approx(160.002)


def test_a_latency_without_a_rate_delays_each_transfer_by_itself(clock: Clock) -> None:
    link = Link(0, 20, clock)
    assert [link.finish_time(1 << 40) for _ in range(2)] == pytest.approx([100.00002] * 2)


def test_without_limits_a_transfer_is_finished_when_it_is_asked_for(clock: Clock) -> None:
    link = Link(clock=clock)
    assert link.finish_time(1 << 60) == clock.now


def test_no_bytes_cost_the_latency_only(clock: Clock) -> None:
    assert Link(GB_PER_S, 10, clock).finish_time(0) == pytest.approx(100.00001)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_a_rate_or_latency_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="gbps must be a finite number"):
        Link(value, 0)
    with pytest.raises(ValueError, match="latency_us must be a finite number"):
        Link(0, value)


def test_negative_bytes_are_refused(clock: Clock) -> None:
    with pytest.raises(ValueError, match="num_bytes must not be negative"):
        Link(GB_PER_S, 0, clock).finish_time(-1)


# Pauses before each transfer in microseconds, and its bytes: from hopelessly late to mostly idle.
TRANSFERS = st.lists(
    st.tuples(st.integers(0, 3_000), st.integers(0, 2_000_000)), min_size=1, max_size=40
)
LATENCIES_US = st.sampled_from([0, 5, 700])


@given(transfers=TRANSFERS, latency_us=LATENCIES_US)
def test_no_span_of_time_moves_more_than_the_rate_allows_plus_one_transfer(
    transfers: list[tuple[int, int]], latency_us: int
) -> None:
    clock = Clock()
    link = Link(GB_PER_S, latency_us, clock)
    arrived = []
    for pause_us, num_bytes in transfers:
        clock.now += pause_us * 1e-6
        arrived.append((link.finish_time(num_bytes), num_bytes))
    for first, last in itertools.combinations_with_replacement(range(len(arrived)), 2):
        span = arrived[last][0] - arrived[first][0]
        moved = sum(num_bytes for _, num_bytes in arrived[first : last + 1])
        # The first one's bytes were on the wire before the span begins; one byte for rounding.
        assert moved <= RATE * span + arrived[first][1] + 1


@given(transfers=TRANSFERS, latency_us=LATENCIES_US)
def test_a_transfer_starts_when_it_is_asked_for_or_when_the_wire_is_free_whichever_is_later(
    transfers: list[tuple[int, int]], latency_us: int
) -> None:
    clock = Clock()
    link = Link(GB_PER_S, latency_us, clock)
    wire_is_free_at = 0.0
    for pause_us, num_bytes in transfers:
        clock.now += pause_us * 1e-6
        finished = link.finish_time(num_bytes)
        wire_is_free_at = max(wire_is_free_at, clock.now) + num_bytes / RATE
        assert finished == pytest.approx(wire_is_free_at + latency_us * 1e-6, abs=1e-9)


@given(transfers=TRANSFERS, latency_us=LATENCIES_US)
def test_a_shared_link_is_as_busy_as_one_clients(
    transfers: list[tuple[int, int]], latency_us: int
) -> None:
    """Who asks does not matter: the last byte of a batch arrives when that of its sum would."""
    clock = Clock()
    batch, alone = Link(GB_PER_S, latency_us, clock), Link(GB_PER_S, latency_us, clock)
    last = max(batch.finish_time(num_bytes) for _, num_bytes in transfers)
    total = alone.finish_time(sum(num_bytes for _, num_bytes in transfers))
    assert last == pytest.approx(total, abs=1e-9)
