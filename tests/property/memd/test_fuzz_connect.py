"""Connecting to what is no memd, or to a lying one: a typed error in time, nothing leaked."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from memd.client import MemdClient
from memd.errors import MemdError, MemdTimeout, MemdUnavailable, PoolFull, ProtocolError
from memd.protocol import (
    PROTOCOL_VERSION,
    ErrorCode,
    ErrorReply,
    HelloReply,
    KVLayout,
    Pong,
    Welcome,
    encode,
)
from tests.chaos.hostile import hostile_frame

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYOUT = KVLayout(num_heads=2, head_dim=8, dtype="float16", page_tokens=4)
NUM_PAGES, LANDING_ROWS = 4, 16
REGION_BYTES = 64 << 10
# For those who wait for an answer in vain; the others get one, on however busy a machine.
DEADLINE_S, PATIENT_S = 0.5, 60.0
BOUND_S = 15.0

WELCOME = Welcome(
    version=PROTOCOL_VERSION, session=bytes(16), pid=os.getpid(), region_bytes=REGION_BYTES
)
HELLO = HelloReply(
    request_id=0,
    version=PROTOCOL_VERSION,
    client_id=1,
    extent_offset=0,
    extent_bytes=8192,
    landing_offset=4096,
    landing_rows=LANDING_ROWS,
    row_bytes=LAYOUT.row_bytes,
    page_bytes=LAYOUT.page_bytes,
    row_index_bytes=4,
)


@dataclasses.dataclass(frozen=True)
class Script:
    """What a hostile daemon does.

    Attributes:
        welcome: Said to who attaches; None: silence.
        num_fds: Descriptors sent with it.
        region_bytes: Size of the region behind them.
        is_sealed: Whether the region can never change its size.
        reply: Answer to the first frame; None: silence.
        hangs_up: Whether it closes the attach connection after its welcome.
    """

    welcome: bytes | None = encode(WELCOME)
    num_fds: int = 1
    region_bytes: int = REGION_BYTES
    is_sealed: bool = True
    reply: bytes | None = encode(HELLO)
    hangs_up: bool = False

    @property
    def is_silent(self) -> bool:
        """Whether somebody who waits for a word waits in vain."""
        return not self.hangs_up and (self.welcome is None or self.reply is None)


@contextlib.contextmanager
def hostile_daemon(script: Script) -> Iterator[str]:
    """Address of something that serves one client by the script."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hostile-")))
        region = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        stack.callback(os.close, region)
        os.ftruncate(region, script.region_bytes)
        if script.is_sealed:
            fcntl.fcntl(region, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(f"{directory}/s.attach")
        listener.listen()
        context = zmq.Context(io_threads=1)
        stack.callback(context.destroy, linger=0)
        router = context.socket(zmq.ROUTER)
        router.bind(f"ipc://{directory}/s")
        is_over = threading.Event()

        def serve() -> None:
            listener.settimeout(PATIENT_S)
            connection, _ = listener.accept()
            with connection:
                if script.welcome is not None:
                    fds = [region] * script.num_fds
                    with contextlib.suppress(OSError):
                        socket.send_fds(connection, [script.welcome], fds)
                if script.hangs_up:
                    connection.close()
                while not is_over.is_set():
                    if router.poll(10):
                        sender, _ = router.recv_multipart()
                        if script.reply is not None:
                            router.send_multipart([sender, script.reply])

        thread = threading.Thread(target=serve)
        thread.start()
        stack.callback(thread.join, BOUND_S)
        stack.callback(is_over.set)
        yield f"ipc://{directory}/s"


def connect(script: Script) -> MemdClient:
    """Connect, within the bound, and leave nothing behind if that fails."""
    with hostile_daemon(script) as address:
        fds_before = set(os.listdir("/proc/self/fd"))
        begin = time.monotonic()
        try:
            return MemdClient.connect(
                address,
                LAYOUT,
                num_pages=NUM_PAGES,
                landing_rows=LANDING_ROWS,
                deadline_s=DEADLINE_S if script.is_silent else PATIENT_S,
            )
        except MemdError:
            # The hostile side may have accepted a connection meanwhile: that one is not ours.
            leaked = [
                link
                for fd in set(os.listdir("/proc/self/fd")) - fds_before
                if (link := _target(fd)) and "hostile" in link
            ]
            assert leaked == []
            raise
        finally:
            assert time.monotonic() - begin < DEADLINE_S + BOUND_S


def _target(fd: str) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(f"/proc/self/fd/{fd}")
    return None


def test_the_script_without_a_lie_is_a_memd() -> None:
    with connect(Script()) as client:
        assert client.landing.shape == (LANDING_ROWS, LAYOUT.row_bytes)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (Script(welcome=None), MemdTimeout),
        (Script(welcome=None, hangs_up=True), MemdUnavailable),
        (Script(hangs_up=True, reply=None), MemdUnavailable),
        (Script(welcome=b"\xc1"), ProtocolError),
        (Script(welcome=encode(WELCOME)[:-1]), ProtocolError),
        (Script(welcome=encode(WELCOME) + bytes(8000)), ProtocolError),
        (Script(welcome=encode(Pong(request_id=1))), ProtocolError),
        (Script(num_fds=0), ProtocolError),
        (Script(region_bytes=4096), ProtocolError),
        (Script(region_bytes=0), ProtocolError),
        (Script(reply=None), MemdTimeout),
        (Script(reply=b""), ProtocolError),
        (Script(reply=b"\xc1"), ProtocolError),
        (Script(reply=encode(Pong(request_id=0))), ProtocolError),
    ],
    ids=[
        "silence",
        "hangs up",
        "hangs up after the welcome",
        "garbage",
        "half a welcome",
        "too long a welcome",
        "no welcome",
        "no descriptor",
        "a smaller region",
        "an empty region",
        "no answer to Hello",
        "an empty answer",
        "a garbled answer",
        "another answer",
    ],
)
def test_what_is_no_memd_is_refused_by_type(script: Script, error: type[MemdError]) -> None:
    with pytest.raises(error):
        connect(script)


@pytest.mark.parametrize(
    ("code", "error"),
    [(ErrorCode.POOL_FULL, PoolFull), (ErrorCode.UNKNOWN_SESSION, ProtocolError)],
)
def test_a_refused_hello_is_the_matching_error(code: ErrorCode, error: type[MemdError]) -> None:
    refusal = ErrorReply(request_id=0, code=code, message="because")
    with pytest.raises(error, match="because"):
        connect(Script(reply=encode(refusal)))


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 99},
        {"extent_offset": -4096},
        {"extent_offset": 1},
        {"extent_offset": REGION_BYTES},
        {"extent_offset": 1 << 62},
        {"extent_bytes": 0},
        {"extent_bytes": -1},
        {"extent_bytes": REGION_BYTES + 4096},
        {"extent_bytes": (1 << 64) - 1},
        {"landing_offset": 0},
        {"landing_offset": -1},
        {"landing_offset": 8192},
        {"landing_rows": 1 << 40},
        {"row_bytes": 31},
        {"page_bytes": 1},
        {"row_index_bytes": 8},
        {"row_index_bytes": 0},
    ],
    ids=str,
)
def test_an_extent_that_cannot_be_is_a_protocol_error(changes: dict[str, int]) -> None:
    fields = {name: getattr(HELLO, name) for name in HELLO.__struct_fields__}
    with pytest.raises(ProtocolError):
        connect(Script(reply=encode(HelloReply(**{**fields, **changes}))))


@pytest.mark.parametrize("landing_rows", [-1, 0, LANDING_ROWS - 1, LANDING_ROWS + 1])
def test_a_ring_of_another_size_is_a_protocol_error(landing_rows: int) -> None:
    fields: dict[str, Any] = {name: getattr(HELLO, name) for name in HELLO.__struct_fields__}
    fields["landing_rows"] = landing_rows
    with pytest.raises(ProtocolError):
        connect(Script(reply=encode(HelloReply(**fields)))).close()


def test_a_region_that_could_shrink_is_refused() -> None:
    # An access behind the new end would be SIGBUS, which takes the engine with it.
    with pytest.raises(ProtocolError):
        connect(Script(is_sealed=False)).close()


@given(seed=st.integers(0, 2**64 - 1), says_welcome=st.booleans())
def test_no_babble_is_taken_for_a_memd(seed: int, says_welcome: bool) -> None:
    frame = hostile_frame(np.random.default_rng(seed))[:4000] or b"\0"
    script = Script(reply=frame) if says_welcome else Script(welcome=frame)
    with pytest.raises(MemdError):
        connect(script)
