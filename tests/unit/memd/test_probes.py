from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

import memd.probes
from memd.errors import ConfigError
from memd.noticeboard import Noticeboard
from memd.probes import MAX_SILENCE_S, Probes

if TYPE_CHECKING:
    from collections.abc import Iterator

BOUND_S = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> Noticeboard:
    board = Noticeboard(clock)
    board.post({"daemon": {"pid": 1, "address": "ipc:///x", "state": "serving"}})
    return board


@pytest.fixture
def probes(board: Noticeboard, monkeypatch: pytest.MonkeyPatch) -> Iterator[Probes]:
    # Longer than anybody waits here: who is held up notices.
    monkeypatch.setattr(memd.probes, "_DEADLINE_S", 6 * BOUND_S)
    with Probes(0, board) as probes:
        yield probes


def ask(probes: Probes, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", probes.port, timeout=BOUND_S)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def assert_is_closed(connection: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        assert connection.recv(1) == b""


def connect(probes: Probes) -> socket.socket:
    return socket.create_connection(("127.0.0.1", probes.port), timeout=BOUND_S)


def test_metrics_are_prometheus_text_of_the_last_notice(
    probes: Probes, board: Noticeboard, clock: Clock
) -> None:
    clock.now += 0.5
    status, text = ask(probes, "/metrics?x=1")
    assert status == 200
    assert 'memd_state{state="serving"} 1\n' in text
    assert "memd_snapshot_age_seconds 0.5\n" in text


def test_health_follows_the_control_threads_signs_of_life(
    probes: Probes, board: Noticeboard, clock: Clock
) -> None:
    assert ask(probes, "/healthz") == (200, "ok\n")
    clock.now += MAX_SILENCE_S + 1
    status, text = ask(probes, "/healthz")
    assert (status, text) == (503, "the control thread has been silent for 6 s\n")
    assert ask(probes, "/readyz")[0] == 503
    board.beat()
    assert ask(probes, "/healthz")[0] == 200


@pytest.mark.parametrize("state", ["starting", "draining"])
def test_a_daemon_that_takes_no_clients_is_alive_and_not_ready(
    state: str, probes: Probes, board: Noticeboard
) -> None:
    board.post({"daemon": {"state": state}})
    assert ask(probes, "/healthz")[0] == 200
    assert ask(probes, "/readyz") == (503, f"memd is {state}\n")


def test_ready_while_serving(probes: Probes) -> None:
    assert ask(probes, "/readyz") == (200, "ok\n")


def test_other_paths_say_what_there_is(probes: Probes) -> None:
    status, text = ask(probes, "/")
    assert status == 404
    assert "/metrics" in text


def test_only_reading_is_allowed(probes: Probes) -> None:
    assert ask(probes, "/metrics", "HEAD") == (200, "")
    assert ask(probes, "/metrics", "POST")[0] == 405


@pytest.mark.parametrize(
    "request_", [b"\r\n\r\n", b"GET /metrics\r\n\r\n", b"\x16\x03\x01\r\n\r\n"]
)
def test_what_is_no_request_is_refused(request_: bytes, probes: Probes) -> None:
    with connect(probes) as connection:
        connection.sendall(request_)
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_an_endless_request_is_cut_off(probes: Probes) -> None:
    def send_for_ever() -> None:
        while True:
            connection.sendall(b"x" * 1000)
            time.sleep(0.001)

    with connect(probes) as connection, pytest.raises(ConnectionError):
        send_for_ever()
    assert ask(probes, "/healthz")[0] == 200


def test_scrapers_that_hang_hold_up_nobody(probes: Probes) -> None:
    hanging = [connect(probes) for _ in range(200)]
    try:
        hanging[-1].sendall(b"GET /metrics HTTP/1.1\r\n")
        assert ask(probes, "/metrics")[0] == 200
    finally:
        for connection in hanging:
            connection.close()


def test_a_scraper_that_hangs_is_let_go(probes: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memd.probes, "_DEADLINE_S", 0.1)
    with connect(probes) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert_is_closed(connection)


def test_many_scrapers_at_a_time_are_all_answered(probes: Probes) -> None:
    answers: list[int] = []

    def scrape() -> None:
        for _ in range(20):
            answers.append(ask(probes, "/metrics")[0])

    threads = [threading.Thread(target=scrape) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    assert answers == [200] * 160


def test_it_listens_on_loopback_alone(probes: Probes) -> None:
    with pytest.raises(OSError, match=r"refused|unreachable"):
        socket.create_connection(("127.0.0.2", probes.port), timeout=BOUND_S)


def test_a_port_that_is_taken_is_refused_by_its_flag(probes: Probes, board: Noticeboard) -> None:
    with pytest.raises(ConfigError, match=rf"--metrics-port {probes.port}: .* choose another port"):
        Probes(probes.port, board)


def test_closing_ends_the_thread_and_open_connections(board: Noticeboard) -> None:
    before = set(threading.enumerate())
    probes = Probes(0, board)
    with connect(probes) as connection:
        deadline = time.monotonic() + BOUND_S
        while not probes._connections:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        probes.close()
        probes.close()
        assert set(threading.enumerate()) <= before
        with pytest.raises(OSError, match="refused"):
            connect(probes)
        assert_is_closed(connection)
