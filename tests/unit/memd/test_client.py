from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from memd.errors import IntegrityError
from memd.protocol import ErrorCode, ErrorReply, FetchReply, KVLayout, Pong, encode
from memd.store import PageState
from memd.testing import FakeMemd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAYOUT = KVLayout(num_heads=3, head_dim=4, dtype="float16", page_tokens=8)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def memd(clock: Clock) -> Iterator[FakeMemd]:
    with FakeMemd.create(LAYOUT, num_pages=8, landing_rows=100, clock=clock) as client:
        yield client


def sealed(memd: FakeMemd, num_pages: int) -> np.ndarray:
    """Page ids of new sealed pages; every row holds its own flat index."""
    ticket = memd.reserve(num_pages)
    memd.poll()
    assert ticket.page_ids is not None
    flat = memd.pages.reshape(-1, LAYOUT.row_bytes)
    for page in ticket.page_ids:
        for row in range(page * LAYOUT.rows_per_page, (page + 1) * LAYOUT.rows_per_page):
            flat[row] = row
    memd.commit(ticket.page_ids)
    return ticket.page_ids


def test_the_arrays_have_the_agreed_shapes(memd: FakeMemd) -> None:
    assert memd.pages.shape == (8, 3, 8, LAYOUT.row_bytes)
    assert memd.landing.shape == (100, LAYOUT.row_bytes)
    assert memd.pages.dtype == memd.landing.dtype == np.uint8
    assert memd.pages.flags.writeable
    assert memd.is_alive


def test_rows_of_committed_pages_come_back(memd: FakeMemd) -> None:
    sealed(memd, 4)
    rows = np.array([95, 0, 24, 24, 7])
    ticket = memd.fetch(rows)
    assert ticket is not None
    assert not ticket.is_done
    assert memd.wait(ticket, 1.0)
    assert ticket.error is None
    assert memd.landed(ticket)[:, 0].tolist() == rows.tolist()
    memd.finish(ticket)
    assert memd.landing_rows_used == 0
    memd.check_integrity()


def test_a_request_is_sent_at_once_and_answered_at_a_poll(memd: FakeMemd) -> None:
    ticket = memd.reserve(3)
    assert not ticket.is_done
    assert memd.num_unhandled == 1
    memd.poll()
    assert ticket.is_done
    assert ticket.page_ids is not None
    assert ticket.page_ids.dtype == np.int64
    assert ticket.page_ids.tolist() == [0, 1, 2]
    assert memd.pages_used == 3


def test_a_full_pool_is_a_ticket_without_pages(memd: FakeMemd) -> None:
    ticket = memd.reserve(9)
    assert memd.wait(ticket, 1.0)
    assert ticket.page_ids is None
    assert ticket.error is None
    assert memd.is_alive
    assert memd.stats()["counters"]["reserves_full"] == 1


def test_released_pages_can_be_reserved_again(memd: FakeMemd) -> None:
    ids = sealed(memd, 8)
    memd.release(ids[:2])
    ticket = memd.reserve(2)
    assert memd.wait(ticket, 1.0)
    assert ticket.page_ids is not None
    memd.check_integrity()


def test_order_lets_a_fetch_read_what_the_next_call_releases(memd: FakeMemd) -> None:
    ids = sealed(memd, 1)
    memd.hold()
    ticket = memd.fetch(np.arange(5))
    assert ticket is not None
    memd.release(ids)
    memd.resume()
    assert memd.wait(ticket, 1.0)
    assert ticket.error is None


def test_commit_and_fetch_in_one_go(memd: FakeMemd) -> None:
    reserved = memd.reserve(1)
    memd.poll()
    assert reserved.page_ids is not None
    memd.hold()
    memd.commit(reserved.page_ids)
    ticket = memd.fetch(np.arange(24))
    assert ticket is not None
    memd.resume()
    assert memd.wait(ticket, 1.0)
    assert ticket.error is None


def test_a_fetch_of_an_unsealed_page_fails_and_the_client_goes_on(memd: FakeMemd) -> None:
    memd.reserve(1)
    ticket = memd.fetch(np.arange(3))
    assert ticket is not None
    assert memd.wait(ticket, 1.0)
    assert ticket.error is not None
    assert "SEALED" in ticket.error
    with pytest.raises(ValueError, match="without error"):
        memd.landed(ticket)
    memd.finish(ticket)
    assert memd.is_alive
    assert memd.landing_rows_used == 0
    memd.check_integrity()


def test_a_full_ring_gives_none_until_a_ticket_is_finished(memd: FakeMemd) -> None:
    sealed(memd, 8)
    first = memd.fetch(np.arange(60))
    assert first is not None
    assert memd.fetch(np.arange(60)) is None
    memd.poll()
    assert memd.fetch(np.arange(60)) is None
    memd.finish(first)
    assert memd.fetch(np.arange(60)) is not None
    assert memd.stats()["counters"]["fetches_refused_ring_full"] == 2


def test_a_dropped_tickets_space_comes_back_only_after_the_answer(memd: FakeMemd) -> None:
    sealed(memd, 8)
    memd.poll()
    memd.hold()
    ticket = memd.fetch(np.arange(60))
    assert ticket is not None
    memd.finish(ticket)
    memd.poll()
    assert memd.landing_rows_used == 60
    memd.step()
    memd.poll()
    assert memd.landing_rows_used == 0


def test_finish_is_idempotent(memd: FakeMemd) -> None:
    sealed(memd, 1)
    ticket = memd.fetch(np.arange(3))
    assert ticket is not None
    memd.wait(ticket, 1.0)
    memd.finish(ticket)
    other = memd.fetch(np.arange(3))
    assert other is not None
    memd.finish(ticket)
    assert memd.landing_rows_used == 3


@pytest.mark.parametrize(
    "rows",
    [
        np.arange(20, dtype=np.int32),
        np.arange(20, dtype=np.uint64),
        np.arange(40)[::2],
        np.arange(20).reshape(4, 5),
        np.arange(40).reshape(4, 10)[:, ::2],
    ],
    ids=["int32", "uint64", "every other one", "two axes", "every other one of two axes"],
)
def test_rows_are_read_in_whichever_way_they_lie(memd: FakeMemd, rows: np.ndarray) -> None:
    sealed(memd, 2)
    ticket = memd.fetch(rows)
    assert ticket is not None
    assert memd.wait(ticket, 1.0)
    assert memd.landed(ticket)[:, 0].tolist() == rows.reshape(-1).tolist()


def test_a_fetch_keeps_its_rows_when_another_follows_before_memd_looks(memd: FakeMemd) -> None:
    sealed(memd, 4)
    memd.poll()
    memd.hold()
    asked = [np.arange(10), np.arange(40, 60), np.arange(90, 85, -1)]
    tickets = [memd.fetch(rows) for rows in asked]
    # The array is the caller's again as soon as the call returns.
    for rows in asked:
        rows += 1
    memd.resume()
    memd.poll()
    for rows, ticket in zip(asked, tickets, strict=True):
        assert ticket is not None
        assert memd.landed(ticket)[:, 0].tolist() == (rows - 1).tolist()


def test_fetching_no_row_is_done_at_once(memd: FakeMemd) -> None:
    ticket = memd.fetch(np.empty(0, dtype=np.int64))
    assert ticket is not None
    assert ticket.is_done
    assert memd.landed(ticket).shape == (0, LAYOUT.row_bytes)
    memd.finish(ticket)
    assert memd.num_unhandled == 0


@pytest.mark.parametrize("rows", [[-1], [0, 8 * 24], [-(1 << 63)], [1 << 32], [0] * 300 + [-1]])
def test_rows_outside_the_pages_are_a_callers_mistake(memd: FakeMemd, rows: list[int]) -> None:
    with pytest.raises(ValueError, match=r"rows are 0\.\.191"):
        memd.fetch(np.array(rows))


@pytest.mark.parametrize("ids", [[3], [-1], [8], [0, 0]])
def test_pages_that_are_not_held_are_a_callers_mistake(memd: FakeMemd, ids: list[int]) -> None:
    memd.reserve(1)
    memd.poll()
    for verb in (memd.commit, memd.release):
        with pytest.raises(ValueError, match="page"):
            verb(ids)
    memd.check_integrity()


def test_a_page_is_committed_once(memd: FakeMemd) -> None:
    ids = sealed(memd, 1)
    with pytest.raises(ValueError, match="page 0 is SEALED"):
        memd.commit(ids)


def test_a_negative_count_is_a_callers_mistake(memd: FakeMemd) -> None:
    with pytest.raises(ValueError, match="negative"):
        memd.reserve(-1)


def test_a_cancelled_reservation_is_given_back_when_it_arrives(memd: FakeMemd) -> None:
    memd.hold()
    ticket = memd.reserve(5)
    memd.cancel(ticket)
    memd.cancel(ticket)
    memd.resume()
    assert memd.drain(1.0)
    assert memd.pages_used == 0
    memd.check_integrity()


def test_a_reservation_that_has_arrived_is_given_back_by_cancel(memd: FakeMemd) -> None:
    ticket = memd.reserve(5)
    memd.poll()
    memd.cancel(ticket)
    assert memd.pages_used == 0
    memd.check_integrity()


def test_nothing_is_sent_for_no_pages(memd: FakeMemd) -> None:
    memd.commit([])
    memd.release(np.empty(0, dtype=np.int64))
    assert memd.num_unhandled == 0


class TestLoss:
    def test_open_tickets_fail_and_later_calls_do_nothing(self, memd: FakeMemd) -> None:
        ids = sealed(memd, 2)
        memd.poll()
        memd.hold()
        fetch, reserve = memd.fetch(np.arange(9)), memd.reserve(1)
        assert fetch is not None
        memd.kill()
        memd.poll()
        assert not memd.is_alive
        assert memd.lost_reason == "it has ended"
        assert fetch.is_done
        assert fetch.error is not None
        assert reserve.is_done
        assert reserve.page_ids is None
        memd.finish(fetch)
        memd.commit([7])
        memd.release(ids)
        memd.release(ids)
        memd.poll()
        assert memd.fetch(np.arange(3)) is None
        late = memd.reserve(1)
        assert late.is_done
        assert late.error == "it has ended"
        memd.cancel(late)
        assert memd.stats()["state"] == "lost"
        memd.check_integrity()

    def test_memory_stays_readable(self, memd: FakeMemd) -> None:
        sealed(memd, 1)
        ticket = memd.fetch(np.arange(9))
        assert ticket is not None
        memd.poll()
        memd.kill()
        memd.poll()
        assert memd.landed(ticket)[:, 0].tolist() == list(range(9))
        assert memd.pages[0, 0, 5, 0] == 5

    def test_replies_that_were_sent_before_the_end_still_count(self, memd: FakeMemd) -> None:
        sealed(memd, 1)
        memd.hold()
        ticket = memd.fetch(np.arange(9))
        assert ticket is not None
        memd.step(10)
        memd.kill()
        memd.poll()
        assert not memd.is_alive
        assert ticket.error is None
        assert memd.landed(ticket)[3, 0] == 3

    def test_a_broken_connection_is_noticed_by_the_next_request(self, memd: FakeMemd) -> None:
        memd.kill()
        ticket = memd.reserve(1)
        assert ticket.is_done
        assert not memd.is_alive

    def test_a_wait_ends_when_memd_is_lost(self, memd: FakeMemd) -> None:
        memd.hold()
        ticket = memd.reserve(1)
        memd.kill()
        assert memd.wait(ticket, 60.0)
        assert ticket.error is not None

    def test_loss_is_told_once(self, memd: FakeMemd, caplog: pytest.LogCaptureFixture) -> None:
        memd.kill()
        for _ in range(3):
            memd.poll()
        assert len(caplog.records) == 1


class TestDeadline:
    def advance(self, memd: FakeMemd, clock: Clock, seconds: float) -> None:
        """Let time pass as it does for an engine that polls often."""
        for _ in range(int(seconds * 2)):
            clock.now += 0.5
            memd.poll()

    def test_an_unanswered_request_is_a_loss(self, memd: FakeMemd, clock: Clock) -> None:
        memd.hold()
        ticket = memd.reserve(1)
        self.advance(memd, clock, 9.5)
        assert memd.is_alive
        self.advance(memd, clock, 1.0)
        assert not memd.is_alive
        assert memd.lost_reason == "memd did not answer a reserve in 10 s"
        assert ticket.is_done

    def test_silence_without_a_request_is_none(self, memd: FakeMemd, clock: Clock) -> None:
        memd.hold()
        self.advance(memd, clock, 100.0)
        assert memd.is_alive

    def test_an_engine_that_did_not_poll_does_not_blame_memd(
        self, memd: FakeMemd, clock: Clock
    ) -> None:
        memd.hold()
        ticket = memd.reserve(1)
        clock.now += 1000.0
        memd.poll()
        assert memd.is_alive
        memd.resume()
        memd.poll()
        assert ticket.page_ids is not None

    def test_an_answer_in_time_is_enough(self, memd: FakeMemd, clock: Clock) -> None:
        memd.hold()
        for _ in range(5):
            memd.reserve(1)
            self.advance(memd, clock, 8.0)
            memd.step(1)
            memd.poll()
        assert memd.is_alive


class TestDisagreement:
    def test_a_refused_fetch_is_only_that(self, memd: FakeMemd) -> None:
        sealed(memd, 1)
        memd.poll()
        memd.refuse_next()
        ticket = memd.fetch(np.arange(3))
        assert ticket is not None
        memd.poll()
        assert ticket.error == "internal: the test refuses it"
        assert memd.is_alive

    @pytest.mark.parametrize("verb", ["commit", "release"])
    def test_a_refused_commit_or_release_is_a_loss(self, memd: FakeMemd, verb: str) -> None:
        memd.reserve(1)
        memd.poll()
        memd.refuse_next()
        getattr(memd, verb)([0])
        memd.poll()
        assert memd.lost_reason is not None
        assert f"refused a {verb}" in memd.lost_reason

    @pytest.mark.parametrize(
        "frame",
        [
            b"\xc1",
            encode(Pong(request_id=12345)),
            encode(FetchReply(request_id=1, num_rows=1)),
            encode(ErrorReply(request_id=None, code=ErrorCode.MALFORMED, message="?")),
            encode(ErrorReply(request_id=1, code=ErrorCode.NOT_REGISTERED, message="?")),
        ],
        ids=["no message", "no request of ours", "of another kind", "unread", "forgotten"],
    )
    def test_an_answer_that_cannot_be_is_a_loss(self, memd: FakeMemd, frame: bytes) -> None:
        memd.hold()
        ticket = memd.reserve(1)
        memd._loop.replies.append(frame)
        memd.poll()
        assert not memd.is_alive
        assert memd.num_in_flight == 0
        memd.poll()
        del ticket


class TestStatsAndIntegrity:
    def test_stats_show_memds_last_answer(self, memd: FakeMemd) -> None:
        assert memd.stats()["server"] == {}
        memd.poll()
        stats = memd.stats()
        assert stats["state"] == "alive"
        assert stats["server"]["integrity"] == "ok"
        assert stats["pages"] == 8

    def test_stats_ask_one_question_at_a_time(self, memd: FakeMemd) -> None:
        memd.hold()
        for _ in range(5):
            memd.stats()
        assert memd.num_unhandled == 1

    def test_books_that_differ_are_found(self, memd: FakeMemd) -> None:
        sealed(memd, 2)
        memd._states[0] = PageState.RESERVED
        with pytest.raises(IntegrityError, match="in memd"):
            memd.check_integrity()

    def test_a_wrong_count_is_found(self, memd: FakeMemd) -> None:
        memd._pages_used += 1
        with pytest.raises(IntegrityError, match="counted"):
            memd.check_integrity()

    def test_memds_own_finding_is_passed_on(self, memd: FakeMemd) -> None:
        memd.service._store.extents._num_free -= 1
        with pytest.raises(IntegrityError, match="memd: "):
            memd.check_integrity()


def test_close_says_goodbye_and_is_idempotent(clock: Clock) -> None:
    memd = FakeMemd.create(LAYOUT, num_pages=8, landing_rows=100, clock=clock)
    service = memd.service
    memd.close()
    memd.close()
    assert service.stats()["clients"] == []
    assert service.stats()["counters"]["clients_reclaimed"] == 0
    assert not memd.is_alive
    assert memd.stats()["state"] == "closed"
    assert memd.pages.shape[0] == 0
    assert memd.fetch(np.arange(1)) is None


def test_a_client_of_a_lost_daemon_closes(memd: FakeMemd) -> None:
    memd.kill()
    memd.poll()
    memd.close()
    assert memd.stats()["state"] == "closed"


@pytest.mark.parametrize("call", [lambda memd: memd.poll(), lambda memd: memd.stats()])
def test_calls_after_close_do_nothing(memd: FakeMemd, call: Callable[[FakeMemd], object]) -> None:
    memd.close()
    call(memd)
