"""Command line of memd: ``memd serve`` and ``memd status``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from memd.channel import ask_once
from memd.config import (
    MemdConfig,
    default_address,
    format_bytes,
    parse_bytes,
    runtime_directory,
)
from memd.endpoint import Endpoint
from memd.errors import ConfigError, MemdError, MemdUnavailable
from memd.protocol import Stats, StatsReply, decode_reply, encode
from memd.server import serve

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_EXIT_REFUSED = 1
_EXIT_UNAVAILABLE = 3

_DESCRIPTION = """\
memd holds KV pages in shared memory, in a process of its own.

An engine with `--kv-policy heterocache` starts one by itself, so most people never type these
commands. Run one by hand to keep it apart from the engine (a sidecar), or to look into a running
one.
"""

_SERVE_EPILOG = """\
examples:
  memd serve --bytes 4GiB
      a stand-alone daemon at this user's default address; Ctrl-C ends it
  memd serve --bytes 64GiB --address ipc:///run/memd/control.sock
      the directory must be yours alone (0700); it is made if missing

The memory is checked for, allocated and touched before the line `READY ipc://...` appears on
stdout, so a region that does not fit is refused at once. It has no name in /dev/shm: nothing is
left however memd ends.
"""

_STATUS_EPILOG = """\
examples:
  memd status                       every daemon of this user, those started by engines included
  memd status --address ipc://...   one daemon
  memd status --json | jq .         for programs; the keys are documented in docs/memd.md
  memd status --wait 30             wait up to 30 s for a daemon to come up

exit status: 0 at least one daemon answered, 3 none did
"""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("memd", description=_DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve_parser = commands.add_parser(
        "serve",
        help="hold a region of shared memory and serve clients",
        epilog=_SERVE_EPILOG,
        formatter_class=raw,
    )
    serve_parser.add_argument(
        "--bytes",
        required=True,
        type=parse_bytes,
        metavar="N[MiB|GiB]",
        help="size of the region, for example 4GiB; all of it is allocated at once",
    )
    serve_parser.add_argument(
        "--address",
        default=default_address(),
        metavar="ipc://PATH",
        help="where to serve (default: %(default)s)",
    )
    serve_parser.add_argument(
        "--parent-pid",
        type=int,
        metavar="PID",
        help="end when this process ends, however it ends",
    )
    serve_parser.add_argument(
        "--max-clients",
        type=int,
        default=MemdConfig.max_clients,
        metavar="N",
        help="processes that may be attached at a time (default: %(default)s)",
    )
    serve_parser.add_argument(
        "--log-level",
        default="info",
        choices=("debug", "info", "warning", "error"),
        help="how much to say on stderr (default: %(default)s)",
    )

    status_parser = commands.add_parser(
        "status",
        help="show a running daemon: memory, clients, counters",
        epilog=_STATUS_EPILOG,
        formatter_class=raw,
    )
    status_parser.add_argument(
        "--address", metavar="ipc://PATH", help="which daemon (default: all of this user)"
    )
    status_parser.add_argument(
        "--json", action="store_true", help="print JSON, a list with one map each"
    )
    status_parser.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds to wait for a daemon to come up (default: do not wait)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    try:
        arguments = _parser().parse_args(argv)
        if arguments.command == "serve":
            return _serve(arguments)
        return _status(arguments)
    except ConfigError as error:
        sys.stderr.write(f"memd: {error}\n")
        return _EXIT_REFUSED


def _serve(arguments: argparse.Namespace) -> int:
    logging.basicConfig(
        level=arguments.log_level.upper(),
        format="%(asctime)s memd[%(process)d] %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    serve(
        MemdConfig(
            address=arguments.address,
            region_bytes=arguments.bytes,
            parent_pid=arguments.parent_pid,
            max_clients=arguments.max_clients,
        )
    )
    return 0


def _status(arguments: argparse.Namespace) -> int:
    deadline = time.monotonic() + arguments.wait
    while not (answers := _ask_all(arguments.address)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if not answers:
        where = arguments.address or f"any address under {runtime_directory()}"
        sys.stderr.write(f"memd: nobody serves {where}; start one with `memd serve --bytes 4GiB`\n")
        return _EXIT_UNAVAILABLE
    if arguments.json:
        sys.stdout.write(json.dumps(answers, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_describe(stats) for stats in answers))
    return 0


def _ask_all(address: str | None) -> list[dict[str, Any]]:
    """Stats of one daemon, or of all that this user runs; those that do not answer are left out."""
    if address is not None:
        endpoints = [Endpoint.parse(address)]
    else:
        found = {*runtime_directory().glob("memd-*/control.sock")}
        endpoints = [Endpoint(path) for path in sorted(found)]
    answers = []
    for endpoint in endpoints:
        try:
            reply = decode_reply(ask_once(endpoint, encode(Stats(request_id=0)), timeout_s=2.0))
        except MemdUnavailable:
            continue
        if isinstance(reply, StatsReply):
            answers.append(reply.stats)
    return answers


def _describe(stats: dict[str, Any]) -> str:
    """Stats for people."""
    daemon, region, counters = stats["daemon"], stats["region"], stats["counters"]
    used = region["bytes"] - region["free_bytes"]
    lines = [
        f"memd {daemon['pid']} at {daemon['address']}, up {daemon['uptime_s']:.0f} s, "
        f"integrity {stats['integrity']}",
        f"  region    {format_bytes(used)} of {format_bytes(region['bytes'])} given to clients, "
        f"{format_bytes(region['dirty_bytes'])} to be zeroed",
        f"  fetches   {counters['fetches']}, {counters['rows_fetched']} rows, "
        f"{format_bytes(counters['bytes_fetched'])}"
        + (
            f" at {counters['bytes_fetched'] / counters['gather_ns']:.2f} GB/s while gathering"
            if counters["gather_ns"]
            else ""
        ),
        f"  clients   {len(stats['clients'])} now, {counters['clients_registered']} in all, "
        f"{counters['clients_reclaimed']} reclaimed after their end",
        f"  refused   {sum(stats['errors'].values())} requests, "
        f"{counters['peers_refused']} processes",
    ]
    for client in stats["clients"]:
        held = client["pages_reserved"] + client["pages_sealed"]
        lines.append(
            f"  client {client['client_id']}  pid {client['pid']}  {client['name'] or '-'}: "
            f"{held} of {client['pages']} pages ({format_bytes(held * client['page_bytes'])}), "
            f"{client['landing_rows']} landing rows"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MemdError as error:
        sys.stderr.write(f"memd: {error}\n")
        sys.exit(_EXIT_REFUSED)
