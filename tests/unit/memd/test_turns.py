from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from memd.errors import IntegrityError
from memd.turns import Turn, Wait, WaitingRoom

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable


def request(name: str, waits: Iterable[Wait] = (), log: list[str] | None = None) -> Turn[str]:
    def steps() -> Generator[Wait, None, str]:
        try:
            yield from waits
            return name
        finally:
            if log is not None:
                log.append(f"end of {name}")

    return Turn(steps())


def names(room: WaitingRoom[str], num_steps: int = 20) -> list[str | None]:
    """What ends in so many steps."""
    turns = [room.step() for _ in range(num_steps)]
    return [turn.result for turn in turns if turn is not None]


@pytest.fixture
def room() -> WaitingRoom[str]:
    return WaitingRoom()


def test_requests_of_a_connection_keep_their_order(room: WaitingRoom[str]) -> None:
    room.add(b"a", request("long", [Wait.TURN] * 3))
    room.add(b"a", request("short"))
    assert room.num_waiting(b"a") == 2
    assert names(room) == ["long", "short"]
    assert room.num_waiting(b"a") == 0
    assert not room.has_work


def test_connections_go_on_in_turn(room: WaitingRoom[str]) -> None:
    room.add(b"a", request("a1", [Wait.TURN] * 2))
    room.add(b"b", request("b1", [Wait.TURN]))
    room.add(b"a", request("a2"))
    room.add(b"b", request("b2"))
    assert names(room) == ["b1", "a1", "b2", "a2"]


def test_who_sleeps_goes_on_when_something_has_happened(room: WaitingRoom[str]) -> None:
    room.add(b"a", request("sleeper", [Wait.EVENT, Wait.EVENT]))
    room.add(b"b", request("other"))
    assert names(room) == ["other"]
    assert not room.has_work
    room.wake()
    assert room.has_work
    assert names(room) == []
    room.wake()
    assert names(room) == ["sleeper"]


def test_an_error_ends_a_request_and_no_other(room: WaitingRoom[str]) -> None:
    def steps() -> Generator[Wait, None, str]:
        yield Wait.TURN
        raise ValueError("no")

    room.add(b"a", Turn(steps()))
    room.add(b"a", request("next"))
    turns = [turn for _ in range(5) if (turn := room.step()) is not None]
    assert isinstance(turns[0].error, ValueError)
    assert turns[1].result == "next"


def test_cancelled_requests_end_where_they_are(room: WaitingRoom[str]) -> None:
    log: list[str] = []
    first, second = request("first", [Wait.EVENT], log), request("second", [], log)
    room.add(b"a", first)
    room.add(b"a", second)
    room.add(b"b", request("b"))
    assert names(room) == ["b"]
    assert room.cancel(b"a") == [first, second]
    assert log == ["end of first"], "the second had not begun"
    assert not room.has_work
    assert room.cancel(b"a") == []


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_request_may_cancel_its_own_connection(room: WaitingRoom[str], goes_on: bool) -> None:
    behind = request("behind")

    def goodbye() -> Generator[Wait, None, str]:
        yield Wait.TURN
        assert room.cancel(b"a") == [behind]
        if goes_on:
            yield Wait.TURN
        return "goodbye"

    room.add(b"a", Turn(goodbye()))
    room.add(b"a", behind)
    room.add(b"b", request("b"))
    assert names(room) == ["b", "goodbye"]
    room.check_integrity()
    assert room.num_waiting(b"a") == 0


def test_integrity_says_what_does_not_hold(room: WaitingRoom[str]) -> None:
    turn = request("a", [Wait.EVENT])
    room.add(b"a", turn)
    room.check_integrity()
    turn.give_up()
    with pytest.raises(IntegrityError, match="is over and waits"):
        room.check_integrity()
