"""What broke other daemons of this kind, one by one.

The left column is a complaint about a relative of memd, the right one the tests that would notice
it here; those without a file are below. Complaints about CUDA copies, page-locking and schedulers
of engines are not in it: memd touches none of them by itself.

===================================  =============================================================
complaint                            test
===================================  =============================================================
memory kept after an engine's death  test_two_processes: a_dead_clients_memory_is_reclaimed_...;
(LMCache#4014, #4980, #5265, #4287)  tests/chaos
a forked child keeps it              test_two_processes: a_clients_forked_child_does_not_keep_...
a release blocks the control thread  zeroing_a_large_extent_delays_nobody;
(LMCache#4676)                       a_hello_that_can_never_fit_zeroes_nothing;
                                     test_daemon_life: health_tells_when_the_control_thread_...
a failing handler sends no reply     test_service: a_failure_inside_is_an_answer_...;
(LMCache#5270)                       test_fuzz_service
futures without bound                requests_in_flight_are_bounded
(LMCache#5270)
shared memory unlinked at restart    test_two_processes: sigkill_of_memd_is_noticed_and_...,
(LMCache#4069)                       a_killed_daemons_address_can_be_served_again
liveness from the first request on   a_process_that_dies_before_hello_is_let_go;
(LMCache#5265)                       a_client_that_never_asked_for_anything_is_reclaimed
a death while requests are queued    requests_of_a_client_that_died_meanwhile_harm_nobody
a long grace period                  nobody_waits_long_for_a_hello
a start that cannot be watched or    test_daemon_life: a_start_can_be_watched_and_ended;
ended (TensorRT-LLM#17773, #15430)   a_start_is_ended_by_a_signal_and_leaves_nothing
a death that cannot be ended         test_daemon_life: a_drain_ends_at_its_bound_...;
(prime-rl#2949)                      sigterm_is_heard_whichever_thread_it_reaches
a CUDA context in the daemon         the_daemon_loads_neither_torch_nor_cuda
(LMCache#4018, #4019)
/dev/shm of a container is full,     test_two_processes: nothing_has_a_name,
SIGBUS (vllm#48879)                  a_region_that_does_not_fit_is_told_by_spawn
pid namespaces clash (ucx#10968)     test_security: are_watched_by_the_process_that_the_kernel_...
a pool that is not reserved before   test_client: a_full_pool_is_a_ticket_without_pages;
use (sglang#23704)                   test_store_machine
retract or abort in flight           test_client: a_cancelled_reservation_is_given_back_...,
(sglang#40729)                       a_dropped_tickets_space_comes_back_only_after_the_answer
memory grows with requests           ten_thousand_requests_leave_nothing; tests/chaos
(sglang#21624, #20271)
a pool of zero bytes (sglang#21880)  test_config: a_bad_setting_is_refused_by_name_with_its_value
pickle, TCP, nobody asks who         test_security
(LMCache#5128, CVE-2026-3059, ...)
a close that never returns           closing_a_client_of_a_killed_daemon_cannot_wait_for_ever;
(libzmq)                             a_client_that_was_forgotten_does_not_hang_the_garbage_...,
                                     a_client_that_nobody_closed_does_not_hang_the_end_of_...
out of descriptors                   many_control_connections_end_no_daemon;
                                     while_memd_is_out_of_descriptors_its_log_stays_short;
                                     looking_at_the_status_counts_as_no_client
===================================  =============================================================
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zmq

import memd.client
from memd.client import MemdClient
from memd.config import MemdConfig
from memd.greeting import MAX_PAGES_PER_CLIENT
from memd.protocol import (
    MAX_PAGES_PER_MESSAGE,
    PROTOCOL_VERSION,
    ErrorCode,
    ErrorReply,
    Hello,
    KVLayout,
    Ping,
    Reserve,
    ReserveReply,
    decode_reply,
    encode,
)
from memd.service import Service
from memd.store import Store
from memd.testing import FakeMemd
from memd.transfer import HostTransfer
from tests.chaos.daemon import Daemon
from tests.chaos.judged import FRAME_BOUND_S
from tests.chaos.probe import NEVER_MS
from tests.chaos.processes import Footprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.multiproc

LAYOUT = KVLayout(num_heads=3, head_dim=32, dtype="float32", page_tokens=16)
TINY = KVLayout(num_heads=1, head_dim=1, dtype="float16", page_tokens=1)
REGION_BYTES = 8 << 20
BOUND_S = 10.0
PING = encode(Ping(request_id=1))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, "memd", num_bytes=REGION_BYTES) as it:
        yield it


def eventually(is_true: Callable[[], bool], what: str) -> float:
    """Seconds until it was true."""
    begin = time.monotonic()
    while not is_true():
        assert time.monotonic() < begin + BOUND_S, f"not within {BOUND_S} s: {what}"
        time.sleep(0.005)
    return time.monotonic() - begin


@contextlib.contextmanager
def python(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python child that is killed at the end."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            yield child
        finally:
            child.kill()


@contextlib.contextmanager
def control_connections(daemon: Daemon, count: int) -> Iterator[list[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
    try:
        sockets = []
        for _ in range(count):
            sockets.append(context.socket(zmq.DEALER))
            sockets[-1].setsockopt(zmq.RECONNECT_IVL, NEVER_MS)
            sockets[-1].connect(daemon.address)
        yield sockets
    finally:
        context.destroy(linger=0)


CLIENT = """
import os, signal, sys
import numpy as np
from memd.client import MemdClient
from memd.protocol import KVLayout
layout = KVLayout(num_heads=3, head_dim=32, dtype="float32", page_tokens=16)
client = MemdClient.connect(sys.argv[1], layout, num_pages=8, landing_rows=256)
"""

# Does as many requests as it is told, again and again: reserve, commit, fetch, release.
STEADY_CLIENT = f"""
import gc, sys
import numpy as np
from memd.client import MemdClient
from memd.protocol import KVLayout
layout = KVLayout(num_heads=3, head_dim=32, dtype="float32", page_tokens=16)
rng = np.random.default_rng(0)
with MemdClient.connect(sys.argv[1], layout, num_pages=64, landing_rows=4096) as client:
    for line in sys.stdin:
        for _ in range(int(line) // 4):
            reserved = client.reserve(int(rng.integers(1, 32)))
            assert client.wait(reserved, {BOUND_S})
            client.commit(reserved.page_ids)
            rows = rng.choice(reserved.page_ids, 500) * layout.rows_per_page
            ticket = client.fetch(rows)
            client.release(reserved.page_ids)
            assert client.wait(ticket, {BOUND_S})
            client.finish(ticket)
        client.check_integrity()
        gc.collect()
        print("done", flush=True)
"""


class TestLiveness:
    def test_a_process_that_dies_before_hello_is_let_go(self, daemon: Daemon) -> None:
        code = (
            "import os, signal, socket, sys\n"
            "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            "s.connect(sys.argv[1])\n"
            "s.recv(4096)\n"
            "print('attached', flush=True)\n"
            "input()\n"
        )
        daemon.stats()
        before = Footprint.of(daemon.child.pid).num_fds
        with python(code, f"{daemon.sockets}/control.sock.attach") as dying:
            assert dying.stdout is not None
            assert dying.stdout.readline() == "attached\n"
            assert Footprint.of(daemon.child.pid).num_fds > before
            dying.kill()
            dying.wait(BOUND_S)
            eventually(
                lambda: Footprint.of(daemon.child.pid).num_fds == before, "its descriptors go"
            )

    def test_a_client_that_never_asked_for_anything_is_reclaimed(self, daemon: Daemon) -> None:
        with python(CLIENT + "print('connected', flush=True); input()", daemon.address) as dying:
            assert dying.stdout is not None
            assert dying.stdout.readline() == "connected\n"
            assert len(daemon.stats()["clients"]) == 1
            dying.kill()
            eventually(lambda: daemon.stats()["clients"] == [], "memd lets it go")

    def test_requests_of_a_client_that_died_meanwhile_harm_nobody(self, daemon: Daemon) -> None:
        code = CLIENT + (
            "reserved = client.reserve(8)\n"
            "assert client.wait(reserved, 10)\n"
            "client.commit(reserved.page_ids)\n"
            "assert client.drain(10)\n"
            "print('ready', flush=True); input()\n"
            "for page in range(7): client.fetch(np.arange(20)); client.release([page])\n"
            "client._channel._context.destroy(linger=2000)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        with python(code, daemon.address) as dying:
            assert dying.stdout is not None
            assert dying.stdin is not None
            assert dying.stdout.readline() == "ready\n"
            daemon.child.signal(signal.SIGSTOP)
            try:
                dying.stdin.write("\n")
                dying.stdin.flush()
                dying.wait(BOUND_S)
            finally:
                daemon.child.signal(signal.SIGCONT)
        eventually(lambda: daemon.stats()["clients"] == [], "memd lets it go")
        eventually(
            lambda: daemon.stats()["region"]["free_bytes"] == REGION_BYTES, "all is free again"
        )
        stats = daemon.stats()
        assert stats["integrity"] == "ok"
        assert "internal" not in stats["errors"]

    def test_nobody_waits_long_for_a_hello(self) -> None:
        assert MemdConfig(address="ipc:///x/y", region_bytes=1 << 20).hello_grace_s <= 10.0

    def test_the_daemon_loads_neither_torch_nor_cuda(self, daemon: Daemon) -> None:
        with MemdClient.connect(daemon.address, LAYOUT, num_pages=1, landing_rows=1):
            mapped = Path(f"/proc/{daemon.child.pid}/maps").read_text()
        assert not [name for name in ("libtorch", "libcuda", "/dev/nvidia") if name in mapped]


class TestEnding:
    def test_a_start_is_ended_by_a_signal_and_leaves_nothing(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "memd", "serve", "--bytes", "512MiB"]
        command += ["--address", f"ipc://{tmp_path}/memd/s", "--parent-pid", str(os.getpid())]
        for delay_s in (0.25, 0.35, 0.5):
            with subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as starting:
                time.sleep(delay_s)
                starting.send_signal(signal.SIGTERM)
                try:
                    # Before Python has handlers, the signal itself is the end.
                    assert starting.wait(BOUND_S) in (0, -signal.SIGTERM)
                finally:
                    starting.kill()
            assert list(tmp_path.iterdir()) == []

    def test_sigterm_is_heard_whichever_thread_it_reaches(self, tmp_path: Path) -> None:
        # It is the same as a signal that finds the main thread inside ZeroMQ, because a client
        # leaves at that moment: no system call is interrupted, and the next one may sleep for ever.
        cue = tmp_path / "cue"
        prelude = (
            "import os, threading, time\n"
            "def signal_this_thread():\n"
            f"    while not os.path.exists({str(cue)!r}):\n"
            "        time.sleep(0.01)\n"
            "    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)\n"
            "threading.Thread(target=signal_this_thread, daemon=True).start()\n"
        )
        with Daemon(tmp_path, "memd", num_bytes=REGION_BYTES, prelude=prelude) as daemon:
            time.sleep(0.2)  # it sleeps in its poll, with nothing to do
            cue.touch()
            eventually(lambda: daemon.child.returncode is not None, "SIGTERM is heard")
            assert daemon.child.returncode == 0


class TestBlocking:
    def test_zeroing_a_large_extent_delays_nobody(self, tmp_path: Path) -> None:
        region_bytes = 256 << 20
        pages = (region_bytes - (8 << 20)) // LAYOUT.page_bytes

        def longest_delay() -> float:
            client = MemdClient.connect(daemon.address, LAYOUT, num_pages=pages, landing_rows=1)
            client.close()
            delays = []
            while daemon.stats()["region"]["dirty_bytes"]:
                begin = time.monotonic()
                control.send(PING)
                assert control.poll(5000)
                control.recv()
                delays.append(time.monotonic() - begin)
            # None at all if it was zeroed before anybody could look.
            return max(delays, default=0.0)

        with (
            Daemon(tmp_path, "memd", num_bytes=region_bytes) as daemon,
            control_connections(daemon, 1) as (control,),
        ):
            # memd's own delays would come back each time, those of a busy machine do not.
            assert any(longest_delay() < 0.5 for _ in range(4))

    def test_a_hello_that_can_never_fit_zeroes_nothing(self) -> None:
        # At tens of gigabytes that is seconds in which nobody is answered.
        service = daemon_in_this_process(REGION_BYTES)
        gone = service.open_session(1)
        assert say_hello(service, b"gone", gone, num_pages=100)["code"] is None
        service.close_session(gone, "test")
        dirty = service.stats()["region"]["dirty_bytes"]
        assert dirty > 0
        session = service.open_session(1)
        refused = say_hello(service, b"new", session, num_pages=1 << 20)
        assert refused["code"] is ErrorCode.POOL_FULL
        assert service.stats()["region"]["dirty_bytes"] == dirty

    def test_a_client_of_tiny_pages_costs_bounded_time(self) -> None:
        service = daemon_in_this_process(64 << 20)
        session = service.open_session(1)
        num_pages = (60 << 20) // TINY.page_bytes
        refused = say_hello(service, b"c", session, layout=TINY, num_pages=num_pages)
        assert refused["code"] is ErrorCode.QUOTA
        num_pages = MAX_PAGES_PER_CLIENT
        welcome = say_hello(service, b"c", session, layout=TINY, num_pages=num_pages)
        assert welcome["code"] is None
        # Most of it is the answer, which no other client's request can make so long.
        begin = time.thread_time()
        page_ids = np.arange(num_pages).tolist()
        encode(ReserveReply(request_id=1, page_ids=page_ids, free_pages=0))
        answering = time.thread_time() - begin
        begin = time.thread_time()
        service.handle(b"c", encode(Reserve(request_id=1, num_pages=num_pages)))
        assert time.thread_time() - begin < max(FRAME_BOUND_S, 5 * answering)


def daemon_in_this_process(region_bytes: int) -> Service:
    region = np.zeros(region_bytes, dtype=np.uint8)
    return Service(Store(region_bytes), HostTransfer(region))


def say_hello(
    service: Service,
    connection: bytes,
    session: bytes,
    *,
    num_pages: int,
    layout: KVLayout = LAYOUT,
) -> dict[str, Any]:
    """Say Hello; ``code`` of the refusal, None for a welcome."""
    hello = Hello(
        request_id=0,
        version=PROTOCOL_VERSION,
        session=session,
        pid=1,
        layout=layout,
        num_pages=num_pages,
        landing_bytes=0,
    )
    frame = service.handle(connection, encode(hello))
    assert frame is not None
    reply = decode_reply(frame)
    return {"code": reply.code if isinstance(reply, ErrorReply) else None}


class TestBounds:
    def test_requests_in_flight_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memd.client, "_MAX_IN_FLIGHT", 50)
        client = FakeMemd.create(LAYOUT, num_pages=8, landing_rows=1000)
        with client:
            client.hold()
            tickets = [client.reserve(0) for _ in range(60)]
            assert client.num_in_flight == 50
            assert [ticket.error for ticket in tickets[:50]] == [None] * 50
            for ticket in tickets[50:]:
                assert ticket.error == "50 requests are in flight"
            assert client.fetch(np.arange(3)) is None
            client.resume()
            assert client.drain(BOUND_S)
            assert client.is_alive
            client.check_integrity()

    def test_ten_thousand_requests_leave_nothing(self, daemon: Daemon) -> None:
        # The client has a process of its own: what three thousand tests have left in the heap of
        # this one moves by megabytes, for reasons of theirs.
        with python(STEADY_CLIENT, daemon.address) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            daemon.stats()  # from now on it has the connection that asks
            footprints = []
            for num_requests in (2_000, 8_000):
                child.stdin.write(f"{num_requests}\n")
                child.stdin.flush()
                answer = child.stdout.readline()
                assert answer == "done\n", child.communicate()[1]
                footprints.append([Footprint.of(child.pid), Footprint.of(daemon.child.pid)])
            for old, new in zip(*footprints, strict=True):
                assert new.private_bytes - old.private_bytes < 1 << 20
                assert (new.num_fds, new.num_threads) == (old.num_fds, old.num_threads)
            assert sum(daemon.stats()["requests"].values()) >= 10_000

    def test_all_pages_that_can_be_reserved_at_once_can_be_committed_at_once(self) -> None:
        num_pages = MAX_PAGES_PER_MESSAGE + 1
        with FakeMemd.create(TINY, num_pages=num_pages, landing_rows=1) as client:
            reserved = client.reserve(num_pages)
            client.poll()
            assert reserved.page_ids is not None
            client.commit(reserved.page_ids)
            client.poll()
            assert client.is_alive, client.lost_reason

    def test_a_fetch_too_long_for_a_frame_is_only_that(self) -> None:
        num_rows = (16 << 20) // 4 + 1
        with FakeMemd.create(TINY, num_pages=4, landing_rows=num_rows) as client:
            reserved = client.reserve(4)
            client.poll()
            assert reserved.page_ids is not None
            client.commit(reserved.page_ids)
            with contextlib.suppress(ValueError):
                client.fetch(np.zeros(num_rows, dtype=np.int64))
            client.poll()
            assert client.is_alive, client.lost_reason


class TestDescriptors:
    def test_many_control_connections_end_no_daemon(self, tmp_path: Path) -> None:
        # As with the usual soft limit of 1024 and as many connections.
        limits = f"(64, {resource.getrlimit(resource.RLIMIT_NOFILE)[1]})"
        prelude = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {limits})"
        with (
            Daemon(tmp_path, "memd", num_bytes=REGION_BYTES, prelude=prelude) as daemon,
            control_connections(daemon, 100) as sockets,
        ):
            for control in sockets:
                control.send(PING)
            time.sleep(1.0)
            assert daemon.child.returncode is None, daemon.log
            assert daemon.stats()["integrity"] == "ok"

    def test_while_memd_is_out_of_descriptors_its_log_stays_short(self, tmp_path: Path) -> None:
        prelude = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))"
        with (
            Daemon(tmp_path, "memd", num_bytes=REGION_BYTES, prelude=prelude) as daemon,
            contextlib.ExitStack() as stack,
        ):
            for _ in range(30):
                silent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                stack.enter_context(silent).connect(f"{daemon.sockets}/control.sock.attach")
            time.sleep(1.0)
            assert daemon.child.returncode is None
            assert len(daemon.log.splitlines()) < 20
            # Descriptors are kept for those who only ask.
            command = [sys.executable, "-m", "memd", "status", "--wait", "20"]
            command += ["--address", daemon.address]
            subprocess.run(command, capture_output=True, timeout=30, check=True)
            assert daemon.child.returncode is None

    def test_looking_at_the_status_counts_as_no_client(self, tmp_path: Path) -> None:
        arguments = ["--max-clients", "1"]
        with (
            Daemon(tmp_path, "memd", num_bytes=REGION_BYTES, arguments=arguments) as daemon,
            MemdClient.connect(daemon.address, LAYOUT, num_pages=1, landing_rows=1),
        ):
            command = [sys.executable, "-m", "memd", "status", "--wait", "20"]
            command += ["--address", daemon.address]
            subprocess.run(command, capture_output=True, timeout=30, check=True)
            assert daemon.stats()["counters"]["peers_refused"] == 0


def test_a_client_that_was_forgotten_does_not_hang_the_garbage_collector(daemon: Daemon) -> None:
    code = CLIENT + (
        "import gc\n"
        "client.itself = client\n"
        "del client\n"
        "gc.collect()\n"
        "print('collected', flush=True)\n"
    )
    with python(code, daemon.address) as forgetful:
        said, errors = forgetful.communicate(timeout=60)
    assert (said, errors, forgetful.returncode) == ("collected\n", "", 0)


@pytest.mark.parametrize("is_in_cycle", [False, True])
def test_a_client_that_nobody_closed_does_not_hang_the_end_of_its_process(
    daemon: Daemon, is_in_cycle: bool
) -> None:
    code = CLIENT + (
        "client.reserve(8)\n"
        f"if {is_in_cycle}: client.itself = client; del client\n"
        # A forked child ends like that, too, and takes nothing from its parent.
        "child = os.fork()\n"
        "if child:\n"
        "    _, status = os.waitpid(child, 0)\n"
        "    print('child', status, flush=True)\n"
    )
    with python(code, daemon.address) as forgetful:
        said, errors = forgetful.communicate(timeout=60)
    assert (said, errors, forgetful.returncode) == ("child 0\n", "", 0)
    eventually(lambda: daemon.stats()["clients"] == [], "memd lets it go")


def test_closing_a_client_of_a_killed_daemon_cannot_wait_for_ever(daemon: Daemon) -> None:
    # What happens otherwise is too rare for a test: see NEVER_MS.
    with MemdClient.connect(daemon.address, LAYOUT, num_pages=1, landing_rows=1) as client:
        assert client._channel._control.getsockopt(zmq.RECONNECT_IVL) > 1 << 20  # type: ignore[attr-defined]
