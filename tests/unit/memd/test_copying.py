from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memd.copying import CopyJob, CopyQueue
from memd.transfer import HostTransfer

if TYPE_CHECKING:
    from collections.abc import Sequence

ROW = 16
NUM_ROWS = 64


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SlowLink:
    """Every transfer takes a second for each byte, one after the other."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._free_at = 0.0

    def finish_time(self, num_bytes: int) -> float:
        self._free_at = max(self._free_at, self._clock()) + num_bytes
        return self._free_at


class Region:
    """Source rows with their number in every byte, and a landing ring for each client."""

    def __init__(self, num_clients: int = 3) -> None:
        self.memory = np.zeros((1 + num_clients) * NUM_ROWS * ROW, dtype=np.uint8)
        self.rows = self.memory.reshape(1 + num_clients, NUM_ROWS, ROW)
        self.rows[0] = np.arange(NUM_ROWS, dtype=np.uint8)[:, None] + 1

    def job(self, client_id: int, rows: Sequence[int], landing_row: int = 0) -> CopyJob:
        return CopyJob(
            client_id=client_id,
            source_offset=0,
            row_bytes=ROW,
            rows=np.array(rows, dtype=np.int64),
            landing_offset=((1 + client_id) * NUM_ROWS + landing_row) * ROW,
        )

    def landed(self, client_id: int, count: int, landing_row: int = 0) -> list[int]:
        rows = self.rows[1 + client_id, landing_row : landing_row + count]
        assert (rows == rows[:, :1]).all()
        return [int(value) - 1 for value in rows[:, 0]]


def queue(region: Region, quantum_rows: int = 4, **options: object) -> CopyQueue:
    return CopyQueue(HostTransfer(region.memory), quantum_bytes=quantum_rows * ROW, **options)  # type: ignore[arg-type]


def test_a_turn_copies_no_more_than_its_quantum() -> None:
    region = Region()
    copies = queue(region, quantum_rows=4)
    job = region.job(0, range(10))
    copies.submit(job)

    done = []
    while not copies.is_idle:
        copies.step()
        done.append(job.num_done)

    assert done == [4, 8, 10]
    assert copies.take_finished() == [job]
    assert region.landed(0, 10) == list(range(10))


def test_a_small_fetch_waits_for_one_turn_of_a_large_one_not_for_its_end() -> None:
    region = Region()
    copies = queue(region, quantum_rows=4)
    large, small = region.job(0, range(60)), region.job(1, [7, 3])
    copies.submit(large)
    copies.step()
    copies.submit(small)
    copies.step()
    copies.step()

    assert copies.take_finished() == [small]
    assert region.landed(1, 2) == [7, 3]
    assert large.num_done <= 8


def test_clients_share_the_bytes_however_they_cut_their_fetches() -> None:
    region = Region()
    copies = queue(region, quantum_rows=6)
    few = [region.job(0, range(60))]
    many = [region.job(1, [row]) for row in range(60)]
    for job in (*few, *many):
        copies.submit(job)

    for _ in range(8):
        copies.step()

    assert sum(job.num_done for job in few) == sum(job.num_done for job in many) == 24


def test_a_row_larger_than_the_quantum_is_copied_when_enough_turns_have_come() -> None:
    region = Region()
    copies = CopyQueue(HostTransfer(region.memory), quantum_bytes=ROW // 4)
    job = region.job(0, [5])
    copies.submit(job)

    for _ in range(3):
        copies.step()
        assert job.num_done == 0
    copies.step()

    assert copies.take_finished() == [job]
    assert region.landed(0, 1) == [5]


def test_an_idle_client_saves_no_credit() -> None:
    region = Region()
    copies = queue(region, quantum_rows=4)
    copies.submit(region.job(0, [1]))
    copies.step()
    later = region.job(0, range(20))
    copies.submit(later)
    copies.step()

    assert later.num_done == 4


def test_a_slow_link_holds_copies_back_without_holding_up_copying() -> None:
    region, clock = Region(), Clock()
    copies = queue(region, quantum_rows=64, delay=SlowLink(clock), clock=clock)
    first, second = region.job(0, range(2)), region.job(1, range(1))
    copies.submit(first)
    copies.submit(second)
    copies.step()
    copies.step()

    assert copies.is_idle
    assert copies.take_finished() == []
    assert copies.next_due() == 2 * ROW
    clock.now = 2.0 * ROW
    assert copies.take_finished() == [first]
    assert copies.next_due() == 3 * ROW
    clock.now = 3.0 * ROW
    assert copies.take_finished() == [second]
    assert copies.next_due() is None


def test_nothing_of_a_cancelled_client_is_written_any_more() -> None:
    region = Region()
    copies = queue(region, quantum_rows=4)
    gone, stays = region.job(0, range(20)), region.job(1, range(4))
    for job in (gone, stays):
        copies.submit(job)
    copies.step()
    region.rows[1] = 0

    assert copies.cancel(0) == [gone]
    copies.step()

    assert copies.is_idle
    assert copies.take_finished() == [stays]
    assert not region.rows[1].any()
    assert copies.cancel(0) == []


def test_a_fetch_that_cannot_be_copied_gives_way_to_the_others() -> None:
    region = Region()
    copies = queue(region)
    bad, good = region.job(0, [NUM_ROWS - 1]), region.job(1, [2])
    bad.landing_offset = region.memory.size
    for job in (bad, good):
        copies.submit(job)

    with pytest.raises(ValueError):
        copies.step()
    assert copies.drop_current() is bad
    copies.check_integrity()
    copies.step()

    assert copies.take_finished() == [good]


def test_an_empty_fetch_is_finished_with_its_turn() -> None:
    region = Region()
    copies = queue(region)
    job = region.job(0, [])
    copies.submit(job)
    copies.step()

    assert copies.take_finished() == [job]
    assert copies.num_jobs == 0


def test_a_quantum_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="quantum_bytes must be at least 1, got 0"):
        CopyQueue(HostTransfer(Region().memory), quantum_bytes=0)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20)), min_size=1, max_size=12),
    st.integers(1, 9),
)
def test_while_two_clients_wait_neither_gets_more_than_a_quantum_ahead(
    fetches: list[tuple[int, int]], quantum_rows: int
) -> None:
    region = Region()
    copies = queue(region, quantum_rows=quantum_rows)
    jobs = [region.job(client, range(count)) for client, count in fetches]
    for job in jobs:
        copies.submit(job)
    copied = dict.fromkeys({client for client, _ in fetches}, 0)

    while not copies.is_idle:
        copies.step()
        copies.check_integrity()
        copied = {
            client: sum(job.num_done for job in jobs if job.client_id == client)
            for client in copied
        }
        waiting = [client for client in copied if copies.pending_bytes(client)]
        for client in waiting:
            assert all(copied[other] <= copied[client] + quantum_rows for other in copied)

    assert [job.num_done for job in jobs] == [count for _, count in fetches]


class CopyMachine(RuleBasedStateMachine):
    """Fetches of three clients, with cancellations, against what must have landed."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.region = Region()
        self.copies = queue(
            self.region, quantum_rows=3, delay=SlowLink(self.clock), clock=self.clock
        )
        self.open: list[CopyJob] = []

    @rule(client=st.integers(0, 2), rows=st.lists(st.integers(0, NUM_ROWS - 1), max_size=10))
    def submit(self, client: int, rows: list[int]) -> None:
        job = self.region.job(client, rows, landing_row=self.next_row(client, len(rows)))
        self.copies.submit(job)
        self.open.append(job)

    def next_row(self, client: int, count: int) -> int:
        used = sum(len(job.rows) for job in self.open if job.client_id == client)
        return used if used + count <= NUM_ROWS else 0

    @precondition(lambda self: self.open)
    @rule()
    def step(self) -> None:
        self.copies.step()

    @rule(seconds=st.integers(0, 200))
    def time_passes(self, seconds: int) -> None:
        self.clock.now += seconds
        for job in self.copies.take_finished():
            assert job.due <= self.clock.now
            assert job.num_done == len(job.rows)
            mine = [other for other in self.open if other.client_id == job.client_id]
            assert mine[0] is job
            self.open.remove(job)

    @rule(client=st.integers(0, 2))
    def cancel(self, client: int) -> None:
        mine = [job for job in self.open if job.client_id == client]
        assert sorted(map(id, self.copies.cancel(client))) == sorted(map(id, mine))
        self.open = [job for job in self.open if job.client_id != client]

    @invariant()
    def books_hold(self) -> None:
        self.copies.check_integrity()
        assert self.copies.num_jobs == len(self.open)


TestCopyMachine = CopyMachine.TestCase
