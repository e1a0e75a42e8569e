from __future__ import annotations

import pytest

from memd.lifecycle import DaemonState, Lifecycle


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def serving(clock: Clock) -> Lifecycle:
    lifecycle = Lifecycle(5.0, clock=clock)
    assert lifecycle.state is DaemonState.STARTING
    lifecycle.ready()
    assert lifecycle.state is DaemonState.SERVING
    return lifecycle


def test_a_drain_goes_on_while_clients_are_there(serving: Lifecycle, clock: Clock) -> None:
    serving.drain("SIGTERM")
    assert serving.state is DaemonState.DRAINING
    clock.now += 4.9
    serving.check(num_clients=2)
    assert not serving.is_over


def test_a_drain_ends_with_the_last_client(serving: Lifecycle) -> None:
    serving.drain("SIGTERM")
    serving.check(num_clients=0)
    assert serving.end_reason == "SIGTERM, and no client is left"


def test_a_drain_ends_at_its_bound_and_says_who_stayed(serving: Lifecycle, clock: Clock) -> None:
    serving.drain("SIGTERM")
    assert serving.drain_deadline == 105.0
    clock.now = 105.0
    serving.check(num_clients=2)
    assert serving.end_reason == "SIGTERM, and 2 client(s) did not leave within 5 s"


def test_a_second_drain_ends_at_once(serving: Lifecycle) -> None:
    serving.drain("SIGTERM")
    serving.drain("SIGTERM")
    assert serving.is_over


def test_an_end_during_a_drain_is_at_once(serving: Lifecycle) -> None:
    serving.drain("SIGTERM")
    serving.end("SIGINT")
    assert serving.end_reason == "SIGINT"


def test_a_start_does_not_drain() -> None:
    lifecycle = Lifecycle(5.0)
    lifecycle.drain("SIGTERM")
    assert lifecycle.is_over


def test_no_time_to_drain_is_an_end(clock: Clock) -> None:
    lifecycle = Lifecycle(0.0, clock=clock)
    lifecycle.ready()
    lifecycle.drain("SIGTERM")
    assert lifecycle.end_reason == "SIGTERM"


def test_the_first_reason_stays(serving: Lifecycle) -> None:
    serving.end("its parent process has ended")
    serving.end("SIGINT")
    assert serving.end_reason == "its parent process has ended"


def test_without_a_drain_nothing_ends(serving: Lifecycle, clock: Clock) -> None:
    clock.now += 1e6
    serving.check(num_clients=0)
    assert not serving.is_over
