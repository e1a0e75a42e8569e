"""A daemon as an operator sees it: how it starts and stops, and what it shows meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zmq

from memd.client import MemdClient, spawn_memd
from memd.errors import MemdUnavailable
from memd.protocol import KVLayout
from tests.contract.plain_msgpack import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.multiproc

LAYOUT = KVLayout(num_heads=3, head_dim=32, dtype="float32", page_tokens=16)
BOUND_S = 15.0
LONG_DRAIN = ("--drain-s", "60")


@dataclasses.dataclass
class Daemon:
    """A running `memd serve` and where its words go."""

    child: subprocess.Popen[bytes]
    address: str
    directory: Path
    log: Path

    def signal(self, number: signal.Signals) -> None:
        self.child.send_signal(number)

    def ends_within(self, seconds: float) -> int:
        return self.child.wait(seconds)

    def is_gone_without_a_trace(self) -> bool:
        return not self.directory.exists()


@contextlib.contextmanager
def running(tmp_path: Path, *options: str, code: str = "") -> Iterator[Daemon]:
    """A daemon that may not be ready yet, killed at the end if it still runs.

    Args:
        tmp_path: Where its sockets and its log go.
        options: Of `memd serve`; later ones win.
        code: Python to run in the daemon's process before it serves.
    """
    address = f"ipc://{tmp_path}/d/s"
    main = f"{code}\nimport sys\nfrom memd.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", main, "serve", "--bytes", "8MiB", "--address", address]
    log = tmp_path / "log"
    with (
        log.open("wb") as stderr,
        subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=stderr) as child,
    ):
        try:
            yield Daemon(child, address, tmp_path / "d", log)
        finally:
            child.kill()


@contextlib.contextmanager
def serving(tmp_path: Path, *options: str, code: str = "") -> Iterator[Daemon]:
    """As `running`, and ready."""
    with running(tmp_path, *options, code=code) as daemon:
        assert daemon.child.stdout is not None
        line = daemon.child.stdout.readline().decode()
        assert line == f"READY {daemon.address}\n", daemon.log.read_text()
        yield daemon


def connect(address: str) -> MemdClient:
    return MemdClient.connect(address, LAYOUT, num_pages=4, landing_rows=64, name="test")


def eventually(is_true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + BOUND_S
    while not is_true():
        assert time.monotonic() < deadline, f"not within {BOUND_S} s: {what}"
        time.sleep(0.01)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "memd", *arguments], capture_output=True, text=True, timeout=60
    )


def status(daemon: Daemon) -> dict:
    (stats,) = json.loads(
        command("status", "--json", "--wait", "20", "--address", daemon.address).stdout
    )
    return stats


def fetch_works(client: MemdClient) -> bool:
    reserved = client.reserve(1)
    assert client.wait(reserved, BOUND_S)
    client.pages[reserved.page_ids] = 7
    client.commit(reserved.page_ids)
    ticket = client.fetch(np.arange(10))
    assert ticket is not None
    assert client.wait(ticket, BOUND_S)
    return ticket.error is None and bool((client.landed(ticket) == 7).all())


# Stopping -----------------------------------------------------------------------------------------


def test_a_drain_lets_clients_finish_and_ends_with_the_last(tmp_path: Path) -> None:
    with serving(tmp_path, *LONG_DRAIN) as daemon:
        with connect(daemon.address) as client:
            daemon.signal(signal.SIGTERM)
            eventually(lambda: status(daemon)["daemon"]["state"] == "draining", "it drains")
            with pytest.raises(MemdUnavailable, match="takes no new clients"):
                connect(daemon.address)
            assert fetch_works(client)
            assert daemon.child.poll() is None
        assert daemon.ends_within(BOUND_S) == 0
        assert daemon.is_gone_without_a_trace()


def test_a_drain_ends_at_its_bound_with_clients_that_stay(tmp_path: Path) -> None:
    with serving(tmp_path, "--drain-s", "0.7") as daemon, connect(daemon.address) as client:
        begin = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert daemon.ends_within(BOUND_S) == 0
        assert time.monotonic() - begin >= 0.7
        assert daemon.is_gone_without_a_trace()
        client.poll()
        assert not client.is_alive
        assert "1 client(s) did not leave within 0.7 s" in daemon.log.read_text()


def test_a_drain_ends_with_a_client_that_dies(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from memd.client import MemdClient\n"
        "from memd.protocol import KVLayout\n"
        "layout = KVLayout(num_heads=1, head_dim=8, dtype='float16', page_tokens=4)\n"
        "client = MemdClient.connect(sys.argv[1], layout, num_pages=1, landing_rows=1)\n"
        "print('ready', flush=True); input()\n"
    )
    with serving(tmp_path, *LONG_DRAIN) as daemon:
        with subprocess.Popen(
            [sys.executable, "-c", code, daemon.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as client:
            assert client.stdout is not None
            client.stdout.readline()
            daemon.signal(signal.SIGTERM)
            eventually(lambda: status(daemon)["daemon"]["state"] == "draining", "it drains")
            client.kill()
        assert daemon.ends_within(BOUND_S) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_drain_at_once(tmp_path: Path, second: signal.Signals) -> None:
    with serving(tmp_path, *LONG_DRAIN) as daemon, connect(daemon.address):
        daemon.signal(signal.SIGTERM)
        eventually(lambda: "draining" in daemon.log.read_text(), "it drains")
        daemon.signal(second)
        assert daemon.ends_within(BOUND_S) == 0
        assert daemon.is_gone_without_a_trace()


@pytest.mark.parametrize(
    ("options", "number"),
    [(LONG_DRAIN, signal.SIGINT), (("--drain-s", "0"), signal.SIGTERM)],
    ids=["SIGINT", "no-drain"],
)
def test_some_ends_wait_for_nobody(
    tmp_path: Path, options: tuple[str, ...], number: signal.Signals
) -> None:
    with serving(tmp_path, *options) as daemon, connect(daemon.address):
        daemon.signal(number)
        assert daemon.ends_within(BOUND_S) == 0
        assert daemon.is_gone_without_a_trace()


def test_without_clients_a_drain_is_an_end(tmp_path: Path) -> None:
    with serving(tmp_path, *LONG_DRAIN) as daemon:
        daemon.signal(signal.SIGTERM)
        assert daemon.ends_within(BOUND_S) == 0


def test_a_process_that_attached_before_the_drain_may_not_say_hello_in_it(tmp_path: Path) -> None:
    context = zmq.Context()
    with (
        serving(tmp_path, *LONG_DRAIN) as daemon,
        connect(daemon.address),
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as attached,
    ):
        path = daemon.address.removeprefix("ipc://")
        attached.connect(path + ".attach")
        data, (region_fd,), _, _ = socket.recv_fds(attached, 4096, 1)
        os.close(region_fd)
        daemon.signal(signal.SIGTERM)
        eventually(lambda: "draining" in daemon.log.read_text(), "it drains")
        control = context.socket(zmq.DEALER)
        control.connect(daemon.address)
        hello = {
            "type": "hello",
            "request_id": 0,
            "version": 1,
            "session": unpack(data)["session"],
            "pid": os.getpid(),
            "layout": {"num_heads": 1, "head_dim": 8, "dtype": "float16", "page_tokens": 4},
            "num_pages": 1,
            "landing_bytes": 32,
        }
        control.send(pack(hello))
        assert control.poll(10_000)
        assert unpack(control.recv())["code"] == "draining"
        context.destroy(linger=0)


def test_an_engines_own_memd_does_not_wait_for_the_engine_itself(tmp_path: Path) -> None:
    process = spawn_memd(num_bytes=8 << 20, directory=tmp_path / "d", options=LONG_DRAIN)
    with connect(process.address) as client:
        process.close()
        assert process.returncode == 0  # if it waited it would be killed
        client.poll()
        assert not client.is_alive


# Starting -----------------------------------------------------------------------------------------

SLOW_START = """
import time
import memd.pretouch as pretouch
pretouch.SLICE_BYTES = 1 << 20
populate = pretouch._Populate.__call__
def slowly(self, start, length):
    time.sleep(3600 if start >= 4 << 20 else 0.05)
    populate(self, start, length)
pretouch._Populate.__call__ = slowly
pretouch._Touch.__call__ = slowly
pretouch._MAX_THREADS = 1
"""


def test_a_start_can_be_watched_and_ended(tmp_path: Path) -> None:
    port = free_port()
    code = SLOW_START.replace("3600", "0.2")
    options = ("--metrics-port", str(port), "--bytes", "64MiB")
    with running(tmp_path, *options, code=code) as daemon:
        eventually(lambda: ask(port, "/readyz") == (503, "memd is starting\n"), "it starts")
        eventually(daemon.directory.exists, "it takes its address")
        assert ask(port, "/healthz")[0] == 200
        shown = command("status", "--address", daemon.address)
        assert shown.returncode == 3
        assert f"memd {daemon.child.pid} at {daemon.address} is starting" in shown.stdout
        eventually(lambda: metrics(port)["memd_region_ready_bytes"] >= 2 << 20, "bytes get ready")
        assert metrics(port)["memd_region_bytes"] == 64 << 20
        daemon.signal(signal.SIGTERM)
        assert daemon.ends_within(BOUND_S) == 0
        assert daemon.is_gone_without_a_trace()
        assert daemon.child.stdout is not None
        assert daemon.child.stdout.read() == b""


def test_status_waits_for_a_daemon_that_starts(tmp_path: Path) -> None:
    with running(tmp_path, code=SLOW_START.replace("3600", "0.1")) as daemon:
        eventually(daemon.directory.exists, "it takes its address")
        shown = command("status", "--wait", "30", "--address", daemon.address)
        assert shown.returncode == 0
        assert "serving" in shown.stdout


def test_the_log_says_how_fast_the_region_was_made(tmp_path: Path) -> None:
    with serving(tmp_path) as daemon:
        assert "8 MiB ready after" in daemon.log.read_text()
        assert "GiB/s by" in daemon.log.read_text()


def test_a_terminal_shows_a_bar_while_the_region_is_made(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    arguments = ["serve", "--bytes", "64MiB", "--address", f"ipc://{tmp_path}/d/s"]
    with subprocess.Popen(
        [sys.executable, "-m", "memd", *arguments],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
    ) as child:
        os.close(theirs)
        assert child.stdout is not None
        assert child.stdout.readline().startswith(b"READY ")
        try:
            child.send_signal(signal.SIGINT)
            shown = read_terminal(ours, until="64 MiB ready after")
            assert child.wait(BOUND_S) == 0
        finally:
            child.kill()
    os.close(ours)
    assert "allocating" in shown
    assert "64 MiB ready after" in shown


# Metrics ------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def ask(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=BOUND_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except ConnectionRefusedError:
        return 0, ""
    finally:
        connection.close()


def metrics(port: int) -> dict[str, float]:
    status, text = ask(port, "/metrics")
    assert status == 200
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def test_metrics_follow_the_daemon(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, "--metrics-port", str(port), *LONG_DRAIN) as daemon:
        assert ask(port, "/readyz") == (200, "ok\n")
        with connect(daemon.address) as client:
            assert fetch_works(client)
            eventually(lambda: metrics(port)["memd_fetch_rows_total"] == 10, "the fetch is counted")
            found = metrics(port)
            assert found["memd_clients"] == 1
            assert found["memd_fetch_bytes_total"] == 10 * LAYOUT.row_bytes
            assert found['memd_request_duration_seconds_count{type="fetch"}'] == 1
            assert found['memd_pages{state="sealed"}'] == 1
            daemon.signal(signal.SIGTERM)
            draining = 503, "memd is draining\n"
            eventually(lambda: ask(port, "/readyz") == draining, "it drains")
            assert ask(port, "/healthz")[0] == 200
            assert metrics(port)['memd_state{state="draining"}'] == 1
        assert daemon.ends_within(BOUND_S) == 0


def test_metrics_are_at_most_a_second_old_under_load_and_hanging_scrapers(tmp_path: Path) -> None:
    port = free_port()
    with (
        serving(tmp_path, "--metrics-port", str(port)) as daemon,
        connect(daemon.address) as client,
        contextlib.ExitStack() as hanging,
    ):
        for _ in range(50):
            hanging.enter_context(socket.create_connection(("127.0.0.1", port)))
        ages: list[float] = []

        def scrape() -> None:
            for _ in range(40):
                ages.append(metrics(port)["memd_snapshot_age_seconds"])
                time.sleep(0.05)

        scraper = threading.Thread(target=scrape)
        assert fetch_works(client)
        scraper.start()
        num_fetches = 1
        longest_s, last = 0.0, time.monotonic()
        while scraper.is_alive():
            ticket = client.fetch(np.arange(10))
            assert ticket is not None
            assert client.wait(ticket, BOUND_S)
            client.finish(ticket)
            num_fetches += 1
            now = time.monotonic()
            longest_s, last = max(longest_s, now - last), now
        scraper.join()
        assert len(ages) == 40
        # A machine that stops for a second stops memd, too; load alone makes no fetch so long.
        assert max(ages) < 1.0 + longest_s
        assert status(daemon)["latencies"]["fetch"]["count"] == num_fetches


def test_health_tells_when_the_control_thread_is_stuck(tmp_path: Path) -> None:
    code = (
        "import time, memd.probes\n"
        "from memd.service import Service\n"
        "from memd.protocol import Ping\n"
        "memd.probes.MAX_SILENCE_S = 1.5\n"
        "Service._HANDLERS[Ping] = lambda service, connection, request: time.sleep(3600)\n"
    )
    port = free_port()
    context = zmq.Context()
    with serving(tmp_path, "--metrics-port", str(port), code=code) as daemon:
        time.sleep(2)
        eventually(lambda: ask(port, "/healthz")[0] == 200, "it shows life")
        control = context.socket(zmq.DEALER)
        control.connect(daemon.address)
        control.send(pack({"type": "ping", "request_id": 1}))
        eventually(lambda: ask(port, "/healthz")[0] == 503, "the probe fails")
        assert "silent" in ask(port, "/readyz")[1]
    context.destroy(linger=0)


# Logs ---------------------------------------------------------------------------------------------


def test_every_line_of_a_json_log_is_an_object(tmp_path: Path) -> None:
    with serving(tmp_path, "--log-format", "json", "--log-level", "debug") as daemon:
        with connect(daemon.address) as client:
            client_id = client.client_id
        daemon.signal(signal.SIGTERM)
        assert daemon.ends_within(BOUND_S) == 0
        entries = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    assert {entry["pid"] for entry in entries} == {daemon.child.pid}
    assert any(entry.get("region_bytes") == 8 << 20 for entry in entries)
    of_client = [entry for entry in entries if entry.get("client_id") == client_id]
    assert [entry["client_pid"] for entry in of_client] == [os.getpid()] * 2


# Looking ------------------------------------------------------------------------------------------


def read_terminal(fd: int, *, until: str) -> str:
    """What a child has written to its terminal, until that text is there or the child ends."""
    text = b""
    deadline = time.monotonic() + BOUND_S
    while until.encode() not in text and (left := deadline - time.monotonic()) > 0:
        if not select.select([fd], [], [], left)[0]:
            break
        try:
            text += os.read(fd, 65536)
        except OSError:
            break
    return text.decode(errors="replace")


def test_top_prints_one_frame_to_a_pipe(tmp_path: Path) -> None:
    with serving(tmp_path) as daemon, connect(daemon.address) as client:
        assert fetch_works(client)
        shown = command("top", "--once", "--interval", "0.1", "--address", daemon.address)
        assert shown.returncode == 0, shown.stderr
        assert f"memd {daemon.child.pid}" in shown.stdout
        assert "serving" in shown.stdout
        assert str(os.getpid()) in shown.stdout
        assert "integrity ok" in shown.stdout


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "Ctrl-C"])
def test_top_on_a_terminal_is_left_by_a_key(tmp_path: Path, key: bytes) -> None:
    ours, theirs = pty.openpty()
    with (
        serving(tmp_path) as daemon,
        subprocess.Popen(
            [sys.executable, "-m", "memd", "top", "--address", daemon.address],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"},
        ) as top,
    ):
        os.close(theirs)
        try:
            title = f"memd {daemon.child.pid}"
            assert title in read_terminal(ours, until=title)
            os.write(ours, key)
            if key == b"\x03":
                top.send_signal(signal.SIGINT)
            assert top.wait(BOUND_S) == 0
            assert top.stderr is not None
            assert top.stderr.read() == b""
        finally:
            top.kill()
    os.close(ours)


def test_check_finds_this_host_fit() -> None:
    done = command("check", "--bytes", "1MiB", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["verdict"] in ("ok", "warn")
    findings = {finding["name"]: finding for finding in answer["findings"]}
    assert findings["daemon"]["verdict"] == "ok"
    assert findings["gather"]["measured"]["gather_gib_per_s"] > 0


def test_check_says_what_would_fit() -> None:
    done = command("check", "--bytes", "900TiB")
    assert done.returncode == 1
    assert "fail  memory" in done.stdout
    assert "ask for at most --bytes" in done.stdout
