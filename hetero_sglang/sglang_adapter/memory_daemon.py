"""Connection to memd: a daemon of the server's own, or a running one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hetero_sglang.errors import ConfigError
from memd.client import MemdClient, MemdProcess, spawn_memd
from memd.errors import MemdError
from memd.protocol import KVLayout

if TYPE_CHECKING:
    from hetero_sglang.cache.sizing import PoolShape
    from hetero_sglang.sglang_adapter.setup import Setup

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
    """

    client: MemdClient
    process: MemdProcess | None
    address: str

    def close(self) -> None:
        """Leaves the daemon; ends it when it is ours."""
        self.client.close()
        if self.process is not None:
            self.process.close()


def connect_memory_daemon(setup: Setup, shape: PoolShape) -> MemoryDaemon:
    """Starts or joins memd as the settings say.

    Args:
        setup: Settings of this process.
        shape: Sizes of the device areas; names how many token ids there are.

    Raises:
        ConfigError: memd cannot be started or reached, or has not enough room.
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
    return MemoryDaemon(client=client, process=process, address=address)
