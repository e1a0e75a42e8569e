"""How a client becomes one: attach, say ``Hello``, map the extent. Blocks, within a deadline."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import mmap
import os
import time
from typing import TYPE_CHECKING

import numpy as np

from memd.channel import Channel, ZmqChannel, attach
from memd.cuda.errors import DeviceLost, RingRefused
from memd.endpoint import Endpoint
from memd.errors import MemdError, MemdTimeout, MemdUnavailable, PoolFull, ProtocolError
from memd.protocol import (
    PROTOCOL_VERSION,
    DeviceRing,
    ErrorCode,
    ErrorReply,
    Hello,
    HelloReply,
    KVLayout,
    decode_reply,
    encode,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from memd.cuda.ring import RingHandle

__all__ = ["Registration", "register"]

_MADV_POPULATE_WRITE = 23

# What a refused Hello means, but for the two sides not fitting each other.
_ERRORS: dict[ErrorCode, type[MemdError]] = {
    ErrorCode.POOL_FULL: PoolFull,
    ErrorCode.DRAINING: MemdUnavailable,
    ErrorCode.DEVICE_REFUSED: RingRefused,
    ErrorCode.DEVICE_LOST: DeviceLost,
}


@dataclasses.dataclass(frozen=True)
class Registration:
    """What a client holds of its daemon.

    Attributes:
        channel: Path to memd; whoever gets the registration closes it.
        hello: memd's answer to ``Hello``.
        extent: The mapped extent, uint8 [extent_bytes], writable; unmapped with its last view.
        memd_pid: memd's process id.
    """

    channel: Channel
    hello: HelloReply
    extent: npt.NDArray[np.uint8]
    memd_pid: int


def register(
    address: str,
    layout: KVLayout,
    *,
    num_pages: int,
    landing_rows: int,
    deadline_s: float,
    name: str,
    host_pages: int = 0,
    ring: RingHandle | None = None,
) -> Registration:
    """Register with the memd at ``address``; see ``MemdClient.connect``."""
    if num_pages < 1 or landing_rows < 0:
        raise ValueError(
            f"need num_pages >= 1 and landing_rows >= 0, got {num_pages} and {landing_rows}"
        )
    if not 0 <= host_pages <= num_pages:
        raise ValueError(f"host_pages must be 0 to num_pages ({num_pages}), got {host_pages}")
    if ring is not None and ring.num_bytes != landing_rows * layout.row_bytes:
        raise ValueError(
            f"a ring of {landing_rows} rows has {landing_rows * layout.row_bytes} bytes, got "
            f"{ring.num_bytes}"
        )
    endpoint = Endpoint.parse(address)
    deadline = time.monotonic() + deadline_s
    connection, welcome, region_fd = attach(endpoint, deadline_s)
    try:
        channel = ZmqChannel(endpoint, connection)
    except BaseException:
        connection.close()
        os.close(region_fd)
        raise
    request = Hello(
        request_id=0,
        version=PROTOCOL_VERSION,
        session=welcome.session,
        pid=os.getpid(),
        layout=layout,
        num_pages=num_pages,
        landing_bytes=0 if ring is not None else landing_rows * layout.row_bytes,
        name=name,
        host_pages=host_pages,
        ring=None if ring is None else _as_message(ring),
    )
    try:
        hello = _say_hello(channel, request, deadline=deadline)
        extent = _map_extent(
            region_fd, welcome.region_bytes, hello, layout, num_pages, landing_rows
        )
    except BaseException:
        channel.close()
        raise
    finally:
        # The mapping keeps the memory; the descriptor has done its work.
        os.close(region_fd)
    return Registration(channel, hello, extent, welcome.pid)


def _say_hello(channel: Channel, hello: Hello, *, deadline: float) -> HelloReply:
    """Send ``Hello`` and wait for its answer."""
    channel.send(encode(hello))
    while (frame := channel.receive()) is None:
        if channel.peer_has_closed():
            raise MemdUnavailable("memd ended, or turned this process away, before it said Hello")
        left = deadline - time.monotonic()
        if left <= 0:
            raise MemdTimeout("memd did not answer Hello in time")
        channel.wait(min(left, 0.1))
    reply = decode_reply(frame)
    if isinstance(reply, ErrorReply):
        raise _ERRORS.get(reply.code, ProtocolError)(reply.message)
    if not isinstance(reply, HelloReply):
        raise ProtocolError(f"memd answered Hello with {type(reply).__name__}")
    data_path = "host" if hello.ring is None else "cuda_ipc"
    if reply.data_path != data_path:
        raise ProtocolError(
            f"memd has the data path {reply.data_path!r} where this client has {data_path!r}; run "
            "the same release on both sides, or connect without a ring"
        )
    expected = (PROTOCOL_VERSION, hello.layout.row_bytes, hello.layout.page_bytes)
    if (reply.version, reply.row_bytes, reply.page_bytes) != expected:
        raise ProtocolError(
            f"memd computes (version, row_bytes, page_bytes) as "
            f"{(reply.version, reply.row_bytes, reply.page_bytes)}, this client as {expected}"
        )
    return reply


def _as_message(ring: RingHandle) -> DeviceRing:
    return DeviceRing(
        handle=ring.handle,
        base_offset=ring.base_offset,
        num_bytes=ring.num_bytes,
        device_uuid=ring.device_uuid,
    )


def _map_extent(
    region_fd: int,
    region_bytes: int,
    hello: HelloReply,
    layout: KVLayout,
    num_pages: int,
    landing_rows: int,
) -> npt.NDArray[np.uint8]:
    """Map the extent that memd named, after checking that it is one.

    Raises:
        ProtocolError: The numbers do not describe the extent that was asked for.
    """
    size = os.fstat(region_fd).st_size
    # A ring on a device is none of the extent's.
    ring_bytes = hello.landing_rows * layout.row_bytes if hello.data_path == "host" else 0
    fits = (
        size == region_bytes
        and hello.extent_offset % mmap.ALLOCATIONGRANULARITY == 0
        and 0 <= hello.extent_offset <= hello.extent_offset + hello.extent_bytes <= size
        and num_pages * layout.page_bytes <= hello.landing_offset
        and hello.landing_rows == landing_rows
        and hello.landing_offset + ring_bytes <= hello.extent_bytes
        and 0 <= hello.host_pages <= num_pages
        and hello.row_index_bytes == layout.row_index_bytes(num_pages)
    )
    if not fits:
        raise ProtocolError(
            f"memd described an extent that cannot be: {hello}, region {size} bytes"
        )
    # A region that somebody could make shorter would end this process by SIGBUS one day.
    seals = fcntl.fcntl(region_fd, fcntl.F_GET_SEALS)
    if not seals & fcntl.F_SEAL_SHRINK:
        raise ProtocolError("memd's region is not sealed against shrinking")
    # Populated now, so that the decode loop never waits for a page fault. Where pages come and go
    # with a disk that would give memory to all of them.
    is_whole = hello.host_pages in (0, num_pages)
    mapping = mmap.mmap(
        region_fd,
        hello.extent_bytes,
        flags=mmap.MAP_SHARED | (mmap.MAP_POPULATE if is_whole else 0),
        offset=hello.extent_offset,
    )
    if not is_whole:
        # Before Linux 5.14 its first use is slower, and that is all.
        with contextlib.suppress(OSError):
            mapping.madvise(_MADV_POPULATE_WRITE, hello.landing_offset)
    # A forked child (a tokenizer, a compiler) must not keep the memory when the engine is gone.
    mapping.madvise(mmap.MADV_DONTFORK)
    return np.frombuffer(mapping, dtype=np.uint8)
