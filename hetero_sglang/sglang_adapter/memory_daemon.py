"""Connection to memd: a daemon of the server's own, or a running one.

Where the pools are on a GPU, memd's memory is page-locked in this process, which issues the copies.
Not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from hetero_sglang.errors import ConfigError
from memd.client import MemdClient, MemdProcess, spawn_memd
from memd.cuda import PageLock, load_driver
from memd.cuda.registration import CHUNK_BYTES
from memd.errors import MemdError
from memd.protocol import KVLayout

if TYPE_CHECKING:
    from hetero_sglang.cache.sizing import PoolShape
    from hetero_sglang.sglang_adapter.setup import Setup
    from memd.cuda import Driver

logger = logging.getLogger(__name__)

_DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_SLACK_BYTES = 2**20


@dataclass
class MemoryDaemon:
    """A connected client and, for a daemon of our own, its process.

    Attributes:
        client: Connected client.
        process: The child; None when the daemon was there before.
        address: Where it listens.
        locks: Page locks on its memory; none where the pools are CPU tensors.
    """

    client: MemdClient
    process: MemdProcess | None
    address: str
    locks: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def close(self) -> None:
        """Leaves the daemon; ends it when it is ours."""
        # Locked memory is mapped memory, so this comes first.
        self.locks.close()
        self.client.close()
        if self.process is not None:
            self.process.close()


def connect_memory_daemon(setup: Setup, shape: PoolShape, device: torch.device) -> MemoryDaemon:
    """Starts or joins memd as the settings say.

    Args:
        setup: Settings of this process.
        shape: Sizes of the device areas; names how many token ids there are.
        device: Where these lie; for a GPU, memd's memory is page-locked.

    Raises:
        ConfigError: memd cannot be started or reached, or has not enough room, or its memory cannot
            be page-locked.
    """
    config = setup.config
    layout = KVLayout(
        num_heads=setup.tables.num_compressed,
        head_dim=setup.head_dim,
        dtype=_DTYPE_NAMES[setup.dtype],
        page_tokens=config.page_tokens,
    )
    page_bytes = layout.num_heads * layout.page_tokens * shape.row_bytes
    num_pages = -(-shape.num_slots // config.page_tokens)
    landing_bytes = config.landing_rows * shape.row_bytes
    if config.memd_bytes:
        num_pages = min(num_pages, (config.memd_bytes - landing_bytes) // page_bytes)
        if num_pages < 1:
            raise ConfigError(
                f"--kv-policy-memd-bytes {config.memd_bytes} holds no page: one page is "
                f"{page_bytes} bytes and the landing ring {landing_bytes}; raise it to at least "
                f"{page_bytes + landing_bytes}"
            )
    process: MemdProcess | None = None
    try:
        if config.memd_address == "auto":
            total = num_pages * page_bytes + landing_bytes + _SLACK_BYTES
            process = spawn_memd(num_bytes=total)
            address = process.address
        else:
            address = config.memd_address
        client = MemdClient.connect(
            address, layout, num_pages=num_pages, landing_rows=config.landing_rows
        )
    except MemdError as error:
        if process is not None:
            process.close()
        raise ConfigError(
            f"--kv-policy-memd {config.memd_address}: {error}; start one with `memd serve`, give "
            "it more memory (--kv-policy-memd-bytes), or use --kv-policy-retrieval off"
        ) from error
    daemon = MemoryDaemon(client=client, process=process, address=address)
    if device.type == "cuda":
        try:
            # A context of the device becomes current in this thread, as locking needs it.
            torch.cuda.synchronize(device)
            driver = load_driver()
            driver.init()
            index = torch.cuda.current_device() if device.index is None else device.index
            lock_memory(daemon.client, driver, driver.device(index), daemon.locks)
        except MemdError as error:
            daemon.close()
            raise ConfigError(
                f"memd's memory cannot be page-locked for {device}: {error}; raise the limit on "
                "locked memory (ulimit -l), ask for less (--kv-policy-memd-bytes), or use "
                "--kv-policy-retrieval off"
            ) from error
    return daemon


def lock_memory(
    client: MemdClient, driver: Driver, device: int, locks: contextlib.ExitStack
) -> None:
    """Page-locks pages and landing ring, so that the device copies by itself.

    Args:
        client: Connected client.
        driver: Initialised; a context of the device is current, as it has to be at the end.
        device: The device's handle.
        locks: Gets the locks, which end with it.

    Raises:
        CudaError: It could not be locked; nothing that was locked before is undone here.
        ConfigError: The landing ring is longer than what is locked in one piece.
    """
    if client.landing.nbytes > CHUNK_BYTES:
        raise ConfigError(
            f"a landing ring for a GPU must not be longer than {CHUNK_BYTES} bytes, got "
            f"{client.landing.nbytes}"
        )
    locks.enter_context(client.page_lock(driver, device=device))
    pages = client.pages.reshape(-1)
    # A copy must not cross from one locked piece into the next, and copies are of whole pages.
    unit = math.lcm(client.layout.page_bytes, mmap.PAGESIZE)
    chunk_bytes = unit * max(1, CHUNK_BYTES // unit)
    lock = locks.enter_context(PageLock(driver, pages, device=device, chunk_bytes=chunk_bytes))
    logger.info("memd: %.1f GiB page-locked in %.1f s", lock.num_bytes / 2**30, lock.seconds)
