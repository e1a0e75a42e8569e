"""Who may do what: other users nothing, other clients nothing of ours, nobody code.

What is checked elsewhere: malformed and too long frames (``test_two_processes.py``, and
``tests/property/memd/test_fuzz_service.py``), the metrics port (``test_probes.py``),
and that no client ever sees another's bytes, under load and sudden death (``tests/chaos``).
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import fcntl
import mmap
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zmq

import memd
from memd.client import MemdClient
from memd.protocol import PROTOCOL_VERSION, KVLayout
from tests.chaos.daemon import Daemon
from tests.contract.plain_msgpack import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.multiproc

LAYOUT = KVLayout(num_heads=3, head_dim=32, dtype="float32", page_tokens=16)
REGION_BYTES = 4 << 20
NOBODY = 65534
BOUND_S = 10.0

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, "memd", num_bytes=REGION_BYTES) as it:
        yield it


def eventually(is_true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + BOUND_S
    while not is_true():
        assert time.monotonic() < deadline, f"not within {BOUND_S} s: {what}"
        time.sleep(0.01)


@dataclasses.dataclass
class Attached:
    """A process on the attach socket, by hand.

    Attributes:
        connection: The attach connection.
        session: Token for a ``Hello``.
        region_fd: Descriptor of the region.
    """

    connection: socket.socket
    session: bytes
    region_fd: int


@contextlib.contextmanager
def attached(daemon: Daemon) -> Iterator[Attached]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(BOUND_S)
        connection.connect(f"{daemon.sockets}/control.sock.attach")
        data, (fd,), _, _ = socket.recv_fds(connection, 4096, 1)
        try:
            yield Attached(connection, unpack(data)["session"], fd)
        finally:
            os.close(fd)


class Control:
    """A control connection that speaks plain MessagePack; a context manager."""

    def __init__(self, daemon: Daemon) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(daemon.address)

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._context.destroy(linger=0)

    def ask(self, **request: object) -> dict[str, Any]:
        self._socket.send(pack({"request_id": 1, **request}))
        assert self._socket.poll(int(1000 * BOUND_S)), request
        reply = unpack(self._socket.recv())
        assert isinstance(reply, dict)
        return reply

    def hello(self, session: bytes, **changes: object) -> dict[str, Any]:
        fields: dict[str, object] = {
            "type": "hello",
            "version": PROTOCOL_VERSION,
            "session": session,
            "pid": os.getpid(),
            "layout": {"num_heads": 1, "head_dim": 8, "dtype": "float16", "page_tokens": 4},
            "num_pages": 4,
            "landing_bytes": 10 * 32,
        }
        return self.ask(**{**fields, **changes})


class TestOtherUsers:
    """Processes of another user: the directory keeps them out, and behind it memd itself."""

    ATTACH = """
import os, socket, sys
uid = int(sys.argv[2])
os.setgroups([]); os.setgid(uid); os.setuid(uid)
for _ in range(int(sys.argv[3])):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(10)
        try:
            connection.connect(sys.argv[1])
        except OSError as error:
            print(type(error).__name__)
            continue
        data, fds, _, _ = socket.recv_fds(connection, 4096, 1)
        print(len(fds), data)
"""

    @pytest.fixture
    def open_directory(self) -> Iterator[Path]:
        """A directory that every user may pass; pytest's own are private."""
        with tempfile.TemporaryDirectory(prefix="security-") as name:
            Path(name).chmod(0o711)
            yield Path(name)

    def attach_as_nobody(self, daemon: Daemon, times: int = 1) -> list[str]:
        path = f"{daemon.sockets}/control.sock.attach"
        done = subprocess.run(
            [sys.executable, "-c", self.ATTACH, path, str(NOBODY), str(times)],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return done.stdout.splitlines()

    @needs_root
    def test_do_not_reach_the_sockets(self, open_directory: Path) -> None:
        with Daemon(open_directory, "memd", num_bytes=REGION_BYTES) as daemon:
            assert self.attach_as_nobody(daemon) == ["PermissionError"]

    @needs_root
    def test_are_refused_even_where_the_directory_lets_them_through(
        self, open_directory: Path
    ) -> None:
        with Daemon(open_directory, "memd", num_bytes=REGION_BYTES) as daemon:
            daemon.sockets.chmod(0o711)
            for path in daemon.socket_files():
                path.chmod(0o666)
            answers = self.attach_as_nobody(daemon, times=3)
            assert len(answers) == 3
            for answer in answers:
                num_fds, _, text = answer.partition(" ")
                assert num_fds == "0", "a stranger got the region"
                assert "peer_refused" in text
            assert daemon.stats()["counters"]["peers_refused"] == 3
            assert daemon.log.count("refused pid") == 1
            assert f"this process is user {NOBODY}" in daemon.log
            with MemdClient.connect(daemon.address, LAYOUT, num_pages=1, landing_rows=1) as client:
                client.check_integrity()

    @needs_root
    def test_who_reach_the_control_socket_get_no_memory_without_a_session(
        self, open_directory: Path
    ) -> None:
        with (
            Daemon(open_directory, "memd", num_bytes=REGION_BYTES) as daemon,
            Control(daemon) as it,
        ):
            # Whoever is there, the session comes with the region's descriptor or not at all.
            assert it.hello(os.urandom(16))["code"] == "unknown_session"
            assert it.ask(type="reserve", num_pages=1)["code"] == "not_registered"


class TestSessions:
    """A session belongs to one process, one connection, one registration."""

    def test_are_random_and_of_full_length(self, daemon: Daemon) -> None:
        with contextlib.ExitStack() as stack:
            sessions = [stack.enter_context(attached(daemon)).session for _ in range(20)]
        assert {len(session) for session in sessions} == {16}
        assert len(set(sessions)) == 20
        assert len({session[:4] for session in sessions}) == 20

    def test_of_a_registered_client_serve_nobody_else(self, daemon: Daemon) -> None:
        with attached(daemon) as mine, Control(daemon) as owner, Control(daemon) as thief:
            assert owner.hello(mine.session)["type"] == "hello_reply"
            assert thief.hello(mine.session)["code"] == "already_registered"
            assert thief.ask(type="reserve", num_pages=1)["code"] == "not_registered"

    def test_are_over_with_goodbye(self, daemon: Daemon) -> None:
        with attached(daemon) as mine, Control(daemon) as control, Control(daemon) as thief:
            control.hello(mine.session)
            assert control.ask(type="goodbye")["type"] == "goodbye_reply"
            assert control.hello(mine.session)["code"] == "already_registered"
            assert thief.hello(mine.session)["code"] == "already_registered"

    def test_are_over_with_the_process(self, daemon: Daemon) -> None:
        with Control(daemon) as control:
            with attached(daemon) as mine:
                session = mine.session
                control.hello(session)
            eventually(lambda: daemon.stats()["clients"] == [], "memd lets it go")
            assert control.hello(session)["code"] == "unknown_session"

    def test_that_are_over_do_not_touch_the_next_clients_memory(self, daemon: Daemon) -> None:
        with Control(daemon) as ghost:
            with attached(daemon) as gone:
                ghost.hello(gone.session)
                assert ghost.ask(type="reserve", num_pages=2)["page_ids"] == [0, 1]
                ghost.ask(type="commit", page_ids=[0, 1])
            eventually(
                lambda: daemon.stats()["region"]["free_bytes"] == REGION_BYTES, "all is free again"
            )
            with MemdClient.connect(daemon.address, LAYOUT, num_pages=8, landing_rows=8) as client:
                reserved = client.reserve(8)
                assert client.wait(reserved, BOUND_S)
                client.pages[:], client.landing[:] = 7, 9
                client.commit(range(8))
                assert client.drain(BOUND_S)
                # The same places in the region were the ghost's: it must not write or free them.
                rows = np.arange(4, dtype="<u4").tobytes()
                for request in (
                    {"type": "fetch", "rows": rows, "landing_row": 0},
                    {"type": "release", "page_ids": [0]},
                    {"type": "goodbye"},
                ):
                    assert ghost.ask(**request)["code"] == "not_registered"
                assert (client.pages == 7).all()
                assert (client.landing == 9).all()
                client.check_integrity()

    def test_are_watched_by_the_process_that_the_kernel_names(self, daemon: Daemon) -> None:
        with attached(daemon) as mine, Control(daemon) as control:
            control.hello(mine.session, pid=1)
            assert [client["pid"] for client in daemon.stats()["clients"]] == [os.getpid()]


class TestMemory:
    """The region: nobody resizes it, and nothing in it goes from one client to another."""

    def test_the_descriptor_is_private_sealed_and_has_no_name(self, daemon: Daemon) -> None:
        with attached(daemon) as mine:
            info = os.fstat(mine.region_fd)
            assert stat.S_IMODE(info.st_mode) == 0o600
            assert info.st_size == REGION_BYTES
            seals = fcntl.fcntl(mine.region_fd, fcntl.F_GET_SEALS)
            for seal in (fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL):
                assert seals & seal
            for size in (0, REGION_BYTES + mmap.PAGESIZE):
                with pytest.raises(PermissionError):
                    os.ftruncate(mine.region_fd, size)
            assert os.readlink(f"/proc/self/fd/{mine.region_fd}").endswith("memd (deleted)")

    @pytest.mark.parametrize("is_killed", [True, False], ids=["SIGKILL", "goodbye"])
    def test_every_byte_of_a_client_is_zeroed_after_it(
        self, daemon: Daemon, is_killed: bool
    ) -> None:
        code = (
            "import os, signal, sys\n"
            "from memd.client import MemdClient\n"
            "from memd.protocol import KVLayout\n"
            "layout = KVLayout(num_heads=3, head_dim=32, dtype='float32', page_tokens=16)\n"
            "client = MemdClient.connect(sys.argv[1], layout, num_pages=200, landing_rows=999)\n"
            "client.pages[:] = 0xAB\n"
            "client.landing[:] = 0xCD\n"
            "if sys.argv[2] == 'kill': os.kill(os.getpid(), signal.SIGKILL)\n"
            "client.close()\n"
        )
        with attached(daemon) as mine:
            how = "kill" if is_killed else "goodbye"
            subprocess.run(
                [sys.executable, "-c", code, daemon.address, how], timeout=30, check=False
            )
            eventually(
                lambda: daemon.stats()["region"]["free_bytes"] == REGION_BYTES, "all is free again"
            )
            counters = daemon.stats()["counters"]
            assert counters["clients_registered"] == 1
            assert counters["clients_reclaimed"] == int(is_killed)
            assert os.pread(mine.region_fd, REGION_BYTES, 0) == bytes(REGION_BYTES)

    def test_a_fetch_cannot_name_another_clients_row(self, daemon: Daemon) -> None:
        with (
            attached(daemon) as one,
            attached(daemon) as two,
            Control(daemon) as a,
            Control(daemon) as b,
        ):
            first, second = a.hello(one.session), b.hello(two.session)
            a.ask(type="reserve", num_pages=4)
            a.ask(type="commit", page_ids=[0, 1, 2, 3])
            # Rows are counted from the client's own first page: none of another's has a name.
            row = second["extent_offset"] // first["row_bytes"]
            rows = np.array([row], dtype=f"<u{first['row_index_bytes']}").tobytes()
            assert a.ask(type="fetch", rows=rows, landing_row=0)["code"] == "out_of_range"


class TestFiles:
    """What memd leaves in the file system while it runs, and where it refuses to."""

    def test_are_private_under_any_umask(self, tmp_path: Path) -> None:
        prelude = "import os; os.umask(0)"
        with Daemon(tmp_path, "memd", num_bytes=REGION_BYTES, prelude=prelude) as daemon:
            assert stat.S_IMODE(daemon.sockets.stat().st_mode) == 0o700
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in daemon.socket_files()}
            assert set(modes) >= {"control.sock", "control.sock.attach", "control.sock.lock"}
            assert set(modes.values()) == {0o600}

    def refusal(self, directory: Path) -> str:
        command = [sys.executable, "-m", "memd", "serve", "--bytes", "1MiB"]
        command += ["--address", f"ipc://{directory}/s"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        return done.stderr

    @pytest.mark.parametrize("mode", [0o755, 0o711, 0o770, 0o701])
    def test_do_not_go_where_others_may_enter(self, tmp_path: Path, mode: int) -> None:
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(mode)
        assert "mode 0700" in self.refusal(tmp_path / "open")
        assert list((tmp_path / "open").iterdir()) == []

    def test_do_not_go_through_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir(mode=0o700)
        (tmp_path / "link").symlink_to(tmp_path / "real")
        assert "no link" in self.refusal(tmp_path / "link")

    @needs_root
    def test_do_not_go_into_another_users_directory(self, tmp_path: Path) -> None:
        (tmp_path / "theirs").mkdir(mode=0o700)
        os.chown(tmp_path / "theirs", NOBODY, NOBODY)
        assert f"belongs to {NOBODY}" in self.refusal(tmp_path / "theirs")


class TestNetwork:
    """memd is reached through its directory, and through nothing that has no permissions."""

    def sockets(self, daemon: Daemon) -> set[str]:
        """Inodes of the daemon's sockets."""
        links = []
        for link in Path(f"/proc/{daemon.child.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(link))
        return {found[1] for link in links if (found := re.fullmatch(r"socket:\[(\d+)\]", link))}

    def addresses(self, daemon: Daemon) -> list[str]:
        """Local addresses of the daemon's network sockets, as the kernel writes them."""
        mine, found = self.sockets(daemon), []
        for table in ("tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6"):
            path = Path(f"/proc/{daemon.child.pid}/net/{table}")
            if path.exists():
                rows = [line.split() for line in path.read_text().splitlines()[1:]]
                found += [row[1] for row in rows if row[9] in mine]
        return found

    def test_nothing_listens_unless_asked(self, daemon: Daemon) -> None:
        with MemdClient.connect(daemon.address, LAYOUT, num_pages=1, landing_rows=1):
            assert self.sockets(daemon), "the search finds nothing at all"
            assert self.addresses(daemon) == []

    def test_no_socket_lies_in_the_abstract_name_space(self, daemon: Daemon) -> None:
        mine = self.sockets(daemon)
        rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
        names = [row[7] for row in rows if row[6] in mine and len(row) > 7]
        assert sorted(set(names)) == [
            f"{daemon.sockets}/control.sock",
            f"{daemon.sockets}/control.sock.attach",
        ]

    def test_metrics_that_were_asked_for_are_on_loopback_alone(self, tmp_path: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = ["--metrics-port", str(port)]
        with Daemon(tmp_path, "memd", num_bytes=REGION_BYTES, arguments=arguments) as daemon:
            assert self.addresses(daemon) == [f"0100007F:{port:04X}"]

    @pytest.mark.parametrize("address", ["tcp://127.0.0.1:9999", "inproc://x", "ipc://@abstract"])
    def test_other_transports_are_refused(self, address: str) -> None:
        command = [sys.executable, "-m", "memd", "serve", "--bytes", "1MiB", "--address", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 1
        assert "ipc:// and an absolute path" in done.stderr


class TestCode:
    """No bytes of a peer are ever run or unpickled."""

    PACKAGE = Path(memd.__file__).parent
    FORBIDDEN_MODULES = frozenset(
        {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "code"}
    )
    FORBIDDEN_CALLS = frozenset(
        {"eval", "exec", "compile", "__import__", "send_pyobj", "recv_pyobj", "send_serialized"}
    )

    def modules(self) -> list[tuple[Path, ast.Module]]:
        found = [(path, ast.parse(path.read_text())) for path in self.PACKAGE.rglob("*.py")]
        assert len(found) > 20
        return found

    def test_nothing_that_unpickles_is_imported(self) -> None:
        for path, module in self.modules():
            for node in ast.walk(module):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [alias.name for alias in node.names]
                    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                    roots = {name.partition(".")[0] for name in names}
                    assert not roots & self.FORBIDDEN_MODULES, f"{path}:{node.lineno}"

    def test_nothing_that_runs_code_is_called(self) -> None:
        for path, module in self.modules():
            for node in ast.walk(module):
                if isinstance(node, ast.Call):
                    function = node.func
                    name = function.id if isinstance(function, ast.Name) else None
                    if isinstance(function, ast.Attribute) and function.attr.endswith("pyobj"):
                        name = function.attr
                    assert name not in self.FORBIDDEN_CALLS, f"{path}:{node.lineno}"
                    keywords = {keyword.arg for keyword in node.keywords}
                    assert "allow_pickle" not in keywords, f"{path}:{node.lineno}"

    def test_a_daemon_has_not_even_loaded_a_model_framework(self, daemon: Daemon) -> None:
        mapped = Path(f"/proc/{daemon.child.pid}/maps").read_text()
        assert "libtorch" not in mapped
        assert "libcuda" not in mapped


def test_a_clients_name_cannot_write_a_line_of_the_log(daemon: Daemon) -> None:
    with attached(daemon) as mine, Control(daemon) as control:
        control.hello(mine.session, name="x\n2026-01-01 00:00:00,000 memd[1] ERROR all is lost")
        eventually(lambda: "client 1" in daemon.log, "memd tells of the client")
    assert not any(line.startswith("2026-01-01 ") for line in daemon.log.splitlines())


def test_a_clients_name_cannot_steer_the_terminal(daemon: Daemon) -> None:
    with attached(daemon) as mine, Control(daemon) as control:
        control.hello(mine.session, name="\x1b]0;owned\x07\x1b[2J")
        done = subprocess.run(
            [sys.executable, "-m", "memd", "status", "--wait", "20", "--address", daemon.address],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    assert "\x1b" not in done.stdout
