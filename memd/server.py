"""The daemon's loop: what happens when, around a ``Service``. One thread, no locks.

What other threads know of it they read from a noticeboard (``memd.probes``).

Life of a client, as the loop sees it::

    connects to NAME.attach ── uid checked ──> Welcome + region fd, pidfd opened, session opened
    Hello over NAME         ─────────────────> extent
    ...
    pidfd readable or attach connection closed ──> session closed, extent reclaimed, zeroed, free

What the loop waits on: the ZeroMQ ROUTER, one descriptor for the attach listener and every client's
connection and pidfd, the parent's pidfd, and a pipe that signals write to. Rows are copied and
returned memory is zeroed in small steps between two looks at those.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from memd import heap
from memd.attachments import Attachments
from memd.cuda.driver import load_driver
from memd.endpoint import Endpoint, EndpointLock, private_directory
from memd.errors import ConfigError
from memd.lifecycle import Lifecycle
from memd.limits import raise_descriptor_limit
from memd.link import Link
from memd.liveness import ProcessWatch
from memd.noticeboard import Noticeboard
from memd.numa import choose_nodes, read_nodes, running_cpu
from memd.region import Region
from memd.rings import Rings
from memd.service import Service
from memd.sizes import format_bytes
from memd.store import Store
from memd.tiers import DiskTier, ThreadRunner, Tiers
from memd.transfer import HostTransfer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

    from memd.config import MemdConfig
    from memd.cuda.driver import Driver
    from memd.numa import Node

__all__ = ["Progress", "Server", "serve"]

_LOG = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the bytes that are ready and all bytes, from several threads, one at a time."""

# Requests handled before the loop looks at the other sockets again.
_BURST = 256
# Replies that may wait for one client; more than that means that it does not read them.
_MAX_QUEUED_REPLIES = 100_000
_LINGER_MS = 500
# What a scraper sees is at most twice this old.
_NOTICE_INTERVAL_S = 0.5
# For copies under way and the end of a context; who hangs longer is left to the end of the process.
_STOP_RINGS_S = 5.0


def _no_progress(num_ready: int, num_bytes: int) -> None:
    """Tells nobody."""


class Server:
    """Serves one region until told to stop; a context manager, entered once.

    Entering takes the endpoint, allocates the region and starts to listen; leaving gives everything
    back in the opposite order: sockets, region, endpoint files, directory.

    Args:
        config: Settings.
        progress: Called while the region is made.
        load_cuda: Gives the CUDA driver, on another thread, once a client has a ring on a device.

    Raises:
        ConfigError: On entering: the address, the host's memory, its NUMA nodes or the metrics port
            do not allow a start.
        InterruptedError: On entering: told to stop while the region was made.
    """

    def __init__(
        self,
        config: MemdConfig,
        *,
        progress: Progress = _no_progress,
        load_cuda: Callable[[], Driver] = load_driver,
    ) -> None:
        self._config = config
        self._progress = progress
        self._load_cuda = load_cuda
        self._endpoint = Endpoint.parse(config.address)
        self._lifecycle = Lifecycle(config.drain_s)
        # Only with a metrics port: without readers there is nothing to wake up for.
        self._board: Noticeboard | None = None
        self._next_notice = 0.0
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Server:
        """Start to listen."""
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop to listen and give everything back."""
        self._resources.close()

    def stop(self, reason: str) -> None:
        """Make ``run`` return soon; may be called from a signal handler."""
        self._lifecycle.end(reason)
        self._wake()

    def drain(self, reason: str) -> None:
        """Take no new clients, and make ``run`` return when those that are there have left.

        It returns after ``drain_s`` in any case, and at once when asked a second time. May be
        called from a signal handler.
        """
        self._lifecycle.drain(reason)
        self._wake()

    def run(self) -> None:
        """Serve until ``stop`` or ``drain`` ends it, or the parent process does."""
        more_to_tidy = False
        while not self._lifecycle.is_over:
            is_idle = not (more_to_tidy or self._service.has_work)
            events = dict(self._poller.poll(self._timeout_ms() if is_idle else 0))
            if self._wake_reader.fileno() in events:
                self._sleep_again()
            if self._router in events:
                self._serve_requests()
            if self._attachments.fileno() in events:
                self._attachments.on_readable()
            for sender, reply in self._service.step():
                self._send(sender, reply)
            self._attachments.check_time()
            self._look_after_parent()
            self._follow_lifecycle()
            self._post_notice()
            # Clients wait for copies, and nobody for this.
            if not self._service.has_work:
                more_to_tidy = self._service.tidy(self._config.scrub_bytes)
        _LOG.info("stopping: %s", self._lifecycle.end_reason)

    def _open(self, stack: contextlib.ExitStack) -> None:
        config, endpoint = self._config, self._endpoint
        wake_reader, self._wake_writer = socket.socketpair()
        stack.enter_context(wake_reader)
        stack.enter_context(self._wake_writer)
        wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._wake_reader = wake_reader
        stack.enter_context(self._signals())

        self._parent: ProcessWatch | None = None
        if config.parent_pid is not None:
            self._parent = stack.enter_context(ProcessWatch(config.parent_pid))
        if config.metrics_port:
            # First of all that can be seen, so that a supervisor can watch the start.
            self._board = Noticeboard()
            self._post_start(0, config.region_bytes)
            stack.enter_context(_probes(config.metrics_port, self._board))

        directory = endpoint.control.parent
        if private_directory(directory):
            stack.callback(self._remove_directory)
        stack.enter_context(EndpointLock(endpoint))
        self._make_region(stack)
        self._poller = zmq.Poller()
        self._poller.register(wake_reader.fileno(), zmq.POLLIN)
        if self._parent is not None and self._parent.fileno() is not None:
            self._poller.register(self._parent.fileno(), zmq.POLLIN)
        self._listen(stack)
        # First of all that ends: clients take the end of their connection for memd's own.
        stack.callback(self._stop_rings)
        if self._should_stop():
            raise InterruptedError("stopped when it was about to listen")
        self._lifecycle.ready()
        self._post_notice()

    def _make_region(self, stack: contextlib.ExitStack) -> None:
        config = self._config
        # A policy for memory as it comes and goes is not ours to set.
        nodes = [] if config.disk_dir else choose_nodes(config.numa, read_nodes(), running_cpu())
        disk = self._open_disk(stack)
        region = self._region = stack.enter_context(
            Region(
                config.region_bytes,
                address_bytes=None if disk is None else config.region_bytes + disk.num_bytes,
                nodes=nodes,
                lock=config.lock,
                should_stop=self._should_stop,
                progress=self._on_progress,
            )
        )
        _log_region(region, is_locked=config.lock)
        if nodes:
            _log_placement(region.placement(), nodes)
        self._store = Store(
            region.num_bytes,
            memory_bytes=region.memory_bytes,
            disk_bytes=0 if disk is None else disk.num_bytes,
        )
        runner = ThreadRunner(self._on_news)
        tiers = None if disk is None else self._make_tiers(disk, runner)
        self._service = Service(
            self._store,
            stack.enter_context(HostTransfer(region.memory)),
            address=self._endpoint.address,
            delay=_link(config),
            max_client_bytes=config.client_bytes,
            max_frame_bytes=config.max_frame_bytes,
            tiers=tiers,
            rings=self._make_rings(tiers),
        )
        stack.callback(self._drop_service)
        # Ends before the service does, which it tells its news.
        stack.enter_context(runner)

    def _open_disk(self, stack: contextlib.ExitStack) -> DiskTier | None:
        config = self._config
        if not config.disk_dir:
            return None
        disk = stack.enter_context(DiskTier(Path(config.disk_dir), config.disk_bytes))
        _LOG.info(
            "%s in %s for pages that leave memory, %s first",
            format_bytes(disk.num_bytes),
            config.disk_dir,
            config.eviction,
            extra={"disk_bytes": disk.num_bytes, "disk_dir": config.disk_dir},
        )
        return disk

    def _make_tiers(self, disk: DiskTier, runner: ThreadRunner) -> Tiers:
        return Tiers(
            disk,
            eviction=self._config.eviction,
            memory=self._region.memory,
            fd=self._region.fd,
            run=runner,
        )

    def _make_rings(self, tiers: Tiers | None) -> Rings | None:
        if not self._config.cuda_staging_bytes:
            return None
        return Rings(
            self._store,
            self._region.memory,
            staging_bytes=self._config.cuda_staging_bytes,
            fill=None if tiers is None else tiers.fill,
            load=self._load_cuda,
            notify=self._on_news,
        )

    def _on_news(self) -> None:
        """Called on the disk's thread, and on those of devices."""
        # A device's thread that hung may come back when there is nobody left.
        with contextlib.suppress(AttributeError):
            self._service.note_news()
        self._wake()

    def _stop_rings(self) -> None:
        for sender, reply in self._service.stop_rings(_STOP_RINGS_S):
            self._send(sender, reply)

    def _listen(self, stack: contextlib.ExitStack) -> None:
        endpoint, config = self._endpoint, self._config
        listener = stack.enter_context(
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        )
        listener.bind(os.fspath(endpoint.attach))
        os.chmod(endpoint.attach, 0o600)
        context = zmq.Context(io_threads=1)
        stack.callback(context.destroy, linger=_LINGER_MS)
        self._router = context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.SNDHWM, _MAX_QUEUED_REPLIES)
        self._router.setsockopt(zmq.RCVHWM, _MAX_QUEUED_REPLIES)
        # Unroutable and blocked replies are errors to be counted here, instead of being dropped
        # inside.
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # ROUTER_HANDOVER stays off. Without it libzmq (4.3.5) keeps 35 KiB for ever of a connection
        # that claims another's name; with it, now and then a descriptor, and there are fewer of
        # those. Names that it gives itself cannot be claimed.

        # The service refuses long frames with a reply; far longer ones end the connection unread.
        self._router.setsockopt(zmq.MAXMSGSIZE, 4 * config.max_frame_bytes)
        self._router.bind(endpoint.address)
        os.chmod(endpoint.control, 0o600)
        self._poller.register(self._router, zmq.POLLIN)
        # Attaching is the first thing a client does, so it opens last.
        listener.listen(config.max_clients)
        self._attachments = stack.enter_context(
            Attachments(listener, self._service, self._region, config)
        )
        self._poller.register(self._attachments.fileno(), zmq.POLLIN)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM drains and SIGINT stops the loop for the time of this context."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            del frame
            (self.drain if number == signal.SIGTERM else self.stop)(signal.Signals(number).name)

        # Python calls the handler only once the loop runs again. What makes it run, also if the
        # signal came just before it fell asleep, is the byte that the kernel's handler writes here.
        previous_fd = signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        previous = {
            number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_fd)

    def _wake(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self._wake_writer.send(b"\0")

    def _sleep_again(self) -> None:
        """Take what woke the loop up; the signal's handler has run by now."""
        with contextlib.suppress(BlockingIOError):
            while self._wake_reader.recv(64):
                pass

    def _look_after_parent(self) -> None:
        if self._parent is not None and self._parent.is_dead:
            self._lifecycle.end("its parent process has ended")

    def _should_stop(self) -> bool:
        self._look_after_parent()
        return self._lifecycle.is_over

    def _on_progress(self, num_ready: int, num_bytes: int) -> None:
        self._progress(num_ready, num_bytes)
        self._post_start(num_ready, num_bytes)

    def _post_start(self, num_ready: int, num_bytes: int) -> None:
        if self._board is not None:
            daemon = {
                "pid": os.getpid(),
                "address": self._endpoint.address,
                "state": self._lifecycle.state,
            }
            region = {"bytes": num_bytes, "ready_bytes": num_ready}
            self._board.post({"daemon": daemon, "region": region})

    def _follow_lifecycle(self) -> None:
        """Tell the service and the log when the daemon begins to drain; notice when it has."""
        lifecycle = self._lifecycle
        num_clients = len(self._store.clients)
        if self._service.state is not lifecycle.state:
            self._service.state = lifecycle.state
            self._next_notice = 0.0
            if num_clients:
                _LOG.info(
                    "%s: %s; %d client(s) may go on for %g s, a second SIGTERM ends at once",
                    lifecycle.state,
                    lifecycle.drain_reason,
                    num_clients,
                    self._config.drain_s,
                    extra={"clients": num_clients},
                )
        lifecycle.check(num_clients + self._service.num_leaving_rings)

    def _post_notice(self) -> None:
        """Let the metrics port know what there is, twice a second."""
        if self._board is None:
            return
        self._board.beat()
        now = time.monotonic()
        if now >= self._next_notice:
            self._next_notice = now + _NOTICE_INTERVAL_S
            self._board.post(self._service.stats())

    def _remove_directory(self) -> None:
        # Somebody else's file in it is no reason to fail at the very end.
        with contextlib.suppress(OSError):
            self._endpoint.control.parent.rmdir()

    def _drop_service(self) -> None:
        # Its transfer points into the region; the mapping can only go when nothing does.
        del self._service

    def _timeout_ms(self) -> int | None:
        """How long the loop may sleep: for ever, unless something has to be polled or is due."""
        now = time.monotonic()
        dues = [self._service.next_due(), self._lifecycle.drain_deadline]
        if self._board is not None:
            dues.append(self._next_notice)
        must_ask_for_parent = self._parent is not None and self._parent.fileno() is None
        if must_ask_for_parent or self._attachments.needs_polling:
            dues.append(now + self._config.watch_interval_s)
        first = min((due for due in dues if due is not None), default=None)
        # Rounded down: the last part of a millisecond is spent looking.
        return None if first is None else max(0, int((first - now) * 1000))

    def _serve_requests(self) -> None:
        for _ in range(_BURST):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # Anything but [sender, frame] is answered as the malformed request that it is.
            sender, frame = frames[0], frames[1] if len(frames) == 2 else b""
            reply = self._service.handle(sender, frame)
            if reply is not None:
                self._send(sender, reply)

    def _send(self, sender: bytes, reply: bytes) -> None:
        try:
            self._router.send_multipart([sender, reply], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # It left (its attach connection tells the rest) or does not read its replies.
            self._service.metrics.counters.replies_dropped += 1
            _LOG.debug("a reply found no reader: %s", error)


def _link(config: MemdConfig) -> Link | None:
    """The interconnect to imitate; None for none."""
    if not (config.link_gbps or config.link_latency_us):
        return None
    return Link(config.link_gbps, config.link_latency_us)


def serve(config: MemdConfig, *, progress: Progress = _no_progress) -> None:
    """Run a daemon in this process until a signal or its parent's end; print ``READY`` first.

    Args:
        config: Settings.
        progress: Called while the region is made.

    Raises:
        ConfigError: The address, the host's memory, its NUMA nodes or the metrics port do not allow
            a start.
    """
    raise_descriptor_limit()
    heap.keep_freed_memory()
    try:
        with Server(config, progress=progress) as server:
            # The one line on stdout: scripts and parents wait for it.
            os.write(1, f"READY {config.address}\n".encode())
            server.run()
    except InterruptedError as error:
        _LOG.info("stopped before it was ready: %s", error)
    except OSError as error:
        raise ConfigError(f"cannot serve {config.address}: {error}") from error


def _probes(port: int, board: Noticeboard) -> contextlib.AbstractContextManager[object]:
    # Only here: asyncio takes as long to import as everything else together.
    from memd.probes import Probes

    return Probes(port, board)


def _log_region(region: Region, *, is_locked: bool) -> None:
    made = region.pretouched
    if made is None:
        _LOG.info("%s of memory, to be taken as pages need it", format_bytes(region.memory_bytes))
        return
    _LOG.info(
        "%s ready after %.2f s: %.1f GiB/s by %s on %d thread(s)%s",
        format_bytes(region.num_bytes),
        made.seconds,
        made.gib_per_s,
        made.method,
        made.num_threads,
        ", locked" if is_locked else "",
        extra={
            "region_bytes": region.num_bytes,
            "pretouch_s": round(made.seconds, 3),
            "pretouch_gib_per_s": round(made.gib_per_s, 2),
        },
    )


def _log_placement(placed: dict[int, int], wanted: Sequence[Node]) -> None:
    """Say where the memory lies; the kernel goes elsewhere without a word when a node is full."""
    strayed = sorted(set(placed) - {node.node_id for node in wanted})
    by_node = ", ".join(f"node {node}: {format_bytes(count)}" for node, count in placed.items())
    _LOG.log(
        logging.WARNING if strayed else logging.INFO,
        "placed on %s%s",
        by_node or "nodes that the kernel does not name",
        "; the wanted nodes were full" if strayed else "",
        extra={"node_bytes": placed},
    )
