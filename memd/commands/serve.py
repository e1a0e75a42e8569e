"""``memd serve``: hold a region of shared memory and serve clients."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TYPE_CHECKING, Any

from memd.commands.command import EXIT_OK, EXIT_REFUSED, Command
from memd.config import MemdConfig, default_address
from memd.errors import MemdError
from memd.logs import LOG_FORMATS, LOG_LEVELS, configure_logs
from memd.sizes import parse_bytes
from memd.tiers.eviction import POLICY_NAMES

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

__all__ = ["SERVE"]

_LOG = logging.getLogger(__name__)

_EPILOG = """\
examples:
  memd serve --bytes 4GiB
      a stand-alone daemon at this user's default address; Ctrl-C ends it
  memd serve --bytes 64GiB --address ipc:///run/memd/control.sock
      the directory must be yours alone (0700); it is made if missing
  memd serve --bytes 64GiB --disk-dir /mnt/nvme --disk-bytes 512GiB
      pages that clients have frozen and do not read go to disk and come back (docs/memd.md)
  memd serve --bytes 64GiB --lock --metrics-port 9400 --log-format json
      never swapped, watched by Prometheus, logged for machines (docs/deploy/memd.service)

start:
  The memory is checked for, allocated and touched before the line `READY ipc://...` appears on
  stdout, so a region that does not fit is refused at once, with the size that would.
  It has no name in /dev/shm: nothing is left however memd ends.
stop:
  SIGTERM    takes no new clients, goes on for those that are there until they leave or --drain-s
             is over; a second one ends at once
  SIGINT     (Ctrl-C) ends at once
  Status 0 in either case. Clients keep the memory that they have mapped, and fetch no more.
"""


def _add_size(group: argparse._ArgumentGroup, flag: str, **options: Any) -> None:
    """Add an option whose value is a size, written the one way that memd reads."""
    group.add_argument(flag, type=parse_bytes, metavar="N[MiB|GiB]", **options)


def _add_options(parser: argparse.ArgumentParser) -> None:
    memory = parser.add_argument_group("memory")
    _add_size(
        memory,
        "--bytes",
        required=True,
        help="size of the region, for example 4GiB; all of it is allocated at once",
    )
    memory.add_argument(
        "--numa",
        default=MemdConfig.numa,
        metavar="POLICY",
        help="where the memory goes on a host with several NUMA nodes: `interleave` spreads it "
        "over all of them, `local` takes the node that memd runs on, `0,2-3` names nodes "
        "(default: %(default)s)",
    )
    memory.add_argument(
        "--lock",
        action="store_true",
        help="keep the region from being swapped out; needs RLIMIT_MEMLOCK of its size",
    )
    clients = parser.add_argument_group("clients")
    clients.add_argument(
        "--address",
        default=default_address(),
        metavar="ipc://PATH",
        help="where to serve (default: %(default)s)",
    )
    clients.add_argument(
        "--max-clients",
        type=int,
        default=MemdConfig.max_clients,
        metavar="N",
        help="processes that may be attached at a time (default: %(default)s)",
    )
    _add_size(
        clients,
        "--client-bytes",
        default=MemdConfig.client_bytes,
        help="most of the region that one client may have (default: all of it)",
    )
    disk = parser.add_argument_group(
        "disk",
        "Clients that say so may have more pages than memory: pages that they do not write go to "
        "disk and come back when they are read. Memory is then taken as pages need it, not at "
        "the start.",
    )
    disk.add_argument(
        "--disk-dir",
        default=MemdConfig.disk_dir,
        metavar="DIR",
        help="where a file without a name is made for them, best on a local NVMe (default: none)",
    )
    _add_size(
        disk,
        "--disk-bytes",
        default=MemdConfig.disk_bytes,
        help="its size, all of it taken at the start, for example 256GiB",
    )
    disk.add_argument(
        "--eviction",
        default=MemdConfig.eviction,
        choices=POLICY_NAMES,
        help="which pages leave first: `depth` those deep in a prompt, which fewer prompts share, "
        "and of these the least recently used; `lru` the least recently used; `lfu` the least "
        "often used (default: %(default)s)",
    )
    cuda = parser.add_argument_group(
        "cuda",
        "Clients with a GPU may have fetched rows copied into its memory. No CUDA driver is loaded "
        "before one of them asks. Not yet run on a GPU (docs/memd.md).",
    )
    _add_size(
        cuda,
        "--cuda-staging-bytes",
        default=MemdConfig.cuda_staging_bytes,
        help="page-locked memory for each GPU that is copied to, taken out of --bytes while it "
        "is, at least the longest landing ring, for example 256MiB (default: copy to none)",
    )
    link = parser.add_argument_group(
        "link",
        "Imitates a slower interconnect, for studies: rows are copied as always, and a "
        "fetch is answered when they would have arrived over this one. All clients share it.",
    )
    link.add_argument(
        "--link-gbps",
        type=float,
        default=MemdConfig.link_gbps,
        metavar="N",
        help="its rate in gigabits a second, for example 126 for PCIe 3.0 x16; 0: no limit "
        "(default: %(default)g)",
    )
    link.add_argument(
        "--link-latency-us",
        type=float,
        default=MemdConfig.link_latency_us,
        metavar="N",
        help="time that a fetch takes beside its bytes, in microseconds (default: %(default)g)",
    )
    ending = parser.add_argument_group("ending")
    ending.add_argument(
        "--drain-s",
        type=float,
        default=MemdConfig.drain_s,
        metavar="S",
        help="seconds that SIGTERM gives clients to leave; 0 ends at once (default: %(default)g)",
    )
    ending.add_argument(
        "--parent-pid",
        type=int,
        metavar="PID",
        help="end when this process ends, however it ends",
    )
    watching = parser.add_argument_group("watching")
    watching.add_argument(
        "--metrics-port",
        type=int,
        default=MemdConfig.metrics_port,
        metavar="N",
        help="serve /metrics, /healthz and /readyz on 127.0.0.1:N; 0 does not (default: "
        "%(default)s)",
    )
    watching.add_argument(
        "--log-level",
        default=MemdConfig.log_level,
        choices=LOG_LEVELS,
        help="how much to say on stderr (default: %(default)s)",
    )
    watching.add_argument(
        "--log-format",
        default=MemdConfig.log_format,
        choices=LOG_FORMATS,
        help="lines for people, or one JSON object a line (default: %(default)s)",
    )


def _run(arguments: argparse.Namespace) -> int:
    config = MemdConfig(
        address=arguments.address,
        region_bytes=arguments.bytes,
        numa=arguments.numa,
        lock=arguments.lock,
        parent_pid=arguments.parent_pid,
        max_clients=arguments.max_clients,
        client_bytes=arguments.client_bytes,
        drain_s=arguments.drain_s,
        metrics_port=arguments.metrics_port,
        disk_dir=arguments.disk_dir,
        disk_bytes=arguments.disk_bytes,
        eviction=arguments.eviction,
        cuda_staging_bytes=arguments.cuda_staging_bytes,
        link_gbps=arguments.link_gbps,
        link_latency_us=arguments.link_latency_us,
        log_level=arguments.log_level,
        log_format=arguments.log_format,
    )
    configure_logs(config.log_level, config.log_format)
    from memd.server import serve

    try:
        with _shown_progress() as progress:
            serve(config, progress=progress)
    except MemdError as error:
        if config.log_format == "text":
            raise
        # A collector expects JSON of every line, the last one most of all.
        _LOG.error("%s", error)
        return EXIT_REFUSED
    return EXIT_OK


@contextlib.contextmanager
def _shown_progress() -> Iterator[Callable[[int, int], None]]:
    """What to call as the region is made: moves a bar on a terminal, does nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda num_ready, num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("allocating"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=None)

    def show(num_ready: int, num_bytes: int) -> None:
        bar.update(task, completed=num_ready, total=num_bytes)
        if num_ready < num_bytes:
            bar.start()
        else:
            bar.stop()

    try:
        yield show
    finally:
        bar.stop()


SERVE = Command(
    name="serve",
    summary="hold a region of shared memory and serve clients",
    epilog=_EPILOG,
    add_options=_add_options,
    run=_run,
)
