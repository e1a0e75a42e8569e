"""``/metrics``, ``/healthz`` and ``/readyz`` over HTTP on loopback, for scrapers and supervisors.

A thread of its own answers from the noticeboard alone, so a request can neither wait for the
daemon's work nor delay it. A connection has two seconds for its request and for taking the answer,
and there are at most 64: the oldest goes when another one comes. The answers name no client and
hold nothing of any page, because any user of the host can ask for them.

==============  ==========================================================================
``/metrics``    Prometheus text, at most a second old
``/healthz``    200 while the control thread gives signs of life, else 503
``/readyz``     200 while clients are taken, else 503 with the reason
==============  ==========================================================================
"""

from __future__ import annotations

import asyncio
import http
import logging
import socket
import threading
from typing import TYPE_CHECKING

from memd.errors import ConfigError
from memd.lifecycle import DaemonState
from memd.prometheus import CONTENT_TYPE, render

if TYPE_CHECKING:
    from memd.noticeboard import Noticeboard

__all__ = ["MAX_SILENCE_S", "Probes"]

MAX_SILENCE_S = 5.0
"""Without a sign of life for so long, the control thread counts as stuck."""

_LOG = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_DEADLINE_S = 2.0
_MAX_CONNECTIONS = 64
_MAX_REQUEST_BYTES = 8 << 10
_PLAIN = "text/plain; charset=utf-8"


class Probes:
    """The HTTP responder; a context manager. Listens from construction on.

    Args:
        port: Port on 127.0.0.1; 0 lets the system choose.
        board: What it answers from.

    Attributes:
        port: The port.

    Raises:
        ConfigError: The port is taken.
    """

    def __init__(self, port: int, board: Noticeboard) -> None:
        self._board = board
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((_HOST, port))
            self._socket.listen(_MAX_CONNECTIONS)
        except OSError as error:
            self._socket.close()
            raise ConfigError(
                f"--metrics-port {port}: cannot listen on {_HOST}:{port} ({error.strerror}); "
                f"choose another port, or 0 for none"
            ) from error
        self.port: int = self._socket.getsockname()[1]
        self._connections: dict[asyncio.StreamWriter, None] = {}
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="memd-probes", daemon=True)
        self._thread.start()

    def __enter__(self) -> Probes:
        """The responder."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the responder."""
        self.close()

    def close(self) -> None:
        """Stop listening and let go of all connections; idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(
            self._on_connection, sock=self._socket, limit=_MAX_REQUEST_BYTES
        )
        async with server:
            await self._stop.wait()
            for writer in list(self._connections):
                writer.transport.abort()

    async def _on_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if len(self._connections) >= _MAX_CONNECTIONS:
            next(iter(self._connections)).transport.abort()
        self._connections[writer] = None
        try:
            async with asyncio.timeout(_DEADLINE_S):
                request = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(request))
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            _LOG.debug("a connection to the metrics port came to nothing")
        finally:
            writer.transport.abort()
            del self._connections[writer]

    def _answer(self, request: bytes) -> bytes:
        """The whole HTTP answer to a request's head."""
        method, _, rest = request.partition(b"\r\n")[0].partition(b" ")
        path, _, version = rest.partition(b" ")
        if not version.startswith(b"HTTP/1."):
            return _response(http.HTTPStatus.BAD_REQUEST, "not an HTTP/1 request\n")
        if method not in (b"GET", b"HEAD"):
            return _response(http.HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD\n")
        status, text, content_type = self._page(path.partition(b"?")[0])
        return _response(status, text, content_type, with_body=method == b"GET")

    def _page(self, path: bytes) -> tuple[http.HTTPStatus, str, str]:
        board = self._board
        if path == b"/metrics":
            text = render(board.notice.stats, age_s=board.age_s)
            return http.HTTPStatus.OK, text, CONTENT_TYPE
        if path in (b"/healthz", b"/readyz"):
            trouble = self._trouble(needs_serving=path == b"/readyz")
            if trouble is None:
                return http.HTTPStatus.OK, "ok\n", _PLAIN
            return http.HTTPStatus.SERVICE_UNAVAILABLE, trouble + "\n", _PLAIN
        return http.HTTPStatus.NOT_FOUND, "there are /metrics, /healthz and /readyz\n", _PLAIN

    def _trouble(self, *, needs_serving: bool) -> str | None:
        """Why a probe fails; None if it does not."""
        silence_s = self._board.silence_s
        if silence_s > MAX_SILENCE_S:
            return f"the control thread has been silent for {silence_s:.0f} s"
        state = self._board.notice.stats.get("daemon", {}).get("state", DaemonState.STARTING)
        if needs_serving and state != DaemonState.SERVING:
            return f"memd is {state}"
        return None


def _response(
    status: http.HTTPStatus, text: str, content_type: str = _PLAIN, *, with_body: bool = True
) -> bytes:
    body = text.encode()
    head = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if status is http.HTTPStatus.METHOD_NOT_ALLOWED:
        head.append("Allow: GET, HEAD")
    return "\r\n".join([*head, "", ""]).encode() + (body if with_body else b"")
