from __future__ import annotations

from memd.histogram import LogHistogram, percentile_of


def test_nothing_recorded_is_zero() -> None:
    summary = LogHistogram().summary()
    assert summary == {
        "count": 0,
        "sum_s": 0.0,
        "max_s": 0.0,
        "p50_s": 0.0,
        "p90_s": 0.0,
        "p99_s": 0.0,
        "buckets": [],
    }


def test_short_durations_are_exact() -> None:
    histogram = LogHistogram()
    for duration in range(1, 65):
        histogram.record(duration)
    assert histogram.buckets() == [(duration, 1) for duration in range(1, 65)]
    assert percentile_of(histogram.buckets(), 0.5) == 32


def test_every_power_of_two_ends_a_bucket() -> None:
    histogram = LogHistogram()
    for bits in range(43):
        histogram.record(1 << bits)
        histogram.record((1 << bits) + 1)
    ends = [end for end, _ in histogram.buckets()]
    assert {1 << bits for bits in range(43)} <= set(ends)


def test_what_takes_no_time_or_hours_is_still_counted() -> None:
    histogram = LogHistogram()
    histogram.record(0)
    histogram.record(10**15)
    assert [end for end, _ in histogram.buckets()] == [1, 1 << 42]
    assert histogram.max_ns == 10**15


def test_memory_is_bounded() -> None:
    histogram = LogHistogram()
    for duration in range(0, 1 << 43, 1 << 30):
        histogram.record(duration)
    assert len(histogram.buckets()) < 1300


def test_percentiles_do_not_exceed_the_longest() -> None:
    histogram = LogHistogram()
    histogram.record(1_000_001)
    assert histogram.summary()["p99_s"] == 0.001000001
