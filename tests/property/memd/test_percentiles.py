"""Percentiles of the histogram against those of the sorted durations."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from memd.histogram import LogHistogram, percentile_of

DURATIONS = st.lists(
    st.one_of(st.integers(0, 200), st.integers(0, 10**9), st.integers(0, 1 << 42)),
    min_size=1,
    max_size=200,
)


def recorded(durations: list[int]) -> LogHistogram:
    histogram = LogHistogram()
    for duration in durations:
        histogram.record(duration)
    return histogram


@given(durations=DURATIONS, share=st.floats(0, 1))
def test_a_percentile_is_never_less_and_at_most_a_thirty_second_more(
    durations: list[int], share: float
) -> None:
    exact = sorted(durations)[max(1, math.ceil(share * len(durations))) - 1]
    found = percentile_of(recorded(durations).buckets(), share)
    assert max(1, exact) <= found <= max(1, exact) * (1 + 1 / 32)


@given(durations=DURATIONS)
def test_nothing_is_lost(durations: list[int]) -> None:
    histogram = recorded(durations)
    summary = histogram.summary()
    assert sum(count for _, count in histogram.buckets()) == len(durations) == summary["count"]
    assert histogram.total_ns == sum(durations)
    assert histogram.max_ns == max(durations)
    assert summary["p50_s"] <= summary["p90_s"] <= summary["p99_s"] <= summary["max_s"]


@given(durations=DURATIONS, bits=st.integers(0, 42))
def test_counts_up_to_a_power_of_two_are_exact(durations: list[int], bits: int) -> None:
    counted = sum(count for end, count in recorded(durations).buckets() if end <= 1 << bits)
    assert counted == sum(duration <= 1 << bits for duration in durations)


@given(first=DURATIONS, second=DURATIONS)
def test_buckets_add_up(first: list[int], second: list[int]) -> None:
    both = dict(recorded(first + second).buckets())
    for end, count in recorded(first).buckets():
        both[end] -= count
    assert [(end, count) for end, count in both.items() if count] == recorded(second).buckets()
