"""The one thread that calls the CUDA driver for one device.

The control thread posts commands and takes outcomes; neither side waits for the other. A command is
handled to its end before the next one, in the order of posting, so the driver sees what one thread
does, and a context needs no lock. Copies that were sent are looked after between commands.

The context is made for the first ring that is opened and ends with the last one that is closed::

    Open    init, find device, retain context, page-lock staging, map ring      Opened | Refused
    Send    one asynchronous copy, one event                                    Landed, later
    Close   wait for this ring's copies (by asking), unmap                      Closed
            no ring left: unlock staging, release context                       Idle
    any     the driver fails where it must not                                  Lost

After `Lost` the worker does one more thing, which is to release the context: that ends the
mappings and every copy, as far as the driver still does anything at all. It may hang in that, as in
any other call, and then it is only itself that hangs, though the device memory that it maps stays
mapped until memd ends. What it does at the moment it leaves in ``errand``, for the control thread
to judge whether that takes too long.

Not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from memd.cuda.commands import (
    Close,
    Closed,
    Idle,
    Landed,
    Lost,
    Open,
    Opened,
    Refused,
    Send,
    Stop,
)
from memd.cuda.context import PrimaryContext, device_name, find_device
from memd.cuda.errors import CudaError, RingRefused
from memd.cuda.registration import PageLock
from memd.cuda.ring import DeviceRing
from memd.errors import MemdError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from memd.cuda.commands import Command, Outcome
    from memd.cuda.driver import Driver
    from memd.cuda.ring import RingHandle

__all__ = ["Errand", "Timeouts", "Worker"]

_LOG = logging.getLogger(__name__)

# Between two looks at copies under way; some three times what a copy of 1 MiB takes.
_POLL_INTERVAL_S = 100e-6


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """What is too long.

    Attributes:
        start_s: The driver's start together with a context, and each page-locked chunk; seconds.
            Hosts with many devices and no persistence mode take tens of them.
        call_s: Everything else that is one command, in seconds.
        copy_s: Time without a landed copy while copies to a ring are under way, in seconds.
    """

    start_s: float = 60.0
    call_s: float = 10.0
    copy_s: float = 10.0

    def __post_init__(self) -> None:
        """Check that there are bounds."""
        if min(self.start_s, self.call_s, self.copy_s) <= 0:
            raise ValueError(f"timeouts must be positive, got {self}")


@dataclasses.dataclass(frozen=True, eq=False)
class Errand:
    """Something that the worker does; each time a new object.

    Attributes:
        bound_s: Longer than this, and the driver hangs; seconds.
    """

    bound_s: float


@dataclasses.dataclass
class _Running:
    """What exists from the first ring to the last."""

    driver: Driver
    device: int
    resources: contextlib.ExitStack


class Worker:
    """Calls the driver for one device. ``run`` is its thread's body; tests call ``step``.

    Args:
        device_uuid: The device.
        staging: Memory to be page-locked and copied from, uint8 [num_bytes]; kept alive by this.
        load: Gives the driver.
        timeouts: Bounds of errands.
        chunk_bytes: Bytes to page-lock at a time.
        notify: Called from the worker's thread after each outcome; must not block.

    Attributes:
        name: Of the device, for people.
        errand: What it does now; None while it does nothing.
        is_abandoned: Set by the control thread when it gives the device up: no new copy begins.
    """

    def __init__(
        self,
        device_uuid: bytes,
        staging: npt.NDArray[np.uint8],
        *,
        load: Callable[[], Driver],
        timeouts: Timeouts,
        chunk_bytes: int,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = device_name(device_uuid)
        self.errand: Errand | None = None
        self.is_abandoned = False
        self._uuid = device_uuid
        self._staging = staging
        self._staging_address = int(staging.ctypes.data)
        self._load = load
        self._timeouts = timeouts
        self._chunk_bytes = chunk_bytes
        self._notify = notify
        # Of the commands; never held while the driver is called.
        self._lock = threading.Lock()
        self._commands: deque[Command] = deque()
        self._wakeup = threading.Event()
        self._outcomes: deque[Outcome] = deque()
        # From here on touched by the worker's thread alone.
        self._is_over = False
        self._running: _Running | None = None
        self._rings: dict[int, DeviceRing] = {}
        self._closing: set[int] = set()

    def post(self, command: Command) -> None:
        """Add a command; from the control thread."""
        with self._lock:
            self._commands.append(command)
        self._wakeup.set()

    def withdraw(self, client_id: int) -> list[int]:
        """Take back a client's copies that were not begun; from the control thread.

        Returns:
            Their ids: no outcome will name them.
        """
        taken: list[int] = []
        kept: deque[Command] = deque()
        with self._lock:
            for command in self._commands:
                if isinstance(command, Send) and command.client_id == client_id:
                    taken.append(command.copy_id)
                else:
                    kept.append(command)
            self._commands = kept
        return taken

    def take_outcomes(self) -> list[Outcome]:
        """What has happened since the last call, in order; from the control thread."""
        return [self._outcomes.popleft() for _ in range(len(self._outcomes))]

    def run(self) -> None:
        """Work until told to stop, or until the device is lost."""
        while not self._is_over:
            # Before looking, so that what is posted meanwhile is not slept over.
            self._wakeup.clear()
            self.step()
            if not self._commands and not self._is_over:
                is_busy = any(ring.num_in_flight for ring in self._rings.values())
                self._wakeup.wait(_POLL_INTERVAL_S if is_busy else None)

    def step(self) -> None:
        """Handle one command, if there is one, then look after the copies under way."""
        if self._is_over:
            return
        self.errand = Errand(self._timeouts.call_s)
        try:
            command = self._next_command()
            if command is not None:
                self._handle(command)
            if not self.is_abandoned:
                self._look_after_rings()
        except MemdError as error:
            self._lose(str(error))
        except Exception as error:  # whatever it is, the control thread must hear of it
            _LOG.exception("device %s: the worker failed", self.name)
            self._lose(f"memd failed: {error!r}")
        if self.is_abandoned and not self._is_over:
            self._lose("it was given up")
        self.errand = None

    def _next_command(self) -> Command | None:
        with self._lock:
            return self._commands.popleft() if self._commands and not self.is_abandoned else None

    def _tell(self, outcome: Outcome) -> None:
        # At once: what this step does next may take long, or hang.
        self._outcomes.append(outcome)
        self._notify()

    def _handle(self, command: Command) -> None:
        match command:
            case Open(client_id, handle):
                self._open(client_id, handle)
            case Send():
                self._rings[command.client_id].send(
                    command.copy_id,
                    source=self._staging_address + command.staging_offset,
                    offset=command.ring_offset,
                    num_bytes=command.num_bytes,
                )
            case Close(client_id) if client_id in self._rings:
                self._closing.add(client_id)
            case Close(client_id):
                self._tell(Closed(client_id))
                if self._running is None:
                    self._tell(Idle())
            case Stop():
                assert self._running is None, "a worker is stopped when nothing is open"
                self._is_over = True

    def _open(self, client_id: int, handle: RingHandle) -> None:
        try:
            if self._running is None:
                self._running = self._start()
        except MemdError as error:
            self._tell(Refused(client_id, str(error)))
            self._tell(Idle())
            return
        try:
            self._rings[client_id] = DeviceRing(self._running.driver, handle)
            self._tell(Opened(client_id))
        except RingRefused as error:
            self._tell(Refused(client_id, str(error)))

    def _start(self) -> _Running:
        """Make the context and lock the staging memory; leaves nothing behind when it fails."""
        self.errand = Errand(self._timeouts.start_s)
        begin = time.monotonic()
        driver = self._load()
        device = find_device(driver, self._uuid)
        with contextlib.ExitStack() as stack:
            stack.enter_context(PrimaryContext(driver, device))
            locked = stack.enter_context(
                PageLock(
                    driver,
                    self._staging,
                    device=device,
                    chunk_bytes=self._chunk_bytes,
                    progress=self._on_locked,
                )
            )
            _LOG.info(
                "device %s: context and %d page-locked bytes (%.3f s) after %.3f s",
                self.name,
                locked.num_bytes,
                locked.seconds,
                time.monotonic() - begin,
            )
            return _Running(driver, device, stack.pop_all())

    def _on_locked(self, num_locked: int, num_bytes: int) -> None:
        del num_locked, num_bytes
        self.errand = Errand(self._timeouts.start_s)

    def _look_after_rings(self) -> None:
        for client_id, ring in list(self._rings.items()):
            for copy_id in ring.landed():
                self._tell(Landed(copy_id))
            if client_id in self._closing and not ring.num_in_flight:
                ring.close()
                del self._rings[client_id]
                self._closing.remove(client_id)
                self._tell(Closed(client_id))
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        if self._running is None or self._rings:
            return
        running, self._running = self._running, None
        running.resources.close()
        _LOG.info("device %s: nobody copies to it any more; context released", self.name)
        self._tell(Idle())

    def _lose(self, reason: str) -> None:
        self._is_over = True
        self._tell(Lost(reason))
        running, self._running = self._running, None
        self._rings.clear()
        if running is None:
            return
        # Not ring by ring: unmapping under a copy is undefined, ending the context is not.
        running.resources.pop_all()
        try:
            running.driver.release_context(running.device)
        except CudaError as error:
            _LOG.warning("device %s: its context may be left behind: %s", self.name, error)
