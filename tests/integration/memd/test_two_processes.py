"""A real daemon, real clients in other processes, and signals that give nobody a last word."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zmq

from memd.client import MemdClient, MemdProcess, spawn_memd
from memd.errors import MemdUnavailable, PoolFull, ProtocolError
from memd.protocol import KVLayout
from tests.chaos.probe import NEVER_MS
from tests.contract.plain_msgpack import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.multiproc

LAYOUT = KVLayout(num_heads=3, head_dim=32, dtype="float32", page_tokens=16)
REGION_BYTES = 8 << 20
BOUND_S = 10.0


@pytest.fixture
def memd(tmp_path: Path) -> Iterator[MemdProcess]:
    with spawn_memd(num_bytes=REGION_BYTES, directory=tmp_path / "memd") as process:
        yield process


def connect(memd: MemdProcess, *, num_pages: int = 8, landing_rows: int = 256) -> MemdClient:
    return MemdClient.connect(memd.address, LAYOUT, num_pages=num_pages, landing_rows=landing_rows)


def eventually(is_true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + BOUND_S
    while not is_true():
        assert time.monotonic() < deadline, f"not within {BOUND_S} s: {what}"
        time.sleep(0.01)


def status(memd: MemdProcess) -> dict:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "memd",
            "status",
            "--json",
            "--wait",
            "20",
            "--address",
            memd.address,
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    (stats,) = json.loads(done.stdout)
    return stats


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def num_fds(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@contextlib.contextmanager
def python(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python child that has printed its first line, killed at the end."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            yield child
        finally:
            child.kill()


CLIENT = """
import sys
import numpy as np
from memd.client import MemdClient
from memd.protocol import KVLayout
layout = KVLayout(num_heads=3, head_dim=32, dtype="float32", page_tokens=16)
client = MemdClient.connect(sys.argv[1], layout, num_pages=int(sys.argv[2]), landing_rows=256)
ticket = client.reserve(int(sys.argv[2]))
assert client.wait(ticket, 10)
client.pages[:] = 0xAB
client.commit(ticket.page_ids)
assert client.drain(10)
"""


def test_rows_travel_through_shared_memory(memd: MemdProcess) -> None:
    rng = np.random.default_rng(0)
    with connect(memd, num_pages=32) as client:
        reserved = client.reserve(20)
        assert client.wait(reserved, BOUND_S)
        ids = reserved.page_ids
        assert ids is not None
        client.pages[ids] = rng.integers(0, 256, client.pages[ids].shape, dtype=np.uint8)
        client.commit(ids)
        flat = client.pages.reshape(-1, LAYOUT.row_bytes)
        for _ in range(20):
            rows = rng.integers(0, 20 * LAYOUT.rows_per_page, rng.integers(1, 100))
            ticket = client.fetch(rows)
            assert ticket is not None
            assert client.wait(ticket, BOUND_S)
            assert ticket.error is None
            assert np.array_equal(client.landed(ticket), flat[rows])
            client.finish(ticket)
        client.release(ids)
        client.check_integrity()
        assert client.memd_pid == memd.pid


def test_nothing_has_a_name(memd: MemdProcess) -> None:
    before = set(os.listdir("/dev/shm"))
    with connect(memd):
        assert set(os.listdir("/dev/shm")) <= before
        directory = Path(memd.address.removeprefix("ipc://")).parent
        assert directory.stat().st_mode & 0o777 == 0o700
        for path in directory.iterdir():
            assert path.stat().st_mode & 0o177 == 0, path


def test_sigkill_of_memd_is_noticed_and_the_mapping_stays(memd: MemdProcess) -> None:
    with connect(memd) as client:
        reserved = client.reserve(1)
        assert client.wait(reserved, BOUND_S)
        client.pages[0] = 7
        client.commit(reserved.page_ids)
        assert client.drain(BOUND_S)
        os.kill(memd.pid, signal.SIGSTOP)
        ticket = client.fetch(np.arange(10))
        assert ticket is not None
        os.kill(memd.pid, signal.SIGKILL)

        def is_lost() -> bool:
            client.poll()
            return not client.is_alive

        eventually(is_lost, "the client sees that memd is gone")
        assert ticket.is_done
        assert ticket.error is not None
        assert (client.pages[0] == 7).all()
        client.finish(ticket)
        client.release([0])
        client.check_integrity()
    memd.close()
    assert not Path(memd.address.removeprefix("ipc://")).parent.exists()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_clients_memory_is_reclaimed_and_zeroed(
    memd: MemdProcess, end: signal.Signals
) -> None:
    num_pages = (REGION_BYTES - (1 << 20)) // LAYOUT.page_bytes
    with python(CLIENT + "print('ready', flush=True); input()", memd.address, str(num_pages)) as it:
        assert it.stdout is not None
        assert it.stdout.readline() == "ready\n"
        assert status(memd)["clients"][0]["pages_sealed"] == num_pages
        with pytest.raises(PoolFull, match="bytes are free"):
            connect(memd, num_pages=num_pages)
        it.send_signal(end)
        it.wait(BOUND_S)
    eventually(lambda: status(memd)["clients"] == [], "memd lets the dead client go")
    with connect(memd, num_pages=num_pages) as client:
        assert not client.pages.any()
    stats = status(memd)
    assert stats["counters"]["clients_reclaimed"] == 1
    assert stats["integrity"] == "ok"


def test_a_clients_forked_child_does_not_keep_it_alive(memd: MemdProcess) -> None:
    code = CLIENT + (
        "import os, time\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    time.sleep(60)\n"
        "    os._exit(0)\n"
        "print(child, flush=True); input()\n"
    )
    with python(code, memd.address, "4") as it:
        assert it.stdout is not None
        child = int(it.stdout.readline())
        try:
            it.kill()
            it.wait(BOUND_S)
            eventually(lambda: status(memd)["clients"] == [], "memd lets the dead client go")
            assert is_running(child)
            assert "memd" not in Path(f"/proc/{child}/maps").read_text()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_client_that_just_ends_is_reclaimed(memd: MemdProcess) -> None:
    with python(CLIENT + "import os; os._exit(0)", memd.address, "4") as it:
        it.wait(60)
    eventually(lambda: status(memd)["clients"] == [], "memd lets the client go")


def test_memd_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from memd.client import spawn_memd\n"
        "memd = spawn_memd(num_bytes=1 << 20, directory=Path(sys.argv[1]))\n"
        "print(memd.pid, flush=True); input()\n"
    )
    with python(code, str(tmp_path / "memd")) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
        parent.wait(BOUND_S)
        eventually(lambda: not is_running(pid), "memd ends")
    assert not (tmp_path / "memd").exists()


def test_memd_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    import threading

    started: list[MemdProcess] = []
    thread = threading.Thread(
        target=lambda: started.append(spawn_memd(num_bytes=1 << 20, directory=tmp_path / "memd"))
    )
    thread.start()
    thread.join(60)
    with started[0] as process:
        time.sleep(0.3)
        assert process.is_running


def test_a_parent_that_is_gone_already_ends_memd_at_once(tmp_path: Path) -> None:
    with python("pass") as gone:
        gone.wait(BOUND_S)
    command = [sys.executable, "-m", "memd", "serve", "--bytes", "1MiB"]
    command += ["--address", f"ipc://{tmp_path}/memd/s", "--parent-pid", str(gone.pid)]
    done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_memd_cleanly(memd: MemdProcess) -> None:
    with connect(memd) as client:
        os.kill(memd.pid, signal.SIGINT)
        eventually(lambda: not memd.is_running, "memd ends")
        assert memd.returncode == 0
        client.poll()
        assert not client.is_alive
    assert not Path(memd.address.removeprefix("ipc://")).parent.exists()


def test_a_stopped_memd_is_lost_by_deadline_and_reclaims_when_it_wakes(
    memd: MemdProcess,
) -> None:
    client = connect(memd, landing_rows=8)
    client._deadline_s = 0.5  # to connect may take longer
    begin = time.monotonic()
    client.poll()  # it has watched memd until now
    os.kill(memd.pid, signal.SIGSTOP)
    try:
        ticket = client.reserve(1)
        assert client.wait(ticket, BOUND_S)
        assert time.monotonic() - begin > 0.4
        assert ticket.error is not None
        assert "did not answer" in ticket.error
        assert not client.is_alive
        client.close()
    finally:
        os.kill(memd.pid, signal.SIGCONT)
    eventually(lambda: status(memd)["clients"] == [], "memd lets the client go")
    assert status(memd)["integrity"] == "ok"


def test_clients_of_two_processes_work_side_by_side(memd: MemdProcess) -> None:
    code = CLIENT + (
        "rows = np.arange(4 * layout.rows_per_page)\n"
        "for _ in range(200):\n"
        "    ticket = client.fetch(rows[:100])\n"
        "    assert client.wait(ticket, 10) and ticket.error is None\n"
        "    assert (client.landed(ticket) == 0xAB).all()\n"
        "    client.finish(ticket)\n"
        "client.check_integrity(); client.close(); print('good', flush=True)\n"
    )
    with python(code, memd.address, "4") as one, python(code, memd.address, "5") as two:
        assert one.communicate(timeout=30)[0] == "good\n"
        assert two.communicate(timeout=30)[0] == "good\n"
    stats = status(memd)
    assert stats["counters"]["fetches"] == 400
    assert stats["counters"]["clients_reclaimed"] == 0


def test_malformed_frames_are_counted_and_disturb_nobody(memd: MemdProcess) -> None:
    rng = np.random.default_rng(1)
    context = zmq.Context()
    with connect(memd) as client:
        vandal = context.socket(zmq.DEALER)
        vandal.connect(memd.address)
        frames = [[rng.bytes(int(size))] for size in rng.integers(0, 300, 200)]
        frames += [[b"", pack({"type": "ping", "request_id": 1})], [b"a", b"b", b"c"]]
        frames += [[pack({"type": "reserve", "request_id": 1, "num_pages": 1})]]
        for frame in frames:
            vandal.send_multipart(frame)
        replies = []
        for _ in frames:
            assert vandal.poll(10_000)
            replies.append(unpack(vandal.recv()))
        assert all(reply["type"] == "error_reply" for reply in replies)
        assert {reply["code"] for reply in replies} == {"malformed", "not_registered"}
        ticket = client.reserve(1)
        assert client.wait(ticket, BOUND_S)
        client.check_integrity()
    context.destroy(linger=0)
    assert status(memd)["errors"]["malformed"] == len(frames) - 1


def test_a_far_too_long_frame_ends_only_its_own_connection(memd: MemdProcess) -> None:
    context = zmq.Context()
    vandal = context.socket(zmq.DEALER)
    vandal.setsockopt(zmq.RECONNECT_IVL, NEVER_MS)
    vandal.connect(memd.address)
    vandal.send(bytes(17 << 20))
    assert vandal.poll(10_000)
    assert unpack(vandal.recv())["code"] == "too_large"
    vandal.send(bytes(65 << 20))
    assert not vandal.poll(300)
    context.destroy(linger=0)
    with connect(memd) as client:
        client.check_integrity()


def test_any_messagepack_library_can_be_a_client(memd: MemdProcess) -> None:
    path = memd.address.removeprefix("ipc://")
    context = zmq.Context()
    attach = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with attach:
        attach.settimeout(BOUND_S)
        attach.connect(path + ".attach")
        data, (region_fd,), _, _ = socket.recv_fds(attach, 4096, 1)
        welcome = unpack(data)
        control = context.socket(zmq.DEALER)
        control.connect(memd.address)

        def ask(**request: object) -> dict:
            control.send(pack(request))
            assert control.poll(10_000)
            return unpack(control.recv())

        hello = ask(
            type="hello",
            request_id=0,
            version=1,
            session=welcome["session"],
            pid=os.getpid(),
            layout={"num_heads": 1, "head_dim": 8, "dtype": "float16", "page_tokens": 4},
            num_pages=2,
            landing_bytes=10 * 32,
        )
        assert hello["type"] == "hello_reply"
        assert ask(type="reserve", request_id=1, num_pages=1)["page_ids"] == [0]
        for row in range(4):
            os.pwrite(region_fd, bytes([row + 1]) * 32, hello["extent_offset"] + row * 32)
        assert ask(type="commit", request_id=2, page_ids=[0])["type"] == "commit_reply"
        rows = np.array([3, 1], dtype="<u4").tobytes()
        assert ask(type="fetch", request_id=3, rows=rows, landing_row=4)["num_rows"] == 2
        landing = hello["extent_offset"] + hello["landing_offset"]
        assert os.pread(region_fd, 64, landing + 4 * 32) == b"\4" * 32 + b"\2" * 32
        assert ask(type="goodbye", request_id=4)["type"] == "goodbye_reply"
        os.close(region_fd)
    context.destroy(linger=0)


def test_one_daemon_for_an_address(memd: MemdProcess) -> None:
    with pytest.raises(MemdUnavailable, match="exit status 1"):
        spawn_memd(num_bytes=1 << 20, directory=Path(memd.address.removeprefix("ipc://")).parent)
    with connect(memd) as client:
        client.check_integrity()


def test_a_killed_daemons_address_can_be_served_again(memd: MemdProcess) -> None:
    directory = Path(memd.address.removeprefix("ipc://")).parent
    os.kill(memd.pid, signal.SIGKILL)
    eventually(lambda: not memd.is_running, "memd ends")
    assert list(directory.iterdir())
    with spawn_memd(num_bytes=1 << 20, directory=directory) as again:
        assert again.address == memd.address
        connect(again).close()


def test_nobody_at_an_address_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(MemdUnavailable, match="memd serve --address"):
        MemdClient.connect(f"ipc://{tmp_path}/s", LAYOUT, num_pages=1, landing_rows=1)


def test_a_region_that_does_not_fit_is_told_by_spawn(tmp_path: Path) -> None:
    with pytest.raises(MemdUnavailable, match="exit status 1"):
        spawn_memd(num_bytes=1 << 50, directory=tmp_path / "memd")
    assert list(tmp_path.iterdir()) == []


def test_clients_that_come_and_go_leave_nothing(memd: MemdProcess) -> None:
    connect(memd).close()
    eventually(lambda: status(memd)["region"]["dirty_bytes"] == 0, "the scrub is through")
    gc.collect()  # what earlier tests left must not go meanwhile
    daemon_fds, own_fds = num_fds(memd.pid), num_fds(os.getpid())
    for _ in range(30):
        connect(memd).close()
    # At first it may have had one more, of the connection that had asked for its status.
    eventually(lambda: num_fds(memd.pid) <= daemon_fds, "memd's descriptors are closed")
    assert num_fds(os.getpid()) <= own_fds
    stats = status(memd)
    assert stats["counters"]["clients_registered"] == 31
    eventually(
        lambda: status(memd)["region"]["free_bytes"] == REGION_BYTES, "all memory is free again"
    )


def test_status_is_readable_for_people(memd: MemdProcess) -> None:
    with connect(memd, num_pages=4):
        done = subprocess.run(
            [sys.executable, "-m", "memd", "status", "--wait", "20", "--address", memd.address],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    assert f"memd {memd.pid} at {memd.address}" in done.stdout
    assert "integrity ok" in done.stdout
    assert "0 of 4 pages" in done.stdout


def test_status_finds_the_daemons_that_engines_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with spawn_memd(num_bytes=1 << 20) as memd:
        done = subprocess.run(
            [sys.executable, "-m", "memd", "status", "--json", "--wait", "20"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    assert [stats["daemon"]["pid"] for stats in json.loads(done.stdout)] == [memd.pid]
    assert list(tmp_path.iterdir()) == []


SERVER = """
import sys
from memd.config import MemdConfig
from memd.server import serve
grace_s = float(sys.argv[2]) if len(sys.argv) > 2 else 10.0
serve(MemdConfig(address=sys.argv[1], region_bytes=1 << 20, hello_grace_s=grace_s,
                 watch_interval_s=0.05, max_clients=2))
"""


def test_a_process_that_never_says_hello_is_let_go(tmp_path: Path) -> None:
    with python(SERVER, f"ipc://{tmp_path}/d/s", "0.2") as it:
        assert it.stdout is not None
        assert it.stdout.readline().startswith("READY ipc://")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
            silent.settimeout(BOUND_S)
            silent.connect(f"{tmp_path}/d/s.attach")
            _, fds, _, _ = socket.recv_fds(silent, 4096, 1)
            os.close(fds[0])
            assert silent.recv(10) == b""


def test_a_process_too_many_is_told_so(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/d/s"
    with python(SERVER, address) as it, contextlib.ExitStack() as clients:
        assert it.stdout is not None
        it.stdout.readline()
        for _ in range(2):
            clients.enter_context(MemdClient.connect(address, LAYOUT, num_pages=1, landing_rows=1))
        with pytest.raises(MemdUnavailable, match="limit is --max-clients 2"):
            MemdClient.connect(address, LAYOUT, num_pages=1, landing_rows=1)


def test_another_version_is_refused_by_the_client(tmp_path: Path) -> None:
    code = "import sys, memd.attachments\nmemd.attachments.PROTOCOL_VERSION = 99\n" + SERVER
    address = f"ipc://{tmp_path}/d/s"
    with python(code, address) as it:
        assert it.stdout is not None
        it.stdout.readline()
        with pytest.raises(ProtocolError, match="same release"):
            MemdClient.connect(address, LAYOUT, num_pages=1, landing_rows=1)


def test_without_pidfd_deaths_are_noticed_by_polling(tmp_path: Path) -> None:
    code = "import os\ndel os.pidfd_open\n" + SERVER
    address = f"ipc://{tmp_path}/d/s"
    with python(code, address) as it:
        assert it.stdout is not None
        it.stdout.readline()
        ping = MemdClient.connect(address, LAYOUT, num_pages=1, landing_rows=1)
        with ping, python(CLIENT + "print('ready', flush=True); input()", address, "4") as dying:
            assert dying.stdout is not None
            dying.stdout.readline()
            dying.kill()
            dying.wait(BOUND_S)

            def is_reclaimed() -> bool:
                ping.stats()
                assert ping.drain(BOUND_S)
                return len(ping.stats()["server"]["clients"]) == 1

            eventually(is_reclaimed, "memd lets the dead client go")


def test_a_client_that_reads_no_reply_costs_only_itself(tmp_path: Path) -> None:
    code = "import memd.server\nmemd.server._MAX_QUEUED_REPLIES = 100\n" + SERVER
    address = f"ipc://{tmp_path}/d/s"
    context = zmq.Context()
    with python(code, address) as it:
        assert it.stdout is not None
        it.stdout.readline()
        deaf = context.socket(zmq.DEALER)
        deaf.setsockopt(zmq.RCVHWM, 1)
        deaf.setsockopt(zmq.SNDHWM, 0)
        deaf.connect(address)
        for _ in range(30_000):
            deaf.send(pack({"type": "ping", "request_id": 1}))
        with MemdClient.connect(address, LAYOUT, num_pages=1, landing_rows=1) as client:

            def are_dropped() -> bool:
                client.stats()
                client.drain(BOUND_S)
                return client.stats()["server"]["counters"]["replies_dropped"] > 0

            eventually(are_dropped, "memd drops what nobody reads")
            client.check_integrity()
    context.destroy(linger=0)
