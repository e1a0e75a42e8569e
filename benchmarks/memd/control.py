"""A message to memd and back, against a bare DEALER and ROUTER of pyzmq in the same run.

The bare side is a process that sends back as many bytes as memd would, and does nothing else.
*ping* goes through a plain DEALER, *reserve* through ``MemdClient``: asking for no pages is the
cheapest thing that a client can wait for. Frames have the same sizes on both sides; the ratio is
that of the medians in each side's best turn.

    python -m benchmarks.memd.control
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from benchmarks.memd import _daemon
from benchmarks.memd._harness import Row, best, in_turns, parser, percentile, report, require
from memd.protocol import Ping, Pong, Reserve, ReserveReply, decode_reply, encode

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from memd.client import MemdClient

TIMES_BARE = 2.0
MESSAGES_A_TURN = 100
# A long-running engine's: it is a part of the frame's length.
REQUEST_ID = 100_000
SIZES = {"row_bytes": 512, "num_pages": 4, "landing_rows": 1}
LENGTH_BYTES = 4
ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run, print a table, write a JSON file; 1 if a bound is missed."""
    arguments = parser(__doc__, rounds=20)
    arguments.add_argument("--echo", metavar="ADDRESS", help="be the bare side")
    options = arguments.parse_args()
    return echo(options.echo) if options.echo else report("control", options, measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Pings and reserves, each in turns with the bare side."""
    ping = encode(Ping(request_id=REQUEST_ID))
    reserve = encode(Reserve(request_id=REQUEST_ID, num_pages=0))
    reserved = encode(ReserveReply(request_id=REQUEST_ID, page_ids=[], free_pages=4))
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(_daemon.daemon_for(**SIZES))
        client = stack.enter_context(_daemon.connect(daemon, **SIZES))
        plain = stack.enter_context(dealer(daemon.address))
        bare = stack.enter_context(dealer(stack.enter_context(echo_process())))
        pong = exchange(plain, ping)
        require(isinstance(decode_reply(pong), Pong), "memd's answer to a ping")
        require(len(exchange(bare, bare_request(ping, pong))) == len(pong), "the echo's length")
        for way, request, reply, ours in (
            ("ping", ping, pong, lambda: exchange(plain, ping)),
            ("reserve", reserve, reserved, lambda: reserve_nothing(client)),
        ):
            same = bare_request(request, reply)
            taken: dict[str, list[float]] = {"bare": [], "memd": []}
            theirs = lambda same=same: exchange(bare, same)  # noqa: E731
            seconds = in_turns(
                {
                    "bare": lambda theirs=theirs, taken=taken: turn(theirs, taken["bare"]),
                    "memd": lambda ours=ours, taken=taken: turn(ours, taken["memd"]),
                },
                options.rounds,
            )
            yield Row(
                case={"way": way, "request_bytes": len(request), "reply_bytes": len(reply)},
                measured={
                    f"{side}_p{percent}_us": percentile(taken[side], percent) * 1e6
                    for side in taken
                    for percent in (50, 99)
                },
                ratio=best(seconds)["memd"] / best(seconds)["bare"],
                at_most=TIMES_BARE,
            )


def turn(round_trip: Callable[[], object], taken: list[float]) -> float:
    """Times a turn's messages one by one; gives their median."""
    for _ in range(MESSAGES_A_TURN):
        begin = time.perf_counter()
        round_trip()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[-MESSAGES_A_TURN:])


def exchange(socket: zmq.Socket[bytes], frame: bytes) -> bytes:
    """Sends a frame and waits for the answer."""
    socket.send(frame)
    return socket.recv()


def reserve_nothing(client: MemdClient) -> None:
    """A round trip that changes nothing."""
    ticket = client.reserve(0)
    if not client.wait(ticket, _daemon.WAIT_S):
        raise RuntimeError(f"a reserve was not answered: {client.lost_reason}")


def bare_request(request: bytes, reply: bytes) -> bytes:
    """As long as a request; tells the echo how long its answer shall be."""
    return len(reply).to_bytes(LENGTH_BYTES, "little").ljust(len(request), b"\0")


@contextlib.contextmanager
def dealer(address: str) -> Iterator[zmq.Socket[bytes]]:
    """A connected DEALER with a context of its own, as a client has."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, int(_daemon.WAIT_S * 1000))
        socket.connect(address)
        yield socket


@contextlib.contextmanager
def echo_process() -> Iterator[str]:
    """The bare side in a process of its own; gives its address."""
    with tempfile.TemporaryDirectory() as directory:
        address = f"ipc://{directory}/echo.sock"
        words = [sys.executable, "-m", "benchmarks.memd.control", "--echo", address]
        child = subprocess.Popen(words, cwd=ROOT)
        try:
            yield address
        finally:
            child.terminate()
            child.wait()


def echo(address: str) -> int:
    """Answers every frame with as many bytes as its first four say, until terminated."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(address)
        while True:
            sender, frame = router.recv_multipart()
            router.send_multipart([sender, bytes(int.from_bytes(frame[:LENGTH_BYTES], "little"))])


if __name__ == "__main__":
    sys.exit(main())
